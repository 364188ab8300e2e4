"""A disk that fills up in mid-training: real ENOSPC on a small tmpfs, and EFBIG from `RLIMIT_FSIZE` where none may be
mounted. Somebody else takes the room (a ballast file), as on a shared file system.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .attempt import Attempt
from .harness import Bases, Server, events, fault, litter, resumable_steps, weights

HIDDEN = 64
"""Makes a checkpoint of full fine-tuning 0.6 MB, a final model 0.2 MB."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB of the test's own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def attempt(disk: Path) -> Callable[..., Attempt]:
    """An attempt on `disk/run`; a ballast beside it takes all but 300 kB in the step `fill_at`."""

    def make(**values: object) -> Attempt:
        plain = {"directory": str(disk / "run"), "lora": False, "hidden": HIDDEN, "ballast": str(disk / "ballast")}
        return Attempt(**{**plain, "leave": 300_000, **values})

    return make


def kept(run: Path) -> dict[int, str | None]:
    """Step and fault of each checkpoint."""
    return {int(p.name.split("-")[1]): fault(p) for p in sorted((run / "checkpoints").glob("checkpoint-*"))}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_periodic_save_on_a_full_disk(
    ranks: int, disk: Path, attempt: Callable[..., Attempt], bases: Bases, server: Server
) -> None:
    base = bases(False, ranks, HIDDEN)
    run = base.copy(disk / "run")
    done = server.run(attempt(fill_at=5), disk.with_name("log"), ranks=ranks)
    assert done.codes == [0] * ranks, done.output
    assert kept(run) == {6: None, 8: None}, "each takes the place of the oldest"
    gone = [(e["checkpoint"], e["reason"]) for e in events(run, "deleted")]
    assert gone == [("checkpoint-3", "disk full"), ("checkpoint-4", "disk full")]
    assert not events(run, "checkpoint_failed")
    assert [e["step"] for e in events(run, "finished")] == [8]
    assert weights(run) == base.twin
    assert not litter(run)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_periodic_save_on_a_full_disk_that_may_delete_nothing(
    ranks: int, disk: Path, attempt: Callable[..., Attempt], bases: Bases, server: Server
) -> None:
    base = bases(False, ranks, HIDDEN)
    run = base.copy(disk / "run")
    shutil.rmtree(run / "checkpoints/checkpoint-3")
    done = server.run(attempt(fill_at=5), disk.with_name("log"), ranks=ranks)
    assert done.codes == [0] * ranks, done.output
    assert kept(run) == {4: None}, "the newest still verifies"
    failed = events(run, "checkpoint_failed")
    assert [(e["step"], e["kind"]) for e in failed] == [(6, "periodic"), (8, "periodic")]
    assert all("No space left on device" in e["reason"] for e in failed)
    assert re.search(r"WARNING: periodic checkpoint of step 6 was not written: .*No space left", done.output)
    assert not events(run, "deleted")
    assert weights(run) == base.twin
    assert not litter(run)


def test_the_ledger_on_the_full_disk(disk: Path, attempt: Callable[..., Attempt], bases: Bases, server: Server) -> None:
    """Nothing else can be written from step 5 to step 7; the ledger has blocks of its own set aside."""
    base = bases(False, 1, HIDDEN)
    run = base.copy(disk / "run")
    shutil.rmtree(run / "checkpoints/checkpoint-3")
    done = server.run(attempt(fill_at=5, leave=0, free_at=7), disk.with_name("log"))
    assert done.codes == [0], done.output
    assert "the ledger can't be written" not in done.output
    (failed,) = events(run, "checkpoint_failed")
    assert (failed["step"], failed["kind"]) == (6, "periodic")
    times = [e["time"] for e in events(run)]
    assert times == sorted(times), "each line says when it happened, not when it could be written"
    assert weights(run) == base.twin
    assert not litter(run)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("leave", [300_000, 0])
def test_an_emergency_save_makes_room(
    ranks: int, leave: int, disk: Path, attempt: Callable[..., Attempt], bases: Bases, server: Server
) -> None:
    base = bases(False, ranks, HIDDEN)
    run = base.copy(disk / "run")
    saved = server.run(attempt(fill_at=5, stop_at=5, leave=leave), disk.with_name("log"), ranks=ranks)
    assert saved.codes == [75] * ranks, saved.output
    assert kept(run) == {4: None, 5: None}
    assert [e["checkpoint"] for e in events(run, "deleted")] == ["checkpoint-3"]
    assert [(e["step"], e["kind"]) for e in events(run, "checkpoint")][-1] == (5, "emergency")
    assert events(run, "attempt_ended")[-1]["step"] == 5
    (disk / "ballast").unlink()
    again = server.run(attempt(), disk.with_name("log-again"), ranks=ranks)
    assert again.codes == [0] * ranks, again.output
    assert events(run, "resumed")[-1]["step"] == 5, "no step is lost"
    assert weights(run) == base.twin


