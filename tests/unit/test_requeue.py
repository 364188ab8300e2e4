"""The requeue policy, and how a cause is read from what Slurm says."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from outlast.config.sections import PreemptionSection
from outlast.preemption.policy import decide
from outlast.preemption.shutdown import ELASTIC_ENV, SETTLES_ENV, Departure
from outlast.preemption.signals import PreemptionGuard
from outlast.ranks.lost import Lost, LostRankError
from outlast.rundir.ledger import Ledger
from outlast.slurm.environment import SlurmJob
from outlast.slurm.view import JobView

from .conftest import Slurm

Events = list[dict[str, Any]]
LIMITS = PreemptionSection(max_requeues=10, max_crashes=1)


def ledger(*steps: int, cause: str = "preempted", submitted_at: int = 1) -> Events:
    """One attempt for each saved step, requeued but for the last, and but for that before attempt `submitted_at`."""
    events: Events = []
    for number, step in enumerate(steps, 1):
        events.append({"time": 0.0, "attempt": number, "event": "attempt_started"})
        events.append({"time": 0.0, "attempt": number, "event": "checkpoint", "step": step, "kind": "emergency"})
        events.append({"time": 0.0, "attempt": number, "event": "attempt_ended", "cause": cause, "step": step})
        if number < len(steps) and number + 1 != submitted_at:
            events.append({"time": 0.0, "attempt": number, "event": "requeued", "cause": cause})
    return events


@pytest.mark.parametrize("cause", ["preempted", "time_limit", "node_failure"])
def test_what_is_requeued(cause: Any) -> None:
    assert decide(cause, ledger(5, cause=cause), LIMITS).action == "again"


@pytest.mark.parametrize(("cause", "action", "code"), [("cancelled", "stop", 75), ("finished", "finish", 0)])
def test_what_is_not(cause: Any, action: str, code: int) -> None:
    decision = decide(cause, ledger(5, cause=cause), LIMITS)
    assert (decision.action, decision.exit_code) == (action, code)


def test_no_progress_in_three_restarts() -> None:
    assert decide("preempted", ledger(5, 5, 5), LIMITS).action == "again"
    decision = decide("preempted", ledger(5, 5, 5, 5), LIMITS)
    assert (decision.action, decision.exit_code) == ("give_up", 93)
    assert "no progress in 3 restarts: none saved a step after 5" in decision.reason
    assert decide("preempted", ledger(5, 5, 5, 6), LIMITS).action == "again"


def test_who_submits_again_is_given_all_the_patience_there_is() -> None:
    assert decide("preempted", ledger(5, 5, 5, 5, submitted_at=4), LIMITS).action == "again"
    assert decide("failed", ledger(5, 5, cause="failed", submitted_at=2), LIMITS).action == "again"


def test_max_requeues() -> None:
    for limit, action in ((2, "give_up"), (3, "again")):
        assert decide("preempted", ledger(1, 2, 3), PreemptionSection(max_requeues=limit)).action == action
    assert decide("preempted", ledger(1), PreemptionSection(max_requeues=0)).action == "give_up"


@pytest.mark.parametrize("cause", ["failed", "out_of_memory"])
def test_crashes_in_a_row_fail_the_run(cause: Any) -> None:
    assert decide(cause, ledger(5, cause=cause), LIMITS).action == "again"
    decision = decide(cause, ledger(5, 5, cause=cause), LIMITS)
    assert (decision.action, decision.exit_code) == ("fail", 1)
    assert "2 times in a row without a new checkpoint; preemption.max_crashes is 1" in decision.reason
    assert decide(cause, ledger(5, cause=cause), PreemptionSection(max_crashes=0)).action == "fail"


def test_a_new_checkpoint_forgives_the_crashes_before_it() -> None:
    assert decide("failed", ledger(5, 6, 7, 8, cause="failed"), LIMITS).action == "again"
    assert decide("failed", ledger(5, 6, 6, cause="failed"), LIMITS).action == "fail"


def test_a_preemption_between_two_crashes_forgives_nothing_by_itself() -> None:
    events = ledger(5, 5, 5, cause="failed")
    for event in events:
        if event["attempt"] == 2 and event["event"] == "attempt_ended":
            event["cause"] = "preempted"
    assert decide("failed", events, LIMITS).action == "fail"


def test_what_outlast_refused_is_not_tried_again() -> None:
    events = ledger(5, cause="failed")
    events[-1] |= {"refused": True, "error": "CheckpointError: the disk is full"}
    decision = decide("failed", events, LIMITS)
    assert decision.action == "fail"
    assert "the disk is full" in decision.reason


NOW = time.time()
JOB = SlurmJob("7", 0, "n0")


@pytest.mark.parametrize(
    ("view", "cause"),
    [
        (JobView("RUNNING", "None", NOW - 1, NOW - 100, NOW + 29), "preempted"),
        (JobView("SIGNALING", "None", NOW - 1, NOW - 100, NOW + 29), "preempted"),
        (JobView("COMPLETING", "None", NOW - 1, NOW - 100, NOW - 1), "preempted"),  # PreemptMode=CANCEL, no grace
        (JobView("COMPLETING", "None", None, NOW - 100, NOW), "cancelled"),
        (JobView("CANCELLED", "None", None, NOW - 100, NOW), "cancelled"),
        (JobView("COMPLETING", "None", NOW - 500, NOW - 100, NOW), "cancelled"),  # PreemptTime of an earlier attempt
        (JobView("COMPLETING", "TimeLimit", None, NOW - 100, NOW), "time_limit"),
        (JobView("RUNNING", "None", None, NOW - 100, NOW + 100), "time_limit"),
        (JobView("RUNNING", "None", None, NOW - 100, NOW + 5000), None),  # sent on purpose, or by srun
    ],
)
def test_the_cause(view: JobView, cause: str | None) -> None:
    assert view.stop_cause(JOB, lead_s=90) == cause


RESTARTED = JobView("COMPLETING", "None", None, NOW, NOW + 3600, restarts=1)


@pytest.mark.parametrize(
    ("sacct", "nodes", "cause"),
    [
        ("PREEMPTED\n", "alloc\n", "preempted"),
        ("NODE_FAIL\n", "alloc\n", "node_failure"),
        ("REQUEUED\n", "alloc\ndown*\n", "node_failure"),
        ("", "alloc\ncomp\n", "preempted"),  # no sacct: its nodes are well, so they were taken
        ("", "comp\ndown\n", "node_failure"),
    ],
)
def test_the_cause_of_a_restart_that_slurm_made(slurm: Slurm, sacct: str, nodes: str, cause: str) -> None:
    slurm.says("sacct", sacct)
    slurm.says("sinfo", nodes)
    assert RESTARTED.stop_cause(JOB, lead_s=90) == cause


class Recorded:
    """Appends to a ledger, and shows what is in it."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __call__(self, event: str, **values: Any) -> None:
        self.ledger.append(event, 1, **values)

    @property
    def events(self) -> list[dict[str, Any]]:
        return self.ledger.read()

    @property
    def names(self) -> list[str]:
        return [event["event"] for event in self.events]


