"""A user's own script in the batch script that the README shows: preempted or killed, it comes back."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import RunProbe, wait_for
from .cluster import Cluster

Probe = Callable[[str], RunProbe]
Submit = Callable[[str], str]

REPOSITORY = Path(__file__).parents[2]
USER_SCRIPT = REPOSITORY / "tests" / "process" / "user_script.py"
KILLED_ONCE = """
import os, signal, outlast
run = outlast.start("runs/mine")
if run.attempt == 1:
    os.kill(os.getpid(), signal.SIGKILL)
run.finish(1)
"""


@pytest.fixture
def submit(devcluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submit:
    """Submits a text as `train.py`, with `outlast` on the PATH, and gives the job's id. Its log is `log`."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")

    def run(script: str) -> str:
        (tmp_path / "train.py").write_text(script)
        flags = ["--parsable", "--chdir", str(tmp_path), "-p", "low", "-o", str(tmp_path / "log")]
        return devcluster.run("sbatch", *flags, str(REPOSITORY / "slurm" / "script.sbatch")).strip()

    return run


def test_preempted(submit: Submit, devcluster: Cluster, probe: Probe) -> None:
    text = USER_SCRIPT.read_text().replace("sys.argv[1]", '"runs/mine"').replace("sys.argv[2]", "200")
    try:
        job, run = submit(text), probe("mine")
        run.reach(20)
        devcluster.run("sbatch", "-p", "high", "-N", "4", "--exclusive", "-o", "/dev/null", "--wrap", "true")
        wait_for(lambda: run.events("finished"), "the end")
        devcluster.wait_for_state(job, "COMPLETED", 30)
    finally:
        devcluster.cancel_all()
    assert run.causes() == ["preempted", "finished"]
    assert run.steps_repeated() == 0


def test_killed(submit: Submit, devcluster: Cluster, probe: Probe) -> None:
    """The ranks can't say what has happened: the batch script's last line does, and requeues the job."""
    job, run = submit(KILLED_ONCE), probe("mine")
    devcluster.wait_for_state(job, "COMPLETED", 60)
    assert run.causes() == ["failed", "finished"]
    assert run.events("attempt_ended")[0]["detail"] == "a rank was killed by SIGKILL"


def test_a_job_that_is_not_the_runs_is_left_alone(devcluster: Cluster, tmp_path: Path, probe: Probe) -> None:
    """Whatever else is in an `salloc` stays there when the script in it is signalled."""
    text = USER_SCRIPT.read_text().replace("sys.argv[1]", '"runs/mine"').replace("sys.argv[2]", "100000")
    (tmp_path / "train.py").write_text(text)
    shell = f"{sys.executable} -u train.py; echo ended with $?; scontrol show job -o $SLURM_JOB_ID"
    salloc = ["salloc", "-p", "low", "-N", "1", "sh", "-c", shell]
    with (tmp_path / "log").open("w") as log:
        allocation = subprocess.Popen(salloc, cwd=tmp_path, env=devcluster.env, stdout=log, stderr=log)
    run = probe("mine")
    run.reach(3)
    os.kill(json.loads((run.path / ".lock").read_text())["pid"], signal.SIGUSR1)
    assert allocation.wait(60) == 0
    said = (tmp_path / "log").read_text()
    assert "is not requeued, since nothing says that it is there for this run alone" in said
    assert "ended with 75" in said
    assert "JobState=RUNNING" in said
    assert "Restarts=0" in said
    assert run.causes() == ["preempted"]
    assert not run.events("requeued")


def test_a_script_that_fails_before_it_starts_a_run(submit: Submit, devcluster: Cluster, tmp_path: Path) -> None:
    job = submit("import no_such_module")
    devcluster.wait_for_state(job, "FAILED", 30)
    log = (tmp_path / "log").read_text()
    assert log.count("Traceback") == 1
    assert "No module named 'no_such_module'" in log
