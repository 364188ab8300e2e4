"""How many checkpoints the byte budget has room for: by the plan's estimate, then by what a save really took."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from outlast.checkpoint.manifest import Sealed
from outlast.checkpoint.space import RECORDS
from outlast.checkpoint.store import CheckpointStore
from outlast.config.storage import StorageSection
from outlast.errors import BudgetError
from outlast.files import read_json
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Record
from outlast.storage.budget import Footprint, gb, margin, verdict, with_margin


class CheckpointLimit:
    """Keeps the store's `save_total_limit` to what the budget holds (on rank 0).

    Args:
        planned: what the plan expects the run to take; None for a run without a plan (a user's own script).
        say: prints a line in the log.
    """

    def __init__(
        self,
        store: CheckpointStore,
        storage: StorageSection,
        planned: Footprint | None,
        record: Record,
        say: Callable[[str], None],
    ) -> None:
        self._store, self._reserve, self._record, self._say = store, storage.reserve, record, say
        self._footprint, self._measured = planned, False
        self._asked: int | None = None

    @property
    def expected_bytes(self) -> int | None:
        """What a checkpoint takes, by what was measured, else by the plan; None: not known."""
        return self._footprint.checkpoint_bytes if self._footprint else None

    def begin(self) -> None:
        """Take the limit that the user asked for as an upper bound, and set the one that holds.

        Raises:
            BudgetError: as :meth:`check`.
        """
        self._asked = self._store.room.retention.limit
        whole = [c for c in self._store.sealed() if not c.light]
        if whole:
            self._measure(whole[-1])
        self.check()
        self.apply()

    def check(self, coming: Mapping[str, int] | None = None) -> None:
        """See that the budget holds what is there and what is to come: else no save would be made.

        Args:
            coming: bytes that are about to be written beside the checkpoints, by part.

        Raises:
            BudgetError: it does not; the message has the arithmetic.
        """
        there, budget = self._store.space.beside_by_part(), self._store.space.budget()
        there |= {part: there.get(part, 0) + size for part, size in (coming or {}).items()}
        if self._footprint is None:  # its checkpoints are of a size that only the first one will tell
            if sum(there.values()) + margin(budget) >= budget:
                raise self.too_small("nothing is left for a checkpoint", there)
            return
        whole = replace(self._footprint, fixed=there)
        found, saves = (
            verdict(one, budget, reserve=reserve)
            for one, reserve in ((whole, self._reserve), (replace(whole, final={}), False))
        )
        why = f"the run needs {found.arithmetic}; storage.budget_gb={found.smallest_gb:g} or more does"
        final = with_margin(whole.fixed_bytes + whole.checkpoint_bytes + whole.final_bytes)
        if not saves.fits or final > budget:
            raise self.too_small(why, there)
        if not found.fits:  # by a little: an estimate was off
            self._say(f"WARNING: storage.budget_gb is tight by what was measured: {why}")

    def too_small(self, why: str, there: Mapping[str, int] | None = None) -> BudgetError:
        """Make the error for a budget that can't hold this run.

        Args:
            there: bytes beside the checkpoints, by part; None: those that are there now.
        """
        space = self._store.space
        parts = space.beside_by_part() if there is None else there
        taken = ", ".join(f"{name} {gb(size)}" for name, size in sorted(parts.items(), key=lambda p: -p[1]) if size)
        return BudgetError(
            f"storage.budget_gb is too small by what was measured: of {gb(space.budget())} for this run, {taken} are "
            f"taken beside its checkpoints, and {why}. Raise it, or make room in {self._store.path(0).parent.parent}; "
            "the same command then goes on"
        )

    def saved(self, sealed: Sealed) -> None:
        """Replace the estimate by the size of the attempt's first checkpoint, and say how far it was off."""
        if self._measured:
            return
        estimate = self._footprint
        files = self._measure(sealed)
        limit = self.apply()
        off = estimate.deviations(files) if estimate is not None and estimate.checkpoint else {}
        self._record("measured", bytes=self.expected_bytes, save_total_limit=limit, off=off)
        for part, (expected, found) in off.items():
            self._say(f"WARNING: {part} of a checkpoint takes {gb(found)}; the plan expected {gb(expected)}")

    def apply(self) -> int | None:
        """Keep no more checkpoints than the budget has room for, with one in flight and the finished model.

        A cell's share of its sweep's budget grows, so the answer may change.
        """
        if self._footprint is None:
            return None
        budget, retention = self._store.space.budget(), self._store.room.retention
        found = verdict(self._footprint, budget, save_total_limit=self._asked, reserve=self._reserve)
        limit = max(found.save_total_limit, 1)
        if found.lowered and retention.limit != limit:
            self._say(f"save_total_limit is {limit}: more do not fit into {gb(budget)}")
        retention.limit = limit
        return limit

    def _measure(self, sealed: Sealed) -> dict[str, int]:
        self._measured = True
        files = {name: int(entry["bytes"]) for name, entry in sealed.manifest.files.items()}
        model, there = {"weights": sealed.bytes - sealed.resume_bytes}, self._store.space.beside_by_part()
        estimate = self._footprint or Footprint(final=model)
        there[RECORDS] = max(there.get(RECORDS, 0), estimate.fixed.get(RECORDS, 0))  # they are still to grow
        self._footprint = replace(estimate.measured(files), fixed=there)
        return files


def planned_footprint(run: RunDirectory) -> Footprint | None:
    """What the plan expects the run to take; None for a run without a plan."""
    try:
        return Footprint.from_dict((read_json(run.plan) or {})["storage"]["parts"])
    except (ValueError, KeyError, TypeError):
        return None
