"""The requeue policy, and how a cause is read from what Slurm says."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from outlast.config.preemption import PreemptionSection
from outlast.errors import ConfigError, RunBusyError, SlurmError
from outlast.preemption.afterwards import Afterwards
from outlast.preemption.cause import StopCause
from outlast.preemption.deadline import Planner, TimeLimit
from outlast.preemption.echo import is_left_to_epilogue
from outlast.preemption.outcome import Outcome
from outlast.preemption.policy import decide, since_submission, startup_warning
from outlast.preemption.repeats import exit_code_of, will_repeat
from outlast.preemption.shutdown import Shutdown
from outlast.preemption.signals import PreemptionGuard
from outlast.ranks.identity import Identity
from outlast.ranks.lost import Lost, LostRankError
from outlast.ranks.started import ELASTIC_ENV
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger, Recorder
from outlast.slurm.environment import BATCH_JOB_ENV, SlurmJob, in_own_batch_script
from outlast.slurm.view import JobView, restart_cause, show_job

from .conftest import Slurm

Events = list[dict[str, Any]]
LIMITS = PreemptionSection(max_requeues=10, max_crashes=1)


def ledger(*steps: int, cause: str = "preempted", submitted_at: int = 1, trained: int = 2) -> Events:
    """One attempt for each saved step, requeued but for the last, and but for that before attempt `submitted_at`.

    Each was `trained` steps further than it had saved.
    """
    events: Events = []
    for number, step in enumerate(steps, 1):
        events.append({"time": 0.0, "attempt": number, "event": "attempt_started"})
        events.append({"time": 0.0, "attempt": number, "event": "checkpoint", "step": step, "kind": "emergency"})
        events.append(
            {"time": 0.0, "attempt": number, "event": "attempt_ended", "cause": cause, "step": step + trained}
        )
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


def test_progress_is_counted_from_where_an_attempt_started() -> None:
    """The newest checkpoints were lost: what is saved after that is progress, though it was saved before."""
    events = ledger(418, 140, 168, 197)
    events.insert(4, {"time": 0.0, "attempt": 2, "event": "resumed", "step": 112})
    assert decide("preempted", events, LIMITS).action == "again"
    crashes = ledger(418, 140, cause="failed")
    crashes.insert(4, {"time": 0.0, "attempt": 2, "event": "resumed", "step": 112})
    assert decide("failed", crashes, LIMITS).action == "again"


def test_who_begins_anew_makes_progress_from_there() -> None:
    """`checkpoint.allow=[restart]`: what had been saved is lost, and what comes now is less for a long time."""
    events = ledger(418, 60, cause="failed")
    assert decide("failed", events, LIMITS).action == "fail"
    events.insert(4, {"time": 0.0, "attempt": 2, "event": "restarted", "reason": "lost"})
    assert decide("failed", events, LIMITS).action == "again"


def test_who_is_taken_away_in_start_up_has_not_failed() -> None:
    events = ledger(5, 5, 5, 5, 5, 5, trained=0)
    assert decide("preempted", events, LIMITS).action == "again"
    warning = startup_warning(since_submission(events))
    assert warning is not None
    assert warning.startswith("the last 3 attempts were taken away before they had made a step, after 0 s at most")
    assert "preemption.max_requeues bounds" in warning
    assert startup_warning(since_submission(ledger(5, 5, 5))) is None
    assert decide("preempted", events, PreemptionSection(max_requeues=5)).action == "give_up"
    # a time limit that start-up alone uses up would be used up again
    assert decide("time_limit", ledger(5, 5, 5, 5, cause="time_limit", trained=0), LIMITS).action == "give_up"
    # and those that were taken away early do not hide those that had time
    mixed = ledger(5, 5, 5, 5, 5)
    mixed[-1]["step"] = 5
    assert decide("preempted", mixed, LIMITS).action == "give_up"


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


def test_what_the_program_raises_before_its_first_step_is_not_tried_again() -> None:
    events = ledger(5, cause="failed")
    events[-1] |= {"repeats": True, "error": "KeyError: 'eval_acc'"}
    decision = decide("failed", events, LIMITS)
    assert (decision.action, decision.exit_code) == ("fail", 1)
    assert "KeyError: 'eval_acc'), before the first step" in decision.reason


def _raised(error: Exception, on_account_of: Exception | None) -> Exception:
    error.__cause__ = on_account_of
    return error


@pytest.mark.parametrize(
    ("error", "repeats"),
    [
        (ValueError("no such column"), True),
        (KeyError("eval_acc"), True),
        (ModuleNotFoundError("No module named 'lion'"), True),
        (ImportError("You need to install `bitsandbytes`"), True),
        (RuntimeError("The size of tensor a (3) must match b (4)"), True),
        (ImportError("libcuda.so.1: cannot open shared object file"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("Connection closed by peer"), False),
        (OSError("Stale file handle"), False),
        (ConnectionError("the hub"), False),
        (MemoryError(), False),
        (_raised(ValueError("can't be loaded"), OSError("Stale file handle")), False),
        (ConfigError("trainer.optim", "sdg", ["sgd"]), True),
        (_raised(ConfigError("data.train", "/mnt/x", "it can't be read"), FileNotFoundError("/mnt/x")), False),
        (RunBusyError("in use"), False),
        (SlurmError("node n0: no address"), False),
        (RuntimeError("The server socket has failed to listen: errno: 98, Address already in use"), False),
    ],
)
def test_which_errors_repeat(error: Exception, repeats: bool) -> None:
    assert will_repeat(error) is repeats


def test_a_refusal_whose_reason_is_hidden_from_the_user_still_has_one() -> None:
    def refuse() -> None:
        try:
            Path("/nowhere/train.jsonl").read_text()
        except OSError as error:
            raise ConfigError("data.train", "train.jsonl", str(error)) from None

    with pytest.raises(ConfigError) as raised:
        refuse()
    assert not will_repeat(raised.value)


def test_in_a_job_exit_code_2_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, refused = RunBusyError("in use"), ConfigError("trainer.optim", "sdg", ["sgd"])
    assert (exit_code_of(busy), exit_code_of(refused)) == (2, 2)
    in_batch_script_of_ours(monkeypatch)
    assert (exit_code_of(busy), exit_code_of(refused)) == (1, 2)


@pytest.mark.parametrize(("error", "refused"), [(SlurmError("no address"), False), (ConfigError("a", 1, "2"), True)])
def test_only_what_would_be_refused_again_is_final(slurm: Slurm, rank: "Rank", error: Exception, refused: bool) -> None:
    rank.shutdown.fail(error, 0)
    assert rank.events[-1]["refused"] is refused


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
        ("REQUEUED\n", "alloc\n", "requeued"),
        ("", "alloc\ncomp\n", "requeued"),  # no sacct: its nodes are well, and nothing says that they were taken
        ("", "comp\ndown\n", "node_failure"),
    ],
)
def test_the_cause_of_a_restart_that_slurm_made(slurm: Slurm, sacct: str, nodes: str, cause: str) -> None:
    slurm.says("sacct", sacct)
    slurm.says("sinfo", nodes)
    assert RESTARTED.stop_cause(JOB, lead_s=90) == cause


@pytest.mark.parametrize(
    ("says", "cause"),
    [
        ("PreemptTime=1000", "preempted"),
        ("PreemptTime=900", "requeued"),  # of an earlier start
        ("PreemptTime=None GraceTime=0", "preempted"),  # which leaves no trace
        ("PreemptTime=None GraceTime=30", "requeued"),
        ("GraceTime=0 Reason=job_requeued_in_held_state", "requeued"),
    ],
)
def test_a_preemption_leaves_its_time_behind_unless_it_comes_without_a_grace_period(
    slurm: Slurm, says: str, cause: str
) -> None:
    slurm.says("scontrol", f"PreemptType = preempt/partition_prio\nJobId=7 Partition=low Restarts=1 {says}\n")
    slurm.says("sinfo", "mix\n")
    assert show_job("7").stop_cause(JOB, lead_s=90, since=950.0) == cause


@pytest.mark.parametrize(("signalled", "cause"), [(True, "requeued"), (False, "node_failure")])
def test_a_node_that_is_well_again_gave_no_signal_when_it_failed(slurm: Slurm, signalled: bool, cause: str) -> None:
    slurm.says("sinfo", "mix\n")
    assert restart_cause(JOB, 0.0, RESTARTED, signalled=signalled) == cause


class Rank:
    """A rank's way out, with all that it is made of, on a ledger of its own."""

    def __init__(self, directory: Path, *, job: SlurmJob | None = JOB, rank: int = 0, world_size: int = 1) -> None:
        run, preemption = RunDirectory(directory), PreemptionSection()
        self.ledger, self.guard = Ledger(run.ledger), PreemptionGuard()
        identity = Identity(rank, world_size, job, 1)
        record = Recorder(self.ledger, identity, print)
        self.cause = StopCause(run, identity, self.guard, preemption, print)
        outcome = Outcome(run, identity, preemption, record, print)
        self.shutdown = Shutdown(identity, self.guard, self.cause, outcome, preemption, record, print)
        self.afterwards = Afterwards(identity, self.cause, outcome, preemption)

    @property
    def events(self) -> list[dict[str, Any]]:
        return self.ledger.read()

    @property
    def names(self) -> list[str]:
        return [event["event"] for event in self.events]


