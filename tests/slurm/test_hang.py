"""Ranks that are stopped, or stuck in a save, on a real Slurm: the others requeue the job before it is killed."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..conftest import RunProbe, wait_for
from .cluster import Cluster
from .test_policy import LONG, TWO_NODES, cluster, preempt, rank, run, submit

__all__ = ["cluster", "run", "submit"]

GRACE_S = 12


@pytest.fixture
def short_grace(cluster: Cluster) -> Iterator[Cluster]:
    cluster.run("scontrol", "update", "partitionname=low", f"gracetime={GRACE_S}")
    yield cluster
    cluster.run("scontrol", "update", "partitionname=low", "gracetime=30")


def seconds_to_start(run: RunProbe) -> float:
    (requeued,), second = run.events("requeued"), run.events("attempt_started")[1]
    return float(second["time"] - requeued["time"])


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_rank_stopped_in_the_grace_period(
    submit: Callable[..., str], run: RunProbe, short_grace: Cluster, stuck: int
) -> None:
    job = submit(*TWO_NODES, "trainer.max_steps=16", "trainer.step_s=2", "checkpoint.every=3")
    wait_for(lambda: run.events("checkpoint"), "the save of step 3", 120)
    process = rank(job, stuck)
    preempt(short_grace)
    # Slurm sends CONT before TERM: one that has received TERM stays stopped
    wait_for(lambda: f"rank {stuck} received TERM" in run_log(run, stuck), "the signal", 30)
    process.suspend()
    wait_for(lambda: run.events("requeued"), "the requeue", 30)
    signal, ended = run.events("signal")[0], run.events("attempt_ended")[0]
    assert ended["cause"] == "preempted"
    assert f"rank {stuck} on n" in ended["detail"]
    assert [(e["rank"], e["how"]) for e in run.events("straggler")] == [(stuck, "silent")]
    assert run.events("requeued")[0]["time"] < signal["time"] + GRACE_S
    wait_for(lambda: run.events("finished"), "the end", 150)
    print("rank stopped in the grace period, requeue to the next attempt, s:", seconds_to_start(run))
    short_grace.wait_for_state(job, "COMPLETED", 30)
    assert run.causes() == ["preempted", "finished"]
    assert short_grace.job(job)["Restarts"] == "1"
    assert run.events("resumed")[0]["step"] == run.saved()


def run_log(run: RunProbe, number: int) -> str:
    path = run.path / "logs" / f"attempt-001.rank-{number}.log"
    return path.read_text() if path.exists() else ""


def test_a_rank_stopped_in_training(submit: Callable[..., str], run: RunProbe, cluster: Cluster) -> None:
    job = submit(*TWO_NODES, *LONG, "preemption.hang_s=4")
    run.reach(25)
    rank(job, 1).suspend()
    wait_for(lambda: run.events("attempt_ended"), "the end of the attempt", 20)
    wait_for(lambda: run.events("finished"), "the end", 150)
    print("rank stopped in training, requeue to the next attempt, s:", seconds_to_start(run))
    ended = run.events("attempt_ended")[0]
    assert (ended["cause"], ended["rank"]) == ("failed", 1)
    assert "has given no sign of life for 4 s" in ended["detail"]
    assert [(e["cause"], e["job_id"]) for e in run.events("requeued")] == [("failed", job)]
    assert run.events("resumed")[0]["step"] == run.saved()


SCRIPT = """
import sys, time
from pathlib import Path
import torch.distributed as dist
import outlast

run = outlast.start(sys.argv[1], every=3, requeue=True)
ranks = int(sys.argv[2])
if ranks > 1:
    dist.init_process_group("gloo")
checkpoint = run.resume_point()
step = checkpoint.step if checkpoint else 0
run.begin(step)

def save(directory):
    (directory / f"rank-{run.rank}").write_text(str(step))
    if run.attempt == 1 and (step > 6 if sys.argv[3] == "1000" else run.stopping) and run.rank == ranks - 1:
        time.sleep(float(sys.argv[3]))

while step < 20:
    time.sleep(0.3)
    step += 1
    run.step_end(step, save, total=20)
run.finish(step)
"""


@pytest.mark.parametrize(("ranks", "seconds"), [(1, 1000), (2, 1000), (1, 18)])
def test_a_save_that_hangs_is_given_up_and_a_slow_one_is_not(
    cluster: Cluster, tmp_path: Path, run: RunProbe, short_grace: Cluster, ranks: int, seconds: int
) -> None:
    """A user's own script, under plain `srun`: the process is alive, but does not come to where the others wait. If no
    other waits, the job is requeued in time and the save goes on."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    batch = tmp_path / "job.sbatch"
    batch.write_text(f"#!/bin/bash\nexec srun {sys.executable} -u {script} {run.path} {ranks} {seconds}\n")
    run.path.parent.mkdir()
    flags = ["--parsable", "-p", "low", "-N", str(ranks), "--ntasks-per-node=1", "--requeue", "--open-mode=append"]
    job = cluster.run("sbatch", *flags, "-o", str(tmp_path / "log"), str(batch)).strip()
    run.reach(6)
    preempt(cluster)
    wait_for(lambda: run.events("attempt_ended"), "the end of the attempt", 30)
    wait_for(lambda: run.events("finished"), "the end", 150)
    print("save that hangs, requeue to the next attempt, s:", seconds_to_start(run))
    ended = run.events("attempt_ended")[0]
    assert ended["cause"] == "preempted"
    assert [(e["rank"], e["how"]) for e in run.events("straggler")] == [(1, "behind")][: ranks - 1]
    assert run.events("requeued")[0]["time"] < run.events("signal")[0]["time"] + GRACE_S
    assert run.events("resumed")[0]["step"] == (6 if seconds == 1000 else run.events("signal")[0]["step"])
    cluster.wait_for_state(job, "COMPLETED", 30)
    assert cluster.job(job)["Restarts"] == "1"
