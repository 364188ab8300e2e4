"""Checkpoints that have gone bad: the one before is resumed from, the bad one is put aside with its reason in words."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .attempt import Attempt
from .harness import Base, Bases, Outcome, Server, events, fault, weights
from .windows import flip_bit


def flip(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: flip_bit(checkpoint / name)


def truncate(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: os.truncate(checkpoint / name, (checkpoint / name).stat().st_size // 2)


def remove(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def reword(old: str, new: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        text = (checkpoint / "manifest.json").read_text()
        assert old in text
        (checkpoint / "manifest.json").write_text(text.replace(old, new))

    return change


def forbid(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).chmod(0)


def give_away(checkpoint: Path) -> None:
    """Not ours any more: it can't be read, nor moved."""
    os.chown(checkpoint, 65534, 65534)
    checkpoint.chmod(0)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "bit flipped in the weights": (flip("model.safetensors"), "model.safetensors differs"),
    "bit flipped in the optimizer": (flip("optimizer.pt"), "optimizer.pt differs"),
    "bit flipped in the schedule": (flip("scheduler.pt"), "scheduler.pt differs"),
    "bit flipped in the random state": (flip("rng_state_1.pth"), "rng_state_1.pth differs"),
    "bit flipped in the trainer's state": (flip("trainer_state.json"), "trainer_state.json differs"),
    "weights truncated": (truncate("model.safetensors"), "model.safetensors has .* bytes"),
    "manifest truncated": (truncate("manifest.json"), "manifest can't be read"),
    "bit flipped in the manifest": (reword('"step": 4', '"step": 5'), "manifest differs"),
    "no manifest": (remove("manifest.json"), "no manifest"),
    "no optimizer": (remove("optimizer.pt"), "optimizer.pt.*No such file"),
    "no weights": (remove("model.safetensors"), "model.safetensors.*No such file"),
    "a rank's random state is missing": (remove("rng_state_1.pth"), "rng_state_1.pth.*No such file"),
    "unreadable file": (forbid("optimizer.pt"), "optimizer.pt.*Permission denied"),
    "unreadable directory": (forbid("."), "Permission denied"),
    "somebody else's directory": (give_away, "Permission denied"),
}


@pytest.fixture
def place(work: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory of the test's own."""
    path = work / re.sub(r"\W+", "-", request.node.name)
    path.mkdir()
    yield path
    shutil.rmtree(path)


def resumed(server: Server, base: Base, run: Path, **values: object) -> Outcome:
    attempt = base.attempt(**{"directory": str(run), "bound": True, **values})
    outcome = server.run(attempt, run.with_name("log"), ranks=base.ranks)
    assert outcome.codes == [0] * base.ranks, outcome.output
    assert weights(run) == base.twin
    return outcome


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_one_before_is_resumed_from(damage: str, place: Path, bases: Bases, server: Server) -> None:
    base = bases(False, 2)
    run, (do, reason) = base.copy(place / "run"), DAMAGE[damage]
    if do is give_away and os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    do(run / "checkpoints/checkpoint-4")
    done = resumed(server, base, run)
    assert [e["step"] for e in events(run, "resumed")] == [3]
    (line,) = events(run, "quarantined")
    assert line["checkpoint"] == "checkpoint-4"
    assert re.search(reason, line["reason"]), line["reason"]
    assert re.search(f"WARNING: checkpoint-4 .*{reason}", done.output), done.output
    aside = run / "quarantine" / ("checkpoint-4.kept" if "Permission" in reason else "checkpoint-4")
    assert re.search(reason, aside.with_name(f"{aside.name}.reason.txt").read_text())
    if do is not give_away:
        assert aside.is_dir()
        assert not (run / "checkpoints/checkpoint-4").exists()
    else:
        assert "could not be moved" in done.output
        assert (run / "checkpoints/checkpoint-4").is_dir(), "it is not ours to delete"


def test_none_is_left(place: Path, bases: Bases, server: Server) -> None:
    """A run does not begin again from nothing by itself; nothing is moved before the user has decided."""
    base = bases(True, 1)
    run = base.copy(place / "run")
    for step, name in ((3, "optimizer.pt"), (4, "rng_state.pth")):
        (run / f"checkpoints/checkpoint-{step}" / name).unlink()
    failed = server.run(base.attempt(directory=str(run), bound=True), run.with_name("log"))
    assert failed.codes == [1]
    assert re.search(r"none of its checkpoints verifies.*checkpoint-4: rng_state.pth can't be read", failed.output)
    assert "checkpoint.allow=[restart]" in failed.output
    assert not events(run, "quarantined")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"checkpoint-3", "checkpoint-4"}


# Quarantine and the budget ---------------------------------------------------------------------------------------


def size(path: Path) -> int:
    return sum(p.lstat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())


def quarantined(base: Base, place: Path) -> Path:
    """checkpoint-4 is damaged and will be put aside."""
    run = base.copy(place / "run")
    flip_bit(run / "checkpoints/checkpoint-4/optimizer.pt")
    return run


