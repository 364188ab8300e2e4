"""The writer: digests of what was written, in files that the libraries' own readers read."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outlast.checkpoint.manifest import read_entry
from outlast.checkpoint.writer import BUFFER, CHUNK, Writer, adopt

TENSORS = {
    "weight": torch.arange(12.0).reshape(3, 4),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3),
    "mask": torch.tensor([True, False, True]),
    "größe": torch.ones(2, dtype=torch.float64),
}


@pytest.fixture
def limited() -> Iterator[None]:
    """Files of this process can't grow beyond a megabyte."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_goes_through_is_digested_and_read_by_the_libraries(tmp_path: Path) -> None:
    state = {"step": torch.tensor(7.0), "exp_avg": torch.randn(300, 1000)}
    writer = Writer(tmp_path)
    with writer.capture():
        save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
        torch.save(state, str(tmp_path / "optimizer.pt"))
    entries = writer.finish()
    assert entries == {name: read_entry(tmp_path / name) for name in ("model.safetensors", "optimizer.pt")}
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    for mmap in (False, True):
        again = torch.load(tmp_path / "optimizer.pt", weights_only=True, mmap=mmap)
        assert torch.equal(again["exp_avg"], state["exp_avg"])


@pytest.mark.parametrize("size", [0, 1, BUFFER, BUFFER + 1, CHUNK - 1, 3 * CHUNK + 5])
def test_pieces_of_any_size(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    writer = Writer(tmp_path)
    with writer.open(tmp_path / "file") as file:
        file.write(b"head")
        file.write(memoryview(data)[:size])
        file.write(b"tail")
    assert (tmp_path / "file").read_bytes() == b"head" + data[:size] + b"tail"
    assert writer.finish() == {"file": read_entry(tmp_path / "file")}


def test_outside_the_directory_nothing_is_routed(tmp_path: Path) -> None:
    inside = tmp_path / "staged"
    inside.mkdir()
    writer = Writer(inside)
    original = torch.save
    with writer.capture():
        torch.save(1, tmp_path / "elsewhere.pt")
        save_file(TENSORS, tmp_path / "elsewhere.safetensors")
    assert torch.save is original
    assert writer.finish() == {}
    assert load_file(tmp_path / "elsewhere.safetensors").keys() == TENSORS.keys()


def test_files_written_by_other_means_or_changed_afterwards_are_read_back(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    with writer.capture():
        torch.save(1, tmp_path / "moved.tmp")
        torch.save(2, tmp_path / "changed.pt")
        (tmp_path / "moved.tmp").rename(tmp_path / "moved.pt")
        (tmp_path / "changed.pt").write_bytes(b"other")
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "config.json").write_text("{}")
    entries = writer.finish()
    assert entries == {}
    adopt(tmp_path, entries)
    assert entries == {name: read_entry(tmp_path / name) for name in ("changed.pt", "moved.pt", "sub/config.json")}


@pytest.mark.usefixtures("limited")
def test_what_the_disk_refuses_is_told_in_its_own_words(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    with writer.capture(), pytest.raises(OSError, match="File too large"):
        torch.save(torch.zeros(1_000_000), tmp_path / "optimizer.pt")
    with writer.capture(), pytest.raises(OSError, match="File too large"):
        save_file({"w": torch.zeros(1_000_000)}, tmp_path / "model.safetensors")
    assert writer.finish() == {}
