"""Three ranks and four: a resumed run ends with the weights of the run left alone, to the bit."""

import signal
from collections.abc import Callable

import pytest

from ..conftest import SMOKE, Command, RunProbe

Start = Callable[..., Command]
Probe = Callable[[str], RunProbe]

SFT = [
    "job=sft",
    "peft=none",
    "model.vocab_size=300",
    "model.hidden_size=16",
    "model.layers=1",
    "data.max_pairs=60",
    "data.eval_fraction=0.2",
    "parallel.cpus_per_rank=1",
    "checkpoint.every=1000",
    "trainer.max_length=64",
    "trainer.per_device_train_batch_size=2",
    "trainer.eval_strategy=no",
    "trainer.load_best_model_at_end=false",
    "trainer.max_steps=12",
    "trainer.learning_rate=0.02",
]


def preempted_equals_left_alone(outlast: Start, probe: Probe, arguments: list[str], step: int) -> None:
    twin = outlast("train", *arguments, "run.name=twin")
    assert twin.wait() == 0, twin.output
    command, run = outlast("train", *arguments, "run.name=r"), probe("r")
    run.reach(step)
    command.ranks()[-1].send_signal(signal.SIGUSR1)
    assert command.wait() == 0, command.output
    assert run.causes() == ["preempted", "finished"]
    assert run.steps_repeated() == 0
    assert run.weights() == probe("twin").weights()


@pytest.mark.parametrize("ranks", [3, 4])
def test_a_loop_with_accelerate(outlast: Start, probe: Probe, ranks: int) -> None:
    arguments = [*SMOKE, f"parallel.ranks_per_node={ranks}", "trainer.max_steps=40", "trainer.step_s=0.02"]
    preempted_equals_left_alone(outlast, probe, arguments, 5)


@pytest.mark.parametrize(
    "options",
    [
        ["trainer.gradient_checkpointing=true"],  # with it the Trainer leaves find_unused_parameters off
        ["trainer.ddp_find_unused_parameters=false", "trainer.ddp_bucket_cap_mb=1"],
        ["trainer.ddp_static_graph=true"],
    ],
    ids=["checkpointing", "small buckets", "static graph"],
)
def test_the_trainer(outlast: Start, probe: Probe, options: list[str]) -> None:
    preempted_equals_left_alone(outlast, probe, [*SFT, "parallel.ranks_per_node=3", *options], 3)


@pytest.mark.parametrize("kind", ["zero1", "zero3"])
def test_zero(outlast: Start, probe: Probe, kind: str) -> None:
    """ZeRO 2, which divides as ZeRO 1 does: two ranks in `test_deepspeed.py`, four in `tests/slurm/test_nodes.py`."""
    pytest.importorskip("deepspeed")
    preempted_equals_left_alone(outlast, probe, [*SFT, "parallel.ranks_per_node=3", f"parallel={kind}"], 3)