def test_quarantine_is_not_retention_s(place: Path, bases: Bases, server: Server) -> None:
    """A limit of one checkpoint, and room: what was put aside stays."""
    base = bases(True, 1)
    run = quarantined(base, place)
    resumed(server, base, run, limit=1)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["checkpoint-8"]
    assert (run / "quarantine/checkpoint-4/optimizer.pt").exists()
    assert {e["checkpoint"] for e in events(run, "deleted")} == {"checkpoint-3", "checkpoint-6"}


def test_quarantine_counts_against_the_budget(place: Path, bases: Bases, server: Server) -> None:
    """Without what is in quarantine three checkpoints would fit; with it one has to go, and the ledger names it."""
    base = bases(True, 1)
    run = quarantined(base, place)
    beside = 65_536  # is kept free for the ledger
    one, budget = size(run / "checkpoints/checkpoint-4"), size(run) + beside + 20_000
    assert one > 20_000
    resumed(server, base, run, budget_gb=budget / 1e9, limit=None)
    assert size(run) <= budget
    gone = [e["checkpoint"] for e in events(run, "deleted")]
    assert gone[0] == "quarantine/checkpoint-4"
    assert not (run / "quarantine/checkpoint-4").exists()
    assert fault(run / "checkpoints/checkpoint-8") is None


# What is not the run's own ----------------------------------------------------------------------------------------


def everything_in(path: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and content of each file and directory, by name."""
    found = {".": (path.stat().st_mode, b"")}
    for p in sorted(path.rglob("*")):
        found[str(p.relative_to(path))] = (p.lstat().st_mode, p.read_bytes() if p.is_file() else b"")
    return found


@pytest.mark.parametrize("step", [2, 5, 6, 9])
def test_a_checkpoint_that_is_a_link_out_of_the_run(step: int, place: Path, bases: Bases, server: Server) -> None:
    """Older than all, newest on resume, in the way of the save of step 6, and never reached."""
    base = bases(True, 1)
    run, outside = base.copy(place / "run"), place / "outside"
    shutil.copytree(run / "checkpoints/checkpoint-4", outside)
    manifest = outside / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 4', f'"step": {step}'))
    outside.chmod(0o750)
    before = everything_in(outside)
    (run / f"checkpoints/checkpoint-{step}").symlink_to(outside)
    resumed(server, base, run, bound=False, limit=1)
    assert [e["step"] for e in events(run, "resumed")] == [4]
    assert everything_in(outside) == before
    assert fault(run / "checkpoints/checkpoint-8") is None


@pytest.mark.parametrize("limit", [1, None])
def test_a_link_inside_a_checkpoint(limit: int | None, place: Path, bases: Bases, server: Server) -> None:
    """checkpoint-3 is deleted, or a milestone made light; a link in it goes, what it points at stays."""
    base = bases(True, 1)
    run, outside = base.copy(place / "run"), place / "outside"
    (outside / "global_step3").mkdir(parents=True)
    (outside / "global_step3/optimizer.pt").write_bytes(b"somebody else's")
    before = everything_in(outside)
    (run / "checkpoints/checkpoint-3/global_step3").symlink_to(outside / "global_step3")
    (run / "checkpoints/checkpoint-3/optimizer_1.pt").symlink_to(outside / "global_step3/optimizer.pt")
    resumed(server, base, run, bound=False, limit=limit or 2, milestone_every=None if limit else 3)
    assert everything_in(outside) == before
    assert events(run, "deleted" if limit else "lightened")[0]["checkpoint"] == "checkpoint-3"


def test_a_deletion_that_fails_is_reported_and_tried_again(place: Path, bases: Bases, server: Server) -> None:
    base = bases(True, 1)
    run = base.copy(place / "run")
    (run / "checkpoints/checkpoint-3").chmod(0o500)
    done = resumed(server, base, run, limit=1)
    assert [e["checkpoint"] for e in events(run, "delete_failed")] == ["checkpoint-3"]
    assert re.search(r"WARNING: could not delete checkpoint-3: .*Permission denied", done.output)
    assert (run / "checkpoints/checkpoint-3").is_dir()
    assert {e["checkpoint"] for e in events(run, "deleted")} == {"checkpoint-4", "checkpoint-6"}


def test_a_failed_deletion_succeeds_later(place: Path, bases: Bases, server: Server) -> None:
    base = bases(True, 1)
    run = base.copy(place / "run")
    checkpoint = run / "checkpoints/checkpoint-3"
    checkpoint.chmod(0o500)
    stopped = server.run(Attempt(directory=str(run), bound=True, limit=1, stop_at=7), place / "log")
    assert stopped.codes == [75], stopped.output
    assert checkpoint.is_dir()
    checkpoint.chmod(0o700)
    resumed(server, base, run, limit=1, steps=8, every=1)
    assert not checkpoint.exists()
    assert "checkpoint-3" in {e["checkpoint"] for e in events(run, "deleted")}
