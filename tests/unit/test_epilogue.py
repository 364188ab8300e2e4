"""What the batch script sees to when its ranks are gone, by what they and Slurm left behind."""

import json
import os
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from outlast.config.configuration import build, dump
from outlast.epilogue import _command, follow_up
from outlast.launcher.commands import logs
from outlast.launcher.runs.standing import look
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.rundir.lock import RunLock

from .conftest import Slurm

RUNNING = "JobState=RUNNING Restarts=0"


class Run:
    """A run directory as a first attempt of job 7 leaves it behind."""

    def __init__(self, path: Path) -> None:
        self.directory = RunDirectory(path)
        self.directory.create()
        cluster = {"kind": "slurm"}
        tree = {"run": {"name": path.name, "root": str(path.parent)}, "job": {"name": "smoke"}, "cluster": cluster}
        self.directory.config.write_text(dump(build(tree)))
        self.ledger = Ledger(self.directory.ledger)

    def start(self, attempt: int = 1, job_id: str = "7", restarts: int = 0) -> None:
        values: dict[str, Any] = {"hosts": ["n0"], "world_size": 2, "versions": {}}
        self.ledger.append("attempt_started", attempt, job_id=job_id, restart_count=restarts, **values)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.ledger.read() if event["event"] == name]

    def follow_up(self, code: int) -> int:
        return int(follow_up(self.directory, code))


