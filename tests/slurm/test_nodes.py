"""Two nodes on a real Slurm: preempted by a higher-priority job, no step lost, weights equal to the bit.

Each cell is a way of training with LoRA, on two ranks a node, or of everything, on one. By default: the two ways in
which ZeRO divides a model among ranks. DDP is in `test_runs.py`; each stage, on one machine, in `test_many_ranks.py`
and `test_deepspeed.py`. `OUTLAST_NODES_CELLS` names others (`zero3-lora`, or several, with commas), or is `all`.
"""

import os
from collections.abc import Callable, Iterator

import pytest

from ..conftest import Command, RunProbe, wait_for
from .cluster import Cluster

Start = Callable[..., Command]
Probe = Callable[[str], RunProbe]

EVERY = [f"{kind}-{peft}" for kind in ("ddp", "zero1", "zero2", "zero3") for peft in ("lora", "none")]
DEFAULT = "zero2-lora,zero3-none"
TINY = [
    "job=sft",
    "model.vocab_size=300",
    "model.hidden_size=16",
    "model.layers=1",
    "data.max_pairs=40",
    "data.eval_fraction=0.2",
    "parallel.cpus_per_rank=1",
    "checkpoint.every=1000",
    "trainer.max_length=64",
    "trainer.gradient_accumulation_steps=2",
    "trainer.per_device_train_batch_size=1",
    "trainer.eval_strategy=no",
    "trainer.load_best_model_at_end=false",
    "trainer.learning_rate=0.02",
    "trainer.max_steps=60",
]


@pytest.fixture
def cluster(devcluster: Cluster) -> Iterator[Cluster]:
    """The cluster, with no job left on it afterwards."""
    yield devcluster
    devcluster.cancel_all()


@pytest.mark.parametrize("cell", EVERY)
def test_preempted_on_two_nodes_it_equals_the_run_left_alone(
    cell: str, outlast: Start, cluster: Cluster, probe: Probe
) -> None:
    chosen = os.environ.get("OUTLAST_NODES_CELLS", DEFAULT)
    if chosen != "all" and cell not in chosen.split(","):
        pytest.skip("not among OUTLAST_NODES_CELLS")
    kind, peft = cell.split("-")
    if kind != "ddp":
        pytest.importorskip("deepspeed")
    ranks = 2 if peft == "lora" else 1
    arguments = [*TINY, f"parallel={kind}", f"peft={peft}", *(["peft.dropout=0.1"] if peft == "lora" else [])]
    placed = ["cluster=devcluster", "parallel.nodes=2", f"parallel.ranks_per_node={ranks}", "run.name=r"]
    submitted = outlast("train", *arguments, *placed, OUTLAST_DEVCLUSTER=str(cluster.directory))
    assert submitted.wait(120) == 0, submitted.output
    job, run = submitted.output.split("submitted job ")[1].split()[0], probe("r")
    run.reach(3, limit_s=240)
    cluster.run("sbatch", "-p", "high", "-N", "4", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    wait_for(lambda: run.events("finished"), "the end", 240)
    cluster.wait_for_state(job, "COMPLETED", 30)
    assert run.causes() == ["preempted", "finished"]
    assert [event["world_size"] for event in run.events("attempt_started")] == [2 * ranks, 2 * ranks]
    assert len(run.events("attempt_started")[0]["hosts"]) == 2
    assert run.steps_repeated() == 0
    assert 0 < run.events("resumed")[0]["step"] < 60

    twin = outlast("train", *arguments, f"parallel.ranks_per_node={2 * ranks}", "run.name=twin")
    assert twin.wait() == 0, twin.output
    assert run.weights() == probe("twin").weights()
