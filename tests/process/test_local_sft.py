"""The main promise on the real stack: TRL, PEFT, evaluation, best model; interrupted anywhere, equal to the bit."""

import random
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ..conftest import Command, RunProbe, wait_for

Start = Callable[..., Command]
Probe = Callable[[str], RunProbe]

SFT = [
    "job=sft",
    "model.vocab_size=512",
    "model.hidden_size=32",
    "model.layers=2",
    "data.max_pairs=308",
    "data.eval_fraction=0.364",  # 112 rows: an evaluation takes long enough to be met
    "peft=lora",
    "peft.dropout=0.1",
    "parallel.cpus_per_rank=1",
    "checkpoint.every=9",
    "trainer.packing=true",
    "trainer.max_length=128",
    "trainer.gradient_accumulation_steps=2",
    "trainer.per_device_train_batch_size=2",
    "trainer.per_device_eval_batch_size=1",
    "trainer.eval_steps=9",
    "trainer.logging_steps=2",
    "trainer.load_best_model_at_end=true",
    "trainer.learning_rate=0.02",
]
WITHOUT_EVALUATION = ["trainer.eval_strategy=no", "trainer.load_best_model_at_end=false"]
WATCHER = Path(__file__).with_name("watcher")


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> RunProbe:
    """The run left alone: nearly three epochs."""
    directory = tmp_path_factory.mktemp("twin")
    command = Command(directory, "train", *SFT, "trainer.max_steps=100", "run.name=twin")
    assert command.wait() == 0, command.output
    return RunProbe(directory / "runs" / "twin")


def evaluations(run: RunProbe) -> list[tuple[int, float]]:
    return [(e["step"], e["metrics"]["eval_loss"]) for e in run.events("evaluated")]


def test_the_twin_is_what_the_test_needs(twin: RunProbe) -> None:
    states = sorted(twin.path.glob("checkpoints/checkpoint-*/trainer_state.json"))
    assert any('"epoch": 2.' in state.read_text() for state in states), "it must cross two epochs"
    assert len(evaluations(twin)) == 12  # every 9 steps, and at the end


def test_five_preemptions_at_random_moments(outlast: Start, probe: Probe, twin: RunProbe) -> None:
    seed = random.randrange(10_000)
    # Progress is written twice a second, and a step takes 40 ms: the run is up to 13 steps ahead of what is seen here.
    # One moment in each quarter: three attempts in a row without a step made would rightly give up.
    draw = random.Random(seed)
    moments = [draw.randrange(first, first + 14) for first in (2, 17, 32, 47)]
    in_evaluation = draw.randrange(5)
    print(f"seed {seed}: steps {moments}, evaluation in attempt {in_evaluation + 1}")
    command, run = outlast("train", *SFT, "trainer.max_steps=100", "run.name=r"), probe("r")
    steps = iter(moments)
    for attempt in range(5):
        if attempt == in_evaluation:
            wait_for(
                lambda a=attempt: (now := run.progress()).get("phase") == "evaluating" and now["attempt"] == a + 1,
                f"an evaluation in attempt {attempt + 1}",
            )
        else:
            run.reach(next(steps), attempt=attempt + 1)
        command.signal(signal.SIGUSR1)
        wait_for(lambda a=attempt: len(run.events("requeued")) > a, f"requeue {attempt + 1}")
    assert command.wait() == 0, command.output
    assert run.causes() == ["preempted"] * 5 + ["finished"]
    assert run.steps_repeated() == 0
    assert evaluations(run) == evaluations(twin)
    assert run.weights() == twin.weights()
    pending = [c for c in run.path.glob("checkpoints/*/manifest.json") if '"pending_evaluation": true' in c.read_text()]
    assert pending, "the evaluation that was cut short is noted in its checkpoint"


def test_tokenized_once(outlast: Start, probe: Probe, tmp_path: Path) -> None:
    arguments = ["train", *SFT, "trainer.max_steps=6", *WITHOUT_EVALUATION, "run.name=r"]
    env, run = {"PYTHONPATH": str(WATCHER), "WATCH": str(tmp_path)}, probe("r")
    for stop, code in ((3, 75), (0, 0)):
        command = outlast(*arguments, **env, WATCH_STOP=str(stop))
        assert command.wait() == code, command.output
    assert [e["step"] for e in run.events("resumed")] == [3]
    first, second = ((run.path / "logs" / f"attempt-00{n}.rank-0.log").read_text() for n in (1, 2))
    assert "Tokenizing train dataset" in first
    assert "Tokenizing" not in second


ONE_EPOCH = [
    *SFT,
    "data.max_pairs=560",
    "data.eval_fraction=0.05",
    "trainer.max_steps=80",
    "trainer.dataloader_num_workers=2",
    *WITHOUT_EVALUATION,
]
"""With the same two workers from the first step to the last: at an epoch's end there may be other ones."""


def workers_of(rank: psutil.Process) -> list[psutil.Process]:
    workers = [child for child in rank.children() if "outlast.rank" in child.cmdline()]
    assert len(workers) == 2
    return workers


def test_workers_of_the_data_loader_are_signalled_too(outlast: Start, probe: Probe) -> None:
    left_alone = outlast("train", *ONE_EPOCH, "run.name=twin")
    assert left_alone.wait() == 0, left_alone.output
    command, run = outlast("train", *ONE_EPOCH, "run.name=r"), probe("r")
    run.reach(5)
    rank = command.ranks()[0]
    workers = workers_of(rank)
    for process in [*workers, rank]:
        process.send_signal(signal.SIGTERM)
    assert command.wait() == 0, command.output
    assert run.causes() == ["preempted", "finished"]
    assert run.steps_repeated() == 0
    assert run.weights() == probe("twin").weights()
    psutil.wait_procs(workers, timeout=15)
    assert not any(worker.is_running() for worker in workers)


def test_a_worker_alone_is_signalled(outlast: Start, probe: Probe) -> None:
    command, run = outlast("train", *ONE_EPOCH, "run.name=r"), probe("r")
    run.reach(5)
    for worker in workers_of(command.ranks()[0]):
        worker.send_signal(signal.SIGUSR1)
    assert command.wait() == 0, command.output
    assert run.causes() == ["finished"], "a worker's signal is not the run's"


def test_what_was_prepared_is_compared(outlast: Start, probe: Probe) -> None:
    arguments = [*SFT, "trainer.max_steps=50", *WITHOUT_EVALUATION]
    command, run = outlast("train", *arguments, "run.name=r"), probe("r")
    run.reach(3)
    command.end()
    weights = run.path / "prepared/model/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    again = outlast("train", *arguments, "run.name=r")
    assert again.wait() == 2, again.output
    assert "prepared/model is not what was prepared: model.safetensors differs from what was written" in again.output
    assert run.events("attempt_ended")[-1]["refused"]
