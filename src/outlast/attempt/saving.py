"""When this attempt saves, and what happens when it does: room, the store, the ledger; and what it resumes from."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outlast.checkpoint import compatibility as origin
from outlast.checkpoint.compatibility import origin_of
from outlast.checkpoint.interval import Cadence
from outlast.checkpoint.manifest import Manifest, PassingError, Sealed, versions
from outlast.checkpoint.space import Room
from outlast.checkpoint.store import CheckpointStore, SaveError
from outlast.config.sections import CheckpointSection, StorageSection
from outlast.errors import CheckpointError, ResumeRefusedError
from outlast.ranks.collectives import Agreement
from outlast.ranks.layout import Layout, layout
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Event, Record
from outlast.rundir.progress import read
from outlast.storage.budget import Footprint, gb, verdict
from outlast.storage.share import Share

PROBLEMS = (ResumeRefusedError, PassingError, CheckpointError, OSError)
"""What rank 0 may find when it looks for a checkpoint, the special before the general; all ranks raise it."""
NO_ROOM = "it would exceed storage.budget_gb, and no older checkpoint may be deleted"


class Saver:
    """Saves and resumes for one attempt; all ranks call each method together, but for :meth:`due`.

    Args:
        say: prints a line in the log (rank 0 only).
        section: when periodic saves are due, and what may differ on resume.
        storage: what the run directory may take.
        loop_saves: when to save is up to the training loop.
    """

    def __init__(
        self,
        run: RunDirectory,
        agreement: Agreement,
        record: Record,
        say: Callable[[str], None],
        *,
        section: CheckpointSection,
        storage: StorageSection,
        loop_saves: bool,
    ) -> None:
        self._agreement, self._record, self._say = agreement, record, say
        self._section, self._loop_saves = section, loop_saves
        self._cadence: Cadence | None = None
        self._asked_limit: int | None = None
        self._run, self._asked_accumulation = run, 0
        self._footprint, self._reserve, self._measured = _planned(run), storage.reserve, False
        before, estimate = read(run), self._footprint or Footprint()
        room = Room(
            run,
            Share(run, storage),
            estimate=(estimate.checkpoint_bytes, estimate.final_bytes),
            reserve=storage.reserve,
            peak=before.bytes_peak if before else 0,
        )
        self.store = CheckpointStore(run, agreement, record, room, say=say)
        self.store.retention.milestone_every = section.milestone_every
        self.origin: dict[str, Any] = {"world_size": agreement.world_size}
        """What this run is, as far as a checkpoint depends on it."""
        self.newest_step: int | None = None
        """Step of the newest checkpoint that can be resumed from."""
        self.differences: dict[str, str] = {}
        """What of the origin has changed since that checkpoint, in words, by name."""
        self._made: dict[str, Any] = {}
        self.layout: Layout | None = None
        """How the rows of a step are spread over the ranks; None if the loop does not leave that to the run."""

    def describe(self, accumulation: int | None = None, **origin: Any) -> None:
        """Say what this run is; see :meth:`outlast.Run.describe`."""
        self.origin |= {name: value for name, value in origin.items() if value is not None}
        if accumulation is not None:
            self._asked_accumulation = accumulation
            self._lay_out({"world_size": self._agreement.world_size})

    @property
    def agreed_layout(self) -> Layout:
        if self.layout is None:
            raise RuntimeError("run.layout: say run.describe(micro_batch=..., accumulation=...) first")
        return self.layout

    def _lay_out(self, made: dict[str, Any]) -> None:
        if not self._asked_accumulation:
            return
        ranks, micro_batch = self._agreement.world_size, int(self.origin["micro_batch"])
        self.layout = layout(made, ranks=ranks, micro_batch=micro_batch, accumulation=self._asked_accumulation)
        self.origin |= {"global_batch": self.layout.global_batch, "first": list(self.layout.first)}

    def begin(self, events: list[Event]) -> None:
        """Training begins: the time to the first periodic save runs from here.

        Args:
            events: the run's ledger.
        """
        self._asked_limit = self.store.retention.limit
        if not self._loop_saves:
            self._cadence = Cadence(self._section, events, time.time())
        if self._agreement.rank == 0:
            whole = [c for c in self.store.sealed() if not c.light]
            if whole:
                self._measure(whole[-1], say=False)
            elif self._footprint is not None:
                self._limit(self._footprint)

    @property
    def expected_bytes(self) -> int | None:
        """What a checkpoint takes, by what was measured, else by the plan; None: not known."""
        return self._footprint.checkpoint_bytes if self._footprint else None

    def due_by_step(self, step: int) -> bool:
        """Whether a periodic save is due after `step` by its number, which all ranks answer alike."""
        return self._cadence is not None and self._cadence.due_by_step(step)

    def due(self, step: int) -> bool:
        """Whether a periodic save is due after `step` (rank 0's answer counts)."""
        return self._cadence is not None and self._cadence.due(step, time.time())

    def resume_point(self) -> Sealed | None:
        """The newest checkpoint that verifies, or None if there is none.

        Raises:
            ResumeRefusedError: it was made by another run than this one; nothing has been changed.
            CheckpointError: none verifies, or a rank does not see it; another attempt would fare no better.
            OSError: the file system hesitates: worth another attempt.
        """
        newest, problem, kind = None, None, None
        if self._agreement.rank == 0:
            try:
                newest = self._compared(self.store.newest_verified(restart="restart" in self._section.allow))
            except (CheckpointError, OSError) as error:
                problem = str(error)
                kind = next(i for i, kind in enumerate(PROBLEMS) if isinstance(error, kind))
        answer = (newest.step if newest else None, self._made, problem, kind)
        step, self._made, problem, kind = self._agreement.from_rank_0(answer)
        if kind is not None:
            raise (OSError if PROBLEMS[kind] is PassingError else PROBLEMS[kind])(problem)
        self.newest_step = step
        self._lay_out(self._made)
        if step is None:
            return None
        found = next((c for c in self.store.sealed() if c.step == step), None)
        if not self._agreement.all_ok(found is not None):
            where = self.store.path(step).parent.parent
            raise CheckpointError(f"checkpoint-{step} is not visible to every rank: is {where} shared?")
        return found

    def _compared(self, newest: Sealed | None) -> Sealed | None:
        if newest is None:  # the run has the global batch of its first attempt, though nothing was saved
            self._made = origin_of(self._run) or {"world_size": self._agreement.world_size}
        else:
            self._made = {"world_size": newest.manifest.world_size, **newest.manifest.origin}
        self._lay_out(self._made)
        if newest is None and self.layout is not None and self.layout.accumulation != self._asked_accumulation:
            self._say(f"it began with {self._made['world_size']} ranks: {self._adapted()}")
        if newest is not None:
            compared = origin.compare(
                self._made,
                self.origin,
                versions_made=newest.manifest.versions,
                versions_now=versions(),
                allow=self._section.allow,
                adapted=self._adapted(),
            )
            origin.check(newest.path.name, compared)
            self.differences = compared.noted
            for difference in compared.noted.values():
                self._say(f"WARNING: resuming although {difference}")
        return newest

    def _adapted(self) -> str | None:
        """What becomes of the gradient accumulation, in words."""
        if self.layout is None:
            return None
        now, asked = self.layout.accumulation, self._asked_accumulation
        change = f"is {now}, configured {asked} for {self.layout.first[0]} ranks" if now != asked else f"is {now}"
        return (
            f"gradient accumulation {change}; each step has the same {self.layout.global_batch} rows as before; "
            "random numbers (dropout) are others and sums are rounded in another order"
        )

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        *,
        kind: str,
        asked_at: float | None = None,
        pending_evaluation: bool = False,
        best_step: int | None = None,
    ) -> Sealed | None:
        """Make one checkpoint.

        An emergency save that finds the disk full makes room in the order of retention and tries again; a periodic
        one deletes nothing for that.

        Args:
            kind: `periodic`, `emergency` or `final`.
            best_step: step of the best by the metric, as known now.
            asked_at: when it was asked for (the signal), if that was before this call; Unix seconds.

        Returns:
            The sealed checkpoint, or None if it could not be written: the ledger says why, and what was there stands.
        """
        began = time.time()
        manifest = Manifest(
            step=step,
            kind=kind,
            world_size=self._agreement.world_size,
            time=began,
            pending_evaluation=pending_evaluation,
            best_step=best_step,
            origin=self.origin,
            versions=versions(),
        )
        sealed, reason = None, NO_ROOM
        may_write = self._on_rank_0(lambda: self.store.make_room(kind=kind))
        while may_write and sealed is None:
            try:
                sealed = self.store.save(write, manifest)
            except SaveError as error:
                reason = str(error)
                may_write = (
                    kind != "periodic"
                    and error.disk_full
                    and self._on_rank_0(lambda: self.store.free_some(kind=kind, reason="disk full"))
                )
        if sealed is None:
            self._record("checkpoint_failed", step=step, kind=kind, reason=reason)
            self._say(f"WARNING: {kind} checkpoint of step {step} was not written: {reason}")
            return None
        now = time.time()
        self._record(
            "checkpoint",
            step=step,
            kind=kind,
            bytes=sealed.bytes,
            stall_s=now - began,
            sealed_s=now - (asked_at or began),
            run_bytes=self.store.room.peak,
        )
        if kind != "final":
            self.newest_step = step
            if self._agreement.rank == 0 and not self._measured:
                self._measure(sealed, say=True)
        if kind == "periodic" and self._agreement.rank == 0:
            self._after_periodic(step, began)
        return sealed

    def _measure(self, sealed: Sealed, *, say: bool) -> None:
        """Put what a checkpoint really takes in the place of the estimate."""
        self._measured = True
        files = {name: int(entry["bytes"]) for name, entry in sealed.manifest.files.items()}
        model = {"weights": sealed.bytes - sealed.resume_bytes}
        estimate = self._footprint or Footprint(final=model, fixed={"what is there": self.store.room.beside()})
        self._footprint = real = estimate.measured(files)
        limit = self._limit(real)
        if not say:
            return
        off = estimate.deviations(files) if estimate.checkpoint else {}
        self._record("measured", bytes=real.checkpoint_bytes, save_total_limit=limit, off=off)
        for part, (expected, found) in off.items():
            self._say(f"WARNING: {part} of a checkpoint takes {gb(found)}; the plan expected {gb(expected)}")

    def _limit(self, footprint: Footprint) -> int:
        """Keep no more checkpoints than the budget has room for, with one in flight and the finished model."""
        budget = self.store.room.budget()
        found = verdict(footprint, budget, save_total_limit=self._asked_limit, reserve=self._reserve)
        limit = max(found.save_total_limit, 1)
        if not found.fits and self.store.retention.limit != limit:
            self._say(f"WARNING: storage.budget_gb is too small by what was measured: it needs {found.arithmetic}")
        elif found.lowered and self.store.retention.limit != limit:
            self._say(f"save_total_limit is {limit}: more do not fit into {gb(budget)}")
        self.store.retention.limit = limit
        return limit

    def _after_periodic(self, step: int, began: float) -> None:
        try:
            if self._footprint is not None:
                self._limit(self._footprint)  # anew, since a cell's share of its sweep's budget grows
            self.store.retire()
            self.store.keep_reserve()
        except OSError as error:
            self._say(f"WARNING: older checkpoints could not be looked through: {error}")
        if self._cadence is not None:
            now = time.time()  # what was deleted to make place is part of what saving costs
            self._cadence.saved(step, now - began, now)
            if changed := self._cadence.changed():
                self._record("interval", **changed)
                self._say(f"checkpoints: {self._cadence.explanation}")

    def _on_rank_0(self, act: Callable[[], bool]) -> bool:
        answer = False
        if self._agreement.rank == 0:
            try:
                answer = act()
            except OSError as error:
                self._say(f"WARNING: could not make room: {error}")
        return bool(self._agreement.from_rank_0(answer))

    def newest(self) -> Sealed:
        """The checkpoint of `newest_step`, from disk."""
        return next(c for c in self.store.sealed() if c.step == self.newest_step)


def _planned(run: RunDirectory) -> Footprint | None:
    """What the plan expects the run to take; None for a run without a plan (a user's own script)."""
    try:
        return Footprint.from_dict(json.loads(run.plan.read_text())["storage"]["parts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
