import fcntl
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from outlast.errors import SlurmError
from outlast.launcher import status
from outlast.launcher.runs import is_locked
from outlast.launcher.status import NO_ANSWER, RunStatus, collect, render
from outlast.ledger import Ledger
from outlast.rundir import RunDirectory, RunLock

Make = Callable[..., RunDirectory]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run directory with a frozen configuration, under one root."""

    def make(name: str, config: str = "storage: {budget_gb: 1.0}\ntrainer: {max_steps: 100}\n") -> RunDirectory:
        run = RunDirectory(tmp_path / name)
        run.create()
        run.config.write_text(config)
        return run

    return make


def start(run: RunDirectory, attempt: int = 1, job_id: str | None = None) -> Ledger:
    ledger = Ledger(run.ledger)
    ledger.append("attempt_started", attempt, job_id=job_id, restart_count=0, hosts=["a"], world_size=1, versions={})
    return ledger


def save(ledger: Ledger, step: int, attempt: int = 1) -> None:
    ledger.append("checkpoint", attempt, step=step, kind="periodic", bytes=10, stall_s=0.1, sealed_s=0.1)


def end(ledger: Ledger, cause: str, step: int = 40, attempt: int = 1) -> None:
    ledger.append("attempt_ended", attempt, cause=cause, step=step)


def row(run: RunDirectory, queue: status.Queue | None = None) -> RunStatus:
    return next(row for row in collect(run.path.parent, queue or no_queue) if row.name == run.path.name)


def no_queue(job_ids: list[str]) -> dict[str, str]:
    raise AssertionError(f"Slurm was asked for {job_ids}")


def says(**states: str) -> status.Queue:
    return lambda job_ids: {job: state for job, state in states.items() if job in job_ids}


def progress(run: RunDirectory, **values: Any) -> None:
    now = {"attempt": 1, "phase": "training", "step": 42, "total_steps": 100, "time": time.time()}
    run.progress.write_text(json.dumps(now | values))


def test_only_run_directories_are_shown(make: Make, tmp_path: Path) -> None:
    make("b")
    make("a")
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("")
    assert [row.name for row in collect(tmp_path)] == ["a", "b"]
    assert collect(tmp_path / "nowhere") == []


def test_not_started(make: Make) -> None:
    now = row(make("a"))
    assert (now.state, now.attempts, now.step, now.total_steps, now.job_id) == ("not_started", 0, 0, 100, None)
    assert (now.budget_bytes, now.checkpoint_step, now.checkpoint_age_s) == (10**9, None, None)


def test_running_by_its_lock(make: Make) -> None:
    run = make("a")
    save(start(run), 40)
    progress(run, seconds_per_step=0.5, loss=1.5, time=time.time() - 3600)
    lock = RunLock(run)
    lock.acquire("a test")
    now = row(run)
    lock.release()
    assert (now.state, now.step, now.total_steps, now.loss, now.checkpoint_step) == ("running", 42, 100, 1.5, 40)
    assert now.eta_s == 0.0
    assert now.checkpoint_age_s is not None
    assert now.checkpoint_age_s < 5
    # The lock was taken on this host and is free: the attempt is dead, however fresh its progress.
    progress(run)
    assert row(run).state == "stopped_unexpectedly"


def test_running_on_another_host_by_its_progress(make: Make) -> None:
    run = make("a")
    start(run)
    run.lock.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    progress(run, seconds_per_step=0.5)
    now = row(run)
    assert now.state == "running"
    assert now.eta_s == pytest.approx(29.0, abs=1.5)
    progress(run, time=time.time() - 61)
    assert row(run).state == "stopped_unexpectedly"


def test_looking_at_the_lock_does_not_take_it(make: Make) -> None:
    run = make("a")
    assert is_locked(run) is None
    lock = RunLock(run)
    lock.acquire("a test")
    assert is_locked(run) is True
    lock.release()
    assert is_locked(run) is False
    # Another reader's look, which lasts an instant, hides no holder and stops no start.
    with open(run.lock) as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert is_locked(run) is False
    lock.acquire("a test")
    lock.release()


@pytest.mark.parametrize(
    ("cause", "state"),
    [
        ("preempted", "interrupted"),
        ("time_limit", "interrupted"),
        ("failed", "failed"),
        ("cancelled", "cancelled"),
    ],
)
def test_the_end_of_a_local_attempt(make: Make, cause: str, state: str) -> None:
    run = make("a")
    end(start(run), cause)
    assert (row(run).state, row(run).step) == (state, 40)


def test_finished(make: Make) -> None:
    run = make("a")
    ledger = start(run, job_id="7")
    ledger.append("evaluated", 1, step=50, metrics={"eval_loss": 1.25})
    end(ledger, "finished", 100)
    ledger.append("finished", 1, step=100, seconds=3.0)
    now = row(run)
    assert (now.state, now.step, now.best) == ("finished", 100, {"name": "eval_loss", "value": 1.25, "step": 50})


def test_gave_up_until_it_is_started_again(make: Make) -> None:
    run = make("a")
    ledger = start(run)
    end(ledger, "preempted")
    ledger.append("gave_up", 1, reason="no progress")
    assert row(run).state == "gave_up"
    end(start(run, 2), "cancelled", attempt=2)
    assert (row(run).state, row(run).attempts) == ("cancelled", 2)


@pytest.mark.parametrize(
    ("slurm_state", "state"),
    [
        ("PENDING", "queued"),
        ("CONFIGURING", "running"),
        ("RUNNING", "running"),
        ("COMPLETING", "queued"),
        ("CANCELLED", "cancelled"),
        ("COMPLETED", "interrupted"),
        (None, "interrupted"),
    ],
)
def test_a_requeued_job(make: Make, slurm_state: str | None, state: str) -> None:
    run = make("a")
    ledger = start(run, job_id="7")
    end(ledger, "preempted")
    assert row(run, says(**{"7": "PENDING"})).state == "queued"
    ledger.append("requeued", 1, cause="preempted", job_id="7")
    assert row(run, says(**{"7": slurm_state} if slurm_state else {})).state == state


def test_a_preempted_job_waits_for_its_requeue(make: Make) -> None:
    run = make("a")
    end(start(run, job_id="7"), "preempted")
    assert row(run, says(**{"7": "COMPLETING"})).state == "preempted"


def test_an_attempt_that_stopped_without_a_word(make: Make) -> None:
    run = make("a")
    start(run, job_id="7")
    assert row(run, says(**{"7": "RUNNING"})).state == "running"
    assert row(run, says()).state == "stopped_unexpectedly"


def test_a_submitted_job(make: Make) -> None:
    run = make("a")
    (run.path / "submitted.json").write_text(json.dumps({"job_id": "12", "cluster": "slurm", "slurm_conf": None}))
    now = row(run, says(**{"12": "PENDING"}))
    assert (now.state, now.job_id) == ("queued", "12")
    assert row(run, says(**{"12": "RUNNING"})).state == "running"
    assert row(run, says()).state == "stopped_unexpectedly"


def test_a_failed_run_that_was_submitted_again(make: Make) -> None:
    run = make("a")
    end(start(run, job_id="7"), "failed")
    record = run.path / "submitted.json"
    record.write_text(json.dumps({"job_id": "12", "cluster": "slurm", "slurm_conf": None}))
    os.utime(record, (time.time() - 100,) * 2)
    assert (row(run).state, row(run).job_id) == ("failed", "7")
    os.utime(record, (time.time() + 1,) * 2)
    now = row(run, says(**{"12": "PENDING"}))
    assert (now.state, now.job_id) == ("queued", "12")


def test_slurm_is_asked_once(make: Make, tmp_path: Path) -> None:
    for name, job in (("a", "7"), ("b", "8"), ("c", None)):
        ledger = start(make(name), job_id=job)
        if job:
            ledger.append("requeued", 1, cause="preempted", job_id=job)
    asked = []

    def queue(job_ids: list[str]) -> dict[str, str]:
        asked.append(job_ids)
        return {"7": "PENDING", "8": "RUNNING"}

    assert [row.state for row in collect(tmp_path, queue)] == ["queued", "running", "stopped_unexpectedly"]
    assert asked == [["7", "8"]]


def test_slurm_does_not_answer(make: Make, tmp_path: Path) -> None:
    ledger = start(make("a"), job_id="7")
    ledger.append("requeued", 1, cause="preempted", job_id="7")
    end(start(make("b")), "preempted")

    def queue(job_ids: list[str]) -> dict[str, str]:
        raise SlurmError("squeue is not installed")

    rows = collect(tmp_path, queue)
    assert [(row.state, row.note) for row in rows] == [("queued", NO_ANSWER), ("interrupted", None)]
    out = io.StringIO()
    render(rows, Console(file=out, width=140))
    assert out.getvalue().count(NO_ANSWER) == 1
    assert "interrupted: saved; the same command resumes it" in out.getvalue()


def test_what_is_damaged_is_shown_as_far_as_it_goes(make: Make, tmp_path: Path) -> None:
    run = make("a", "{[")
    save(start(run), 10)
    with open(run.ledger, "a") as file:
        file.write('{"time": 1, "att')
    run.progress.write_text("{")
    now = row(run)
    assert (now.state, now.step, now.total_steps, now.budget_bytes) == ("stopped_unexpectedly", 10, None, None)
    out = io.StringIO()
    render([now], Console(file=out, width=80))
    assert "10/?" in out.getvalue()


def test_the_command(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main(tmp_path, as_json=False) == 0
    assert "no runs here yet" in capsys.readouterr().out
    make("a")
    assert status.main(tmp_path, as_json=True) == 0
    [values] = json.loads(capsys.readouterr().out)
    assert (values["name"], values["state"]) == ("a", "not_started")
