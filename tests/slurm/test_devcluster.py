"""The devcluster is a real Slurm: it runs jobs, preempts with grace, stands beside another, leaves nothing."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from outlast.errors import OutlastError
from outlast.launcher.devcluster import cluster as launcher_devcluster
from outlast.launcher.devcluster import daemons as devcluster_daemons

from .cluster import Cluster, wait_for

TRAP = """#!/bin/bash
# Writes the first signal and its time to $1, then leaves.
for name in TERM USR1; do trap "echo $name \\$(date +%s.%N) >> $1; exit 0" $name; done
echo ready >> $1
while :; do sleep 0.1; done
"""


@pytest.fixture
def cluster(devcluster: Cluster) -> Iterator[Cluster]:
    """The shared cluster, empty again afterwards."""
    yield devcluster
    devcluster.cancel_all()


def preempt(cluster: Cluster, tmp_path: Path) -> tuple[str, str, dict[str, str], float]:
    """Preempt a job on all nodes: its id, the signal it got, what Slurm said of it then, the signal's time."""
    script, out = tmp_path / "trap.sh", tmp_path / "signals"
    script.write_text(TRAP)
    script.chmod(0o755)
    everything = ("--nodes=4", "--exclusive", f"--output={tmp_path}/%j.log")
    step = f"srun -n1 -N1 {script} {out}; sleep 300"
    low = cluster.run("sbatch", "--parsable", "-p", "low", *everything, "--signal=USR1@20", "--wrap", step).strip()
    wait_for(lambda: out.exists() and "ready" in out.read_text(), 30, "the low job traps its signals")
    cluster.run("sbatch", "-p", "high", *everything, "--wrap", "sleep 1")
    wait_for(lambda: len(out.read_text().splitlines()) > 1, 30, "a signal")
    said = cluster.job(low)
    name, when = out.read_text().splitlines()[1].split()
    return low, name, said, float(when)


def test_every_node_is_idle(devcluster: Cluster) -> None:
    devcluster.cancel_all()  # what an earlier test's job leaves behind
    status = launcher_devcluster.status(devcluster.directory)
    assert status.up
    assert status.nodes == dict.fromkeys(("n0", "n1", "n2", "n3"), "idle")
    assert status.partitions == {"low": "up", "high": "up"}
    assert status.dead == []


def test_a_job_runs_on_two_nodes(cluster: Cluster) -> None:
    out = cluster.run("srun", "-N2", "-n2", "bash", "-c", "echo $SLURMD_NODENAME $SLURM_PROCID")
    assert sorted(out.splitlines()) == ["n0 0", "n1 1"]


def test_the_requeue_hold_is_the_real_one(devcluster: Cluster) -> None:
    assert "cred_expire" not in devcluster.run("scontrol", "show", "config")


def test_high_preempts_low_with_sigterm_and_grace(cluster: Cluster, tmp_path: Path) -> None:
    low, name, said, when = preempt(cluster, tmp_path)
    assert name == "TERM"
    assert said["JobState"] == "RUNNING"
    assert said["PreemptTime"] != "None"
    end = time.mktime(time.strptime(said["EndTime"], "%Y-%m-%dT%H:%M:%S"))
    assert end - when == pytest.approx(30, abs=3)
    time.sleep(5)
    assert cluster.state(low) == "RUNNING"  # well inside the grace period


def test_user_signal_arrives_when_it_is_on(cluster: Cluster, tmp_path: Path) -> None:
    cluster.set_user_signal(True)
    try:
        assert preempt(cluster, tmp_path)[1] == "USR1"
    finally:
        cluster.set_user_signal(False)


