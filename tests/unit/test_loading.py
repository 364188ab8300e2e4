"""What of a checkpoint is read: regular files that its manifest lists, and nothing in them is executed."""

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.attempt import loading
from outlast.checkpoint.manifest import Manifest, read_entry, verify, write_manifest
from outlast.errors import CheckpointError, ConfigError
from outlast.rundir.directory import RunDirectory


def seal(directory: Path, *, light: bool = False, **more: Path) -> None:
    files = {str(p.relative_to(directory)): read_entry(p) for p in directory.rglob("*") if p.is_file()} | {
        name: read_entry(path) for name, path in more.items()
    }
    files.pop("manifest.json", None)
    write_manifest(directory, Manifest(step=3, kind="periodic", world_size=1, time=0.0, light=light, files=files))


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A checkpoint with a directory of shards in it."""
    path = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    (path / "global_step3").mkdir(parents=True)
    (path / "global_step3" / "shard.pt").write_text("shard")
    (path / "model.safetensors").write_text("weights")
    seal(path)
    return path


def replace_by_link(path: Path) -> None:
    away = path.parents[3] / "away"
    path.rename(away)
    path.symlink_to(away)


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (lambda p: (p / "latest_universal").symlink_to("/etc/hostname"), "latest_universal is a link"),
        (lambda p: (p / "zero").symlink_to("/etc"), "zero is a link"),
        (lambda p: replace_by_link(p / "model.safetensors"), "model.safetensors is a link"),
        (lambda p: replace_by_link(p / "global_step3"), "global_step3 is a link"),
        (lambda p: (p / "global_step3" / "more.pt").write_text(""), "global_step3/more.pt is not in its manifest"),
        (lambda p: (p / "pytorch_model.bin").write_text(""), "pytorch_model.bin is not in its manifest"),
        (lambda p: os.mkfifo(p / "pipe"), "pipe is a link or another special file"),
        (lambda p: replace_by_link(p / "manifest.json"), "its manifest is a link"),
        (lambda p: seal(p, **{"../../../outside": Path("/etc/hostname")}), "lists ../../../outside"),
        (lambda p: seal(p, **{"/etc/hostname": Path("/etc/hostname")}), "lists /etc/hostname"),
    ],
    ids=["link", "linked directory", "file", "directory", "shard", "weights", "pipe", "manifest", "above", "absolute"],
)
def test_what_does_not_belong_there_is_refused_by_name(
    forge: Callable[[Path], object], reason: str, sealed: Path
) -> None:
    (sealed.parents[2] / "outside").write_text("")
    forge(sealed)
    with pytest.raises(CheckpointError, match=reason):
        verify(sealed)


def test_what_may_lie_there(sealed: Path) -> None:
    """A killed rewriting of the manifest, a file that NFS keeps for who has it open, an empty directory."""
    (sealed / ".manifest.json.123.tmp").write_text("{")
    (sealed / "global_step3" / ".nfs0000000001").write_text("")
    (sealed / "empty").mkdir()
    assert verify(sealed).step == 3


def test_a_checkpoint_that_is_being_lightened(sealed: Path) -> None:
    """The new manifest is there, and what it no longer lists too."""
    seal(sealed, light=True)
    (sealed / "optimizer.pt").write_text("")
    assert verify(sealed).light


class Code:
    """Unpickled, it makes a directory."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run whose loads are guarded."""
    monkeypatch.setattr(torch, "load", torch.load)
    monkeypatch.setattr(torch.serialization, "load", torch.serialization.load)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (tmp_path / "link").symlink_to(run)
    loading.guard_loads(RunDirectory(tmp_path / "link"))
    yield run
    loading._directories.clear()


@pytest.mark.parametrize("how", ["path", "text", "file", "positional", "link to the run", "link out of it"])
def test_no_load_executes_anything(how: str, guarded: Path, tmp_path: Path) -> None:
    path, mark = guarded / "checkpoints" / "state.pt", tmp_path / "executed"
    given: Any = path
    if how == "link out of it":
        path.symlink_to(tmp_path / "outside.pt")
    elif how == "link to the run":
        given = tmp_path / "link" / "checkpoints" / "state.pt"
    torch.save(Code(mark), path)
    if how in ("text", "file"):
        given = str(path) if how == "text" else open(path, "rb")  # noqa: SIM115
    more = ("cpu", pickle) if how == "positional" else ()
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(given, *more, weights_only=False)
    if how == "file":
        given.close()
    assert not mark.exists()


def test_other_loads_are_left_alone(guarded: Path, tmp_path: Path) -> None:
    torch.save(Code(tmp_path / "executed"), tmp_path / "mine.pt")
    torch.load(tmp_path / "mine.pt", weights_only=False)
    assert (tmp_path / "executed").exists()
    torch.save({"weight": torch.ones(2)}, guarded / "checkpoints" / "state.pt")
    assert torch.load(guarded / "checkpoints" / "state.pt", weights_only=False)["weight"].sum() == 2


def test_what_could_not_be_read_back_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    with loading.refusing_unreadable():
        torch.save({"weight": torch.ones(2), "name": "a", "array": torch.ones(2).numpy()}, tmp_path / "plain.pt")
    save = loading.refusing_unreadable()(lambda obj, path: torch.save(obj, path))
    with pytest.raises(ConfigError, match=r"custom_checkpoint_0.pkl.*posix.mkdir.*add_safe_globals"):
        save(Code(tmp_path / "executed"), tmp_path / "custom_checkpoint_0.pkl")
    with torch.serialization.safe_globals([os.mkdir]), loading.refusing_unreadable():
        torch.save(Code(tmp_path / "executed"), tmp_path / "custom_checkpoint_0.pkl")
