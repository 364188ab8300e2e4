"""The writer: digests of what was written, in files that the libraries' own readers read."""

import contextlib
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outlast.checkpoint.direct_io import ALIGN, IN_FLIGHT, PIECE
from outlast.checkpoint.manifest import read_entry
from outlast.checkpoint.writer import CHUNK, Writer, adopt

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
    entries = writer.entries()
    assert entries == {name: read_entry(tmp_path / name) for name in ("model.safetensors", "optimizer.pt")}
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    for mmap in (False, True):
        again = torch.load(tmp_path / "optimizer.pt", weights_only=True, mmap=mmap)
        assert torch.equal(again["exp_avg"], state["exp_avg"])


@pytest.mark.parametrize(
    "size", [0, 1, CHUNK - 1, ALIGN, PIECE - 8, PIECE - 7, PIECE, 2 * PIECE - 8, (IN_FLIGHT + 3) * PIECE + 5]
)
def test_pieces_of_any_size(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    writer = Writer(tmp_path)
    with writer.open(tmp_path / "file") as file:
        file.write(b"head")
        file.write(memoryview(data)[:size])
        file.write(b"tail")
    assert (tmp_path / "file").read_bytes() == b"head" + data[:size] + b"tail"
    assert writer.entries() == {"file": read_entry(tmp_path / "file")}


def test_outside_the_directory_nothing_is_routed(tmp_path: Path) -> None:
    inside = tmp_path / "staged"
    inside.mkdir()
    writer = Writer(inside)
    original = torch.save
    with writer.capture():
        torch.save(1, tmp_path / "elsewhere.pt")
        save_file(TENSORS, tmp_path / "elsewhere.safetensors")
    assert torch.save is original
    assert writer.entries() == {}
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
    entries = writer.entries()
    assert entries == {}
    adopt(tmp_path, entries)
    assert entries == {name: read_entry(tmp_path / name) for name in ("changed.pt", "moved.pt", "sub/config.json")}


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("numbers", [1_000_000, 20_000_000], ids=["in one piece", "by the thread"])
def test_what_the_disk_refuses_is_told_in_its_own_words(tmp_path: Path, numbers: int) -> None:
    writer, before = Writer(tmp_path), set(threading.enumerate())
    with writer.capture(), pytest.raises(OSError, match="File too large"):
        torch.save(torch.zeros(numbers), tmp_path / "optimizer.pt")
    with writer.capture(), pytest.raises(OSError, match="File too large"):
        save_file({"w": torch.zeros(numbers)}, tmp_path / "model.safetensors")
    assert writer.entries() == {}
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("numbers", [1_000_000, 20_000_000])
def test_no_more_than_allowed(tmp_path: Path, numbers: int) -> None:
    writer = Writer(tmp_path, allowance=4 * numbers - 1)
    with writer.capture(), pytest.raises(OSError, match=r"storage\.budget_gb does not allow"):
        torch.save(torch.zeros(numbers), tmp_path / "optimizer.pt")
    assert (tmp_path / "optimizer.pt").stat().st_size < 4 * numbers
    with Writer(tmp_path, allowance=10_000_000).capture():
        torch.save(torch.zeros(1_000), tmp_path / "optimizer.pt")


def test_many_files_at_once(tmp_path: Path) -> None:
    writer, data = Writer(tmp_path), bytes(range(256)) * (PIECE // 128)
    files = [writer.open(tmp_path / str(i)) for i in range(8)]
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(file)
        for start in range(0, len(data), 100_000):
            for file in files:
                file.write(memoryview(data)[start : start + 100_000])
    assert all((tmp_path / str(i)).read_bytes() == data for i in range(8))
    assert len(writer.entries()) == 8
