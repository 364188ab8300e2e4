"""Ends an attempt when the ranks have agreed to stop or one has failed: requeues the job, and leaves.

Rank 0 speaks for all: it writes the ledger and requeues the job, once. Where rank 0 is the one that is lost, the
watchdog lets another rank stand in for it.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from outlast import clock
from outlast.config.preemption import PreemptionSection
from outlast.errors import Exit, OutlastError, SlurmError
from outlast.ranks.identity import Identity
from outlast.ranks.lost import Lost, LostRankError
from outlast.rundir.ledger import Cause, Event, Record
from outlast.slurm.actions import bring_forward, requeue_job
from outlast.slurm.environment import in_own_batch_script

from .cause import StopCause
from .echo import is_left_to_epilogue, may_be_echo, wait_for_echo
from .outcome import Outcome
from .repeats import exit_code_of, will_repeat
from .signals import PreemptionGuard


class Shutdown:
    """One rank's way out of an attempt.

    Args:
        record: appends to the ledger.
        say: prints a line in the log.
    """

    def __init__(
        self,
        identity: Identity,
        guard: PreemptionGuard,
        cause: StopCause,
        outcome: Outcome,
        preemption: PreemptionSection,
        record: Record,
        say: Callable[[str], None],
    ) -> None:
        self._identity, self._guard, self._cause, self._outcome = identity, guard, cause, outcome
        self._delay_s, self._append, self._print = preemption.requeue_delay_s, record, say
        self._speaks = identity.rank == 0
        self._lost: list[Lost] = []
        self._requeueing, self._failing = threading.Lock(), threading.Lock()
        self._code: Exit | None = None
        self._failed: Exit | None = None
        self._requeued_at: float | None = None
        self.ended_it = False
        """Whether it was this rank that wrote down how the attempt ended."""
        self.signal: str | None = None
        """Name of the signal that the ranks agreed on; None while they train."""
        self.asked_at = 0.0
        """When it came, by `outlast.clock`."""
        self.saved_step = 0
        """The newest step that is saved."""

    def stand_in(self, lost: list[Lost]) -> None:
        """Act for all ranks from here on: those in `lost` are gone, or are blocking the others."""
        self._lost, self._speaks = lost, True

    def announce(self, signal: str, step: int, **more: bool) -> None:
        """Take note that the ranks stop after `step`; the ledger gets one such line, whoever writes it."""
        self.signal, self.asked_at = signal, self._guard.requested_at or clock.now()
        if not self._speaks:
            return
        self._cause.ask_why_in_background().join(timeout=2.0)  # the save must not wait for a silent controller
        deadline = self._cause.deadline()
        deadline_s = None if deadline is None else round(deadline - self.asked_at, 3)
        if self._identity.rank != 0 and self._outcome.was_signalled:  # rank 0 has said so before it was lost
            return
        self._append("signal", name=signal, step=step, deadline_s=deadline_s, **more)
        left = f" ({deadline_s:.0f} s left)" if deadline_s is not None else ""
        self._say(f"{signal}: saving step {step} and leaving{left}")

    def requeue(self, step: int) -> Exit:
        """Write why the attempt ended and, by the policy, have Slurm start the next one.

        It acts once. The requeue makes Slurm end the other ranks, and the error that this rank then raises may bring it
        here again. If the requeue was over a second ago (a slow save went on), the start time is set again.

        Returns:
            The exit code for all ranks.
        """
        with self._requeueing:
            if self._code is None:
                cause = self._cause.cause_after_saving(self.signal)
                self._end(cause, step=step, **({"detail": "; ".join(map(str, self._lost))} if self._lost else {}))
                self._code = self._follow(cause, step) if self.ended_it else Exit.RESUME_ME
            elif self._requeued_at is not None and time.monotonic() - self._requeued_at > 1.0:
                self._requeued_at = time.monotonic()
                assert self._identity.job is not None
                with suppress(SlurmError):
                    bring_forward(self._identity.job, self._delay_s)
            return self._code

    def fail(self, error: BaseException, step: int, *, repeats: bool = False) -> Exit:
        """Write that this rank has raised `error` in the middle of `step`. On any rank, and once.

        An error raised while the job is being taken away (a worker killed, a peer gone) counts as the preemption that
        caused it: the last sealed checkpoint stands, and the job is requeued.

        Args:
            repeats: another attempt would raise it too.

        Returns:
            The exit code for this rank.
        """
        with self._failing:
            if self._failed is None:
                self._failed = self._fail(error, step, repeats)
            return self._failed

    def _fail(self, error: BaseException, step: int, repeats: bool) -> Exit:
        lost, ours = isinstance(error, LostRankError), isinstance(error, OutlastError)
        if isinstance(error, LostRankError):
            self._lost = error.lost
        if not ours and self._identity.world_size > 1:
            wait_for_echo(self._guard)
        # Without a job nobody else will say which rank died, and that it was no preemption.
        died = lost and self._identity.job is None and may_be_echo(self._lost, self._cause)
        stopping = None if died else self._guard.requested
        if stopping is not None and self._identity.rank != 0:
            return Exit.RESUME_ME  # rank 0 speaks for all
        if stopping is not None and not ours:
            self._say(f"{type(error).__name__} while leaving: {error}")
            if is_left_to_epilogue(self._cause):
                return Exit.FAILED
            if self.signal is None:
                self.announce(stopping, step)
            return self.requeue(step)
        memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
        cause: Cause = "out_of_memory" if memory else "failed"
        if isinstance(error, LostRankError):
            self._end(cause, step=step, rank=error.rank, detail=str(error))
            if self._identity.job is not None and self.ended_it and not in_own_batch_script():
                return self._follow(cause, step, self._cause.is_cancelled)  # it may be its node's fault
            return Exit.FAILED
        text = f"{type(error).__name__}: {error}"[:2000]
        more = {"repeats": True} if repeats and not ours else {}
        refused = ours and will_repeat(error)
        self._end(cause, step=step, rank=self._identity.rank, error=text, refused=refused, **more)
        return exit_code_of(error) if isinstance(error, OutlastError) else Exit.FAILED

    def note_late(self, one: Lost) -> None:
        """Write down a rank that has kept the others waiting."""
        self._append("straggler", **asdict(one))
        self._say(f"WARNING: {one}")

    def _end(self, cause: Cause, **values: Any) -> None:
        stragglers = [("straggler", asdict(one)) for one in self._lost]
        self.ended_it = self._outcome.ended(cause, before=stragglers, speaks=self._speaks, **values)

    def _follow(self, cause: Cause, step: int, is_cancelled: Callable[[], bool] = lambda: False) -> Exit:
        """Do what the policy says of an attempt that this rank has noted as ended."""
        start_next = self._requeue_job if self._identity.job is not None else None
        try:
            decision = self._outcome.follow(cause, start_next, is_cancelled)
        except SlurmError as error:
            what = "the batch script looks for another way" if in_own_batch_script() else "submit it again"
            self._say(f"could not requeue: {error}; {self._saved(step)}, {what}")
            return Exit.RESUME_ME
        if self._requeued_at is not None and self._identity.job is not None:
            self._say(f"requeued job {self._identity.job.job_id} ({cause})")
        elif decision.action == "again" and self._identity.job is None and self._identity.around is not None:
            self._say(
                f"{self._saved(step)}; job {self._identity.around.job_id} is not requeued, since nothing says "
                "that it is there for this run alone: start the script from a copy of slurm/script.sbatch, "
                "or call outlast.start(..., requeue=True)"
            )
        return decision.exit_code

    def _saved(self, step: int) -> str:
        return f"step {step} is saved" if self.saved_step >= step else f"step {self.saved_step} was saved last"

    def _requeue_job(self) -> Event:
        assert self._identity.job is not None
        done = requeue_job(self._identity.job, self._delay_s)
        self._requeued_at = time.monotonic()
        return {"job_id": self._identity.job.job_id, "by": done.by, "hold_lifted": done.hold_lifted}

    def _say(self, text: str) -> None:
        if self._speaks:
            self._print(text)
