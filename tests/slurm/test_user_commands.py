"""`status`, `logs`, `cancel` and `resume` on a real Slurm: with and without its accounting, and while it is silent."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from outlast.errors import OutlastError
from outlast.launcher.commands import cancel as launcher_cancel
from outlast.launcher.devcluster import cluster as launcher_devcluster
from outlast.launcher.runs import queue
from outlast.launcher.runs.queue import JobKey

from ..conftest import SMOKE, Command, RunProbe, wait_for
from .cluster import Cluster

Run = Callable[..., str]
Probe = Callable[[str], RunProbe]
LONG = ["trainer.max_steps=80", "trainer.step_s=0.1"]
JOB = ["cluster=devcluster", *SMOKE, *LONG, "cluster.sbatch.export=NIL"]
"""Nothing of the submitter's environment is passed on, not even a PATH."""


@pytest.fixture
def outlast_on(outlast: Callable[..., Command], devcluster: Cluster) -> Iterator[Run]:
    """Runs an `outlast` command against the cluster and gives what it prints; what is left of jobs is cancelled."""

    def run(*arguments: str, code: int = 0) -> str:
        command = outlast(*arguments, OUTLAST_DEVCLUSTER=str(devcluster.directory))
        assert command.wait(90) == code, command.output
        return command.output

    yield run
    devcluster.cancel_all()


def status(outlast_on: Run, *names: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(outlast_on("status", "--json", *names))}


def preempt(cluster: Cluster) -> str:
    """Take all nodes, from the high partition, until this job is cancelled."""
    flags = ["--parsable", "-p", "high", "-N", "4", "--exclusive", "-o", "/dev/null"]
    return cluster.run("sbatch", *flags, "--wrap", "sleep 300").strip()


def jobs(cluster: Cluster, but: Collection[str] = ()) -> set[str]:
    """Every job that Slurm has had, `but` those of earlier tests, which it may forget in the middle of a later one."""
    return set(cluster.run("squeue", "-h", "--array", "--states=all", "-o", "%i").split()) - set(but)


def test_from_submit_to_done(outlast_on: Run, devcluster: Cluster, probe: Probe) -> None:
    earlier = jobs(devcluster)
    outlast_on("train", *JOB, "parallel.nodes=2", "run.name=r")
    run, before = probe("r"), jobs(devcluster, earlier)
    run.reach(10)
    row = status(outlast_on)["r"]
    assert (row["state"], row["slurm_state"], row["attempts"], row["total_steps"]) == ("running", "RUNNING", 1, 80)
    assert "attempt 1, rank 0" in outlast_on("logs", "r")
    assert "log: " in outlast_on("logs", "r", "--job")
    assert f"r is running already (job {row['job_id']})" in outlast_on("resume", "r")

    assert "it has stopped" in outlast_on("cancel", "r")
    devcluster.wait_for_state(row["job_id"], "CANCELLED", 10)
    assert run.causes() == ["cancelled"]
    assert status(outlast_on)["r"]["state"] == "cancelled"
    assert "was cancelled before" in outlast_on("cancel", "r")
    assert jobs(devcluster, earlier) == before

    said = outlast_on("resume", "r", "cluster.time_min=30", "cluster.partition=high", "parallel.nodes=1")
    again = said.split("r: job ")[1].split()[0]
    run.reach(run.events("attempt_ended")[0]["step"] + 2, attempt=2)
    now = devcluster.job(again)
    assert (now["TimeLimit"], now["Partition"], now["NumNodes"]) == ("00:30:00", "high", "1")
    assert "is running already" in outlast_on("resume", "r")
    devcluster.run("scancel", again)
    said = outlast_on("train", *JOB, "parallel.nodes=2", "run.name=r")
    assert f"waiting for job {again}, which is on its way out" in said
    assert "submitted job" in said
    wait_for(lambda: run.events("finished"), "the end")
    assert run.steps_repeated() == 0
    assert "accumulation is 2, configured 1 for 2 ranks" in run.events("resumed")[0]["differences"]["world_size"]
    assert status(outlast_on)["r"]["state"] == "finished"
    assert "has finished already" in outlast_on("resume", "r")


@pytest.mark.parametrize("moment", ["signal", "requeued"])
def test_cancelled_while_it_saves_and_while_its_requeue_is_pending(
    outlast_on: Run, devcluster: Cluster, probe: Probe, moment: str
) -> None:
    outlast_on("train", *JOB, "run.name=r")
    run = probe("r")
    run.reach(10)
    job = status(outlast_on)["r"]["job_id"]
    other = preempt(devcluster)
    wait_for(lambda: run.events(moment), moment, 60)
    if moment == "requeued":
        row = status(outlast_on)["r"]
        assert row["state"] in ("queued", "running")  # pending again is not failed
    outlast_on("cancel", "r")
    devcluster.wait_for_state(job, "CANCELLED", 40)
    devcluster.run("scancel", other)
    devcluster.wait_for(lambda: "high" not in devcluster.run("squeue", "-h", "-o", "%P"), 60, "the other job's end")
    assert devcluster.state(job) == "CANCELLED"
    assert len(run.events("attempt_started")) == 1
    assert status(outlast_on)["r"]["state"] == "cancelled"


