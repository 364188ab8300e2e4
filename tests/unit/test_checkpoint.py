"""The store on real files: sealed or not there."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint import store as store_module
from outlast.checkpoint.manifest import Kind, Manifest, TransientError, read_entry, read_manifest, verify
from outlast.checkpoint.space import Space
from outlast.checkpoint.store import CheckpointStore, SaveError
from outlast.errors import CheckpointError, ConfigError, ResumeRefusedError
from outlast.ranks.collectives import Collectives
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.storage.budget import MARGIN


class Harness:
    def __init__(self, path: Path, budget: int = 10**9) -> None:
        self.run = RunDirectory(path)
        self.run.create()
        self.events: list[dict[str, Any]] = []
        self.space = Space(self.run, lambda: budget + MARGIN)
        self.store = CheckpointStore(self.run, Collectives(), self.record, self.space)

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

    with pytest.raises(SaveError, match="No space left") as caught:
        harness.store.save(write, Manifest(step=20, kind="periodic", world_size=1, time=0.0))
    assert caught.value.disk_full
    assert harness.steps() == [10]
    assert sorted(p.name for p in harness.run.checkpoints.iterdir()) == ["checkpoint-10"]


def test_what_a_killed_attempt_left_is_swept(harness: Harness) -> None:
    (harness.run.staging / "checkpoint-5").mkdir(parents=True)
    (harness.run.trash / "checkpoint-3").mkdir(parents=True)
    (harness.run.path / ".progress.json.1.tmp").touch()
    (harness.run.path / ".losses.json.1.tmp").touch()
    harness.save(10)
    (harness.store.path(10) / ".manifest.json.1.tmp").touch()
    harness.store.clean_up()
    assert sorted(p.name for p in harness.run.path.rglob("*")) == [
        "checkpoint-10", "checkpoints", "logs", "manifest.json", "model.safetensors", "optimizer.pt"
    ]  # fmt: skip


def test_the_budget_deletes_the_oldest_but_never_the_newest_or_the_best(tmp_path: Path) -> None:
    harness = Harness(tmp_path / "run", budget=8_800)
    for step in (10, 20, 30, 40):
        harness.save(step)
    harness.store.room.retention.best_step = 10
    assert harness.store.room.make_space(kind=Kind.PERIODIC)
    assert harness.steps() == [10, 30, 40]
    assert [(e["event"], e["checkpoint"], e["reason"]) for e in harness.events] == [
        ("lightened", "checkpoint-10", "budget"),
        ("deleted", "checkpoint-20", "budget"),
    ]


@pytest.mark.parametrize("kind", ["periodic", "emergency"])
def test_a_budget_that_holds_no_second_checkpoint(tmp_path: Path, kind: str) -> None:
    harness = Harness(tmp_path / "run", budget=3_000)
    harness.save(10)
    assert not harness.store.room.make_space(kind=kind)
    assert harness.steps() == [10], "the last verified checkpoint is never the price"


def test_nothing_is_deleted_if_all_that_may_go_would_not_do(tmp_path: Path) -> None:
    harness = Harness(tmp_path / "run", budget=5_000)
    for step in (10, 20):
        harness.save(step)
    (harness.run.path / "data").write_bytes(bytes(2_000))
    assert not harness.store.room.make_space(kind=Kind.EMERGENCY)
    assert harness.steps() == [10, 20]


def test_save_total_limit_holds_after_each_save(harness: Harness) -> None:
    harness.store.room.retention.limit = 2
    for step in (10, 20, 30):
        harness.save(step)
        harness.store.room.retire()
    assert harness.steps() == [20, 30]
    assert harness.events == [{"event": "deleted", "checkpoint": "checkpoint-10", "reason": "save_total_limit"}]


def test_what_is_oldest_is_told_by_the_step_not_by_the_clock_and_half_written_ones_take_no_slot(
    harness: Harness,
) -> None:
    harness.store.room.retention.limit = 2
    for step in (10, 20):
        harness.save(step)
    os.utime(harness.store.path(10))  # the Trainer's own rotation would now delete 20
    harness.store.path(25).mkdir()
    (harness.store.path(25) / "model.safetensors").write_bytes(b"half")
    harness.save(30)
    harness.store.room.retire()
    assert harness.steps() == [20, 30]


def test_limit_one_with_a_best_never_loses_the_newest(harness: Harness) -> None:
    harness.store.room.retention.limit, harness.store.room.retention.best_step = 1, 10
    for step in (10, 20, 30):
        harness.save(step)
        harness.store.room.retire()
    assert harness.steps() == [10, 30]


def test_a_light_milestone_keeps_its_weights_and_verifies_but_is_not_resumed_from(harness: Harness) -> None:
    harness.store.room.retention.limit, harness.store.room.retention.milestone_every = 1, 20
    for step in (10, 20, 30, 40):
        harness.save(step)
        harness.store.room.retire()
    assert [(c.step, c.light) for c in harness.store.sealed()] == [(20, True), (40, False)]
    assert verify(harness.store.path(20)).files.keys() == {"model.safetensors"}
    assert not (harness.store.path(20) / "optimizer.pt").exists()
    damage_flip(harness.store.path(40))
    with pytest.raises(CheckpointError, match="none of its checkpoints verifies, and a restart is not silently made"):
        harness.store.newest_verified()
    assert harness.steps() == [20, 40], "nothing was moved"
    assert harness.store.newest_verified(restart=True) is None
    assert harness.steps() == [20]


def manifest_of(harness: Harness, step: int, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest, as somebody who knows nothing of its digest."""
    path = harness.store.path(step) / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESHUTDOWN, errno.ENOTCONN, errno.ESTALE])