def in_batch_script_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", BATCH_JOB_ENV):
        monkeypatch.setenv(name, JOB.job_id)


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    return Rank(tmp_path)


def test_of_ranks_that_end_an_attempt_at_once_one_requeues(slurm: Slurm, rank: Rank, tmp_path: Path) -> None:
    slurm.says("scontrol", RUNNING)
    ranks = [Rank(tmp_path).shutdown for _ in range(8)]
    with ThreadPoolExecutor(len(ranks)) as threads:
        codes = set(threads.map(lambda one: one.requeue(5), ranks))
    assert codes == {75}
    assert rank.names == ["attempt_ended", "requeued"]
    assert len(slurm.calls("scontrol requeue")) == 1
    assert sum(one.ended_it for one in ranks) == 1


@pytest.mark.parametrize(
    ("env", "own"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7"}, False),  # an salloc, a notebook
        ({BATCH_JOB_ENV: ""}, False),  # the prologue, outside Slurm
        ({"SLURM_JOB_ID": "8", BATCH_JOB_ENV: "7"}, False),  # submitted from inside one of ours
        ({"SLURM_JOB_ID": "7", BATCH_JOB_ENV: "7"}, True),
    ],
)
def test_which_job_is_the_runs_own(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], own: bool) -> None:
    for name in ("SLURM_JOB_ID", BATCH_JOB_ENV):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert in_own_batch_script() is own