@pytest.fixture
def record(tmp_path: Path) -> Recorded:
    return Recorded(Ledger(tmp_path / "ledger"))


@pytest.fixture
def departure(record: Recorded) -> Departure:
    return Departure(record, print, record.ledger, JOB, PreemptionSection())


def test_of_ranks_that_end_an_attempt_at_once_one_requeues(slurm: Slurm, record: Recorded) -> None:
    slurm.says("scontrol", RUNNING)
    ranks = [Departure(record, print, record.ledger, JOB, PreemptionSection()) for _ in range(8)]
    with ThreadPoolExecutor(len(ranks)) as threads:
        codes = set(threads.map(lambda rank: rank.requeue(5), ranks))
    assert codes == {75}
    assert record.names == ["attempt_ended", "requeued"]
    assert len(slurm.calls("scontrol requeue")) == 1
    assert sum(rank.ended_it for rank in ranks) == 1


def test_a_rank_that_does_not_speak_for_all_writes_nothing(slurm: Slurm, record: Recorded) -> None:
    silent = Departure(record, print, record.ledger, JOB, PreemptionSection(), speaks=False)
    silent.announce("TERM", PreemptionGuard(), 5)
    assert silent.signal == "TERM"
    assert record.events == []
    assert not slurm.calls("scontrol")


@pytest.mark.parametrize(("agent", "cause"), [(True, "failed"), (False, "preempted")])
def test_the_agents_term_is_the_echo_of_a_death(
    record: Recorded, monkeypatch: pytest.MonkeyPatch, agent: bool, cause: str
) -> None:
    """torch's agent ends the other ranks, by TERM, when one has died; whichever they notice first."""
    if agent:
        monkeypatch.setenv(ELASTIC_ENV, "1")
    departure, guard = Departure(record, print, record.ledger, None, PreemptionSection()), PreemptionGuard()
    guard.request("TERM")
    departure.lost = [Lost(rank=1, host="here", seconds=0.1, how="gone")]
    departure.fail(LostRankError(departure.lost), guard, 0, 7)
    assert record.events[-1]["cause"] == cause
    assert record.names == [*([] if agent else ["signal"]), "straggler", "attempt_ended"]


