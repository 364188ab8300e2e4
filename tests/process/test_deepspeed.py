"""ZeRO by DeepSpeed on two gloo ranks: resumed to the bit, sealed as a whole, and hanging nowhere.

Four ranks on two nodes, every stage with LoRA and without: `tests/slurm/test_nodes.py`.
"""

import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.checkpoint.manifest import Sealed, read_manifest
from outlast.checkpoint.removal import Remover
from outlast.rundir.directory import RunDirectory

from ..conftest import Command, RunProbe, wait_for

pytest.importorskip("deepspeed")

Start = Callable[..., Command]
Probe = Callable[[str], RunProbe]

SFT = [
    "job=sft",
    "model.vocab_size=300",
    "model.hidden_size=16",
    "model.layers=1",
    "data.max_pairs=60",
    "data.eval_fraction=0.2",
    "parallel.cpus_per_rank=1",
    "trainer.max_length=64",
    "trainer.gradient_accumulation_steps=2",
    "trainer.per_device_train_batch_size=2",
    "trainer.max_steps=40",
    "trainer.learning_rate=0.02",
]
WITHOUT_EVALUATION = ["trainer.eval_strategy=no", "trainer.load_best_model_at_end=false"]
TWO = "parallel.ranks_per_node=2"


def newest(run: RunProbe) -> Path:
    return max(run.path.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.mark.parametrize(("kind", "peft"), [("zero2", "lora"), ("zero3_offload", "none")])
def test_preempted_in_mid_step_it_equals_the_run_left_alone(outlast: Start, probe: Probe, kind: str, peft: str) -> None:
    arguments = [*SFT, *WITHOUT_EVALUATION, TWO, f"parallel={kind}", f"peft={peft}", "checkpoint.every=20"]
    arguments += ["peft.dropout=0.1"] if peft == "lora" else []
    twin = outlast("train", *arguments, "run.name=twin")
    command, run = outlast("train", *arguments, "run.name=r"), probe("r")
    run.reach(5)
    command.ranks()[1].send_signal(signal.SIGUSR1)
    assert command.wait() == 0, command.output
    assert run.causes() == ["preempted", "finished"]
    assert run.steps_repeated() == 0
    assert twin.wait() == 0, twin.output
    assert run.weights() == probe("twin").weights()
    for checkpoint in run.path.glob("checkpoints/checkpoint-*"):
        files = read_manifest(checkpoint).files
        for rank in range(2):
            assert any(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" in name for name in files)
        assert "latest" in files
    planned = json.loads((run.path / "plan.json").read_text())["storage"]["checkpoint_bytes"]
    real = max(event["bytes"] for event in run.events("checkpoint"))
    assert planned == pytest.approx(real, rel=0.05), (
        "of some 250 kB: what is constant weighs more than with a real model"
    )
    assert run.events("measured")[0]["off"] == {}


def test_a_missing_shard_is_found_before_any_rank_loads(outlast: Start, probe: Probe) -> None:
    """With evaluations, and a best model of which nothing is left but the weights when the run ends."""
    arguments = [*SFT, TWO, "parallel=zero3", "peft=none", "trainer.eval_steps=8", "checkpoint.every=8"]
    # The loss falls, so that the first evaluation is taken for the best.
    arguments += ["trainer.greater_is_better=true", "trainer.learning_rate=0.002", "trainer.max_steps=48"]
    twin = outlast("train", *arguments, "run.name=twin")
    command, run = outlast("train", *arguments, "run.name=r"), probe("r")
    run.reach(18)
    command.signal(signal.SIGINT)
    assert command.wait() == 75, command.output
    last = newest(run)
    before = (int(last.name.split("-")[1]) - 1) // 8 * 8
    next(last.glob("global_step*/zero_pp_rank_1_*optim_states.pt")).unlink()
    best = lighten_best(run)
    again = outlast("train", *arguments, "run.name=r")
    assert again.wait() == 0, again.output
    assert [e["checkpoint"] for e in run.events("quarantined")] == [last.name]
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt can't be read" in run.events("quarantined")[0]["reason"]
    assert run.events("resumed")[0]["step"] == before
    assert twin.wait() == 0, twin.output
    state = json.loads((newest(probe("twin")) / "trainer_state.json").read_text())
    assert state["best_global_step"] == best == 8
    assert run.weights() == probe("twin").weights()


def lighten_best(run: RunProbe) -> int:
    """Drop the shards of the best checkpoint, as a budget without room for them would; its step."""
    best = read_manifest(newest(run)).best_step
    path = run.path / "checkpoints" / f"checkpoint-{best}"
    remover = Remover(RunDirectory(run.path), lambda *_, **__: None, print)
    assert remover.lighten(Sealed(path, read_manifest(path)), "no room")
    assert not list(path.glob("global_step*"))
    assert not {path.name for path in path.iterdir()} & {"latest", "zero_to_fp32.py", "zero_to_torch.py"}
    assert best is not None
    return best


def test_a_rank_that_cannot_write_its_shard_hangs_nobody(outlast: Start, probe: Probe) -> None:
    arguments = [*SFT, *WITHOUT_EVALUATION, TWO, "parallel=zero3", "peft=none", "checkpoint.every=5"]
    command, run = outlast("train", *arguments, "run.name=r", "trainer.max_steps=400"), probe("r")
    run.reach(7)
    rank_1 = command.ranks()[1]
    rank_1.rlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    failed = wait_for(lambda: run.events("checkpoint_failed"), "the save that fails")[0]
    rank_1.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert failed["reason"].startswith("rank 1: ")
    assert "File too large" in failed["reason"]
    run.reach(failed["step"] + 12)
    command.signal(signal.SIGINT)
    assert command.wait() == 75, command.output
    steps = [event["step"] for event in run.events("checkpoint")]
    assert failed["step"] not in steps
    assert max(steps) > failed["step"], "and the next save is whole"


def test_one_rank(outlast: Start, probe: Probe) -> None:
    arguments = [*SFT, *WITHOUT_EVALUATION, "parallel=zero1", "peft=lora"]
    command, run = outlast("train", *arguments, "run.name=r", forked=False), probe("r")
    run.reach(4)
    command.signal(signal.SIGUSR1)
    assert command.wait() == 0, command.output
    assert run.causes() == ["preempted", "finished"]
    assert run.steps_repeated() == 0