def test_an_emergency_save_lightens_before_it_deletes(
    disk: Path, attempt: Callable[..., Attempt], bases: Bases, server: Server
) -> None:
    """checkpoint-3 is a milestone: its optimizer goes, and makes room enough."""
    base = bases(False, 1, HIDDEN)
    run = base.copy(disk / "run")
    room = attempt(fill_at=5, stop_at=5, milestone_every=3)
    saved = server.run(room, disk.with_name("log"))
    assert saved.codes == [75], saved.output
    assert kept(run) == {3: None, 4: None, 5: None}
    assert [e["checkpoint"] for e in events(run, "lightened")] == ["checkpoint-3"]
    assert not events(run, "deleted")
    assert resumable_steps(run) == [4, 5]


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_emergency_save_that_may_delete_nothing(
    ranks: int, disk: Path, attempt: Callable[..., Attempt], bases: Bases, server: Server
) -> None:
    base = bases(False, ranks, HIDDEN)
    run = base.copy(disk / "run")
    shutil.rmtree(run / "checkpoints/checkpoint-3")
    left = server.run(attempt(fill_at=5, stop_at=5), disk.with_name("log"), ranks=ranks)
    assert left.codes == [75] * ranks, left.output
    assert kept(run) == {4: None}, "the last verified one is not the price"
    (failed,) = events(run, "checkpoint_failed")
    assert (failed["step"], failed["kind"]) == (5, "emergency")
    assert "No space left on device" in failed["reason"]
    assert "WARNING: emergency checkpoint of step 5 was not written" in left.output
    (disk / "ballast").unlink()
    again = server.run(attempt(), disk.with_name("log-again"), ranks=ranks)
    assert again.codes == [0] * ranks, again.output
    assert events(run, "resumed")[-1]["step"] == 4
    assert weights(run) == base.twin
    assert not litter(run)


def test_the_final_model_on_a_full_disk(
    disk: Path, attempt: Callable[..., Attempt], bases: Bases, server: Server
) -> None:
    """Room is made for it too; the newest checkpoint stays."""
    base = bases(False, 1, HIDDEN)
    run = base.copy(disk / "run")
    done = server.run(attempt(fill_at=8, leave=0), disk.with_name("log"))
    assert done.codes == [0], done.output
    assert weights(run) == base.twin
    assert kept(run) == {6: None}
    assert [e["checkpoint"] for e in events(run, "deleted")] == ["checkpoint-3", "checkpoint-4"]


def test_a_final_model_that_finds_no_room(
    disk: Path, attempt: Callable[..., Attempt], bases: Bases, server: Server
) -> None:
    base = bases(False, 1, HIDDEN)
    run = base.copy(disk / "run")
    shutil.rmtree(run / "checkpoints/checkpoint-3")
    failed = server.run(attempt(fill_at=8, leave=0, every=100), disk.with_name("log"))
    assert failed.codes == [1]
    assert re.search(r"CheckpointError: the finished model could not be written", failed.output)
    assert "OSError" not in failed.output, "the full ledger hides what went wrong"
    assert kept(run) == {4: None}
    (disk / "ballast").unlink()
    again = server.run(attempt(), disk.with_name("log-again"))
    assert again.codes == [0], again.output
    assert events(run, "resumed")[-1]["step"] == 4
    assert weights(run) == base.twin
    assert not litter(run)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_limit_on_the_size_of_files(ranks: int, bases: Bases, server: Server, work: Path) -> None:
    """For one rank alone its random state, 14 kB, does not fit into 10 kB; what `final/` holds does."""
    base = bases(True, ranks)
    run = base.copy(work / f"file-size-{ranks}")
    done = server.run(Attempt(directory=str(run), file_bytes=10_000), work / "file-size.log", ranks=ranks)
    assert done.codes == [0] * ranks, done.output
    failed = events(run, "checkpoint_failed")
    assert [(e["step"], e["kind"]) for e in failed] == [(6, "periodic"), (8, "periodic")]
    assert all(re.search(f"rank {ranks - 1}.*File too large", e["reason"]) for e in failed)
    assert kept(run) == {3: None, 4: None}
    assert weights(run) == base.twin
    assert not litter(run)
