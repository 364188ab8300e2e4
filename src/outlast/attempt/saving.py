"""When this attempt saves, and what happens when it does: room in the budget, the store, the ledger."""

from collections.abc import Callable
from pathlib import Path

from outlast import clock
from outlast.checkpoint.interval import SaveInterval
from outlast.checkpoint.manifest import Kind, Manifest, Sealed, versions
from outlast.checkpoint.store import CheckpointStore, SaveError
from outlast.config.checkpoint import CheckpointSection
from outlast.errors import BudgetError, CheckpointError
from outlast.preemption.repeats import will_repeat
from outlast.ranks.collectives import Collectives
from outlast.rundir.ledger import Event, Record

from .limit import CheckpointLimit
from .resuming import Resuming

NO_SPACE = "it would exceed storage.budget_gb, and no older checkpoint may be deleted"


class Saver:
    """Saves for one attempt; all ranks call each method together, but for :meth:`due`.

    Args:
        resuming: knows what the run is, which each manifest says.
        section: when periodic saves are due.
        record: appends to the ledger (rank 0 only).
        say: prints a line in the log (rank 0 only).
    """

    def __init__(
        self,
        collectives: Collectives,
        store: CheckpointStore,
        limit: CheckpointLimit,
        resuming: Resuming,
        section: CheckpointSection,
        record: Record,
        say: Callable[[str], None],
    ) -> None:
        self._collectives, self._store, self._limit, self._resuming = collectives, store, limit, resuming
        self._section, self._record, self._say = section, record, say
        self._interval: SaveInterval | None = None
        self._saved_one = False

    def begin(self, events: list[Event], *, periodic: bool) -> None:
        """Count the time to the first periodic save from here: training begins.

        Args:
            events: the run's ledger.
            periodic: false if a Trainer decides when to save.

        Raises:
            BudgetError: no save of this attempt would fit the budget.
        """
        if periodic:
            self._interval = SaveInterval(self._section, events, clock.now())
        self._collectives.on_rank_0(self._limit.begin, BudgetError)

    def check_budget(self, coming: dict[str, int]) -> None:
        """See that the budget still holds the run with these bytes, by part, that are about to be written.

        Raises:
            BudgetError: it does not.
        """
        self._collectives.on_rank_0(lambda: self._limit.check(coming), BudgetError)

    def due_by_step(self, step: int) -> bool:
        """Whether a periodic save is due after `step` by its number, which all ranks answer alike.

        Milestones are, also where a Trainer decides when else to save.
        """
        milestone_every = self._section.milestone_every
        if self._interval is None:
            return milestone_every is not None and step % milestone_every == 0
        return self._interval.due_by_step(step)

    def due(self, step: int) -> bool:
        """Whether a periodic save is due after `step` (rank 0's answer counts)."""
        return self._interval is not None and self._interval.due(step, clock.now())

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        *,
        kind: Kind,
        asked_at: float | None = None,
        pending_evaluation: bool = False,
        best_step: int | None = None,
    ) -> Sealed | None:
        """Make one checkpoint.

        A save that finds the disk full makes room in the order of retention and tries again: an emergency save as long
        as anything may go, a periodic one as far as it takes the place of an older one.

        Args:
            asked_at: when it was asked for (the signal), if that was before this call; by `outlast.clock`.
            best_step: step of the best by the metric, as known now.

        Returns:
            The sealed checkpoint, or None if it could not be written: the ledger says why, and what was there stands.

        Raises:
            CheckpointError: this attempt's first save failed for a reason of the program, as the others would.
            BudgetError: the budget can't hold this attempt's first save, or, by what was measured now, a second one.
        """
        began = clock.now()
        manifest = Manifest(
            step=step,
            kind=kind,
            world_size=self._collectives.world_size,
            time=began,
            pending_evaluation=pending_evaluation,
            best_step=best_step,
            origin=self._resuming.origin,
            versions=versions(),
        )
        sealed, first = None, not self._saved_one
        fits = self._on_rank_0(lambda: self._store.room.make_space(kind=kind))
        may_write, over_budget = fits is True, fits is False
        reason = NO_SPACE if over_budget else "the file system did not let room be made"
        while may_write and sealed is None:
            try:
                sealed = self._store.save(write, manifest)
            except SaveError as error:
                reason, over_budget = str(error), error.over_budget
                self._end_if_all_fail(error, step, kind)
                why = "budget" if over_budget else "disk full"
                may_write = error.disk_full and self._make_more_room(kind, why)
        if sealed is None:
            self._record("checkpoint_failed", step=step, kind=kind, reason=reason)
            self._say(f"WARNING: {kind} checkpoint of step {step} was not written: {reason}")
            if first and over_budget and kind != Kind.FINAL:
                self._collectives.on_rank_0(lambda: self._refuse(step, reason), BudgetError)
            return None
        self._saved_one = True
        now = clock.now()
        self._record(
            "checkpoint",
            step=step,
            kind=kind,
            bytes=sealed.bytes,
            stall_s=now - began,
            sealed_s=now - (asked_at or began),
            run_bytes=self._store.space.peak,
        )
        if self._collectives.rank == 0 and kind != Kind.FINAL:
            self._limit.saved(sealed)
        if kind == Kind.PERIODIC:
            if self._collectives.rank == 0:
                self._after_periodic(step, began)
            if first:
                self._collectives.on_rank_0(self._limit.check, BudgetError)
        return sealed

    def _refuse(self, step: int, reason: str) -> None:
        """Refuse to train on unsaved (rank 0)."""
        raise self._limit.too_small(f"this attempt's first checkpoint, of step {step}, does not fit: {reason}")

    def _end_if_all_fail(self, error: SaveError, step: int, kind: Kind) -> None:
        if self._saved_one or kind == Kind.FINAL:
            return
        mine = error.__cause__
        repeats = self._collectives.from_all(None if mine is None else will_repeat(mine))
        if not error.disk_full and all(answer is not False for answer in repeats):
            self._record("checkpoint_failed", step=step, kind=kind, reason=str(error))
            raise CheckpointError(
                f"this attempt's first checkpoint, of step {step}, can't be written, nor could those after it: {error}"
            ) from error

    def _after_periodic(self, step: int, began: float) -> None:
        try:
            self._limit.apply()
            self._store.room.retire()
            self._store.room.keep_reserve()
        except OSError as error:
            self._say(f"WARNING: older checkpoints could not be looked through: {error}")
        if self._interval is not None:
            now = clock.now()  # what was deleted to make place is part of what saving costs
            self._interval.saved(step, now - began, now)
            if changed := self._interval.changed():
                self._record("interval", **changed)
                self._say(f"checkpoints: {self._interval.explanation}")

    def _make_more_room(self, kind: Kind, why: str) -> bool:
        return self._on_rank_0(lambda: self._store.room.replace(kind=kind, reason=why)) is True

    def _on_rank_0(self, act: Callable[[], bool]) -> bool | None:
        """What `act` returns on rank 0, on every rank; None if the file system let it down."""
        try:
            return self._collectives.on_rank_0(act, OSError)
        except OSError as error:
            self._say(f"WARNING: could not make room: {error}")
            return None
