"""Deletes and lightens checkpoints so that a kill at any instant leaves each one whole, light, or gone.

A checkpoint is renamed into the trash before its files are deleted. A deletion that fails is recorded in the ledger,
and tried again at the next save.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from outlast.deletion import delete
from outlast.errors import CheckpointError
from outlast.files import flush_directory
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Record

from .manifest import MANIFEST, Sealed, read_manifest, resume_only, write_manifest

UNSEALED = ".manifest.deleted"
"""The manifest's name in a checkpoint that is being deleted."""


class Remover:
    """Deletes and lightens the checkpoints of a run.

    Args:
        record: appends to the ledger.
        say: prints a line in the log.
    """

    def __init__(self, run: RunDirectory, record: Record, say: Callable[[str], None]) -> None:
        self._run, self._checkpoints, self._trash = run.path, run.checkpoints, run.trash
        self._record, self._say = record, say
        self._reported: set[str] = set()

    def delete(self, checkpoint: Sealed, reason: str) -> bool:
        """Delete a checkpoint: its manifest first, so that a half-deleted one is never taken for whole.

        Returns:
            Whether its bytes are free; if not, the ledger has the reason.
        """
        try:
            os.rename(checkpoint.path / MANIFEST, checkpoint.path / UNSEALED)
            flush_directory(checkpoint.path)
            self._throw_away(checkpoint.path)
        except OSError as error:
            return self._report(checkpoint.path.name, error)
        self._record("deleted", checkpoint=checkpoint.path.name, reason=reason)
        return self._empty_trash()

    def lighten(self, checkpoint: Sealed, reason: str) -> bool:
        """Delete what only a resume needs; the rest gets a new manifest and still verifies.

        Returns:
            As :meth:`delete`.
        """
        manifest = checkpoint.manifest
        kept = {name: entry for name, entry in manifest.files.items() if not resume_only(name)}
        light = replace(manifest, light=True, files=kept)
        try:
            write_manifest(checkpoint.path, light)
            self._finish_lightening(Sealed(checkpoint.path, light))
        except OSError as error:
            return self._report(checkpoint.path.name, error)
        self._record("lightened", checkpoint=checkpoint.path.name, reason=reason, bytes=checkpoint.resume_bytes)
        return True

    def recover(self) -> None:
        """Finish what an earlier attempt left half-deleted or half-lightened, and retry what could not be deleted."""
        for path in sorted(self._checkpoints.glob("checkpoint-*")):
            sealed, deleting = (os.path.exists(path / name) for name in (MANIFEST, UNSEALED))
            if path.is_symlink() or not (sealed or deleting):
                continue
            try:
                if not sealed:
                    self._throw_away(path)
                    self._record("deleted", checkpoint=path.name, reason="its deletion was interrupted")
                elif (manifest := read_manifest(path)).light:
                    self._finish_lightening(Sealed(path, manifest))
            except CheckpointError:
                continue  # its manifest can't be read: the store will quarantine it
            except OSError as error:
                self._report(path.name, error)
        self._empty_trash()

    def retry(self) -> None:
        """Retry the deletions that failed in this attempt."""
        if self._reported:
            self.recover()

    def _empty_trash(self) -> bool:
        gone = True
        if self._trash.is_dir():
            for path in sorted(self._trash.iterdir()):
                gone &= self.remove_tree(path)
            if gone:
                with contextlib.suppress(OSError):
                    delete(self._trash, inside=self._run)
        return gone

    def remove_tree(self, path: Path) -> bool:
        """Remove something of this run; a failure is recorded in the ledger once.

        Returns:
            Whether it is gone, or was not there.
        """
        try:
            delete(path, inside=self._run)
        except OSError as error:
            return self._report(path.name, error)
        return True

    def _throw_away(self, path: Path) -> None:
        self._trash.mkdir(exist_ok=True)
        target, copies = self._trash / path.name, 1
        while target.exists():
            target, copies = self._trash / f"{path.name}.{copies}", copies + 1
        os.rename(path, target)
        flush_directory(self._checkpoints)

    def _finish_lightening(self, checkpoint: Sealed) -> None:
        for path in sorted(checkpoint.path.rglob("*"), reverse=True):
            name = path.relative_to(checkpoint.path).as_posix()
            if resume_only(name) and name not in checkpoint.manifest.files and not path.is_dir():
                delete(path, inside=self._run)
                if path.parent != checkpoint.path and not any(path.parent.iterdir()):
                    delete(path.parent, inside=self._run)

    def _report(self, name: str, error: OSError) -> bool:
        reason = f"{error.filename or ''}: {error.strerror}".lstrip(": ")
        if name not in self._reported:
            self._reported.add(name)
            self._record("delete_failed", checkpoint=name, reason=reason)
            self._say(f"WARNING: could not delete {name}: {reason}; it still takes room, and is tried again")
        return False
