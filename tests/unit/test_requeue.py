"""The requeue policy, and how a cause is read from what Slurm says."""

import time
from typing import Any

import pytest

from outlast.requeue import decide
from outlast.slurm import JobView


def ledger(*steps: int) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for number, step in enumerate(steps, 1):
        events.append({"time": 0.0, "attempt": number, "event": "attempt_started"})
        events.append({"time": 0.0, "attempt": number, "event": "attempt_ended", "cause": "preempted", "step": step})
        if number < len(steps):
            events.append({"time": 0.0, "attempt": number, "event": "requeued", "cause": "preempted"})
    return events


@pytest.mark.parametrize("cause", ["preempted", "time_limit", "node_failure"])
def test_what_is_requeued(cause: Any) -> None:
    assert decide(cause, ledger(5), 10).action == "requeue"


@pytest.mark.parametrize("cause", ["cancelled", "failed", "finished"])
def test_what_is_not(cause: Any) -> None:
    assert decide(cause, ledger(5), 10).action == "stop"


def test_no_progress_in_three_restarts() -> None:
    assert decide("preempted", ledger(5, 5, 5), 10).action == "requeue"
    decision = decide("preempted", ledger(5, 5, 5, 5), 10)
    assert decision.action == "give_up"
    assert "no progress in 3 restarts: each ended at step 5" in decision.reason
    assert decide("preempted", ledger(5, 5, 5, 6), 10).action == "requeue"


def test_max_requeues() -> None:
    assert decide("preempted", ledger(1, 2, 3), 2).action == "give_up"
    assert decide("preempted", ledger(1, 2, 3), 3).action == "requeue"
    assert decide("preempted", ledger(1), 0).action == "give_up"


NOW = time.time()


@pytest.mark.parametrize(
    ("view", "cause"),
    [
        (JobView("RUNNING", "None", NOW - 1, NOW - 100, NOW + 29), "preempted"),
        (JobView("COMPLETING", "None", None, NOW - 100, NOW), "cancelled"),
        (JobView("CANCELLED", "None", None, NOW - 100, NOW), "cancelled"),
        (JobView("COMPLETING", "None", NOW - 500, NOW - 100, NOW), "cancelled"),  # PreemptTime of an earlier attempt
        (JobView("COMPLETING", "TimeLimit", None, NOW - 100, NOW), "time_limit"),
        (JobView("RUNNING", "None", None, NOW - 100, NOW + 100), "time_limit"),
        (JobView("RUNNING", "None", None, NOW - 100, NOW + 5000), "preempted"),  # a signal sent on purpose
    ],
)
def test_the_cause(view: JobView, cause: str) -> None:
    assert view.stop_cause(lead_s=90) == cause
