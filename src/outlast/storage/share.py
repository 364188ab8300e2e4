"""The bytes that a run may use: its own budget, and at most its share of a sweep's.

What the finished cells use is subtracted from `storage.sweep_budget_gb`; the rest is divided over the cells that have
not finished, so a cell that finishes below its share leaves more to the others. One that was left with more than its
share (the sweep has grown since) keeps that, and the others share what is left. No account is kept: each cell looks at
the shared directory when it needs to know. An outdated look gives a smaller share, never a larger one, since a
finished cell uses no more than its share was; so the sum stays below the budget without a lock.
"""

from pathlib import Path

from outlast.config.storage import StorageSection
from outlast.errors import OutlastError
from outlast.files import bytes_used
from outlast.rundir.attempts import finished
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.rundir.progress import read
from outlast.rundir.sweep import SWEEP_MANIFEST, read_sweep_manifest


class Share:
    """The bytes that one run directory may take; call it to ask.

    While the sweep's directory does not answer, the last answer counts.

    Args:
        storage: the run's configuration.

    Raises:
        OSError: (the call) the sweep can't be read, and was not before.
    """

    def __init__(self, run: RunDirectory, storage: StorageSection) -> None:
        self._run, self._storage = run, storage
        self._finished: dict[str, int] = {}  # the bytes of a finished cell do not change
        self._last: int | None = None

    def __call__(self) -> int:
        total = self._storage.sweep_budget_bytes
        sweep = self._run.path.parent
        if total is None or not (sweep / SWEEP_MANIFEST).is_file():
            return self._storage.budget_bytes
        try:
            names = [cell.directory for cell in read_sweep_manifest(sweep).cells]
        except OutlastError as error:
            if self._last is None:
                raise OSError(str(error)) from None
            return self._last
        for name in names:
            run = RunDirectory(sweep / name)
            if name not in self._finished and finished(Ledger(run.ledger).read()):
                self._finished[name] = bytes_used(run.path)
        left = total - _beside(sweep, set(names)) - sum(self._finished.values())
        others = [RunDirectory(sweep / name) for name in names if name not in self._finished]
        used = [_last_used(run) for run in others if run.path != self._run.path]
        self._last = min(self._storage.budget_bytes, _even_share(left, used))
        return self._last


def _even_share(left: int, used: list[int]) -> int:
    """Divide `left` bytes evenly over one cell and those that use `used`; who uses more than its share keeps it."""
    while True:
        each = max(left, 0) // (len(used) + 1)
        over = [size for size in used if size > each]
        if not over:
            return each
        left -= sum(over)
        used = [size for size in used if size <= each]


def _last_used(run: RunDirectory) -> int:
    """The bytes that a cell took when it last said so: to walk a thousand of them would take long."""
    progress = read(run)
    return progress.bytes_used if progress is not None else 0


def _beside(sweep: Path, cells: set[str]) -> int:
    """The bytes that the cells share: the code, the batch logs, the manifest."""
    entries = [entry for entry in sweep.iterdir() if entry.name not in cells]
    files = sum(entry.stat().st_size for entry in entries if entry.is_file() and not entry.is_symlink())
    return files + sum(bytes_used(entry) for entry in entries if entry.is_dir() and not entry.is_symlink())
