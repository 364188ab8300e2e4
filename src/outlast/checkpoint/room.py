"""Makes room for the next save: removes what `retention.py` says may go, until it fits the budget."""

from collections.abc import Callable
from pathlib import Path

from outlast.errors import CheckpointError
from outlast.files import bytes_used
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Record
from outlast.storage.budget import MARGIN

from .manifest import Kind, Sealed, TransientError, UnreadableError, verify
from .removal import Remover
from .retention import Removal, Retention, newest_full
from .space import Space

KEPT = ".kept"
"""Ends the name of what was put aside and is the last thing to go. It may be whole, or is all that there was."""


class Room:
    """Frees bytes of one run (rank 0).

    Args:
        sealed: lists the sealed checkpoints, light ones too, oldest step first.
        quarantine: puts a checkpoint aside, with the reason.
        record: appends to the ledger.
        say: prints a line in the log.
    """

    def __init__(
        self,
        run: RunDirectory,
        space: Space,
        remover: Remover,
        sealed: Callable[[], list[Sealed]],
        quarantine: Callable[[Path, str], None],
        record: Record,
        say: Callable[[str], None],
    ) -> None:
        self._run, self._space, self._remover = run, space, remover
        self._sealed, self._quarantine, self._record, self._say = sealed, quarantine, record, say
        self.retention = Retention()
        self.verified: set[int] = set()
        """Steps whose checkpoints this attempt has compared with their manifests."""
        self._replacing = self._replaced = 0

    def make_space(self, *, kind: Kind, need: int | None = None) -> bool:
        """Free bytes, in the order of `retention.py`, until the next save fits the budget and the disk.

        Args:
            kind: an emergency or final save takes precedence over the best checkpoint.
            need: the bytes that must fit; None: those of the next save.

        Returns:
            Whether it fits the budget. If removing all that may go would not be enough, nothing is removed. Whether
            it fits the disk, the save will tell: others write there too, and a quota may not be seen.
        """
        need = self._space.need(self._sealed(), final=kind == Kind.FINAL) if need is None else need
        self._replacing, self._replaced = need, 0
        free = self._space.free()
        if free < need and free + self._freeable(kind) < need:
            return False
        while self._space.free() < need:
            if not self.free_some(kind=kind, reason="budget"):
                return False
        self._fit_disk(kind, need)
        return True

    def replace(self, *, kind: Kind, reason: str) -> bool:
        """Remove something more, since a save that should have fitted has found no space.

        A periodic save takes the place of as many bytes as it has itself, and only if there are so many that may go.
        If that does not help, others fill the disk as fast.

        Returns:
            Whether bytes were freed, so that the save is worth another try.
        """
        if kind == Kind.PERIODIC and (
            self._replaced >= self._replacing or self._replaced + self._freeable(kind) < self._replacing
        ):
            return False
        before = self._space.used()
        freed = self.free_some(kind=kind, reason=reason)
        self._replaced += max(before - self._space.used(), 0)
        return freed

    def _fit_disk(self, kind: Kind, need: int) -> None:
        """Remove as much as the disk has too little for `need` bytes, if so much may go."""
        free, before = self._space.free_on_disk(), self._space.used()
        missing = 0 if free is None else need + MARGIN - free
        if not 0 < missing <= self._freeable(kind):
            return
        while before - self._space.used() < missing and self.free_some(kind=kind, reason="disk full"):
            pass
        self._replaced += max(before - self._space.used(), 0)

    def _freeable(self, kind: Kind) -> int:
        """Bytes of all that may go for a save."""
        emergency, freed = kind != Kind.PERIODIC, dict[int, int]()
        for removal in self.retention.for_space(self._sealed(), emergency=emergency):
            checkpoint = removal.checkpoint
            freed[checkpoint.step] = checkpoint.bytes if removal.action == "delete" else checkpoint.resume_bytes
        aside = bytes_used(self._run.quarantine, skip_unreadable=True) + (self._space.reserved() if emergency else 0)
        return sum(freed.values()) + aside

    def free_some(self, *, kind: Kind, reason: str) -> bool:
        """Remove the next thing that frees bytes, if there is one left.

        First goes the reserve, unless the save is periodic; then what is in quarantine, oldest first; then what
        `retention.py` lists; last, what is in quarantine and may be whole.

        Returns:
            Whether bytes were freed.
        """
        emergency = kind != Kind.PERIODIC
        if emergency and self._space.give_up_reserve():
            self._record("deleted", checkpoint="reserve", reason=reason)
            return True
        aside = [p for p in self._run.quarantine.glob("*") if p.is_dir() and not p.is_symlink()]
        aside.sort(key=lambda p: p.stat().st_mtime)
        if self._remove_aside([p for p in aside if not p.name.endswith(KEPT)], reason):
            return True
        for removal in self.retention.for_space(self._sealed(), emergency=emergency):
            if self._remove(removal, reason, hurry=kind == Kind.EMERGENCY):
                return True
        return self._remove_aside([p for p in aside if p.name.endswith(KEPT)], reason)

    def _remove_aside(self, paths: list[Path], reason: str) -> bool:
        """Remove the first of these directories in quarantine that can be removed."""
        for path in paths:
            if self._remover.remove_tree(path):
                self._record("deleted", checkpoint=f"quarantine/{path.name}", reason=reason)
                return True
        return False

    def keep_reserve(self) -> None:
        """Set bytes aside for an emergency save if `storage.reserve` asks for it."""
        if problem := self._space.keep_reserve(self._sealed()):
            self._say(f"no reserve for an emergency save: {problem}")

    def retire(self) -> None:
        """Remove, after a save, what neither `save_total_limit` nor milestones keep."""
        for removal in self.retention.beyond_limit(self._sealed()):
            self._remove(removal, "save_total_limit", hurry=False)

    def _remove(self, removal: Removal, reason: str, *, hurry: bool) -> bool:
        checkpoint = removal.checkpoint
        if not self._may_go(checkpoint.step, hurry=hurry):
            return False
        self.verified.discard(checkpoint.step)
        act = self._remover.delete if removal.action == "delete" else self._remover.lighten
        return act(checkpoint, reason)

    def _may_go(self, step: int, *, hurry: bool) -> bool:
        """Whether a checkpoint that this attempt has verified would be left without the one at `step`.

        If none has been verified yet, the newest is, from disk; in a hurry, nothing is read.
        """
        sealed = self._sealed()
        newest = newest_full(sealed)
        if newest is None or newest.step == step:
            return False
        self.verified &= {checkpoint.step for checkpoint in sealed}  # others delete, too
        if self.verified - {step}:
            return True
        if hurry:
            return step not in self.verified
        try:
            verify(newest.path, from_disk=True)
        except (TransientError, UnreadableError) as error:
            self._say(f"WARNING: {newest.path.name}: {error}; nothing older is deleted meanwhile")
            return False
        except CheckpointError as error:
            self._quarantine(newest.path, str(error))
            return False
        self.verified.add(newest.step)
        return True
