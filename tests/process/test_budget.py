"""The byte budget of real runs, seen from outside, every 5 ms."""

import json
import math
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outlast.files import bytes_used

from .. import forked
from ..conftest import OUTLAST, SMOKE, Command, RunProbe, wait_for

Start = Callable[..., Command]
Probe = Callable[[str], RunProbe]

SFT = [
    "job=sft",
    "model.vocab_size=300",
    "model.hidden_size=32",
    "model.layers=2",
    "data.max_pairs=60",
    "data.eval_fraction=0.2",
    "parallel.cpus_per_rank=1",
    "checkpoint.every=4",
    "trainer.max_length=64",
    "trainer.per_device_train_batch_size=2",
    "trainer.eval_steps=6",
    "trainer.max_steps=80",
    "trainer.learning_rate=0.02",
]
LARGE = ["trainer.hidden_size=40000", "trainer.max_steps=60", "trainer.step_s=0.05", "checkpoint.every=4"]


def plan(cwd: Path, *arguments: str) -> dict[str, float]:
    done = forked.run([OUTLAST, "plan", "--json", *arguments], cwd)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["storage"])


@contextmanager
def watched(path: Path) -> Iterator[list[int]]:
    """The bytes in a directory, looked at every 5 ms; the list's one element is the most that was seen."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], bytes_used(path))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("job", "times"),
    [([*SMOKE[:2], *LARGE], 1.0), ([*SMOKE[:2], *LARGE], 1.7), (SFT, 1.0)],
    ids=["smallest", "larger", "sft"],
)
def test_never_above_the_budget_whatever_happens(
    outlast: Start, probe: Probe, tmp_path: Path, job: list[str], times: float
) -> None:
    smallest = plan(tmp_path, *job)["smallest_budget_gb"]
    budget = f"storage.budget_gb={smallest * times}"
    run = probe("r")
    run.path.mkdir(parents=True)
    with watched(run.path) as peak:
        command = outlast("train", *job, "run.name=r", budget)
        run.reach(9)
        command.signal(signal.SIGUSR1)
        run.reach(17, attempt=2)
        (rank,) = command.ranks()
        rank.send_signal(signal.SIGKILL)
        assert command.wait() == 1, command.output
        again = outlast("train", *job, "run.name=r", budget)
        assert again.wait() == 0, again.output
    assert peak[0] <= smallest * times * 1e9
    assert run.steps_repeated() <= 4, "periodic saves went on"
    assert run.progress()["bytes_peak"] <= peak[0] * 1.01
    assert {e["kind"] for e in run.events("checkpoint")} == {"periodic", "emergency", "final"}


def test_too_small_a_budget_is_refused_with_the_smallest_that_would_do(tmp_path: Path) -> None:
    job = [*SMOKE[:2], *LARGE]
    smallest = plan(tmp_path, *job)["smallest_budget_gb"]
    below = smallest - 10 ** (math.floor(math.log10(smallest)) - 2)
    done = forked.run([OUTLAST, "train", *job, "run.name=r", f"storage.budget_gb={below}"], tmp_path)
    assert done.returncode == 2
    assert "storage.budget_gb" in done.stderr
    assert f"{smallest:g}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_what_is_measured_takes_the_place_of_the_estimate(outlast: Start, probe: Probe) -> None:
    command = outlast("train", *SMOKE[:2], *LARGE, "run.name=r", "trainer.max_steps=12")
    assert command.wait() == 0, command.output
    (measured,) = probe("r").events("measured")
    assert measured["off"] == {}
    assert measured["save_total_limit"] >= 1


def test_the_reserve_is_given_up_for_an_emergency_save(outlast: Start, probe: Probe, tmp_path: Path) -> None:
    job = [*SMOKE[:2], *LARGE, "storage.reserve=true"]
    smallest = plan(tmp_path, *job)["smallest_budget_gb"]
    command, run = outlast("train", *job, "run.name=r", f"storage.budget_gb={smallest}"), probe("r")
    reserve = run.path / ".reserve"
    size = wait_for(lambda: reserve.exists() and reserve.stat().st_size, "the reserve")
    blocks = [p.stat().st_blocks * 512 for p in run.path.glob("checkpoints/checkpoint-*/**/*")]
    assert size >= sum(blocks), "a disk that others have filled gives whole blocks"
    run.reach(run.events("checkpoint")[-1]["step"] + 5)
    # what somebody else left in the run directory takes the room that the next save needs
    (run.path / "foreign").write_bytes(bytes(size))
    (rank,) = command.ranks()
    rank.send_signal(signal.SIGUSR1)
    wait_for(lambda: run.events("requeued"), "the requeue")
    assert {"checkpoint": "reserve", "reason": "budget"}.items() <= run.events("deleted")[-1].items()
    assert run.events("checkpoint")[-1]["kind"] == "emergency"
    (run.path / "foreign").unlink()
    assert command.wait() == 0, command.output
    assert run.steps_repeated() == 0


def test_a_sweep_stays_below_its_budget_and_a_smaller_one_is_refused(outlast: Start, tmp_path: Path) -> None:
    job = [*SMOKE[:2], *LARGE, "trainer.max_steps=24"]
    each = plan(tmp_path, *job)["smallest_budget_gb"]
    sweep = ["train", "-m", *job, "run.name=s", "seed=1,2,3", "cluster.parallel_cells=2", "trainer.step_s=0.02,0.1"]
    refused = outlast(*sweep, f"storage.sweep_budget_gb={5 * each}")
    assert refused.wait() == 2
    assert "storage.sweep_budget_gb" in refused.output
    (least,) = re.findall(r"valid: ([\d.]+) or more, for 6 cells", refused.output)
    directory = tmp_path / "runs" / "s"
    assert not directory.exists()
    directory.mkdir(parents=True)
    with watched(directory) as peak:
        command = outlast(*sweep, f"storage.sweep_budget_gb={least}")
        assert command.wait() == 0, command.output
    assert 0 < peak[0] <= float(least) * 1e9
    cells = [RunProbe(path.parent) for path in directory.glob("*/ledger.jsonl")]
    assert len(cells) == 6
    assert all(cell.events("finished") for cell in cells)
    kept = [len(list((cell.path / "checkpoints").glob("checkpoint-*"))) for cell in cells]
    assert max(kept) > min(kept), "who finishes last has more room"
