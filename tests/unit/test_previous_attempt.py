"""What an attempt makes of the one before it, when Slurm has started the job again by itself."""

from pathlib import Path
from typing import Any

import pytest

from outlast.config.preemption import PreemptionSection
from outlast.preemption.previous_attempt import end_previous_attempt
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.rundir.progress import ProgressWriter
from outlast.slurm.environment import SlurmJob

from .conftest import Slurm

LIMITS = PreemptionSection(max_requeues=10)


@pytest.fixture
def run(tmp_path: Path, slurm: Slurm) -> RunDirectory:
    return RunDirectory(tmp_path)


def start(run: RunDirectory, attempt: int, job_id: str | None, restarts: int, **ended: Any) -> None:
    ledger = Ledger(run.ledger)
    values: dict[str, Any] = {"hosts": ["n0", "n1"], "world_size": 2, "versions": {}}
    ledger.append("attempt_started", attempt, job_id=job_id, restart_count=restarts, **values)
    if ended:
        ledger.append("attempt_ended", attempt, step=0, **ended)


def last(run: RunDirectory, event: str) -> dict[str, Any]:
    return [line for line in Ledger(run.ledger).read() if line["event"] == event][-1]


def test_there_is_none(run: RunDirectory) -> None:
    assert end_previous_attempt(run, 1, SlurmJob("7", 0, "n0"), LIMITS, print) is None
    assert Ledger(run.ledger).read() == []


@pytest.mark.parametrize(("state", "cause"), [("NODE_FAIL", "node_failure"), ("PREEMPTED", "preempted")])
def test_slurm_says_why_it_has_started_the_job_again(run: RunDirectory, slurm: Slurm, state: str, cause: str) -> None:
    start(run, 1, "7", 0)
    slurm.says("sacct", f"{state}\nRUNNING\n")
    assert end_previous_attempt(run, 2, SlurmJob("7", 1, "n2"), LIMITS, print) is None
    assert (last(run, "attempt_ended")["cause"], last(run, "attempt_ended")["attempt"]) == (cause, 1)
    assert (last(run, "requeued")["by"], last(run, "requeued")["attempt"]) == ("slurm", 1)


def test_its_nodes_say_it_where_there_is_no_sacct(run: RunDirectory, slurm: Slurm) -> None:
    start(run, 1, "7", 0)
    slurm.says("sinfo", "alloc\ndown*\n")
    end_previous_attempt(run, 2, SlurmJob("7", 1, "n2"), LIMITS, print)
    assert last(run, "attempt_ended")["cause"] == "node_failure"
    assert slurm.calls("sinfo") == ["sinfo --noheader --Node --nodes=n0,n1 --format=%t"]


def test_restarts_by_slurm_count_like_any_other(run: RunDirectory, slurm: Slurm) -> None:
    slurm.says("sacct", "NODE_FAIL\n" * 9)
    reasons = []
    for attempt in range(2, 6):
        start(run, attempt - 1, "7", attempt - 2)
        progress = ProgressWriter(run)
        progress.now.attempt = attempt - 1
        progress.update(step=3, force=True)  # it had time for steps, and saved none
        reasons.append(end_previous_attempt(run, attempt, SlurmJob("7", attempt - 1, "n0"), LIMITS, print))
    assert reasons[:3] == [None] * 3
    assert "no progress" in str(reasons[3])


def test_a_run_that_had_failed_is_not_run_because_slurm_requeues_failed_jobs(run: RunDirectory, slurm: Slurm) -> None:
    start(run, 1, "7", 0, cause="failed", error="ConfigError: no", refused=True)
    assert "ConfigError: no" in str(end_previous_attempt(run, 2, SlurmJob("7", 1, "n0"), LIMITS, print))


def test_another_job_is_a_user_s_doing(run: RunDirectory, slurm: Slurm) -> None:
    start(run, 1, "7", 0)
    slurm.says("sacct", "OUT_OF_MEMORY\n")
    assert end_previous_attempt(run, 2, SlurmJob("8", 0, "n0"), LIMITS, print) is None
    assert last(run, "attempt_ended")["cause"] == "out_of_memory"
    assert not [event for event in Ledger(run.ledger).read() if event["event"] == "requeued"]


def test_what_the_one_before_saw_to_is_left_alone(run: RunDirectory, slurm: Slurm) -> None:
    start(run, 1, "7", 0, cause="preempted")
    Ledger(run.ledger).append("requeued", 1, cause="preempted", job_id="7")
    before = Ledger(run.ledger).read()
    assert end_previous_attempt(run, 2, SlurmJob("7", 1, "n0"), LIMITS, print) is None
    assert Ledger(run.ledger).read() == before


def test_without_slurm_it_was_killed(run: RunDirectory) -> None:
    start(run, 1, None, 0)
    assert end_previous_attempt(run, 2, None, LIMITS, print) is None
    assert (last(run, "attempt_ended")["cause"], last(run, "attempt_ended")["detail"]) == ("failed", "killed")


def test_a_full_disk_is_said_as_it_is(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    start(run, 1, None, 0)

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("outlast.rundir.ledger.os.write", full)
    with pytest.raises(OSError, match="No space left"):
        end_previous_attempt(run, 2, None, LIMITS, print)
