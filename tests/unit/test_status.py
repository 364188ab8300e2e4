"""States: ledger, lock, progress and Slurm, put together."""

import fcntl
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from outlast.launcher.runs.find import runs_named, runs_under
from outlast.launcher.runs.queue import Answer, JobKey, JobState
from outlast.launcher.runs.standing import collect
from outlast.launcher.runs.state import is_locked, state_of
from outlast.launcher.runs.submissions import cancelled_at, mark_cancelled, submission_of
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.rundir.lock import RunLock
from outlast.rundir.place import place_of
from outlast.rundir.sweep import read_sweep_manifest

from .runs import Make, end, progress, row, save, says, shown, start, submit, sweep_of


def test_only_run_directories_are_shown(make: Make, tmp_path: Path) -> None:
    make("b")
    make("a")
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("")
    assert [row.name for row in collect(runs_under(tmp_path))] == ["a", "b"]
    assert runs_under(tmp_path / "nowhere") == []


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
        ("out_of_memory", "failed"),
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


def attempted(make: Make, ledger_says: str, name: str = "a") -> RunDirectory:
    """A run with job 7 whose ledger says one of the things that it can say."""
    run = make(name)
    if ledger_says == "submitted":
        submit(run, "7")
        return run
    ledger = start(run, job_id="7")
    if ledger_says in ("preempted", "requeued"):
        end(ledger, "preempted")
    elif ledger_says in ("failed", "cancelled"):
        end(ledger, ledger_says)
    if ledger_says == "requeued":
        ledger.append("requeued", 1, cause="preempted", job_id="7")
    return run


@pytest.mark.parametrize(
    ("ledger_says", "slurm_says", "state"),
    [
        ("submitted", "PENDING", "queued"),
        ("submitted", "CONFIGURING", "running"),
        ("submitted", "FAILED", "failed"),
        ("submitted", "CANCELLED", "cancelled"),
        ("submitted", None, "stopped_unexpectedly"),
        ("started", "RUNNING", "running"),
        ("started", "PENDING", "queued"),  # its node died: Slurm has requeued it, and that is no failure
        ("started", "OUT_OF_MEMORY", "failed"),
        ("started", "NODE_FAIL", "failed"),
        ("started", "COMPLETED", "stopped_unexpectedly"),
        ("started", None, "stopped_unexpectedly"),
        ("preempted", "RUNNING", "preempted"),
        ("preempted", "COMPLETING", "preempted"),
        ("preempted", "REQUEUED", "queued"),
        ("preempted", None, "interrupted"),
        ("requeued", "PENDING", "queued"),
        ("requeued", "REQUEUE_HOLD", "queued"),
        ("requeued", "COMPLETING", "queued"),
        ("requeued", "RUNNING", "running"),
        ("requeued", "CANCELLED", "cancelled"),
        ("requeued", "TIMEOUT", "failed"),
        ("requeued", "COMPLETED", "interrupted"),
        ("requeued", None, "interrupted"),
        ("failed", "PENDING", "queued"),  # a crash is retried: the line in the ledger comes a moment later
        ("failed", "RUNNING", "failed"),
        ("cancelled", "COMPLETING", "cancelled"),
        ("cancelled", "COMPLETED", "cancelled"),
    ],
)
def test_ledger_and_slurm(make: Make, ledger_says: str, slurm_says: str | None, state: str) -> None:
    run = attempted(make, ledger_says)
    assert row(run, says(**{"J7": slurm_says} if slurm_says else {})).state == state


def test_why_a_job_waits_is_shown(make: Make) -> None:
    run = attempted(make, "requeued")
    assert row(run, says("BeginTime", J7="PENDING")).reason == "BeginTime"
    assert row(run, says("held", J7="REQUEUE_HOLD")).reason == "requeue_hold"
    assert "queued (BeginTime)" in shown([row(run, says("BeginTime", J7="PENDING"))])


def test_why_it_failed_is_shown(make: Make) -> None:
    run = make("a")
    start(run).append("attempt_ended", 1, cause="failed", step=3, error="ValueError: no such file\nTraceback")
    assert row(run).reason == "ValueError: no such file"
    assert row(attempted(make, "started", "b"), says(J7="OUT_OF_MEMORY")).reason == "OUT_OF_MEMORY by Slurm's word"


def test_running_on_this_host_while_slurm_is_behind(make: Make) -> None:
    run = attempted(make, "started")
    lock = RunLock(run)
    lock.acquire("job 7")
    assert row(run, says()).state == "running"
    lock.release()
    assert row(run, says()).state == "stopped_unexpectedly"


