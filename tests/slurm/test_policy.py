"""The requeue policy on a real Slurm: ranks and nodes that die, and jobs that can't be requeued."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from outlast.launcher.execution import snapshot

from ..conftest import SMOKE, Command, RunProbe, wait_for
from .cluster import Cluster, processes_of

Start = Callable[..., Command]
Probe = Callable[[str], RunProbe]

ONE_NODE = ["cluster=devcluster", *SMOKE]
TWO_NODES = [*ONE_NODE, "parallel.nodes=2"]
RAISES = "trainer.dataset_size=100000000000000000000"
"""A number that torch refuses."""
LONG = ["trainer.max_steps=60", "trainer.step_s=0.1", "checkpoint.every=10"]


@pytest.fixture
def cluster(devcluster: Cluster) -> Iterator[Cluster]:
    """The shared cluster, empty and well again afterwards."""
    yield devcluster
    devcluster.cancel_all()

    def well() -> bool:
        states = dict(line.split() for line in devcluster.run("sinfo", "-hN", "--format=%N %t").splitlines())
        for node, state in states.items():
            if state.startswith("down"):
                devcluster.run("scontrol", "update", f"nodename={node}", "state=idle")
        return set(states.values()) == {"idle"}

    devcluster.wait_for(well, 60, "all nodes idle")


@pytest.fixture
def submit(outlast: Start, cluster: Cluster) -> Callable[..., str]:
    """Submits a run by `outlast train` and gives the job's id."""

    def run(*arguments: str, **env: str) -> str:
        command = outlast("train", *arguments, "run.name=r", OUTLAST_DEVCLUSTER=str(cluster.directory), **env)
        assert command.wait(60) == 0, command.output
        return command.output.split("submitted job ")[1].split()[0]

    return run


@pytest.fixture
def run(probe: Probe) -> RunProbe:
    return probe("r")


def rank(job: str, number: int) -> psutil.Process:
    """The process of one rank, once it runs Python."""

    def find() -> psutil.Process | None:
        for process, env in processes_of(job):
            with suppress(psutil.NoSuchProcess):
                argv = process.cmdline()
                runs_python = bool(argv) and Path(argv[0]).name.startswith("python")
                if env.get("SLURM_PROCID") == str(number) and runs_python and "outlast.rank" in argv:
                    return process
        return None

    return wait_for(find, f"rank {number} of job {job}", 60)  # type: ignore[no-any-return]


def listening(process: psutil.Process) -> set[str]:
    """The addresses on which a process takes TCP connections."""
    return {one.laddr.ip for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN}


def batch_log(run: RunProbe) -> str:
    return "".join(path.read_text() for path in sorted((run.path / "logs").glob("[0-9]*.log")))


def ended(run: RunProbe) -> list[dict[str, Any]]:
    return run.events("attempt_ended")


def test_a_rank_killed_in_training_is_retried_from_the_last_checkpoint(
    submit: Callable[..., str], run: RunProbe, cluster: Cluster
) -> None:
    job = submit(*TWO_NODES, *LONG)
    run.reach(25)
    for number in (0, 1):  # the address by which the nodes reach each other, and nothing for the rest of the world
        assert listening(rank(job, number)) <= {"127.0.0.1"}
    rank(job, 1).kill()
    wait_for(lambda: run.events("finished"), "the end")
    cluster.wait_for_state(job, "COMPLETED", 30)
    assert run.causes() == ["failed", "finished"]
    assert ended(run)[0]["detail"] == "a rank was killed by SIGKILL"
    assert run.events("resumed")[0]["step"] == run.saved()
    assert [(e["cause"], e["by"], e["job_id"]) for e in run.events("requeued")] == [("failed", "job", job)]
    assert cluster.job(job)["Restarts"] == "1"


def test_a_rank_killed_in_start_up_is_no_preemption(submit: Callable[..., str], run: RunProbe) -> None:
    job = submit(*TWO_NODES, *LONG)
    wait_for(lambda: run.events("attempt_started"), "the attempt's start", 60)
    rank(job, 1).kill()
    wait_for(lambda: run.events("finished"), "the end")
    assert not run.events("resumed")
    assert run.causes() == ["failed", "finished"]
    assert ended(run)[0]["detail"].startswith("a rank was killed by SIGKILL")


