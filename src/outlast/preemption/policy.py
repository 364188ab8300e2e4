"""The requeue policy: what follows an attempt, by its cause and by how often that has happened.

It is asked by rank 0 when the ranks leave (`shutdown.py`), or when a script is signalled after its training
(`afterwards.py`); by the batch script when they are gone (`epilogue.py`); and by an attempt that starts after one that
could not say how it ended (`previous_attempt.py`).
"""

from dataclasses import dataclass
from typing import Literal

from outlast.config.preemption import PreemptionSection
from outlast.errors import Exit
from outlast.rundir.attempts import Attempt, attempts
from outlast.rundir.ledger import Cause, Event

PATIENCE = 3
"""Restarts in a row that trained and saved no new step, after which a run gives up."""
CRASHES = ("failed", "out_of_memory")
TAKEN = ("preempted", "node_failure", "requeued")
"""Causes for which the cluster is to blame, whenever they come."""


@dataclass(frozen=True)
class Decision:
    """What follows an attempt; `again` is another one that no user has to start."""

    action: Literal["again", "finish", "stop", "fail", "give_up"]
    reason: str

    @property
    def exit_code(self) -> Exit:
        """The exit code that the ranks and the batch script end with."""
        return _EXITS[self.action]


_EXITS = {
    "again": Exit.RESUME_ME,
    "finish": Exit.DONE,
    "stop": Exit.RESUME_ME,
    "fail": Exit.FAILED,
    "give_up": Exit.GAVE_UP,
}


def decide(cause: Cause, events: list[Event], limits: PreemptionSection) -> Decision:
    """What follows an attempt that ended with `cause`. The first line that applies holds.

    | cause | and | then | exit code |
    |---|---|---|---|
    | finished, also in the grace period | | finish | 0 |
    | cancelled | | stop: somebody wanted that | 75 |
    | failed, out_of_memory | outlast itself refused to go on, so another attempt would be refused too | fail | 1 |
    | failed | the program raised an error before its first step, which it would raise again (`repeats.py`) | fail | 1 |
    | failed, out_of_memory | more than `max_crashes` in a row, without a new checkpoint in between | fail | 1 |
    | any other, and those two | `max_requeues` reached, over the whole life of the run | give up | 93 |
    | | `PATIENCE` restarts in a row saved no new step; those taken away in start-up don't count | give up | 93 |
    | | | again: requeue the job, or retry | 75 |

    Args:
        events: the run's ledger, the `attempt_ended` of this attempt included.
    """
    if cause == "finished":
        return Decision("finish", cause)
    if cause == "cancelled":
        return Decision("stop", cause)
    chain = since_submission(events)
    if cause in CRASHES:
        ended = chain[-1].ended if chain else None
        text = describe(ended or {"cause": cause})
        if ended and ended.get("refused"):
            return Decision("fail", text)
        if ended and ended.get("repeats"):
            return Decision("fail", f"{text}, before the first step: another attempt would end alike")
        crashes = crashes_in_a_row(chain)
        if crashes > limits.max_crashes:
            times = "" if crashes == 1 else f", {crashes} times in a row without a new checkpoint"
            return Decision("fail", f"{text}{times}; preemption.max_crashes is {limits.max_crashes}")
    requeues = sum(event["event"] == "requeued" for event in events)
    if requeues >= limits.max_requeues:
        return Decision("give_up", f"{requeues} requeues; preemption.max_requeues is {limits.max_requeues}")
    idle = restarts_without_progress(chain)
    if idle >= PATIENCE:
        saved = chain[-1].saved_step or chain[-1].saved_before
        return Decision("give_up", f"no progress in {idle} restarts: none saved a step after {saved}")
    return Decision("again", cause)


def since_submission(events: list[Event]) -> list[Attempt]:
    """The attempts since a user submitted the run: each but the first follows from a requeue of the one before.

    A user who submits a run again that had failed or given up gets all the patience there is.
    """
    chain: list[Attempt] = []
    for attempt in reversed(attempts(events)):
        if chain and attempt.requeued is None:
            break
        chain.append(attempt)
    return chain[::-1]


def restarts_without_progress(chain: list[Attempt]) -> int:
    """Restarts since one last saved a step after its own first; those taken away in start-up neither count nor mend."""
    count = 0
    for attempt in chain[1:]:
        if attempt.has_saved_more:
            count = 0
        else:
            count += not was_taken_in_startup(attempt)
    return count


def was_taken_in_startup(attempt: Attempt) -> bool:
    """Whether the cluster took the attempt away before there was time for a step."""
    return attempt.ended is not None and attempt.ended["cause"] in TAKEN and not attempt.has_trained


def startup_warning(chain: list[Attempt]) -> str | None:
    """A warning, if the last `PATIENCE` attempts were all taken away before they had made a step."""
    last = chain[-PATIENCE:]
    if len(last) < PATIENCE or not all(map(was_taken_in_startup, last)):
        return None
    lived = max(max(a.ended["time"] - a.started["time"], 0.0) for a in last if a.started and a.ended)
    return (
        f"the last {PATIENCE} attempts were taken away before they had made a step, after {lived:.0f} s at most: "
        "start-up takes longer than the time between two preemptions. What helps: a partition or QOS that is "
        "preempted less often, a model and an environment on a faster file system. "
        "preemption.max_requeues bounds how often this goes on"
    )


def crashes_in_a_row(chain: list[Attempt]) -> int:
    """Crashes since an attempt last saved a step after its own first; its own counts."""
    count = 0
    for attempt in chain:
        if attempt.has_saved_more:
            count = 0
        count += attempt.ended is not None and attempt.ended["cause"] in CRASHES
    return count


def describe(ended: Event) -> str:
    """How an attempt ended, in words."""
    words = str(ended["cause"]).replace("_", " ")
    more = ended.get("error") or ended.get("detail")
    return f"{words} ({more})" if more else words