def test_a_job_that_waits(outlast_on: Run, devcluster: Cluster, probe: Probe) -> None:
    blocker = devcluster.run(
        "sbatch", "--parsable", "-p", "high", "-N", "4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 300"
    ).strip()
    devcluster.wait_for_state(blocker, "RUNNING", 30)
    outlast_on("train", *JOB, "run.name=r")
    row = status(outlast_on)["r"]
    assert (row["state"], row["slurm_state"]) == ("queued", "PENDING")
    said = outlast_on("logs", "r")
    assert f"no attempt has started since job {row['job_id']} was submitted" in said
    assert "nothing there yet" in said
    run = probe("r")
    shutil.copytree(run.path, run.path.with_name("copy"))
    assert "was neither running nor in the queue" in outlast_on("cancel", "copy")
    assert devcluster.state(row["job_id"]) == "PENDING"
    assert "was waiting; taken out of the queue" in outlast_on("cancel", "r")
    assert devcluster.state(row["job_id"]) == "CANCELLED"
    assert devcluster.state(blocker) == "RUNNING"
    assert status(outlast_on)["r"]["state"] == "cancelled"


def test_a_setup_that_fails_says_so(outlast_on: Run, devcluster: Cluster, probe: Probe) -> None:
    outlast_on("train", *JOB, "run.name=r", "cluster.setup=['export A=1','module load cuda/99']")
    run = probe("r")
    wait_for(lambda: run.events("attempt_ended"), "the job's end", 60)
    row = status(outlast_on)["r"]
    devcluster.wait_for_state(row["job_id"], "FAILED", 30)
    assert row["state"] == "failed"
    assert row["reason"].startswith("cluster.setup: exit code 127 of: module load cuda/99: ")
    assert "module: command not found" in row["reason"]
    assert "module: command not found" in outlast_on("logs", "r")
    assert not run.events("requeued")


@contextmanager
def silent(cluster: Cluster) -> Iterator[None]:
    """slurmctld hangs: it takes connections and does not answer."""
    record = json.loads((cluster.directory / "devcluster.json").read_text())
    pid = next(daemon["pid"] for daemon in record["daemons"] if daemon["name"] == "slurmctld")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_slurm_does_not_answer(
    outlast_on: Run, outlast: Callable[..., Command], devcluster: Cluster, probe: Probe
) -> None:
    outlast_on("train", *JOB, "trainer.step_s=1.0", "run.name=r")
    run = probe("r")
    run.reach(5)
    job = status(outlast_on)["r"]["job_id"]
    asked = [["status", "--json"], ["status"], ["logs", "r"], ["cancel", "r"], ["resume", "r"]]
    with silent(devcluster):
        began = time.monotonic()
        commands = [outlast(*one, OUTLAST_DEVCLUSTER=str(devcluster.directory)) for one in asked]
        codes = [command.wait(90) for command in commands]
        seconds = time.monotonic() - began
    as_json, table, logs, cancel, resume = (command.output for command in commands)
    assert codes == [0, 0, 0, 1, 1]
    assert seconds < 60
    [row] = json.loads(as_json)
    assert (row["state"], row["total_steps"], row["slurm_state"]) == ("running", 80, None)
    assert row["step"] >= 5
    assert "Slurm does not answer (squeue did not answer within 5 s); states are from the ledgers alone" in table
    assert "attempt 1, rank 0" in logs
    assert "r is not cancelled: Slurm does not answer" in cancel
    assert "nothing was submitted" in resume
    assert not (run.path / "cancelled.json").exists()
    assert status(outlast_on)["r"]["slurm_state"] == "RUNNING"
    assert devcluster.state(job) == "RUNNING"


