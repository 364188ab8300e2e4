"""How an attempt ended and what followed: the one author of the ledger's `attempt_ended`, `requeued` and `gave_up`.

Ranks, the batch script's epilogue, the attempt that comes next and the local launcher all write these lines here.
"""

from collections.abc import Callable, Sequence
from typing import Any

from outlast.config.preemption import PreemptionSection
from outlast.rundir.attempts import last_seen, last_step
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import KILLED, AttemptNumber, Cause, Event, Ledger, Numbered, Record
from outlast.rundir.place import place_of

from .policy import Decision, decide

Next = Callable[[], Event]
"""Has the next attempt started; returns what `requeued` says of it: `job_id`, and by what means. Raises SlurmError."""


class Outcome:
    """The outcome of one attempt.

    Args:
        attempt: which one; its number is looked up when a line is written.
        limits: the requeue policy.
        record: appends a line for that attempt; keeps those that a full disk refuses for later.
        say: prints a line in the log.
    """

    def __init__(
        self,
        run: RunDirectory,
        attempt: Numbered,
        limits: PreemptionSection,
        record: Record,
        say: Callable[[str], None],
    ) -> None:
        self._run, self._attempt, self._limits, self._record, self._say = run, attempt, limits, record, say
        self._ledger = Ledger(run.ledger)

    @classmethod
    def of(cls, run: RunDirectory, number: int, limits: PreemptionSection, say: Callable[[str], None]) -> "Outcome":
        """The outcome of attempt `number`, for a process that is none of its ranks."""

        def record(event: str, **values: Any) -> None:
            Ledger(run.ledger).append(event, number, **values)

        return cls(run, AttemptNumber(number), limits, record, say)

    def ended(
        self,
        cause: Cause,
        *,
        step: int | None = None,
        before: Sequence[tuple[str, dict[str, Any]]] = (),
        speaks: bool = True,
        **values: Any,
    ) -> bool:
        """Write how the attempt ended, unless somebody has. A full disk must not hide what went wrong.

        Args:
            step: the last step; looked up (:func:`last_step`) if the caller did not make it itself.
            before: lines that go with it, as event and fields.
            speaks: whether the lines wait if the disk is full; of several ranks, one may have them wait.
            values: more fields: `detail` or `error` in words, `rank`, `refused`.

        Returns:
            Whether the line is this caller's.
        """
        number = self._attempt.attempt
        fields = {"cause": cause, "step": last_step(self._run, number) if step is None else step, **values}
        if values.get("detail") == KILLED:
            fields["last_seen"] = last_seen(self._run, number)
        try:
            return self._ledger.append_first("attempt_ended", number, before=before, **fields)
        except OSError:
            if speaks:
                for name, more in [*before, ("attempt_ended", fields)]:
                    self._record(name, **more)  # they wait
            return True

    def finished(self, step: int) -> None:
        """Write that the attempt ended by finishing the run, whatever was written of it before."""
        self._record("attempt_ended", cause="finished", step=step)

    def follow(
        self, cause: Cause, start_next: Next | None, is_cancelled: Callable[[], bool] = lambda: False
    ) -> Decision:
        """Do what the policy says of an attempt that ended with `cause`.

        Args:
            start_next: called if another attempt is due; None: somebody else starts it.
            is_cancelled: asked just before that: a job that was cancelled meanwhile stays so.

        Raises:
            SlurmError: the next attempt could not be started; nothing is written.
        """
        decision = decide(cause, self._ledger.read(), self._limits)
        if decision.action == "give_up":
            self.gave_up(decision.reason)
        elif decision.action == "again" and start_next is not None:
            if is_cancelled():
                return Decision("stop", "the job was cancelled meanwhile")
            self.requeued(cause, **start_next())
        return decision

    def requeued(self, cause: Cause, **values: Any) -> None:
        """Write that another attempt follows; `values` are `job_id`, and by what means it was started."""
        self._record("requeued", cause=cause, place=place_of(self._run.path), **values)

    def gave_up(self, reason: str) -> None:
        """Write that no other attempt follows, and why."""
        self._record("gave_up", reason=reason)
        self._say(f"giving up: {reason}")

    # Read back, by another rank than the one that wrote ---------------------------------------------------------

    @property
    def has_ended(self) -> bool:
        """Whether it is written how the attempt ended."""
        return any(event["event"] == "attempt_ended" for event in self._own())

    @property
    def was_signalled(self) -> bool:
        """Whether it is written that the ranks stop."""
        return any(event["event"] == "signal" for event in self._own())

    @property
    def has_given_up(self) -> bool:
        """Whether it is written that no other attempt follows."""
        return any(event["event"] == "gave_up" for event in self._own())

    @property
    def is_left_to_epilogue(self) -> bool:
        """Whether the ranks have left it to the batch script's epilogue to find out why they were signalled."""
        return any(event.get("unexplained") for event in self._own())

    def is_settled(self, *, in_job: bool) -> bool:
        """Whether the attempt has ended and what follows has been seen to.

        Args:
            in_job: the ranks are in a Slurm job, so that they see to it themselves; else a launcher does.
        """
        for event in self._own():
            if event["event"] in ("requeued", "gave_up"):
                return True
            if event["event"] == "attempt_ended" and (not in_job or event["cause"] in ("cancelled", "finished")):
                return True
        return False

    def _own(self) -> list[Event]:
        return [event for event in self._ledger.read() if event["attempt"] == self._attempt.attempt]
