"""The requeue policy, and how a cause is read from what Slurm says."""

import time
from pathlib import Path
from typing import Any

import pytest

from outlast.ledger import Ledger
from outlast.requeue import Departure, decide
from outlast.sections import PreemptionSection
from outlast.slurm import JobView, SlurmJob


def ledger(*steps: int) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for number, step in enumerate(steps, 1):
        events.append({"time": 0.0, "attempt": number, "event": "attempt_started"})
        events.append({"time": 0.0, "attempt": number, "event": "checkpoint", "step": step, "kind": "emergency"})
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
    assert "no progress in 3 restarts: none saved a step after 5" in decision.reason
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


class FakeRecord:
    def __init__(self) -> None:
        self.events: list[str] = []

    def __call__(self, event: str, **values: Any) -> None:
        self.events.append(event)


def test_a_departure_requeues_once_however_often_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "scontrol.log"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$1" >> {log}\necho JobState=RUNNING PreemptTime=None\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    record = FakeRecord()
    departure = Departure(record, print, Ledger(tmp_path / "ledger"), SlurmJob("7", 0, "n0"), PreemptionSection())
    assert departure.requeue(5) == departure.requeue(5) == 75
    assert record.events == ["attempt_ended", "requeued"]
    assert log.read_text().split().count("requeue") == 1


def test_a_job_cancelled_during_its_save_is_not_brought_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, state = tmp_path / "scontrol.log", tmp_path / "state"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$1" >> {log}\ncat {state}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    state.write_text("JobState=RUNNING StartTime=2020-01-01T00:00:00 PreemptTime=2020-01-01T01:00:00")
    record = FakeRecord()
    departure = Departure(record, print, Ledger(tmp_path / "ledger"), SlurmJob("7", 0, "n0"), PreemptionSection())
    departure.ask_slurm()
    assert departure.cause() == "preempted"
    state.write_text("JobState=COMPLETING Reason=None StartTime=2020-01-01T00:00:00")
    assert departure.requeue(5) == 75
    assert record.events == ["attempt_ended"]
    assert "requeue" not in log.read_text()