RUNNING = "JobState=RUNNING PreemptTime=None Restarts=0"
PREEMPTED = "JobState=RUNNING StartTime=2020-01-01T00:00:00 PreemptTime=2020-01-01T01:00:00 EndTime=2099-01-01T00:00:00"
CANCELLED_IN_GRACE = PREEMPTED.replace("RUNNING", "COMPLETING")


def test_a_departure_requeues_once_however_often_it_is_asked(
    slurm: Slurm, departure: Departure, record: Recorded
) -> None:
    slurm.says("scontrol", RUNNING)
    assert departure.requeue(5) == departure.requeue(5) == 75
    assert record.names == ["attempt_ended", "requeued"]
    assert record.events[1]["by"] == "job"
    assert len(slurm.calls("scontrol requeue")) == 1


def test_a_job_that_slurm_has_requeued_already_is_not_requeued_twice(
    slurm: Slurm, departure: Departure, record: Recorded
) -> None:
    slurm.says("scontrol", "JobState=COMPLETING Restarts=1")
    slurm.says("sacct", "NODE_FAIL")
    slurm.refuse_requeue()
    assert departure.requeue(5) == 75
    assert [event["cause"] for event in record.events] == ["node_failure", "node_failure"]
    assert record.events[1]["by"] == "slurm"


def test_a_refused_requeue_is_not_noted_as_one(slurm: Slurm, departure: Departure, record: Recorded) -> None:
    slurm.says("scontrol", RUNNING)
    slurm.refuse_requeue()
    assert departure.requeue(5) == 75
    assert record.names == ["attempt_ended"]


@pytest.mark.parametrize("ending", ["JobState=COMPLETING StartTime=2020-01-01T00:00:00", CANCELLED_IN_GRACE])
def test_a_job_cancelled_during_its_save_is_not_brought_back(
    slurm: Slurm, departure: Departure, record: Recorded, ending: str
) -> None:
    slurm.says("scontrol", PREEMPTED)
    departure.ask_slurm()
    assert departure.cause() == "preempted"
    slurm.says("scontrol", ending)
    assert departure.requeue(5) == 75
    assert record.names == ["attempt_ended"]
    assert record.events[0]["cause"] == "cancelled"
    assert not slurm.calls("scontrol requeue")


def test_with_preempt_mode_cancel_a_job_past_its_grace_period_is_still_brought_back(
    slurm: Slurm, departure: Departure, record: Recorded
) -> None:
    slurm.says("scontrol", PREEMPTED.replace("2099", "2020"))
    departure.ask_slurm()
    slurm.says("scontrol", CANCELLED_IN_GRACE.replace("2099", "2020"))
    assert departure.requeue(5) == 75
    assert record.names == ["attempt_ended", "requeued"]


def test_what_outlast_cancel_marked_is_cancelled_whatever_slurm_says(
    slurm: Slurm, departure: Departure, record: Recorded, tmp_path: Path
) -> None:
    slurm.says("scontrol", PREEMPTED)
    (tmp_path / "cancelled.json").write_text(f'{{"time": {time.time() + 1}}}')
    assert departure.requeue(5) == 75
    assert record.events[0]["cause"] == "cancelled"
    assert not slurm.calls("scontrol requeue")


def test_who_finds_out_what_a_signal_meant(slurm: Slurm, departure: Departure, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.says("scontrol", RUNNING)
    assert not departure.left_to_settle()  # there is no batch script that would
    monkeypatch.setenv(SETTLES_ENV, "1")
    assert departure.left_to_settle()


def test_a_preemption_is_never_left_to_the_batch_script(
    slurm: Slurm, departure: Departure, record: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SETTLES_ENV, "1")
    slurm.says("scontrol", PREEMPTED)
    assert not departure.left_to_settle()
    departure.announce("TERM", PreemptionGuard(), 5)
    assert record.events[0]["deadline_s"] > 0


@pytest.mark.parametrize(("rank", "signalled"), [(0, True), (1, True), (0, False), (1, False)])
def test_a_connection_that_breaks_because_a_peer_has_died_is_not_the_cause(
    slurm: Slurm, departure: Departure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: int, signalled: bool
) -> None:
    monkeypatch.setenv(SETTLES_ENV, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("outlast.preemption.shutdown.ECHO_S", 0.5)
    slurm.says("scontrol", RUNNING)
    guard = PreemptionGuard()
    if signalled:
        threading.Timer(0.1, guard.request, ["TERM"]).start()
    departure.fail(RuntimeError("Connection closed by peer"), guard, rank, 5)
    ended = [event["rank"] for event in Ledger(tmp_path / "ledger").read()]
    assert ended == ([] if signalled else [rank])
