"""The checkpoint store: stage, seal, publish; find the newest that verifies; make room inside the budget.

A save is collective. All ranks write into `checkpoints/.staging/checkpoint-<step>`, each flushes what it wrote, rank 0
seals it with a manifest and publishes it by a rename. Whatever is killed on the way leaves either the staging
directory, which the next attempt sweeps, or a whole checkpoint.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from outlast.errors import CheckpointError, Exit
from outlast.ledger import Record
from outlast.ranks import Agreement
from outlast.rundir import RunDirectory, flush_directory
from outlast.storage import bytes_used

from .manifest import MANIFEST, Manifest, flush_files, read_manifest, seal, verify, write_manifest
from .retention import deletion_order

PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Sealed:
    """A sealed checkpoint on disk."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def bytes(self) -> int:
        return self.manifest.bytes


class CheckpointStore:
    """Checkpoints of one run.

    Args:
        budget_bytes: what the run directory may take; checkpoints are deleted to stay below it.
        record: how deletions, quarantines and failed saves reach the ledger.
    """

    def __init__(self, run: RunDirectory, agreement: Agreement, record: Record, *, budget_bytes: int) -> None:
        self._run, self._agreement, self._record = run, agreement, record
        self._budget = budget_bytes
        self.limit: int | None = None
        """The largest number of checkpoints to keep (`save_total_limit`); None: as many as the budget holds."""
        self.best_step: int | None = None
        """Step of the best checkpoint by the metric; it is never deleted."""

    @property
    def staging(self) -> Path:
        return self._run.checkpoints / ".staging"

    @property
    def trash(self) -> Path:
        return self._run.checkpoints / ".deleted"

    def path(self, step: int) -> Path:
        return self._run.checkpoints / f"{PREFIX}{step}"

    def sealed(self) -> list[Sealed]:
        """The sealed checkpoints, oldest step first. Directories without a manifest are not checkpoints."""
        found = []
        for entry in os.scandir(self._run.checkpoints):
            number = entry.name.removeprefix(PREFIX)
            if entry.name.startswith(PREFIX) and number.isdigit() and entry.is_dir(follow_symlinks=False):
                try:
                    found.append(Sealed(Path(entry.path), read_manifest(Path(entry.path))))
                except CheckpointError:
                    continue
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def sweep(self) -> None:
        """Remove what an earlier attempt left half-written or half-deleted (rank 0, before anything is saved)."""
        for path in (self.staging, self.trash):
            shutil.rmtree(path, ignore_errors=True)  # a network file system may keep a name for a moment

    def newest_verified(self) -> Sealed | None:
        """The newest checkpoint that verifies (rank 0). Newer ones that don't are moved to `quarantine/`."""
        steps = []
        for entry in os.scandir(self._run.checkpoints):
            number = entry.name.removeprefix(PREFIX)
            if entry.name.startswith(PREFIX) and number.isdigit():
                steps.append(int(number))
        for step in sorted(steps, reverse=True):
            path = self.path(step)
            try:
                manifest = verify(path)
                if manifest.world_size != self._agreement.world_size:
                    raise OtherWorldSizeError(step, manifest.world_size, self._agreement.world_size)
                return Sealed(path, manifest)
            except OtherWorldSizeError:
                raise
            except CheckpointError as error:
                self.quarantine(path, str(error))
        return None

    def quarantine(self, path: Path, reason: str) -> None:
        """Put a checkpoint aside with the reason in words; nothing is lost."""
        self._run.quarantine.mkdir(exist_ok=True)
        target, copies = self._run.quarantine / path.name, 1
        while target.exists():
            target, copies = self._run.quarantine / f"{path.name}.{copies}", copies + 1
        os.rename(path, target)
        (self._run.quarantine / f"{target.name}.reason.txt").write_text(reason + "\n")
        self._record("quarantined", checkpoint=path.name, reason=reason)

    def save(self, write: Callable[[Path], None], manifest: Manifest) -> Sealed:
        """Write, seal and publish one checkpoint; all ranks call it together.

        Args:
            write: called on every rank with an existing directory `checkpoint-<step>` (or `final`) in the staging
                area; writes this rank's files into it.
            manifest: what the checkpoint is; its list of files is filled in here. One of kind `final` is published as
                `final/`, the others as `checkpoints/checkpoint-<step>`.

        Raises:
            CheckpointError: on every rank, if any rank could not write; nothing is published, nothing is left.
        """
        target = self._run.final if manifest.kind == "final" else self.path(manifest.step)
        staged = self.staging / target.name
        problem = None
        if self._agreement.rank == 0:
            try:
                self.sweep()
                staged.mkdir(parents=True)
            except OSError as error:
                problem = f"rank 0: {error}"
        if self._agreement.all_ok(problem is None):
            try:
                write(staged)
                flush_files(staged)
            except Exception as error:
                problem = f"rank {self._agreement.rank}: {error}"
            if self._agreement.all_ok(problem is None):
                problem = self._publish(staged, target, manifest) if self._agreement.rank == 0 else None
                if self._agreement.all_ok(problem is None):
                    return Sealed(target, manifest)  # on rank 0 with its files; a late reader may not see them yet
        if self._agreement.rank == 0:
            self.sweep()
        raise CheckpointError(problem or "another rank could not write it")

    def _publish(self, staged: Path, target: Path, manifest: Manifest) -> str | None:
        try:
            manifest.time = time.time()
            seal(staged, manifest)
            if target == self._run.final and target.exists():
                shutil.rmtree(target)  # an attempt was killed between publishing it and saying "finished"
            elif target.exists():
                self.quarantine(target, "it stood, unsealed, where a new checkpoint was published")
            os.rename(staged, target)
            flush_directory(target.parent)
            shutil.rmtree(self.staging, ignore_errors=True)
        except OSError as error:
            return f"rank 0: {error}"
        return None

    def make_room(self, *, for_emergency: bool) -> bool:
        """Delete, in retention order, until one more checkpoint fits (rank 0), before it is written.

        Its size is taken to be that of the largest sealed one; the first is written without a question.

        Returns:
            Whether it fits. For an emergency save the answer is not asked for: it goes first.
        """
        sealed = self.sealed()
        need = max((checkpoint.bytes for checkpoint in sealed), default=0)
        order = deletion_order(sealed, self.best_step, keep_best=not for_emergency)
        at_best = bytes_used(self._run.path) - sum(checkpoint.bytes for checkpoint in order) + need
        if at_best > self._budget and not for_emergency:
            return False  # deleting all that may go would not do: keep it
        while True:
            over_limit = self.limit is not None and len(sealed) >= max(self.limit, 1) and bool(order)
            over_budget = bytes_used(self._run.path) + need > self._budget
            if not (over_limit or over_budget) or not order:
                return not over_budget
            victim = order.pop(0)
            sealed.remove(victim)
            self.delete(victim, "save_total_limit" if over_limit else "budget")

    def delete(self, checkpoint: Sealed, reason: str) -> None:
        """Delete a checkpoint, its manifest first, so that a half-deleted one is not taken for whole."""
        (checkpoint.path / MANIFEST).unlink()
        flush_directory(checkpoint.path)
        self.trash.mkdir(exist_ok=True)
        os.rename(checkpoint.path, self.trash / checkpoint.path.name)
        self._record("deleted", checkpoint=checkpoint.path.name, reason=reason)
        shutil.rmtree(self.trash, ignore_errors=True)

    def mark_pending(self, step: int) -> None:
        """Note in a sealed checkpoint that the evaluation due at its step has not been made (rank 0)."""
        manifest = read_manifest(self.path(step))
        if not manifest.pending_evaluation:
            write_manifest(self.path(step), replace(manifest, pending_evaluation=True))


class OtherWorldSizeError(CheckpointError):
    """The checkpoint was made by another number of ranks than is about to run."""

    exit_code = Exit.REFUSED

    def __init__(self, step: int, made_with: int, now: int) -> None:
        super().__init__(
            f"checkpoint-{step} was made by {made_with} rank(s) and this attempt has {now}. "
            f"Run it with parallel.nodes * parallel.ranks_per_node = {made_with}."
        )