def test_a_run_that_was_submitted_again(make: Make) -> None:
    run = make("a")
    end(start(run, job_id="7"), "failed")
    submit(run, "12", at=time.time() - 100)
    assert (row(run, says(J7="FAILED")).state, row(run, says()).job_id) == ("failed", "7")
    submit(run, "12", at=time.time() + 1)
    now = row(run, says(J12="PENDING"))
    assert (now.state, now.job_id) == ("queued", "12")


def test_a_job_whose_number_was_never_written_down(make: Make) -> None:
    run = make("a")
    comment = submit(run, None).comment
    answer = Answer({JobKey(None, "31"): JobState("PENDING")}, {(None, comment): "31"})
    now = row(run, lambda wanted, users, clusters: answer)
    assert (now.state, now.job_id) == ("queued", "31")
    assert row(run, says()).state == "stopped_unexpectedly"  # sbatch was killed before it reached Slurm


def test_cancelled_stays_cancelled(make: Make) -> None:
    run = attempted(make, "requeued")
    mark_cancelled(run, "7")
    assert cancelled_at(run) is not None
    assert row(run, says()).state == "cancelled"
    # What Slurm says goes before: a job that came back is told as it is.
    assert row(run, says(J7="PENDING")).state == "queued"
    submit(run, "8")
    assert state_of(run, Ledger(run.ledger).read()) == "queued"


def test_cancelled_while_it_saves(make: Make) -> None:
    run = make("a")
    ledger = start(run)
    mark_cancelled(run, None)
    end(ledger, "preempted")
    assert row(run).state == "cancelled"
    start(run, 2)
    assert row(run).state == "stopped_unexpectedly"
    end(ledger, "preempted", attempt=2)
    assert row(run).state == "interrupted"


@pytest.mark.parametrize("requeued", [True, False])
@pytest.mark.parametrize("submitted", [True, False])
def test_the_job_of_a_run_is_not_that_of_its_copy(make: Make, tmp_path: Path, submitted: bool, requeued: bool) -> None:
    """Nor is that of a run which was moved another's: it keeps the inode, as it keeps the path on another mount."""
    run = make("a")
    place = place_of(run.path)
    start(run, job_id="7", place=place)
    if requeued:
        end(Ledger(run.ledger), "preempted")
        Ledger(run.ledger).append("requeued", 1, cause="preempted", job_id="7", place=place)
    if submitted:
        submit(run, "7", place=place)
    shutil.copytree(run.path, tmp_path / "b")
    copy = row(RunDirectory(tmp_path / "b"), says(J7="RUNNING"))
    assert copy.state == ("interrupted" if requeued else "stopped_unexpectedly")
    assert copy.job_id is None
    assert submission_of(RunDirectory(tmp_path / "b")) is None
    assert row(run, says(J7="RUNNING")).job_id == "7"
    run.path.rename(tmp_path / "c")
    assert row(RunDirectory(tmp_path / "c"), says(J7="RUNNING")).job_id == "7"


def test_a_copy_of_a_sweep_has_not_been_submitted(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, [("7", [0, 1, 2])])
    manifest = read_sweep_manifest(sweep)
    manifest.submissions[0] = replace(manifest.submissions[0], place=place_of(sweep))
    manifest.write(sweep)
    shutil.copytree(sweep, tmp_path / "t")
    assert submission_of(RunDirectory(sweep / "seed=0")) is not None
    assert submission_of(RunDirectory(tmp_path / "t" / "seed=0")) is None


def test_the_cells_of_a_sweep(make: Make, tmp_path: Path) -> None:
    make("r")
    sweep_of(tmp_path, [("20", [0, 1, 2]), ("21", [2])])
    rows = collect(runs_under(tmp_path), says(J20_0="RUNNING", J20_1="PENDING", J20_2="CANCELLED", J21_2="PENDING"))
    assert [(row.name, row.sweep, row.state, row.job_id) for row in rows] == [
        ("r", None, "not_started", None),
        ("s/seed=0", "s", "running", "20_0"),
        ("s/seed=1", "s", "queued", "20_1"),
        ("s/seed=2", "s", "queued", "21_2"),
    ]
    assert "3 cells: 2 queued, 1 running" in shown(rows)


def test_tasks_of_a_large_sweep_are_numbered_from_an_offset(tmp_path: Path) -> None:
    path = sweep_of(tmp_path, [("20", [2])], offset=2)
    rows = collect(runs_named(["s"], tmp_path), says(J20_0="RUNNING"))
    assert [(row.state, row.job_id) for row in rows][2] == ("running", "20_0")
    assert submission_of(RunDirectory(path / "seed=2")).log == path / "logs" / "20_0.log"