def test_ctrl_c_never_brings_a_job_back(slurm: Slurm, rank: Rank) -> None:
    slurm.says("scontrol", PREEMPTED)
    rank.guard.request("INT")
    rank.shutdown.announce("INT", 5)
    assert rank.shutdown.requeue(5) == 75
    assert [event["cause"] for event in rank.events if event["event"] == "attempt_ended"] == ["cancelled"]
    assert not slurm.calls("scontrol requeue")


def test_a_signal_after_training_brings_the_job_back_for_what_follows(slurm: Slurm, rank: Rank) -> None:
    """As often as any requeue, and not where it was cancelled; the run stays finished."""
    rank.ledger.append("attempt_ended", 1, cause="finished", step=5)
    rank.ledger.append("finished", 1, step=5, seconds=1.0)
    slurm.says("scontrol", PREEMPTED)
    assert rank.afterwards.follow("TERM") == 75
    assert len(slurm.calls("scontrol requeue")) == 1
    assert rank.names == ["attempt_ended", "finished", "requeued"]
    assert rank.afterwards.follow("INT") == 75
    assert len(slurm.calls("scontrol requeue")) == 1


def test_after_training_a_signal_that_may_be_an_echo_requeues_nothing(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank may have raised, as it will again; the batch script sees how each has ended."""
    in_batch_script_of_ours(monkeypatch)
    slurm.says("scontrol", RUNNING)
    assert Rank(tmp_path, world_size=2).afterwards.follow("TERM") == 1
    assert not slurm.calls("scontrol requeue")


def test_after_training_a_job_that_was_cancelled_meanwhile_stays_so(slurm: Slurm, rank: Rank) -> None:
    slurm.says("scontrol", RUNNING)
    rank.cause.ask_why()
    slurm.says("scontrol", "JobState=CANCELLED")
    assert rank.afterwards.follow("TERM") == 75
    assert not slurm.calls("scontrol requeue")


def test_a_rank_that_does_not_speak_for_all_writes_nothing(slurm: Slurm, tmp_path: Path) -> None:
    silent = Rank(tmp_path, rank=1, world_size=2)
    silent.shutdown.announce("TERM", 5)
    assert silent.shutdown.signal == "TERM"
    assert silent.events == []
    assert not slurm.calls("scontrol")


@pytest.mark.parametrize(("agent", "cause"), [(True, "failed"), (False, "preempted")])
def test_the_agents_term_is_the_echo_of_a_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agent: bool, cause: str
) -> None:
    """torch's agent ends the other ranks, by TERM, when one has died; whichever they notice first."""
    if agent:
        monkeypatch.setenv(ELASTIC_ENV, "1")
    rank = Rank(tmp_path, job=None)
    rank.guard.request("TERM")
    rank.shutdown.fail(LostRankError([Lost(rank=1, host="here", seconds=0.1, how="gone")]), 7)
    assert rank.events[-1]["cause"] == cause
    assert rank.names == [*([] if agent else ["signal"]), "straggler", "attempt_ended"]


RUNNING = "JobState=RUNNING PreemptTime=None Restarts=0"
PREEMPTED = "JobState=RUNNING StartTime=2020-01-01T00:00:00 PreemptTime=2020-01-01T01:00:00 EndTime=2099-01-01T00:00:00"
CANCELLED_IN_GRACE = PREEMPTED.replace("RUNNING", "COMPLETING")


def test_a_departure_requeues_once_however_often_it_is_asked(slurm: Slurm, rank: Rank) -> None:
    slurm.says("scontrol", RUNNING)
    assert rank.shutdown.requeue(5) == rank.shutdown.requeue(5) == 75
    assert rank.names == ["attempt_ended", "requeued"]
    assert rank.events[1]["by"] == "job"
    assert len(slurm.calls("scontrol requeue")) == 1


def test_a_job_that_slurm_has_requeued_already_is_not_requeued_twice(slurm: Slurm, rank: Rank) -> None:
    slurm.says("scontrol", "JobState=COMPLETING Restarts=1")
    slurm.says("sacct", "NODE_FAIL")
    slurm.refuse_requeue()
    assert rank.shutdown.requeue(5) == 75
    assert [event["cause"] for event in rank.events] == ["node_failure", "node_failure"]
    assert rank.events[1]["by"] == "slurm"


def test_a_refused_requeue_is_not_noted_as_one(slurm: Slurm, rank: Rank) -> None:
    slurm.says("scontrol", RUNNING)
    slurm.refuse_requeue()
    assert rank.shutdown.requeue(5) == 75
    assert rank.names == ["attempt_ended"]


AT_THE_LIMIT = "JobState=RUNNING EndTime=2020-01-01T00:00:00"


@pytest.mark.parametrize(
    ("signalled", "cause", "ending"),
    [
        (PREEMPTED, "preempted", "JobState=COMPLETING StartTime=2020-01-01T00:00:00"),
        (PREEMPTED, "preempted", CANCELLED_IN_GRACE),
        pytest.param(AT_THE_LIMIT, "time_limit", "JobState=COMPLETING", id="at its limit, completing"),
        pytest.param(AT_THE_LIMIT, "time_limit", "JobState=CANCELLED", id="at its limit, cancelled"),
        (RUNNING, "preempted", "JobState=COMPLETING"),  # by a signal that somebody sent on purpose
    ],
)
def test_a_job_cancelled_during_its_save_is_not_brought_back(
    slurm: Slurm, rank: Rank, signalled: str, cause: str, ending: str
) -> None:
    slurm.says("scontrol", signalled)
    rank.cause.ask_why()
    assert rank.cause.cause("TERM") == cause
    slurm.says("scontrol", ending)
    assert rank.shutdown.requeue(5) == 75
    assert rank.names == ["attempt_ended"]
    assert rank.events[0]["cause"] == "cancelled"
    assert not slurm.calls("scontrol requeue")


def test_with_preempt_mode_cancel_a_job_past_its_grace_period_is_still_brought_back(slurm: Slurm, rank: Rank) -> None:
    slurm.says("scontrol", PREEMPTED.replace("2099", "2020"))
    rank.cause.ask_why()
    slurm.says("scontrol", CANCELLED_IN_GRACE.replace("2099", "2020"))
    assert rank.shutdown.requeue(5) == 75
    assert rank.names == ["attempt_ended", "requeued"]


@pytest.mark.parametrize(
    ("signalled", "ending"),
    [
        pytest.param(AT_THE_LIMIT, "JobState=COMPLETING Reason=TimeLimit", id="at its limit"),
        (RUNNING, "JobState=COMPLETING StartTime=2020-01-01T00:00:00 PreemptTime=2020-01-01T01:00:00"),
    ],
)
def test_a_job_that_ends_otherwise_during_its_save_is_brought_back(
    slurm: Slurm, rank: Rank, signalled: str, ending: str
) -> None:
    slurm.says("scontrol", signalled)
    rank.cause.ask_why()
    slurm.says("scontrol", ending)
    assert rank.shutdown.requeue(5) == 75
    assert rank.names == ["attempt_ended", "requeued"]


def test_a_signal_that_came_before_slurm_could_explain_it(slurm: Slurm, rank: Rank) -> None:
    slurm.says("scontrol", RUNNING)
    rank.cause.ask_why()
    slurm.says("scontrol", "JobState=PENDING Restarts=1")
    slurm.says("sinfo", "down\n")
    slurm.refuse_requeue()
    rank.shutdown.requeue(5)
    assert rank.events[0]["cause"] == "node_failure"


def test_a_lost_rank_brings_no_job_back_that_was_cancelled_meanwhile(slurm: Slurm, rank: Rank) -> None:
    slurm.says("scontrol", "JobState=COMPLETING")
    rank.shutdown.fail(LostRankError([Lost(rank=1, host="here", seconds=0.1, how="gone")]), 7)
    assert rank.names == ["straggler", "attempt_ended"]
    assert not slurm.calls("scontrol requeue")


def test_what_outlast_cancel_marked_is_cancelled_whatever_slurm_says(slurm: Slurm, rank: Rank, tmp_path: Path) -> None:
    slurm.says("scontrol", PREEMPTED)
    (tmp_path / "cancelled.json").write_text(f'{{"time": {time.time() + 1}}}')
    assert rank.shutdown.requeue(5) == 75
    assert rank.events[0]["cause"] == "cancelled"
    assert not slurm.calls("scontrol requeue")


def test_who_finds_out_what_a_signal_meant(slurm: Slurm, rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.says("scontrol", RUNNING)
    assert not is_left_to_epilogue(rank.cause)  # there is no batch script that would
    in_batch_script_of_ours(monkeypatch)
    assert is_left_to_epilogue(rank.cause)


def test_a_preemption_is_never_left_to_the_batch_script(
    slurm: Slurm, rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_batch_script_of_ours(monkeypatch)
    slurm.says("scontrol", PREEMPTED)
    assert not is_left_to_epilogue(rank.cause)
    rank.shutdown.announce("TERM", 5)
    assert rank.events[0]["deadline_s"] > 0


@pytest.mark.parametrize(("number", "signalled"), [(0, True), (1, True), (0, False), (1, False)])
def test_a_connection_that_breaks_because_a_peer_has_died_is_not_the_cause(
    slurm: Slurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, signalled: bool
) -> None:
    in_batch_script_of_ours(monkeypatch)
    monkeypatch.setattr("outlast.preemption.echo.ECHO_S", 0.5)
    slurm.says("scontrol", RUNNING)
    rank = Rank(tmp_path, rank=number, world_size=2)
    if signalled:
        threading.Timer(0.1, rank.guard.request, ["TERM"]).start()
    rank.shutdown.fail(RuntimeError("Connection closed by peer"), 5)
    assert [event["rank"] for event in rank.events] == ([] if signalled else [number])


@pytest.mark.parametrize(
    ("ran_s", "left_s", "near"),
    [(3600, 120, False), (3600, 30, True), (0, 40, False)],  # a job shorter than its lead time trains for half of it
)
def test_near_its_time_limit_a_job_stops_without_being_told(
    slurm: Slurm, rank: Rank, ran_s: int, left_s: int, near: bool
) -> None:
    limit = TimeLimit(rank.cause, Planner(lead_s=60), started=time.time() - ran_s)
    assert not limit.is_near()  # nobody has said when it ends
    slurm.says("scontrol", ends_in(left_s))
    rank.cause.ask_for_limits()
    assert limit.is_near() == near
    slurm.says("scontrol", ends_in(3600))
    assert not limit.is_near()  # it was raised meanwhile


def ends_in(seconds: int) -> str:
    end = datetime.fromtimestamp(time.time() + seconds).isoformat(timespec="seconds")
    return f"JobState=RUNNING Restarts=0 EndTime={end}"
