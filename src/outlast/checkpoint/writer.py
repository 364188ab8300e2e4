"""Writes the files of a checkpoint, and digests them while they are written.

A save calls code that outlast does not own: the Trainer, accelerate, PEFT, DeepSpeed, a user's own function. While
:meth:`Writer.capture` is active, `torch.save` and safetensors' `serialize_file`, called by any of them with a path in
the staged directory, write here instead of to the file. What comes out is what they would have written: `optimizer.pt`
is read by a plain `torch.load`, `model.safetensors` by a plain `from_pretrained`. The few files that a library writes
by other means (JSON, a tokenizer) are read back once, when all ranks have written.
"""

import ctypes
import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import xxhash

from .direct_io import DirectFile
from .manifest import FileEntry, entry_of, read_entry

CHUNK = 1 << 20
"""Bytes digested and then copied at a time: few enough that the copy finds them in the CPU's cache."""


class OverBudgetError(OSError):
    """The budget, not the disk, has no room for these bytes."""

    def __init__(self) -> None:
        super().__init__(errno.EDQUOT, "storage.budget_gb does not allow so many bytes")


class DigestingFile:
    """A file written from start to end; only `files.flush_tree` makes sure that it is on disk."""

    def __init__(
        self, path: Path, spend: Callable[[int], None], done: Callable[[FileEntry, os.stat_result], None]
    ) -> None:
        self._file = DirectFile(path)
        self._spend, self._done = spend, done
        self._digest = xxhash.xxh3_128()
        self._size = 0
        self.failure: OSError | None = None
        """The disk's error; `torch.save` replaces it by one of its own, which doesn't say why."""

    def write(self, data: Any) -> int:
        """Append the bytes of any object with a buffer; return their number."""
        view = memoryview(data).cast("B")
        try:
            self._spend(len(view))
            for start in range(0, len(view), CHUNK):
                part = view[start : start + CHUNK]
                self._digest.update(part)
                self._file.write(part)
        except OSError as error:
            self.failure = error
            raise
        self._size += len(view)
        return len(view)

    def flush(self) -> None:
        """Do nothing: `torch.save` calls this, but the flush comes at the end."""

    def __enter__(self) -> "DigestingFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                self._done(entry_of(self._size, self._digest), os.fstat(self._file.fd))
        finally:
            self._file.close()


class Writer:
    """Writes one rank's files of one checkpoint.

    Args:
        directory: the staged directory, which exists.
        allowance: bytes that this rank may write; None: any number. More is refused as on a full disk (EDQUOT).
    """

    def __init__(self, directory: Path, allowance: int | None = None) -> None:
        self.directory = Path(os.path.abspath(directory))
        self._allowance = allowance
        self._written: dict[Path, tuple[FileEntry, os.stat_result]] = {}

    def open(self, path: Path) -> DigestingFile:
        """Open a new file at `path`, inside the directory, in place of one that is there."""
        return DigestingFile(path, self._spend, lambda *written: self._written.__setitem__(path, written))

    def _spend(self, count: int) -> None:
        if self._allowance is not None:
            self._allowance -= count
            if self._allowance < 0:
                raise OverBudgetError

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Route `torch.save` and safetensors' files with a path in the directory through this writer."""
        import safetensors.torch
        import torch

        save, serialize = torch.save, safetensors.torch.serialize_file
        crc = torch.serialization.get_crc32_options()

        def routed_save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
            path = self._mine(f)
            if path is None:
                save(obj, f, *args, **kwargs)
            else:
                with self.open(path) as file:
                    try:
                        save(obj, cast(IO[bytes], file), *args, **kwargs)
                    except RuntimeError as error:
                        raise file.failure or error from None

        def routed_serialize(tensors: dict[str, Any], filename: Any, metadata: dict[str, str] | None = None) -> None:
            path = self._mine(filename)
            if path is None:
                serialize(tensors, filename, metadata=metadata)
            else:
                with self.open(path) as file:
                    _write_safetensors(file, tensors, metadata)

        torch.save, safetensors.torch.serialize_file = routed_save, routed_serialize
        # The digest stands in for the zip file's own checksums, which are slower than the disk; no reader needs them.
        torch.serialization.set_crc32_options(False)
        try:
            yield
        finally:
            torch.save, safetensors.torch.serialize_file = save, serialize
            torch.serialization.set_crc32_options(crc)

    def entries(self) -> dict[str, FileEntry]:
        """`{relative path: entry}` of the files that were written through :meth:`open` and not touched since."""
        entries = {}
        for path, (entry, then) in self._written.items():
            now = path.stat() if path.exists() else None
            if now and (now.st_ino, now.st_size, now.st_mtime_ns) == (then.st_ino, then.st_size, then.st_mtime_ns):
                entries[path.relative_to(self.directory).as_posix()] = entry
        return entries

    def _mine(self, f: Any) -> Path | None:
        if not isinstance(f, str | os.PathLike):
            return None
        path = Path(os.path.abspath(os.fspath(f)))
        return path if path.is_relative_to(self.directory) else None


def adopt(directory: Path, entries: dict[str, FileEntry]) -> None:
    """Add entries for the files that no writer has reported, by reading them (rank 0, after all ranks)."""
    names = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    entries |= {name: read_entry(path) for name, path in sorted(names.items()) if name not in entries}


def _write_safetensors(file: DigestingFile, tensors: dict[str, Any], metadata: dict[str, str] | None) -> None:
    """Write the safetensors format: length of the header, header, tensors one after the other.

    Widest elements first, so that each tensor is aligned; by name among equals.

    Args:
        tensors: `{name: TensorSpec}`, with the address and length of each tensor's bytes.
    """

    def order(item: tuple[str, Any]) -> tuple[int, str, str]:
        bits = re.search(r"\d+", item[1].dtype)
        return -int(bits.group() if bits else 8), item[1].dtype, item[0]

    ordered, header, offset = sorted(tensors.items(), key=order), {}, 0
    for name, spec in ordered:
        end = offset + spec.data_len
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    values = ({"__metadata__": metadata} if metadata is not None else {}) | header
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, spec in ordered:
        if spec.data_len:
            file.write((ctypes.c_char * spec.data_len).from_address(spec.data_ptr))
