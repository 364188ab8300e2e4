"""A user's own script in the batch script that the README shows: preempted or killed, it comes back."""

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


def test_a_script_that_fails_before_it_starts_a_run(submit: Submit, devcluster: Cluster, tmp_path: Path) -> None:
    job = submit("import no_such_module")
    devcluster.wait_for_state(job, "FAILED", 30)
    log = (tmp_path / "log").read_text()
    assert log.count("Traceback") == 1
    assert "No module named 'no_such_module'" in log