@pytest.fixture
def with_accounting(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of its own, whose `sacct` works."""
    try:
        launcher_devcluster.require(accounting=True)
    except OutlastError as error:
        pytest.skip(str(error))
    launcher_devcluster.up(tmp_path / "dc", nodes=1, accounting=True)
    cluster = Cluster(tmp_path / "dc")
    try:
        yield cluster
    finally:
        cluster.cancel_all()
        launcher_devcluster.down(tmp_path / "dc")


def forgotten(cluster: Cluster, outlast: Callable[..., Command]) -> Callable[[], str]:
    """Submit a sweep that waits and cancel one of its tasks without our help: Slurm's queue forgets it at once. Gives
    what `status` makes of the cell."""
    cluster.run("sbatch", "-N1", "-w", "n0", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 300")
    cluster.wait_for(lambda: "RUNNING" in cluster.run("squeue", "-h", "-o", "%T"), 30, "the other job")
    env = {"OUTLAST_DEVCLUSTER": str(cluster.directory)}
    train = outlast("train", "-m", *JOB, "run.name=s", "seed=1,2,3", "cluster.nodelist=n0", **env)
    assert train.wait(60) == 0, train.output
    array = cluster.run("squeue", "-h", "-n", "s", "-o", "%F").split()[0]
    cluster.run("scancel", f"{array}_1")
    assert f"{array}_1" not in jobs(cluster)

    def state() -> str:
        command = outlast("status", "--json", **env)
        assert command.wait(60) == 0, command.output
        rows = {row["name"]: row["state"] for row in json.loads(command.output)}
        assert [rows["s/seed=1"], rows["s/seed=3"]] == ["queued", "queued"]
        return str(rows["s/seed=2"])

    return state


def test_without_accounting(devcluster: Cluster, outlast: Callable[..., Command]) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(["sacct"], env=devcluster.env, check=True, capture_output=True)
    try:
        assert forgotten(devcluster, outlast)() == "stopped_unexpectedly"
    finally:
        devcluster.cancel_all()


def report_agrees_with_sacct(cluster: Cluster, outlast: Callable[..., Command], run: RunProbe) -> None:
    """A run is preempted and finishes: when its attempts had the node and when they waited, both say alike."""
    env = {"OUTLAST_DEVCLUSTER": str(cluster.directory)}
    train = outlast("train", *JOB, "run.name=r", **env)
    assert train.wait(60) == 0, train.output
    run.reach(10)
    cluster.run("sbatch", "-p", "high", "-N1", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    wait_for(lambda: run.events("finished"), "the end")
    job, fields = run.events("attempt_started")[0]["job_id"], ["-D", "-X", "-n", "-P", "-o", "Start,End"]

    def jobs_by_sacct() -> list[list[float]]:
        text = subprocess.check_output(
            ["sacct", *fields, "-j", job], env=cluster.env | {"SLURM_TIME_FORMAT": "%s"}, text=True
        )
        lines = [line.split("|") for line in text.split()]
        return sorted([float(at) for at in line] for line in lines if all(at.isdigit() for at in line))

    first, second = wait_for(lambda: len(found := jobs_by_sacct()) == 2 and found, "slurmdbd to know", 30)
    report = outlast("report", "r", "--json", **env)
    assert report.wait(60) == 0, report.output
    attempts = json.loads(report.output)["attempts"]
    for attempt, (start, end) in zip(attempts, (first, second), strict=True):
        assert attempt["end"] - attempt["allocated_s"] == pytest.approx(start, abs=1.0)
        assert -1.0 <= end - attempt["end"] < 15.0  # the batch script and its epilogue end after the ranks
    assert attempts[1]["queued_s"] == pytest.approx(second[0] - attempts[0]["end"], abs=1.0)
    assert attempts[1]["stopped_s"] == 0.0


def test_with_accounting(with_accounting: Cluster, outlast: Callable[..., Command], probe: Probe) -> None:
    report_agrees_with_sacct(with_accounting, outlast, probe("r"))
    state = forgotten(with_accounting, outlast)
    wait_for(lambda: state() == "cancelled", "slurmdbd to know", 30)


def test_exactly_these_cells(outlast_on: Run, devcluster: Cluster, probe: Probe) -> None:
    outlast_on("train", "-m", *JOB, "run.name=s", "seed=1,2,3,4")
    cells = {seed: probe(f"s/seed={seed}") for seed in (1, 2, 3, 4)}
    for cell in cells.values():
        cell.reach(3)
    said = outlast_on("cancel", "s/seed=2", "s/seed=4")
    assert "s/seed=2 was running; it has stopped" in said
    for seed in (1, 3):
        wait_for(lambda cell=cells[seed]: cell.events("finished"), f"the end of seed={seed}")
    states = {name: row["state"] for name, row in status(outlast_on, "s").items()}
    assert states == {f"s/seed={s}": "cancelled" if s in (2, 4) else "finished" for s in (1, 2, 3, 4)}
    assert "4 cells: 2 cancelled, 2 finished" in outlast_on("status")
    earlier = jobs(devcluster)

    said = outlast_on("resume", "s")
    assert "s: 2 cells in array job" in said
    assert len(jobs(devcluster, earlier)) == 2
    assert "running already" in (again := outlast_on("resume", "s")) or "queued already" in again
    for seed in (2, 4):
        wait_for(lambda cell=cells[seed]: cell.events("finished"), f"the end of seed={seed}")
        assert cells[seed].steps_repeated() == 0
    assert len(jobs(devcluster, earlier)) == 2


def test_what_comes_back_from_the_dead_is_cancelled_again(devcluster: Cluster) -> None:
    """A requeue that was on its way when the job was cancelled: Slurm requeues also what it has just ended."""
    flags = ["--parsable", "--requeue", "-o", "/dev/null"]
    job = devcluster.run("sbatch", *flags, "--wrap", "srun sleep 300").strip()
    devcluster.wait_for_state(job, "RUNNING", 30)
    conf = devcluster.env["SLURM_CONF"]
    queue.cancel(conf, [job])
    devcluster.run("scontrol", "requeue", job)
    left = launcher_cancel.stay_cancelled(conf, [JobKey(conf, job)], {os.getuid()})
    assert left == {}
    assert devcluster.state(job) == "CANCELLED"
