"""The store on real files: sealed or not there."""

import json
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint import CheckpointStore, Manifest, verify
from outlast.checkpoint.retention import deletion_order
from outlast.checkpoint.store import OtherWorldSizeError
from outlast.errors import CheckpointError
from outlast.ranks import Agreement
from outlast.rundir import RunDirectory


class Harness:
    def __init__(self, path: Path, budget: int = 10**9) -> None:
        self.run = RunDirectory(path)
        self.run.create()
        self.events: list[dict[str, Any]] = []
        self.store = CheckpointStore(self.run, Agreement(), self.record, budget_bytes=budget)

    def record(self, event: str, **values: Any) -> None:
        self.events.append({"event": event, **values})

    def save(self, step: int, size: int = 1000, world_size: int = 1) -> None:
        def write(directory: Path) -> None:
            (directory / "model.safetensors").write_bytes(bytes([step % 256]) * size)
            (directory / "optimizer.pt").write_bytes(b"o" * size)

        self.store.save(write, Manifest(step=step, kind="periodic", world_size=world_size, time=0.0))

    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self.store.sealed()]


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path / "run")


def test_a_sealed_checkpoint_verifies_and_nothing_is_left_of_the_staging(harness: Harness) -> None:
    harness.save(10)
    assert verify(harness.store.path(10)).bytes == 2000
    assert sorted(p.name for p in harness.run.checkpoints.iterdir()) == ["checkpoint-10"]


def damage_flip(path: Path) -> None:
    data = bytearray((path / "optimizer.pt").read_bytes())
    data[500] ^= 1
    (path / "optimizer.pt").write_bytes(bytes(data))


def damage_truncate(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"x")


def damage_remove(path: Path) -> None:
    (path / "optimizer.pt").unlink()


def damage_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"step": 20')


def damage_unseal(path: Path) -> None:
    (path / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_flip, "optimizer.pt differs from what was written"),
        (damage_truncate, "model.safetensors has 1 bytes, the manifest says 1000"),
        (damage_remove, "optimizer.pt can't be read: No such file"),
        (damage_manifest, "its manifest can't be read"),
        (damage_unseal, "it has no manifest: it was never sealed"),
    ],
)
def test_the_newest_that_verifies(harness: Harness, damage: Any, reason: str) -> None:
    harness.save(10)
    harness.save(20)
    damage(harness.store.path(20))
    newest = harness.store.newest_verified()
    assert newest is not None
    assert newest.step == 10
    assert reason in (harness.run.quarantine / "checkpoint-20.reason.txt").read_text()
    assert reason in harness.events[-1]["reason"]
    assert not harness.store.path(20).exists()
    harness.save(20)
    assert harness.steps() == [10, 20]


def test_a_failed_write_publishes_nothing(harness: Harness) -> None:
    harness.save(10)

    def write(directory: Path) -> None:
        (directory / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        harness.store.save(write, Manifest(step=20, kind="periodic", world_size=1, time=0.0))
    assert harness.steps() == [10]
    assert sorted(p.name for p in harness.run.checkpoints.iterdir()) == ["checkpoint-10"]


def test_what_a_killed_attempt_left_is_swept(harness: Harness) -> None:
    (harness.store.staging / "checkpoint-5").mkdir(parents=True)
    (harness.store.trash / "checkpoint-3").mkdir(parents=True)
    harness.store.sweep()
    assert not list(harness.run.checkpoints.iterdir())


def test_another_world_size_is_refused_not_put_aside(harness: Harness) -> None:
    harness.save(10, world_size=2)
    with pytest.raises(OtherWorldSizeError, match=r"made by 2 rank\(s\) and this attempt has 1"):
        harness.store.newest_verified()
    assert harness.steps() == [10]


def test_the_budget_deletes_the_oldest_but_never_the_newest_or_the_best(tmp_path: Path) -> None:
    harness = Harness(tmp_path / "run", budget=9_000)
    for step in (10, 20, 30):
        harness.save(step)
    harness.store.best_step = 10
    assert harness.store.make_room(for_emergency=False)
    assert harness.steps() == [10, 30]
    assert harness.events[-1] == {"event": "deleted", "checkpoint": "checkpoint-20", "reason": "budget"}


def test_a_budget_that_holds_no_second_checkpoint(tmp_path: Path) -> None:
    harness = Harness(tmp_path / "run", budget=3_000)
    harness.save(10)
    assert not harness.store.make_room(for_emergency=False)
    assert not harness.store.make_room(for_emergency=True)
    assert harness.steps() == [10], "the last verified checkpoint is never the price"


def test_save_total_limit_counts_the_one_in_flight(harness: Harness) -> None:
    harness.store.limit = 2
    for step in (10, 20, 30):
        harness.store.make_room(for_emergency=False)
        harness.save(step)
    assert harness.steps() == [20, 30]


def test_deletion_order(harness: Harness) -> None:
    for step in (10, 20, 30, 40):
        harness.save(step)
    sealed = harness.store.sealed()
    assert [c.step for c in deletion_order(sealed, 20)] == [10, 30]
    assert [c.step for c in deletion_order(sealed, 20, keep_best=False)] == [10, 30, 20]
    assert [c.step for c in deletion_order(sealed, 40)] == [10, 20, 30]
    assert deletion_order([], None) == []


def test_the_manifest_lists_every_file(harness: Harness) -> None:
    harness.save(10)
    manifest = json.loads((harness.store.path(10) / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.pt"}
    assert manifest["format"] == 1