def test_what_the_program_raises_before_its_first_step_fails_at_once_with_its_reason(
    submit: Callable[..., str], run: RunProbe, cluster: Cluster
) -> None:
    job = submit(*ONE_NODE, RAISES)
    cluster.wait_for_state(job, "FAILED", 90)
    assert run.causes() == ["failed"]
    assert cluster.job(job)["ExitCode"] == "1:0"
    error = ended(run)[0]["error"]
    assert "Overflow when unpacking" in error
    log = batch_log(run)
    assert f"failed: failed ({error}), before the first step" in log
    assert "    Traceback (most recent call last):" in log


def test_who_gives_up_says_why_and_shows_the_end_of_the_log(
    submit: Callable[..., str], run: RunProbe, cluster: Cluster
) -> None:
    job = submit(*ONE_NODE, *LONG, "preemption.max_requeues=0")
    run.reach(12)
    rank(job, 0).kill()
    cluster.wait_for_state(job, "FAILED", 60)
    assert cluster.job(job)["ExitCode"] == "93:0"
    reason = "0 requeues; preemption.max_requeues is 0"
    assert [e["reason"] for e in run.events("gave_up")] == [reason]
    assert f"giving up: {reason}" in batch_log(run)
    assert f"the end of {run.path}/logs/attempt-001.rank-0.log" in batch_log(run)


@contextmanager
def power_loss(cluster: Cluster, node: str, job: str) -> Iterator[None]:
    """Everything of the job on that node is gone at once, its slurmd is silent, and Slurm has noticed."""
    daemons = json.loads((cluster.directory / "devcluster.json").read_text())["daemons"]
    slurmd = psutil.Process(next(daemon["pid"] for daemon in daemons if daemon["name"] == f"slurmd-{node}"))
    slurmd.suspend()
    try:
        for process, env in processes_of(job):
            if env.get("SLURMD_NODENAME") == node:
                with suppress(psutil.NoSuchProcess):
                    parent = process.parent()
                    if parent is not None and parent.name().startswith("slurmstepd"):
                        parent.kill()
                    process.kill()
        cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        yield
    finally:
        slurmd.resume()
        cluster.run("scontrol", "reconfigure")  # has every node speak up; by itself that may take two minutes


@pytest.mark.parametrize("which", ["the batch script's", "the other"])
def test_a_node_that_fails_gives_one_more_attempt(
    submit: Callable[..., str], run: RunProbe, cluster: Cluster, which: str
) -> None:
    job = submit(*TWO_NODES, *LONG)
    run.reach(25)
    hosts = run.events("attempt_started")[0]["hosts"]
    node = hosts[0] if which == "the batch script's" else hosts[1]
    with power_loss(cluster, node, job):
        if node == hosts[0]:  # nobody is left to lift Slurm's requeue hold: a user may
            cluster.wait_for_state(job, "PENDING", 40)
            cluster.run("scontrol", "update", f"jobid={job}", "starttime=now")
        wait_for(lambda: run.events("finished"), "the end", 150)
        cluster.wait_for_state(job, "COMPLETED", 30)
    assert run.causes() == ["node_failure", "finished"]
    assert [(e["attempt"], e["by"]) for e in run.events("requeued")] == [(1, "slurm")]
    assert cluster.job(job)["Restarts"] == "1"
    assert node not in run.events("attempt_started")[1]["hosts"]


def preempt(cluster: Cluster) -> None:
    cluster.run("sbatch", "-p", "high", "-N", "4", "--exclusive", "-o", "/dev/null", "--wrap", "true")


def test_where_requeueing_is_forbidden_a_job_that_depends_on_this_one_goes_on(
    submit: Callable[..., str], outlast: Start, run: RunProbe, cluster: Cluster
) -> None:
    arguments = [*ONE_NODE, *LONG]
    job = submit(*arguments)
    run.reach(15)
    cluster.run("scontrol", "update", f"jobid={job}", "requeue=0")
    preempt(cluster)
    wait_for(lambda: run.events("requeued"), "the next job")
    (requeued,) = run.events("requeued")
    other = requeued["job_id"]
    assert (requeued["by"], requeued["cause"]) == ("dependent", "preempted")
    assert other != job
    record = json.loads((run.path / "submitted.json").read_text())
    assert (record["job_id"], record["cluster"]) == (other, "devcluster")
    again = outlast("train", *arguments, "run.name=r", OUTLAST_DEVCLUSTER=str(cluster.directory))
    assert again.wait(60) == 0, again.output
    assert f"job {other} is in the queue already" in again.output
    wait_for(lambda: run.events("finished"), "the end")
    assert run.causes() == ["preempted", "finished"]
    assert run.steps_repeated() == 0
    assert [e["job_id"] for e in run.events("attempt_started")] == [job, other]