def test_an_error_that_passes_condemns_nothing(harness: Harness, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    for step in (10, 20):
        harness.save(step)
    failures = [OSError(number, os.strerror(number)) for _ in range(2)]

    def once(path: Path, **kwargs: Any) -> Any:
        if failures and path.name == "optimizer.pt":
            raise failures.pop()
        return read_entry(path, **kwargs)

    monkeypatch.setattr("outlast.checkpoint.manifest.read_entry", once)
    newest = harness.store.newest_verified()
    assert newest is not None
    assert newest.step == 20
    assert not failures
    assert not harness.run.quarantine.exists()


def failing(name: str, number: int) -> Callable[..., Any]:
    def read(path: Path, **kwargs: Any) -> Any:
        if path.parent.name == name:
            raise OSError(number, os.strerror(number))
        return read_entry(path, **kwargs)

    return read


def test_a_file_system_that_hesitates_for_long_condemns_nothing(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        harness.save(step)
    monkeypatch.setattr("outlast.checkpoint.manifest.WAITS_S", (0.0, 0.0))
    with monkeypatch.context() as patched:
        patched.setattr("outlast.checkpoint.manifest.read_entry", failing("checkpoint-20", errno.ESTALE))
        with pytest.raises(TransientError, match="Stale"):
            harness.store.newest_verified()
        harness.store.room.retention.limit = 1
        harness.store.room.retire()
    assert harness.steps() == [10, 20]
    assert not harness.run.quarantine.exists()


def test_what_stays_unreadable_is_put_aside_and_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(tmp_path / "run", budget=11_500)
    for step in (10, 20, 30):
        harness.save(step)
    monkeypatch.setattr("outlast.checkpoint.manifest.WAITS_S", (0.0,))
    with monkeypatch.context() as patched:
        patched.setattr("outlast.checkpoint.manifest.read_entry", failing("checkpoint-30", errno.EIO))
        newest = harness.store.newest_verified()
    assert newest is not None
    assert newest.step == 20
    assert (harness.run.quarantine / "checkpoint-30.kept").is_dir()
    harness.save(40)
    for _ in range(2):
        assert harness.store.room.free_some(kind=Kind.PERIODIC, reason="budget")
    assert harness.steps() == [40]
    assert (harness.run.quarantine / "checkpoint-30.kept").is_dir()
    assert harness.store.room.free_some(kind=Kind.PERIODIC, reason="budget")
    assert harness.events[-1]["checkpoint"] == "quarantine/checkpoint-30.kept"


def test_all_unreadable_is_for_the_next_attempt(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.save(10)
    monkeypatch.setattr("outlast.checkpoint.manifest.WAITS_S", (0.0,))
    monkeypatch.setattr("outlast.checkpoint.manifest.read_entry", failing("checkpoint-10", errno.EACCES))
    with pytest.raises(TransientError, match=r"just now: checkpoint-10: model\.safetensors can't be read"):
        harness.store.newest_verified()
    assert harness.steps() == [10]


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(format=2),
        lambda values: values.update(format=99),
        lambda values: values.update(of_a_newer_version=True),
    ],
)
def test_another_format_asks_for_an_upgrade_and_moves_nothing(harness: Harness, change: Any) -> None:
    for step in (10, 20):
        harness.save(step)
    manifest_of(harness, 20, change)
    with pytest.raises(ResumeRefusedError, match=r"checkpoint-20 was made by another outlast .*: upgrade outlast"):
        harness.store.newest_verified(restart=True)
    assert sorted(p.name for p in harness.run.checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-20"]


def test_every_flipped_bit_of_a_manifest_is_noticed(harness: Harness) -> None:
    """The step among them: 60 became 68, in a manifest that was good JSON still."""
    for step in (10, 60):
        harness.save(step)
    path = harness.store.path(60) / "manifest.json"
    whole = path.read_bytes()
    digits = [i for i in range(len(whole)) if whole[i : i + 1].isdigit()]
    for position in {*digits, *range(0, len(whole), 7)}:
        for bit in (0, 3):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
            with suppress(CheckpointError):
                read_manifest(path.parent)
                same = json.loads(path.read_bytes()) == json.loads(whole)
                assert same, (position, bit, whole[position - 20 : position + 20])  # white space
    path.write_bytes(whole.replace(b'"step": 60', b'"step": 68'))
    newest = harness.store.newest_verified()
    assert newest is not None
    assert newest.step == 10
    assert "its manifest differs" in harness.events[-1]["reason"]


def test_a_manifest_belongs_to_its_directory(harness: Harness) -> None:
    harness.save(10)
    os.rename(harness.store.path(10), harness.store.path(20))
    with pytest.raises(CheckpointError, match="its manifest says step 10, but the directory is checkpoint-20"):
        read_manifest(harness.store.path(20))


def lose_checkpoints(harness: Harness) -> None:
    shutil.rmtree(harness.run.checkpoints)
    harness.run.create()


def damage_manifests(harness: Harness) -> None:
    for step in (10, 20):
        damage_manifest(harness.store.path(step))


def lose_manifests(harness: Harness) -> None:
    for step in (10, 20):
        damage_unseal(harness.store.path(step))


@pytest.mark.parametrize("lose", [lose_checkpoints, damage_manifests, lose_manifests])
def test_what_was_sealed_and_is_lost_is_not_silently_begun_again(harness: Harness, lose: Any) -> None:
    ledger = Ledger(harness.run.ledger)
    for step in (10, 20):
        harness.save(step)
        ledger.append("checkpoint", 1, step=step, kind="periodic", bytes=2000, stall_s=0.1, sealed_s=0.1)
    lose(harness)
    there = sorted(harness.run.checkpoints.rglob("*"))
    with pytest.raises(CheckpointError, match=r"a restart is not silently made: .*checkpoint-20.*allow=\[restart\]"):
        harness.store.newest_verified()
    assert sorted(harness.run.checkpoints.rglob("*")) == there
    assert not harness.run.quarantine.exists()
    assert harness.store.newest_verified(restart=True) is None
    assert harness.events[0]["event"] == "restarted"
    ledger.append("restarted", 2, reason=harness.events[0]["reason"])
    assert harness.store.newest_verified() is None, "an attempt that was killed before its first save begins again"
    aside = {p.name for p in harness.run.quarantine.glob("*.kept")} if harness.run.quarantine.exists() else set()
    assert aside == (set() if lose is lose_checkpoints else {"checkpoint-10.kept", "checkpoint-20.kept"})


def test_a_save_of_unknown_size_that_would_exceed_the_budget_is_not_published(tmp_path: Path) -> None:
    harness = Harness(tmp_path / "run", budget=3_000 - MARGIN)
    with pytest.raises(SaveError, match=r"storage\.budget_gb") as caught:
        harness.save(10, size=2_000)
    assert caught.value.disk_full
    assert harness.steps() == []


def test_the_last_verified_goes_only_for_a_verified_successor(harness: Harness) -> None:
    harness.store.room.retention.limit = 1
    harness.save(10)
    assert harness.store.newest_verified() is not None
    harness.save(20)
    damage_flip(harness.store.path(20))
    harness.store.room.retire()
    assert harness.steps() == [10], "20 was read back before 10 was let go"
    assert [e["event"] for e in harness.events] == ["quarantined"]


def test_what_is_in_quarantine_counts_and_goes_first_and_is_named(tmp_path: Path) -> None:
    harness = Harness(tmp_path / "run", budget=7_000)
    for step in (10, 20):
        harness.save(step)
    damage_flip(harness.store.path(20))
    assert harness.store.newest_verified() is not None
    harness.save(30)
    assert harness.store.room.make_space(kind=Kind.PERIODIC)
    assert harness.steps() == [10, 30]
    assert harness.events[-1] == {"event": "deleted", "checkpoint": "quarantine/checkpoint-20", "reason": "budget"}


def test_an_interrupted_deletion_is_finished(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.store.room.retention.limit = 1
    for step in (10, 20):
        harness.save(step)
    monkeypatch.setattr(store_module.Remover, "_throw_away", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        harness.store.room.retire()
    monkeypatch.undo()
    assert harness.steps() == [20]
    assert harness.store.path(10).is_dir()
    harness.store.clean_up()
    assert not harness.store.path(10).exists()
    assert not harness.run.quarantine.exists()


def test_a_deletion_that_fails_is_reported_and_tried_again(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.store.room.retention.limit = 1
    for step in (10, 20):
        harness.save(step)

    def refuse(path: str, dir_fd: int) -> None:
        raise OSError(1, "Operation not permitted", path)

    monkeypatch.setattr("outlast.deletion.shutil.rmtree", refuse)
    harness.store.room.retire()
    failed = [e for e in harness.events if e["event"] == "delete_failed"]
    assert len(failed) == 1
    assert "Operation not permitted" in failed[0]["reason"]
    monkeypatch.undo()
    harness.save(30)
    assert sorted(p.name for p in harness.run.checkpoints.iterdir()) == ["checkpoint-20", "checkpoint-30"]


def test_a_symbolic_link_is_no_checkpoint_and_nothing_is_deleted_through_one(tmp_path: Path) -> None:
    elsewhere = Harness(tmp_path / "elsewhere")
    elsewhere.save(99)
    harness = Harness(tmp_path / "run", budget=3_000)
    harness.save(10)
    (harness.run.checkpoints / "checkpoint-99").symlink_to(elsewhere.store.path(99))
    newest = harness.store.newest_verified()
    assert newest is not None
    assert newest.step == 10
    harness.store.room.make_space(kind=Kind.EMERGENCY)
    harness.store.clean_up()
    assert elsewhere.steps() == [99]
    other = RunDirectory(tmp_path / "other")
    other.path.mkdir()
    other.checkpoints.symlink_to(elsewhere.run.checkpoints)
    with pytest.raises(ConfigError, match="nothing outside the run directory is ever deleted"):
        other.create()


def test_the_manifest_lists_every_file(harness: Harness) -> None:
    harness.save(10)
    manifest = json.loads((harness.store.path(10) / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.pt"}
    assert manifest["format"] == 1


def test_a_checkpoint_whose_name_can_not_be_flushed_is_saved(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flush = store_module.flush_directory

    def fails(path: Path) -> None:
        if path == harness.run.checkpoints and harness.store.path(10).exists():
            raise OSError(errno.EIO, "Input/output error")
        flush(path)

    monkeypatch.setattr(store_module, "flush_directory", fails)
    harness.save(10)
    assert harness.steps() == [10]
    assert "checkpoint-10 is saved, but its name could not be flushed to disk" in capsys.readouterr().out


def test_a_full_disk_costs_as_much_as_a_periodic_save_needs_and_no_more(harness: Harness) -> None:
    """A quota that the file system does not show: the save itself finds it full."""
    for step in (10, 20, 30, 40):
        harness.save(step)
    assert harness.store.room.make_space(kind=Kind.PERIODIC)
    assert harness.store.room.replace(kind=Kind.PERIODIC, reason="disk full")
    assert harness.steps() == [20, 30, 40]
    assert not harness.store.room.replace(kind=Kind.PERIODIC, reason="disk full"), "others fill the disk as fast"
    assert harness.store.room.make_space(kind=Kind.EMERGENCY)
    while harness.store.room.replace(kind=Kind.EMERGENCY, reason="disk full"):
        pass
    assert harness.steps() == [40]
