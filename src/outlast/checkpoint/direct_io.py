"""Writes files as fast as the disk can take them: in aligned pieces, past the page cache, from a thread.

Writing a gigabyte through the page cache touches a gigabyte of new memory, which is slower than the disk; the pieces
here are touched once and reused. Small files are written as usual, and so is every file where the file system lacks
`O_DIRECT` (tmpfs, some network file systems).
"""

import ctypes
import errno
import fcntl
import functools
import mmap
import os
import queue
import threading
from collections import deque
from pathlib import Path
from typing import Any

PIECE = 1 << 23
"""Bytes handed to the disk at a time."""
ALIGN = 4096
"""With `O_DIRECT`, offsets, lengths and addresses must be multiples of this on every disk we know."""
IN_FLIGHT = 2
"""Pieces that wait for the disk while the next is filled."""

_SYNC_FILE_RANGE_WRITE = 2
_free: deque[mmap.mmap] = deque(maxlen=IN_FLIGHT + 2)


class DirectFile:
    """A new file, written from start to end; only an `fsync` makes sure that it is on disk.

    Raises (each method):
        OSError: the disk refused this write or an earlier one.
    """

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._piece, self._filled = _take(), 0
        self._offset, self._direct = 0, False
        self._full: queue.Queue[tuple[mmap.mmap, int] | None] = queue.Queue(IN_FLIGHT)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def write(self, view: memoryview) -> None:
        """Append bytes; they are copied, so the caller may change them afterwards."""
        while view:
            self._check()
            count = min(PIECE - self._filled, len(view))
            self._piece[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == PIECE:
                self._hand_over()

    def flush(self) -> None:
        """Wait until the kernel has everything."""
        if self._thread is None:
            if self._filled:
                self._put(memoryview(self._piece)[: self._filled])
        else:
            self._full.put((self._piece, self._filled))
            self._full.put(None)
            self._thread.join()
            self._thread, self._piece = None, _take()
        self._filled = 0
        self._check()

    def close(self) -> None:
        """Close the file, also after a failure."""
        try:
            if self._thread is not None:
                self._failure = self._failure or OSError(errno.ECANCELED, "closed before it was whole")
                self._full.put(None)
                self._thread.join()
        finally:
            os.close(self.fd)
            _free.append(self._piece)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _hand_over(self) -> None:
        if self._thread is None:
            self._set_direct(True)
            self._thread = threading.Thread(target=self._drain, daemon=True)
            self._thread.start()
        self._full.put((self._piece, self._filled))
        self._piece, self._filled = _take(), 0

    def _drain(self) -> None:
        while (item := self._full.get()) is not None:
            piece, size = item
            try:
                if self._failure is None:
                    self._put(memoryview(piece)[:size])
            except Exception as error:  # if this thread ended early, the writer would wait for ever
                self._failure = error
            _free.append(piece)

    def _put(self, view: memoryview) -> None:
        while view:
            if self._direct and len(view) < ALIGN:
                self._set_direct(False)  # the end of the file
            part = view[: len(view) // ALIGN * ALIGN] if self._direct else view
            try:
                written = os.pwrite(self.fd, part, self._offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._set_direct(False)
                continue
            if written % ALIGN:
                self._set_direct(False)
            if not self._direct:
                _begin_write_back(self.fd, self._offset, written)
            self._offset += written
            view = view[written:]

    def _set_direct(self, on: bool) -> None:
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
        except OSError:
            return  # a file system without it
        self._direct = on


def _take() -> mmap.mmap:
    try:
        return _free.pop()
    except IndexError:
        piece = mmap.mmap(-1, PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        piece[:] = bytes(PIECE)  # touched now, so that the first save does not pay for it piece by piece
        return piece


def _begin_write_back(fd: int, offset: int, count: int) -> None:
    # A hint: where the C library or the file system lacks it, the flush at the end does all the work.
    call = _sync_file_range()
    if call is not None:
        call(fd, ctypes.c_int64(offset), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Any:
    return getattr(ctypes.CDLL(None), "sync_file_range", None)
