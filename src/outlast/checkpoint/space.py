"""The bytes of one run: what may be used, what is used, and what a save will need."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from outlast.deletion import delete
from outlast.files import bytes_used
from outlast.rundir.directory import RunDirectory
from outlast.storage.budget import RESERVE_EXTRA, margin
from outlast.storage.file_system import free_space

from .manifest import Sealed

RECORDS = "records and logs"
OTHER_FILES = "other files"
PARTS = {
    "code": "code",
    "prepared": "prepared data",
    **dict.fromkeys(("logs", "ledger.jsonl", "progress.json", "losses.json", "config.yaml", "plan.json", "job.sbatch",
                     ".lock", "submitted.json"), RECORDS),
}  # fmt: skip
"""What the entries of a run directory are, in words."""


class Space:
    """Counts everything in a run directory, from what is on disk at the moment it is asked.

    Args:
        budget: returns the bytes that the run directory may take; called each time, since sweep cells share a budget.
        estimate: bytes of one checkpoint and of the finished model, for saves before the first is measured; 0: unknown.
        reserve: keep a file as large as a checkpoint is on disk, and give it up when an emergency save needs its bytes.
        peak: the most that earlier attempts saw in use, bytes.
    """

    def __init__(
        self,
        run: RunDirectory,
        budget: Callable[[], int],
        *,
        estimate: tuple[int, int] = (0, 0),
        reserve: bool = False,
        peak: int = 0,
    ) -> None:
        self._run, self.budget, self._estimate, self._reserve = run, budget, estimate, reserve
        self.peak = peak
        """The most that was seen in use, bytes."""

    def used(self) -> int:
        """Bytes in use now: checkpoints, what is staged, quarantine, prepared data, logs, everything."""
        used = bytes_used(self._run.path, skip_unreadable=True)  # a quarantined directory may be
        self.peak = max(self.peak, used)
        return used

    def free(self) -> int:
        """Bytes that may still be written, the margin left out. Negative if too many are in use."""
        budget = self.budget()
        return budget - margin(budget) - self.used()

    def free_on_disk(self) -> int | None:
        """Bytes that the file system has left, quotas not counted; None if it does not say."""
        try:
            return free_space(self._run.path).free_bytes
        except OSError:
            return None

    def beside_by_part(self) -> dict[str, int]:
        """Bytes of what stays for the whole run, by part: all but checkpoints, the finished model, and what may go."""
        parts: dict[str, int] = {}
        going = (self._run.checkpoints, self._run.quarantine, self._run.final, self._run.reserve)
        with os.scandir(self._run.path) as entries:
            for entry in entries:
                if Path(entry.path) in going or entry.is_symlink():
                    continue
                folder = entry.is_dir()
                part = PARTS.get(entry.name, f"{entry.name}/" if folder else OTHER_FILES)
                with contextlib.suppress(FileNotFoundError):  # a temporary file, renamed by now
                    size = bytes_used(Path(entry.path), skip_unreadable=True) if folder else entry.stat().st_size
                    parts[part] = parts.get(part, 0) + size
        return parts

    def need(self, sealed: Sequence[Sealed], *, final: bool = False) -> int:
        """Bytes that the next save takes: those of the largest whole checkpoint, or the estimate before the first.

        Args:
            final: it is the finished model, which is without what only a resume needs.
        """
        whole = [c for c in sealed if not c.light]
        if not whole:
            return self._estimate[1 if final else 0]
        return max(c.bytes - (c.resume_bytes if final else 0) for c in whole)

    def keep_reserve(self, sealed: Sequence[Sealed]) -> str | None:
        """Create the reserve file if it is wanted, missing, and fits.

        Returns:
            Why the wanted file could not be created, or None.
        """
        need = self.need(sealed)
        if not self._reserve or not need or self.reserved():
            return None
        size = need + RESERVE_EXTRA
        if self.free() < need + size:  # the next save goes before it
            return "storage.budget_gb has no room for it beside the next save"
        fd = os.open(self._run.reserve, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            self.give_up_reserve()
            return f"{error.strerror}"
        finally:
            os.close(fd)
        return None

    def reserved(self) -> int:
        """Bytes that :meth:`give_up_reserve` would free."""
        try:
            return self._run.reserve.stat().st_size
        except FileNotFoundError:
            return 0

    def give_up_reserve(self) -> bool:
        """Free the reserve file's bytes.

        Returns:
            Whether there were any.
        """
        return delete(self._run.reserve, inside=self._run.path)
