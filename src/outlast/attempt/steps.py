"""What all ranks do at the end of a step, of a micro-batch, or between two batches of an evaluation."""

import threading
import time
from typing import Literal

from outlast.preemption.deadline import Planner, Work
from outlast.preemption.shutdown import Departure
from outlast.preemption.signals import PreemptionGuard
from outlast.preemption.watchdog import Watch
from outlast.ranks.agreement import Consensus
from outlast.ranks.channel import Peers
from outlast.ranks.collectives import Agreement
from outlast.rundir.ledger import Ledger

from .saving import Saver

Verdict = Literal["go_on", "save", "stop"]


class StepEnd:
    """Polled at the same points on all ranks. With one rank every answer is its own.

    Args:
        hang_s: see `preemption.hang_s`.
        lead_s: the notice that is assumed where none is known.
    """

    def __init__(
        self,
        agreement: Agreement,
        guard: PreemptionGuard,
        departure: Departure,
        saver: Saver,
        planner: Planner,
        ledger: Ledger,
        *,
        hang_s: float | None,
        lead_s: float,
    ) -> None:
        self._agreement, self._guard, self._departure, self._saver = agreement, guard, departure, saver
        self._planner = planner
        self._save_asked = self._save_pending = False
        self.step = 0
        """The last step whose end was polled."""
        self._peers = Peers(agreement.rank, agreement.world_size)
        self._consensus = Consensus(self._peers, self._on_stop)
        self.watch = Watch(
            self._peers,
            self._consensus,
            guard,
            departure,
            ledger,
            hang_s=hang_s,
            lead_s=lead_s,
            now_at=lambda: (self.step, agreement.calls),
        )

    def connect(self) -> None:
        """From here on ranks can ask for things, and are watched. All ranks call it together; again has no effect."""
        self._peers.connect(self._agreement, self.watch.receive, self.watch.tick)

    def on_signal(self) -> None:
        """This process was signalled, after start-up: in the guard's thread, so that the others know at once."""
        print(f"[outlast] rank {self._agreement.rank} received {self._guard.requested}", flush=True)
        if self._agreement.rank == 0:
            threading.Thread(target=self._departure.ask_slurm, daemon=True).start()
        if self._agreement.world_size == 1:
            self.watch.alone()
        elif self._guard.requested is not None:
            self._consensus.ask(self._guard.requested)

    def _on_stop(self, name: str) -> None:
        """Some rank has asked for a stop."""
        self._guard.request(name)
        if self._agreement.rank == 0:
            threading.Thread(target=self._departure.ask_slurm, daemon=True).start()

    def should_stop(self, step: int, work: Work = "step") -> bool:
        """Whether any rank was asked to stop.

        Args:
            work: what has been done since the last point like this one.
        """
        self._planner.reached(work)
        return self._agree(step, save=False) == "stop"

    def step_done(self, step: int) -> Verdict:
        """What all ranks do now that `step` optimizer steps are done."""
        self._planner.reached("step")
        by_step = self._saver.due_by_step(step)
        verdict = self._agree(step, save=self._agreement.rank == 0 and not by_step and self._saver.due(step))
        if verdict == "go_on" and (by_step or self._save_asked):
            verdict = "save"
        if verdict == "save":
            self._save_asked = self._save_pending = False
        return verdict

    def time_for(self, work: Work, count: int | None) -> bool | None:
        """Asked to stop: whether there is time for `count` more stretches of work before the save; None: not known.

        All ranks call it together; rank 0 decides.
        """
        fits = None
        if self._agreement.rank == 0:
            each = self._planner.each_s(work)
            seconds = None if each is None or count is None else each * count
            fits = self._planner.time_for(seconds, self._departure.deadline_by(self._guard), time.time())
        found: bool | None = self._agreement.from_rank_0(fits)
        return found

    def _agree(self, step: int, *, save: bool) -> Verdict:
        if self._departure.signal is not None:
            return "stop"
        self.step = step
        asked = self._guard.poll() or ("save" if save and not self._save_pending else "")
        self._save_pending |= asked == "save" and self._agreement.world_size > 1
        if self._agreement.world_size == 1:
            agreed = asked
        else:
            if asked:
                self._consensus.ask(asked)
            agreed = self._consensus.poll()
        if agreed in ("", "save"):
            self._save_asked |= agreed == "save"  # in an evaluation, until the next step's end
            return "go_on"
        if self._agreement.world_size == 1:
            self.watch.alone()
        self._departure.announce(agreed, self._guard, step)
        return "stop"
