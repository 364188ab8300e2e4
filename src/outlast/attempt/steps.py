"""What all ranks do at the end of a step, of a micro-batch, or between two batches of an evaluation."""

from typing import Literal

from outlast import clock
from outlast.preemption.cause import StopCause
from outlast.preemption.deadline import Planner, TimeLimit, Work
from outlast.preemption.shutdown import Shutdown
from outlast.preemption.signals import CLOCK, PreemptionGuard
from outlast.preemption.watchdog import Watchdog
from outlast.ranks.agreement import StepAgreement
from outlast.ranks.collectives import Collectives

from .bytes_watch import BytesWatch
from .divergence import Divergence
from .saving import Saver

Action = Literal["go_on", "save", "stop"]


class Steps:
    """Polled at the same points on all ranks. With one rank every answer is its own."""

    def __init__(
        self,
        guard: PreemptionGuard,
        collectives: Collectives,
        agreement: StepAgreement,
        cause: StopCause,
        planner: Planner,
        shutdown: Shutdown,
        watchdog: Watchdog,
        saver: Saver,
        bytes_watch: BytesWatch,
    ) -> None:
        self._guard, self._collectives, self._agreement, self._cause = guard, collectives, agreement, cause
        self._planner, self._shutdown, self._watchdog, self._saver = planner, shutdown, watchdog, saver
        self._bytes_watch = bytes_watch
        self._time_limit = TimeLimit(cause, planner, clock.now())
        self._save_asked = self._save_pending = False
        self.divergence = Divergence(collectives)
        self.made_one = False
        """Whether this attempt has done an optimizer step."""

    def on_signal(self) -> None:
        """Tell the other ranks that this process was signalled, at once: in the guard's thread."""
        print(f"[outlast] rank {self._collectives.rank} received {self._guard.requested}", flush=True)
        if self._collectives.rank == 0:
            self._cause.ask_why_in_background()
        if self._collectives.world_size == 1:
            self._watchdog.alone()
        elif self._guard.requested is not None:
            self._agreement.ask(self._guard.requested)

    def should_stop(self, step: int, work: Work = "step") -> bool:
        """Whether any rank was asked to stop; to be asked at the same point on all ranks.

        Args:
            work: what has been done since the last such point: a micro-batch of a step, or an evaluation's batch.
        """
        self._planner.reached(work)
        return self._agree(step, save=False) == "stop"

    def done(self, step: int) -> Action:
        """What all ranks do now that `step` optimizer steps are done."""
        self.made_one = True
        self._planner.reached("step")
        self._bytes_watch.make_up()
        by_step = self._saver.due_by_step(step)
        action = self._agree(step, save=self._collectives.rank == 0 and not by_step and self._saver.due(step))
        if action == "go_on" and (by_step or self._save_asked):
            action = "save"
        if action == "save":
            self._save_asked = self._save_pending = False
        return action

    def time_for(self, work: Work, count: int | None) -> bool | None:
        """Whether there is time for `count` more stretches of work before the save; asked when the run is stopping.

        All ranks call it together; rank 0 decides. None: not known, for want of a deadline or of something to measure.
        """
        fits = None
        if self._collectives.rank == 0:
            each = self._planner.each_s(work)
            seconds = None if each is None or count is None else each * count
            fits = self._planner.time_for(seconds, self._cause.deadline(), clock.now())
        found: bool | None = self._collectives.from_rank_0(fits)
        return found

    def _agree(self, step: int, *, save: bool) -> Action:
        if self._shutdown.signal is not None:
            return "stop"
        if self._guard.requested is None and self._time_limit.is_near():
            self._guard.request(CLOCK)
        asked = self._guard.requested or ("save" if save and not self._save_pending else "")
        self._save_pending |= asked == "save" and self._collectives.world_size > 1
        agreed = self.divergence.heed(self._agreement.poll(step, self.divergence.ask(asked)))
        if agreed in ("", "save"):
            self._save_asked |= agreed == "save"  # in an evaluation, until the next step's end
            return "go_on"
        if self._collectives.world_size == 1:
            self._watchdog.alone()
        self._shutdown.announce(agreed, step)
        return "stop"
