"""Stages, seals and publishes checkpoints, and finds the newest that verifies.

A save is collective. All ranks write into `checkpoints/.staging/checkpoint-<step>`, each flushes what it wrote, rank 0
seals it with a manifest and publishes it by a rename. A kill on the way leaves either the staging directory, which the
next attempt sweeps, or a whole checkpoint. (`files.staged_directory` is for one process, so it does not fit here.)
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outlast.deletion import delete
from outlast.errors import CheckpointError
from outlast.files import flush_directory, flush_tree, remove_temporaries
from outlast.ranks.collectives import Collectives
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger, Record

from .manifest import (
    MANIFEST,
    Kind,
    Manifest,
    NewerFormatError,
    Sealed,
    TransientError,
    UnreadableError,
    read_manifest,
    verify,
    write_manifest,
)
from .removal import Remover
from .room import KEPT, Room
from .space import Space
from .writer import OverBudgetError, Writer, adopt

RESTART = "Mend one, or put all aside and start from step 0 with checkpoint.allow=[restart]"
PREFIX = "checkpoint-"
FULL = (errno.ENOSPC, errno.EDQUOT)  # EFBIG is a limit on each file: deleting others would not help


class SaveError(CheckpointError):
    """A checkpoint could not be written.

    `disk_full` says that a rank found no space for it, and `over_budget` that it was the budget that had none.
    """

    def __init__(self, reason: str, *, disk_full: bool = False, over_budget: bool = False) -> None:
        super().__init__(reason)
        self.disk_full, self.over_budget = disk_full, over_budget


class CheckpointStore:
    """Checkpoints of one run.

    Args:
        record: appends to the ledger.
        space: the bytes of the run; checkpoints are deleted to stay within its budget.
        say: prints a line in the log.
    """

    def __init__(
        self,
        run: RunDirectory,
        collectives: Collectives,
        record: Record,
        space: Space,
        *,
        say: Callable[[str], None] = print,
    ) -> None:
        self._run, self._collectives, self._record, self._say = run, collectives, record, say
        self.space = space
        self._bytes_by_rank: list[int] = []
        self._remover = Remover(run, record, say)
        self._unreadable: set[Path] = set()
        self.room = Room(run, space, self._remover, self.sealed, self.quarantine, record, say)

    def path(self, step: int) -> Path:
        return self._run.checkpoints / f"{PREFIX}{step}"

    def sealed(self) -> list[Sealed]:
        """The sealed checkpoints, light ones too, oldest step first."""
        found = []
        for path in self._directories():
            try:
                found.append(Sealed(path, read_manifest(path, patient=path not in self._unreadable)))
            except (TransientError, UnreadableError):
                self._unreadable.add(path)  # waited for once
            except CheckpointError:
                continue
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def _directories(self) -> list[Path]:
        """The `checkpoint-<number>` directories, sealed or not; symbolic links are left out."""
        if not self._run.checkpoints.exists() and self._run.ledger.exists():  # not if the run itself has been moved
            return []
        with os.scandir(self._run.checkpoints) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if entry.name.startswith(PREFIX)
                and entry.name.removeprefix(PREFIX).isdigit()
                and entry.is_dir(follow_symlinks=False)
            ]

    def clean_up(self) -> None:
        """Remove what an earlier attempt left half-written or half-deleted (rank 0, before anything is saved)."""
        self._remover.remove_tree(self._run.staging)
        self._remover.recover()
        with contextlib.suppress(OSError):
            for written in (self._run.progress, self._run.losses, *(path / MANIFEST for path in self._directories())):
                remove_temporaries(written)

    # Reading ----------------------------------------------------------------------------------------------------

    def newest_verified(self, *, restart: bool = False) -> Sealed | None:
        """The newest checkpoint that can be resumed from and verifies (rank 0).

        What was never sealed, and newer ones that don't verify, are moved to `quarantine/`.

        Args:
            restart: if something was sealed but nothing verifies, quarantine all and return None.

        Raises:
            CheckpointError: something was sealed, by the ledger or by what is there, and nothing verifies. Nothing has
                been moved, since a restart is for the user to decide.
            NewerFormatError: a newer version of outlast has made one; nothing has been moved.
            TransientError: one can't be read just now; nothing has been moved.
        """
        sealed, unsealed, damaged = list[Sealed](), list[tuple[Path, str]](), list[tuple[Path, CheckpointError]]()
        for path in self._directories():
            try:
                sealed.append(Sealed(path, read_manifest(path)))
            except (NewerFormatError, TransientError):
                raise
            except CheckpointError as error:
                if isinstance(error, UnreadableError):
                    self._unreadable.add(path)
                if os.path.lexists(path / MANIFEST) or path in self._unreadable:
                    damaged.append((path, error))
                else:
                    unsealed.append((path, str(error)))
        newest = None
        for checkpoint in sorted((c for c in sealed if not c.light), key=lambda c: c.step, reverse=True):
            try:
                verify(checkpoint.path)
            except TransientError:
                raise
            except CheckpointError as error:
                damaged.append((checkpoint.path, error))
            else:
                newest = checkpoint
                self.room.verified.add(checkpoint.step)
                break
        before = self._sealed_before()
        lost = newest is None and (before is not None or bool(damaged))
        if lost:
            found = [f"{path.name}: {problem}" for path, problem in [*damaged, *unsealed]]
            reasons = "; ".join(found) or f"the ledger says that {before} was sealed, and none is there"
            if any(isinstance(problem, UnreadableError) for _, problem in damaged) and not restart:
                raise TransientError(f"none of its checkpoints can be read just now: {reasons}")
            if not restart:
                raise CheckpointError(
                    f"none of its checkpoints verifies, and a restart is not silently made: {reasons}. {RESTART}"
                )
            self._record("restarted", reason=reasons)
            self._say(f"WARNING: beginning at step 0, as checkpoint.allow says: {reasons}")
        for path, reason in unsealed:
            self.quarantine(path, reason, keep=lost)
        for path, problem in damaged:
            self.quarantine(path, str(problem), keep=lost or isinstance(problem, UnreadableError))
        return newest

    def _sealed_before(self) -> str | None:
        """Name of the last checkpoint that the ledger says was sealed, since the last restart from step 0."""
        for event in reversed(Ledger(self._run.ledger).read()):
            if event["event"] == "restarted":
                return None
            if event["event"] == "checkpoint" and event.get("kind") != Kind.FINAL:
                return f"{PREFIX}{event.get('step')}"
        return None

    def quarantine(self, path: Path, reason: str, *, keep: bool = False) -> None:
        """Move a checkpoint to `quarantine/`, with the reason in words; it still counts against the budget.

        Args:
            keep: it may be whole, or nothing else is left: it is the last thing to be deleted for space.
        """
        self._run.quarantine.mkdir(exist_ok=True)
        end, copies = KEPT if keep else "", 1
        target = self._run.quarantine / f"{path.name}{end}"
        while target.exists():
            target, copies = self._run.quarantine / f"{path.name}.{copies}{end}", copies + 1
        # In this order: after a kill in between, the next attempt finds the checkpoint in place and does this again.
        with contextlib.suppress(OSError):  # a full disk: the ledger has the reason too
            (self._run.quarantine / f"{target.name}.reason.txt").write_text(reason + "\n")
        self._record("quarantined", checkpoint=path.name, reason=reason)
        self._say(f"WARNING: {path.name} is put aside in quarantine/: {reason}")
        try:
            if not path.is_symlink():
                os.chmod(path, path.stat().st_mode | 0o700)  # a directory that may not be written to can't be moved
            os.rename(path, target)
        except OSError as error:
            self._say(f"WARNING: {path.name} could not be moved and stays where it is: {error}")

    # Saving -----------------------------------------------------------------------------------------------------

    def save(self, write: Callable[[Path], None], manifest: Manifest) -> Sealed:
        """Write, seal and publish one checkpoint; all ranks call it together.

        Args:
            write: called on every rank with an existing directory `checkpoint-<step>` (or `final`) in the staging
                area; writes this rank's files into it.
            manifest: what the checkpoint is; its list of files is filled in here. One of kind `final` is published as
                `final/`, the others as `checkpoints/checkpoint-<step>`.

        Raises:
            SaveError: on every rank, if any rank could not write; nothing is published, nothing is left.
        """
        target = self._run.final if manifest.kind == Kind.FINAL else self.path(manifest.step)
        staged = self._run.staging / target.name
        manifest.files = {}

        def stage() -> int:
            if self._collectives.rank == 0:
                self._remover.remove_tree(self._run.staging)
                self._remover.retry()
                if not self._run.checkpoints.exists():
                    self._say(f"WARNING: {self._run.checkpoints} was deleted; it is made again, without what was in it")
                staged.mkdir(parents=True)
            return self.space.free() if self._collectives.rank == 0 else 0

        def fill() -> dict[str, Any]:
            writer = Writer(staged, self._allowance(free, manifest.kind))
            with writer.capture():
                write(staged)
            return writer.entries()

        try:
            free = self._together(stage)[0]
            written = self._together(fill)
            for entries in written:
                manifest.files |= entries
            self._bytes_by_rank = [sum(int(e["bytes"]) for e in entries.values()) for entries in written]
            others = set(manifest.files) - set(written[self._collectives.rank])
            # Every rank does so: on a network file system only the node that wrote a file can flush it.
            self._together(lambda: flush_tree(staged, others))
            self._together(lambda: self._publish(staged, target, manifest) if self._collectives.rank == 0 else None)
        except SaveError:
            if self._collectives.rank == 0:
                self._remover.remove_tree(self._run.staging)
            raise
        return Sealed(target, manifest)

    def _allowance(self, free: int, kind: str) -> int:
        """The part of `free` bytes that this rank may write: all that the others did not write the last time.

        Before the first save, rank 0 may write all, since it writes most, and any other rank an equal share: it writes
        one shard or next to nothing. `_publish` checks the sum.
        """
        if kind == Kind.FINAL or not self._bytes_by_rank:
            return max(free, 0) // (self._collectives.world_size if self._collectives.rank else 1)
        others = sum(self._bytes_by_rank) - self._bytes_by_rank[self._collectives.rank]
        return max(free - others, 0)

    def _together(self, act: Callable[[], Any]) -> list[Any]:
        """Call `act` on every rank; return all results by rank, or raise SaveError for the first failure everywhere."""
        value = problem = cause = None
        try:
            value = act()
        except Exception as error:
            cause, full = error, isinstance(error, OSError) and error.errno in FULL
            # torch reports what its file refused as a RuntimeError of its own
            full |= any(os.strerror(number) in str(error) for number in FULL)
            text = f"rank {self._collectives.rank}: {str(error).strip() or repr(error)}"
            problem = (text, full, isinstance(error, OverBudgetError))
        answers = self._collectives.from_all((value, problem))
        if problems := [problem for _, problem in answers if problem is not None]:
            full, over = any(full for _, full, _ in problems), any(over for _, _, over in problems)
            raise SaveError(problems[0][0], disk_full=full, over_budget=over) from cause
        return [value for value, _ in answers]

    def _publish(self, staged: Path, target: Path, manifest: Manifest) -> None:
        adopt(staged, manifest.files)
        if self.space.used() > self.space.budget():
            raise OverBudgetError
        manifest.time = time.time()
        write_manifest(staged, manifest)
        flush_directory(staged.parent)
        if target == self._run.final:
            delete(target, inside=self._run.path)  # an attempt was killed between publishing it and saying "finished"
        elif os.path.lexists(target):
            self.quarantine(target, "it stood, unsealed, where a new checkpoint was published")
        os.rename(staged, target)
        try:
            flush_directory(target.parent)
        except OSError as error:  # it is sealed: after a power loss the one before it may be the newest, no more
            self._say(f"WARNING: {target.name} is saved, but its name could not be flushed to disk: {error}")
        self._remover.remove_tree(self._run.staging)

    def mark_pending(self, step: int) -> None:
        """Note in a sealed checkpoint that the evaluation due at its step has not been made (rank 0)."""
        manifest = read_manifest(self.path(step))
        if not manifest.pending_evaluation:
            manifest.pending_evaluation = True
            write_manifest(self.path(step), manifest)