def test_one_cell_of_a_sweep_goes_on_in_a_job_that_depends_on_it(
    outlast: Start, run: RunProbe, cluster: Cluster, tmp_path: Path
) -> None:
    arguments = ["train", "-m", "cluster=devcluster", *SMOKE, *LONG, "run.name=s", "seed=1,2"]
    command = outlast(*arguments, OUTLAST_DEVCLUSTER=str(cluster.directory))
    assert command.wait(60) == 0, command.output
    sweep = tmp_path / "runs" / "s"
    cells = json.loads((sweep / "sweep.json").read_text())["cells"]
    first, second = (RunProbe(sweep / cell["directory"]) for cell in cells)
    for cell in (first, second):
        cell.reach(15)
    task = second.events("attempt_started")[0]["job_id"]
    cluster.run("scontrol", "update", f"jobid={task}", "requeue=0")
    cluster.run("scancel", "--signal=USR1", task)
    wait_for(lambda: second.events("requeued"), "the next job")
    other = second.events("requeued")[0]["job_id"]
    assert other.endswith("_1")
    assert other != task
    again = outlast(*arguments, OUTLAST_DEVCLUSTER=str(cluster.directory))
    assert again.wait(60) == 0, again.output
    assert "nothing to submit" in again.output
    for cell in (first, second):
        wait_for(lambda c=cell: c.events("finished"), f"the end of {cell.path.name}")
    assert first.causes() == ["finished"]
    assert second.causes() == ["preempted", "finished"]
    assert [e["job_id"] for e in second.events("attempt_started")] == [task, other]


def test_preempt_mode_cancel_without_a_grace_period(
    submit: Callable[..., str], run: RunProbe, cluster: Cluster
) -> None:
    cluster.run("scontrol", "update", "partitionname=low", "preemptmode=cancel", "gracetime=0")
    try:
        job = submit(*ONE_NODE, *LONG)
        run.reach(15)
        preempt(cluster)
        wait_for(lambda: run.events("requeued"), "the requeue")
        wait_for(lambda: run.events("finished"), "the end")
    finally:
        cluster.run("scontrol", "update", "partitionname=low", "preemptmode=requeue", "gracetime=30")
    assert run.causes() == ["preempted", "finished"]
    assert run.steps_repeated() == 0
    assert cluster.job(job)["Restarts"] == "1"


def test_preemption_with_requeue_and_without_a_grace_period(
    submit: Callable[..., str], run: RunProbe, cluster: Cluster
) -> None:
    cluster.run("scontrol", "update", "partitionname=low", "gracetime=0")
    try:
        job = submit(*ONE_NODE, *LONG)
        run.reach(15)
        preempt(cluster)
        wait_for(lambda: run.events("finished"), "the end")
    finally:
        cluster.run("scontrol", "update", "partitionname=low", "gracetime=30")
    assert run.causes() == ["preempted", "finished"]
    assert [e["by"] for e in run.events("requeued")] == ["slurm"]
    assert run.steps_repeated() == 0
    assert cluster.job(job)["Restarts"] == "1"


def test_a_job_whose_source_was_broken_meanwhile_goes_on_with_the_code_that_was_submitted(
    submit: Callable[..., str], run: RunProbe, cluster: Cluster, tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    snapshot.take(checkout, tmp_path)
    submit(*ONE_NODE, *LONG, PYTHONPATH=str(checkout))
    run.reach(15)
    preempt(cluster)
    wait_for(lambda: run.events("requeued"), "the requeue")
    for source in ("jobs/smoke.py", "run.py", "epilogue.py", "slurm/view.py", "shell/prologue.sh"):
        with open(checkout / "outlast" / source, "a") as file:
            file.write("\n)\n")
    broken = [sys.executable, "-P", "-c", "import outlast.run"]
    done = subprocess.run(broken, env={"PYTHONPATH": str(checkout)}, capture_output=True, text=True, timeout=60)
    assert "SyntaxError" in done.stderr
    wait_for(lambda: run.events("finished"), "the end")
    assert run.causes() == ["preempted", "finished"]
    assert run.steps_repeated() == 0