@pytest.fixture
def run(tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n0")
    slurm.says("scontrol", RUNNING)
    return Run(tmp_path / "runs" / "it's a run")


def test_a_run_that_has_finished_is_done_whatever_srun_said(run: Run, slurm: Slurm) -> None:
    run.start()
    run.ledger.append("attempt_ended", 1, cause="finished", step=5)
    run.ledger.append("finished", 1, step=5, seconds=1.0)
    assert run.follow_up(143) == 0
    assert not slurm.calls("scontrol")


def test_what_a_script_does_after_its_run_is_not_done_because_that_has_finished(run: Run, slurm: Slurm) -> None:
    run.directory.config.unlink()  # a script's
    run.start()
    run.ledger.append("attempt_ended", 1, cause="finished", step=5)
    run.ledger.append("finished", 1, step=5, seconds=1.0)
    assert [run.follow_up(code) for code in (0, 75, 143)] == [0, 75, 143]
    assert not slurm.calls("scontrol")


def test_of_several_runs_of_a_script_the_last_that_has_begun_counts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.directory.config.unlink()
    run.start()
    before, later = run.directory.path.with_name("a"), run.directory.path.with_name("z")
    before.mkdir()
    monkeypatch.setattr(sys, "argv", ["x", *map(str, (before, run.directory.path, later)), "--exit-code", "137"])
    assert _command() == 75
    assert run.events("requeued")
    assert not (before / "ledger.jsonl").exists()
    assert not later.exists()


def test_what_rank_0_has_requeued_is_left_alone(run: Run, slurm: Slurm) -> None:
    run.start()
    run.ledger.append("attempt_ended", 1, cause="preempted", step=5)
    run.ledger.append("requeued", 1, cause="preempted", job_id="7")
    assert run.follow_up(75) == 75
    assert not slurm.calls("scontrol")


def test_a_killed_rank_is_noted_and_the_job_requeued_once(run: Run, slurm: Slurm) -> None:
    run.start()
    assert run.follow_up(137) == 75
    assert run.follow_up(137) == 75
    (ended,) = run.events("attempt_ended")
    assert (ended["cause"], ended["detail"]) == ("failed", "a rank was killed by SIGKILL")
    (requeued,) = run.events("requeued")
    assert (requeued["cause"], requeued["by"], requeued["job_id"]) == ("failed", "job", "7")
    assert slurm.calls("scontrol requeue") == ["scontrol requeue 7"]


def test_what_a_rank_said_of_its_end_stands(run: Run, slurm: Slurm) -> None:
    run.start()
    run.ledger.append("attempt_ended", 1, cause="failed", step=3, error="ValueError: no", rank=1)
    assert run.follow_up(1) == 75
    assert [event["step"] for event in run.events("attempt_ended")] == [3]


def test_out_of_memory_is_what_slurm_calls_so(run: Run, slurm: Slurm) -> None:
    run.start()
    slurm.says("sacct", "RUNNING\nRUNNING\nOUT_OF_MEMORY\n")
    assert run.follow_up(137) == 75
    assert run.events("attempt_ended")[0]["cause"] == "out_of_memory"


@pytest.mark.parametrize(
    ("says", "cause"),
    [
        ("JobState=COMPLETING Reason=TimeLimit", "time_limit"),
        ("JobState=COMPLETING StartTime=2020-01-01T00:00:00 PreemptTime=2020-01-01T01:00:00", "preempted"),
        ("JobState=COMPLETING", "cancelled"),
    ],
)
def test_what_slurm_says_of_the_job_goes_before_how_its_ranks_ended(
    run: Run, slurm: Slurm, says: str, cause: str
) -> None:
    run.start()
    slurm.says("scontrol", says)
    assert run.follow_up(137) == 75
    assert run.events("attempt_ended")[0]["cause"] == cause
    assert bool(slurm.calls("scontrol requeue")) == (cause != "cancelled")


def test_a_job_that_slurm_has_put_back_by_itself_is_noted_as_that(run: Run, slurm: Slurm) -> None:
    run.start()
    slurm.says("scontrol", "JobState=COMPLETING Restarts=1")
    slurm.says("sacct", "NODE_FAIL\n")
    slurm.refuse_requeue()
    assert run.follow_up(143) == 75
    assert run.events("attempt_ended")[0]["cause"] == "node_failure"
    assert run.events("requeued")[0]["by"] == "slurm"
    assert not slurm.calls("sbatch")


def test_a_job_cancelled_after_a_rank_had_said_how_it_ended_is_not_brought_back(run: Run, slurm: Slurm) -> None:
    run.start()
    run.ledger.append("attempt_ended", 1, cause="failed", step=3, error="ValueError: no", rank=1)
    slurm.says("scontrol", "JobState=COMPLETING")
    assert run.follow_up(1) == 75
    assert not run.events("requeued")
    assert not slurm.calls("scontrol requeue")


def test_what_outlast_cancel_has_marked_stays_cancelled(run: Run, slurm: Slurm) -> None:
    run.start()
    (run.directory.path / "cancelled.json").write_text(json.dumps({"time": time.time() + 1}))
    assert run.follow_up(137) == 75
    assert run.events("attempt_ended")[0]["cause"] == "cancelled"
    assert not slurm.calls("scontrol requeue")


def test_a_signal_in_start_up_without_a_death_is_a_preemption(run: Run, slurm: Slurm) -> None:
    run.start()
    run.ledger.append("signal", 1, name="TERM", step=0, deadline_s=None, unexplained=True)
    assert run.follow_up(0) == 75
    assert run.events("attempt_ended")[0]["cause"] == "preempted"
    assert slurm.calls("scontrol requeue")


def test_the_same_with_a_death_is_none(run: Run, slurm: Slurm) -> None:
    run.start()
    run.ledger.append("signal", 1, name="TERM", step=0, deadline_s=None, unexplained=True)
    assert run.follow_up(137) == 75
    assert run.events("attempt_ended")[0]["cause"] == "failed"


def test_ranks_that_never_began_are_an_attempt_too(run: Run, slurm: Slurm) -> None:
    assert run.follow_up(1) == 75
    (ended,) = run.events("attempt_ended")
    assert ended["attempt"] == 1
    assert ended["detail"] == "the ranks ended with exit code 1 before the run began"


@pytest.mark.parametrize(
    ("printed", "code", "why"),
    [
        ("[outlast] hello\nenv: 'python': No such file or directory\nsrun: error: n0: task 0: Exited\n", 127,
         "env: 'python': No such file or directory"),
        ("Traceback (most recent call last):\n  File x\nValueError: no\nsrun: error: n0: task 0: Exited\n", 1,
         "ValueError: no"),
        ("outlast: run is in use by job 6\nsrun: error: n0: task 0: Exited with exit code 1\n", 1,
         "run is in use by job 6"),
        ("slurmstepd: error: execve(): /x/python: No such file\nsrun: error: n0: task 0: Exited\n", 2,
         "execve(): /x/python: No such file"),
        ("ValueError: of the start before\n[outlast] attempt 1 ended: failed\n", 1, None),
    ],
)  # fmt: skip
def test_why_ranks_never_began_is_in_the_ledger_in_status_and_in_logs(
    run: Run, slurm: Slurm, printed: str, code: int, why: str | None
) -> None:
    log = run.directory.logs / "7.log"
    log.write_text(printed)
    command = [sys.executable, "-m", "outlast.epilogue", str(run.directory.path), "--exit-code", str(code)]
    with log.open("a") as out:
        subprocess.run(command, stdout=out, stderr=out, timeout=60)
    (ended,) = run.events("attempt_ended")
    detail = f"the ranks ended with exit code {code} before the run began" + (f": {why}" if why else "")
    assert ended["detail"] == detail
    now = look(run.directory)
    assert now.state == ("failed" if code != 1 else "queued")
    if code != 1:
        assert now.reason == detail
    source = logs.choose(run.directory)
    assert source.path == log
    assert source.title == f"no rank of attempt 1 has begun; what was printed before: {log}"


def test_a_job_that_finds_its_run_in_use_waits_in_the_queue_within_limits(
    run: Run, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.start(1, job_id="6")
    holder = RunLock(run.directory)
    holder.acquire("another attempt")
    monkeypatch.setattr("outlast.epilogue.WAIT_S", 0.1)
    codes = []
    try:
        for restart in range(4):
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
            slurm.says("scontrol", f"JobState=RUNNING Restarts={restart}")
            codes.append(run.follow_up(1))
        slurm.says("scontrol", "JobState=COMPLETING")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
        assert run.follow_up(1) == 75
    finally:
        holder.release()
    assert codes == [75, 75, 1, 1]  # preemption.max_crashes is 2
    assert len(slurm.calls("scontrol requeue")) == 2
    assert [event["event"] for event in run.ledger.read()] == ["attempt_started"]


def test_a_run_that_finishes_while_its_lock_is_waited_for_is_done(run: Run, slurm: Slurm) -> None:
    run.start(1, job_id="6")
    holder = RunLock(run.directory)
    holder.acquire("another attempt")

    def finish() -> None:
        run.ledger.append("attempt_ended", 1, cause="finished", step=5)
        run.ledger.append("finished", 1, step=5, seconds=1.0)
        holder.release()

    threading.Timer(0.5, finish).start()
    assert run.follow_up(1) == 0
    assert [event["event"] for event in run.ledger.read()] == ["attempt_started", "attempt_ended", "finished"]


def test_a_refused_configuration_is_not_tried_again(run: Run, slurm: Slurm) -> None:
    assert run.follow_up(2) == 2
    assert run.events("attempt_ended")[0]["cause"] == "failed"
    assert not slurm.calls("scontrol requeue")


def test_after_too_many_crashes_the_end_of_the_log_is_shown(
    run: Run, slurm: Slurm, capfd: pytest.CaptureFixture[str]
) -> None:
    for attempt in (1, 2, 3):
        run.start(attempt, job_id="7" if attempt == 3 else "6", restarts=0)
        run.ledger.append("attempt_ended", attempt, cause="failed", step=0, error="ValueError: no", rank=1)
        if attempt < 3:
            run.ledger.append("requeued", attempt, cause="failed", job_id="6")
    run.directory.log(3, 1).write_text("before\nValueError: no\n")
    assert run.follow_up(1) == 1
    out = capfd.readouterr().out
    assert "failed: failed (ValueError: no), 3 times in a row without a new checkpoint" in out
    assert "    ValueError: no\n" in out
    assert not slurm.calls("scontrol requeue")


def test_another_attempts_ledger_is_not_written_to(run: Run, slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    run.start(1, job_id="6")
    holder = RunLock(run.directory)
    holder.acquire("another attempt")
    monkeypatch.setattr("outlast.epilogue.WAIT_S", 0.1)
    try:
        assert run.follow_up(2) == 2
    finally:
        holder.release()
    assert [event["event"] for event in run.ledger.read()] == ["attempt_started"]


def script(run: Run) -> Path:
    path = run.directory.path / "job.sbatch"
    path.write_text("#!/bin/bash\n")
    return path


def test_where_a_requeue_is_refused_the_frozen_script_is_submitted_to_start_afterwards(run: Run, slurm: Slurm) -> None:
    run.start()
    path = script(run)
    slurm.refuse_requeue()
    slurm.says("sbatch", "8\n")
    assert run.follow_up(137) == 75
    (requeued,) = run.events("requeued")
    assert (requeued["job_id"], requeued["by"]) == ("8", "dependent")
    record = json.loads((run.directory.path / "submitted.json").read_text())
    assert record["job_id"] == "8"
    assert record["log"].endswith("/logs/8.log")
    expected = f"sbatch --parsable --comment=outlast:{record['token']} --dependency=afterany:7 {path}"
    assert slurm.calls("sbatch") == [expected]


def test_the_same_for_one_task_of_an_array(run: Run, slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    run.start(job_id="7_3")
    script(run)
    slurm.refuse_requeue()
    slurm.says("sbatch", "8\n")
    assert run.follow_up(137) == 75
    assert run.events("requeued")[0]["job_id"] == "8_3"
    assert "--dependency=afterany:7_3 --array=3" in slurm.calls("sbatch")[0]
    assert json.loads((run.directory.path / "submitted.json").read_text())["job_id"] == "8_3"


def test_without_a_frozen_script_it_says_so(run: Run, slurm: Slurm, capfd: pytest.CaptureFixture[str]) -> None:
    run.start()
    slurm.refuse_requeue()
    assert run.follow_up(137) == 75
    assert "it could not be started again" in capfd.readouterr().out
    assert not run.events("requeued")


def test_the_command_needs_a_run_and_the_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "outlast.epilogue"]
    done = subprocess.run([*command, "--exit-code", "3"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert "RUN_DIR, or --sweep SWEEP_DIR" in done.stderr
    assert subprocess.run([*command, str(tmp_path)], capture_output=True, timeout=60).returncode == 2


def test_it_imports_nothing_heavy() -> None:
    code = "import sys, outlast.epilogue; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_while_slurm_is_silent_it_waits(
    run: Run, slurm: Slurm, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run.start()
    script = slurm.directory / "scontrol"
    answering = script.read_text()
    script.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")

    def sleep(seconds: float) -> None:
        script.write_text(answering)

    monkeypatch.setattr("outlast.epilogue.time.sleep", sleep)
    assert run.follow_up(137) == 75
    assert "Unable to contact slurm controller; waiting for Slurm to answer" in capfd.readouterr().out
    assert slurm.calls("scontrol requeue")


def test_a_crash_near_the_time_limit_is_a_crash(run: Run, slurm: Slurm) -> None:
    run.start()
    slurm.says("scontrol", f"JobState=RUNNING EndTime={datetime.fromtimestamp(time.time() + 30).isoformat()}")
    assert run.follow_up(137) == 75
    assert run.events("attempt_ended")[0]["cause"] == "failed"