def test_a_change_is_heeded_at_once(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm sees that its configuration is another one only if it is of another second."""
    said = [_config_time(cluster)]
    for on in (True, False, True, False):
        cluster.set_user_signal(on)
        said.append(_config_time(cluster))
    assert said == sorted(set(said))


def _config_time(cluster: Cluster) -> str:
    return cluster.run("scontrol", "show", "config").splitlines()[0].removeprefix("Configuration data as of ")


def test_up_again_says_so_and_refuses_other_options(devcluster: Cluster) -> None:
    said: list[str] = []
    launcher_devcluster.up(devcluster.directory, grace_s=30, say=said.append)
    assert said == [f"devcluster is already up in {devcluster.directory}"]
    with pytest.raises(OutlastError, match=r"grace_s=30, asked 7.*outlast devcluster down"):
        launcher_devcluster.up(devcluster.directory, grace_s=7)


def test_two_side_by_side_and_down_leaves_nothing(devcluster: Cluster, tmp_path: Path) -> None:
    etc = _listing(Path("/etc/slurm"))
    launcher_devcluster.up(tmp_path, nodes=2, cpus_per_node=2, grace_s=5)
    record = json.loads((tmp_path / "devcluster.json").read_text())
    try:
        second = Cluster(tmp_path)
        assert "n1" in second.run("srun", "-N2", "-n2", "bash", "-c", "echo $SLURMD_NODENAME")
        assert "n3" in devcluster.run("srun", "-N4", "-n4", "bash", "-c", "echo $SLURMD_NODENAME")
        ids = [one.run("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "true") for one in (devcluster, second)]
        assert abs(int(ids[0]) - int(ids[1])) > 1000, "ranks meet on a port that follows from the job's id"
        second.run("sbatch", "-N2", "--output=/dev/null", "--wrap", "srun sleep 300")
        wait_for(lambda: launcher_devcluster.status(tmp_path).nodes["n1"] != "idle", 20, "the job runs")
        assert launcher_devcluster.status(devcluster.directory).up
    finally:
        launcher_devcluster.down(tmp_path)
    _assert_nothing_left(tmp_path, record)
    launcher_devcluster.down(tmp_path)  # again: nothing to do
    assert not launcher_devcluster.status(tmp_path).up
    assert (tmp_path / "logs" / "slurmctld.log").stat().st_size > 0
    assert _listing(Path("/etc/slurm")) == etc


def test_after_a_crash(tmp_path: Path, devcluster: Cluster) -> None:
    """Killed daemons leave jobs behind: `down` kills those too, `up` says what to do, job ids go on counting."""
    launcher_devcluster.up(tmp_path, nodes=2)
    record = json.loads((tmp_path / "devcluster.json").read_text())
    try:
        cluster = Cluster(tmp_path)
        job = cluster.run("sbatch", "--parsable", "--no-requeue", "-o", "/dev/null", "--wrap", "srun sleep 300").strip()
        cluster.wait_for_state(job, "RUNNING", 20)
        time.sleep(1)
        for daemon in record["daemons"]:
            if daemon["name"] in ("slurmctld", "slurmd-n0"):
                os.kill(daemon["pid"], signal.SIGKILL)
        wait_for(lambda: len(launcher_devcluster.status(tmp_path).dead) == 2, 10, "two daemons dead")
        with pytest.raises(OutlastError, match=r"not whole \(dead: slurmctld, slurmd-n0\).*outlast devcluster down"):
            launcher_devcluster.up(tmp_path, nodes=2)
        launcher_devcluster.down(tmp_path)
        _assert_nothing_left(tmp_path, record)
        launcher_devcluster.up(tmp_path, nodes=2)
        later = cluster.run("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "true").strip()
        assert int(later) > int(job)
    finally:
        launcher_devcluster.down(tmp_path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        with pytest.raises(OutlastError, match="root"):
            launcher_devcluster.require()
        return
    monkeypatch.setattr(devcluster_daemons.shutil, "which", lambda name, path: None)
    with pytest.raises(OutlastError, match=r"slurmctld.*`apt-get install slurmctld slurmd slurm-client munge`"):
        launcher_devcluster.require()
    with pytest.raises(OutlastError, match="slurmdbd mariadb-server`"):
        launcher_devcluster.require(accounting=True)


def test_accounting_makes_sacct_work(tmp_path: Path) -> None:
    try:
        launcher_devcluster.require(accounting=True)
    except OutlastError as error:
        pytest.skip(str(error))
    launcher_devcluster.up(tmp_path, nodes=1, accounting=True)
    record = json.loads((tmp_path / "devcluster.json").read_text())
    try:
        cluster = Cluster(tmp_path)
        job = cluster.run("sbatch", "--parsable", "--wait", "-o", "/dev/null", "--wrap", "true").splitlines()[0]
        sacct = ("sacct", "-X", "-n", "-P", "-j", job, "-o", "JobID,State")
        wait_for(lambda: cluster.run(*sacct) == f"{job}|COMPLETED\n", 30, "sacct shows the job as COMPLETED")
    finally:
        launcher_devcluster.down(tmp_path)
    _assert_nothing_left(tmp_path, record)


def _assert_nothing_left(directory: Path, record: dict) -> None:
    for daemon in record["daemons"]:
        with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie, which this process has yet to reap
            assert psutil.Process(daemon["pid"]).status() == psutil.STATUS_ZOMBIE, daemon
    conf = str(launcher_devcluster.conf_path(directory))
    for process in psutil.process_iter():
        try:
            assert process.environ().get("SLURM_CONF") != conf, process
            assert process.cwd() != record["runtime"], process
        except psutil.Error:
            continue
    assert not Path(record["runtime"]).exists()


def _listing(directory: Path) -> list[tuple[str, int, float]]:
    if not directory.exists():
        return []
    return [(str(p), p.stat().st_size, p.stat().st_mtime) for p in sorted(directory.rglob("*"))]
