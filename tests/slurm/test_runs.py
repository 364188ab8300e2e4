"""Whole runs on a real Slurm: preempted, at the time limit, cancelled, requeued, and bit-exact at the end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from ..conftest import SMOKE, Command, RunProbe, wait_for
from .cluster import Cluster, processes_of

Start = Callable[..., Command]
Probe = Callable[[str], RunProbe]

TWO_NODES = ["cluster=devcluster", "parallel.nodes=2", "parallel.cpus_per_rank=1"]
LONG = ["trainer.max_steps=80", "trainer.step_s=0.1"]
SFT = [
    "job=sft",
    "model.vocab_size=512",
    "model.hidden_size=32",
    "model.layers=2",
    "data.max_pairs=300",
    "peft.dropout=0.1",
    "checkpoint.every=10",
    "trainer.max_steps=120",
    "trainer.eval_steps=10",
    "trainer.gradient_accumulation_steps=2",
    "trainer.per_device_train_batch_size=2",
    "trainer.max_length=128",
]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def submit(outlast: Start, devcluster: Cluster) -> Iterator[Callable[..., str]]:
    """Submits a run by `outlast train` and gives the job's id; what is left of it afterwards is cancelled."""

    def run(*arguments: str) -> str:
        command = outlast("train", *arguments, OUTLAST_DEVCLUSTER=str(devcluster.directory))
        assert command.wait(60) == 0, command.output
        return command.output.split("submitted job ")[1].split()[0]

    yield run
    devcluster.cancel_all()


@pytest.fixture(scope="module")
def smoke_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The uninterrupted run of two ranks, on this machine without Slurm."""
    directory = tmp_path_factory.mktemp("twin")
    command = Command(directory, "train", *SMOKE, "run.name=twin", "parallel.ranks_per_node=2", "trainer.max_steps=80")
    assert command.wait() == 0, command.output
    return RunProbe(directory / "runs" / "twin").weights()


def preempt(cluster: Cluster) -> str:
    """Take all nodes for a moment, from the high partition."""
    return cluster.run(
        "sbatch", "--parsable", "-p", "high", "-N", "4", "--exclusive", "-o", "/dev/null", "--wrap", "true"
    ).strip()


def requeue_seconds(run: RunProbe) -> list[float]:
    """From each requeue to the next attempt's first line."""
    started = {e["attempt"]: e["time"] for e in run.events("attempt_started")}
    return [started[e["attempt"] + 1] - e["time"] for e in run.events("requeued")]


@contextmanager
def states_of(cluster: Cluster, job: str) -> Iterator[list[tuple[float, str]]]:
    """All states that the job is seen in, with the time."""
    seen: list[tuple[float, str]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append((time.time(), cluster.state(job)))
            done.wait(0.2)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def test_sft_on_two_nodes_preempted_by_term_and_by_the_user_signal(
    submit: Callable[..., str], outlast: Start, devcluster: Cluster, probe: Probe
) -> None:
    job, run = submit(*SFT, *TWO_NODES, "run.name=r"), probe("r")
    with states_of(devcluster, job) as states:
        run.reach(13)
        preempt(devcluster)
        run.reach(33, attempt=2)
        devcluster.set_user_signal(True)
        try:
            preempt(devcluster)
            wait_for(lambda: len(run.events("requeued")) == 2, "the second requeue")
        finally:
            devcluster.set_user_signal(False)
        wait_for(lambda: run.events("finished"), "the end")
        devcluster.wait_for_state(job, "COMPLETED", 30)
    assert run.causes() == ["preempted", "preempted", "finished"]
    assert [e["name"] for e in run.events("signal")] == ["TERM", "USR1"]
    assert all(20 < e["deadline_s"] <= 31 for e in run.events("signal"))
    assert len(run.events("requeued")) == 2
    assert devcluster.job(job)["Restarts"] == "2"
    assert run.steps_repeated() == 0
    assert all(e["hold_lifted"] for e in run.events("requeued"))
    print("requeue to the next attempt's first line, s:", requeue_seconds(run))
    assert max(requeue_seconds(run)) <= 30  # Slurm alone holds it for 120
    finished = run.events("finished")[0]["time"]
    assert not [state for at, state in states if state == "COMPLETED" and at < finished]

    twin = outlast("train", *SFT, "parallel.ranks_per_node=2", "parallel.cpus_per_rank=1", "run.name=twin")
    assert twin.wait() == 0, twin.output
    assert run.weights() == probe("twin").weights()
    assert [e["metrics"]["eval_loss"] for e in run.events("evaluated")] == [
        e["metrics"]["eval_loss"] for e in probe("twin").events("evaluated")
    ]


def test_the_time_limit_by_slurms_signal_and_by_the_jobs_own_clock(
    submit: Callable[..., str], devcluster: Cluster, probe: Probe, tmp_path: Path, smoke_weights: str
) -> None:
    """Two jobs that wait for their minute to pass: one is signalled before, the other gets no signal that it minds.

    They need two such minutes, and more where starting takes long.
    """
    own_clock = ["run.name=clock", "trainer.max_steps=100", "trainer.step_s=0.5", "preemption.lead_s=25"]
    sbatch(devcluster, tmp_path, ["--time=1", "--signal=CONT@1"], *SMOKE, *own_clock)
    arguments = [*SMOKE, *TWO_NODES, "trainer.max_steps=80", "trainer.step_s=0.4", "run.name=r"]
    job, run = submit(*arguments, "cluster.time_min=1", "preemption.lead_s=20"), probe("r")
    wait_for(lambda: run.events("requeued"), "the requeue", 100)
    wait_for(lambda: run.events("finished"), "the end", 300)
    devcluster.wait_for_state(job, "COMPLETED", 30)
    assert set(run.causes()) == {"time_limit", "finished"}
    assert run.causes()[-1] == "finished"
    assert len(run.events("requeued")) == len(run.causes()) - 1
    assert run.steps_repeated() == 0
    assert run.weights() == smoke_weights

    run = probe("clock")
    wait_for(lambda: run.events("finished"), "the end", 300)
    assert {e["name"] for e in run.events("signal")} == {"clock"}
    assert set(run.causes()) == {"time_limit", "finished"}
    assert run.steps_repeated() == 0


def sbatch(cluster: Cluster, cwd: Path, flags: list[str], *overrides: str) -> str:
    """Submit `slurm/train.sbatch` as a user without the launcher would, from a directory with `outlast` on the PATH."""
    env = {**cluster.env, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["sbatch", "--parsable", *flags, str(REPOSITORY / "slurm" / "train.sbatch"), *overrides]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_plain_sbatch(devcluster: Cluster, probe: Probe, tmp_path: Path, smoke_weights: str) -> None:
    overrides = [*SMOKE, *LONG, "parallel.nodes=2", "run.name=r"]
    job = sbatch(devcluster, tmp_path, ["--nodes=2", "--cpus-per-task=1"], *overrides)
    run = probe("r")
    run.reach(15)
    preempt(devcluster)
    wait_for(lambda: run.events("finished"), "the end")
    devcluster.wait_for_state(job, "COMPLETED", 30)
    assert run.causes() == ["preempted", "finished"]
    assert run.steps_repeated() == 0
    assert run.weights() == smoke_weights
    assert (run.path / "config.yaml").is_file()

    again = sbatch(devcluster, tmp_path, ["--nodes=2", "--cpus-per-task=1"], *overrides)
    devcluster.wait_for_state(again, "COMPLETED", 60)
    assert "has finished already, at step 80" in (tmp_path / f"slurm-{again}.out").read_text()
    assert len(run.events("attempt_started")) == 2


def test_plain_sbatch_refuses_a_wrong_key(devcluster: Cluster, tmp_path: Path) -> None:
    job = sbatch(devcluster, tmp_path, [], "preemption.led_s=3")
    devcluster.wait_for_state(job, "FAILED", 60)
    output = (tmp_path / f"slurm-{job}.out").read_text()
    assert "did you mean lead_s?" in output
    assert "Traceback" not in output


def test_one_rank_alone_is_signalled(
    submit: Callable[..., str], devcluster: Cluster, probe: Probe, smoke_weights: str
) -> None:
    job, run = submit(*SMOKE, *LONG, *TWO_NODES, "run.name=r"), probe("r")
    run.reach(15)
    rank_1 = next(p for p in ranks_of(job) if p.environ()["SLURM_PROCID"] == "1")
    rank_1.send_signal(signal.SIGUSR1)
    wait_for(lambda: run.events("finished"), "the end")
    assert run.causes() == ["preempted", "finished"]
    assert run.steps_repeated() == 0
    assert run.weights() == smoke_weights


def ranks_of(job: str) -> list[psutil.Process]:
    found = []
    for process, env in processes_of(job):
        with suppress(psutil.NoSuchProcess):
            argv = process.cmdline()
            if "SLURM_PROCID" in env and "outlast.rank" in argv and "srun" not in argv[0]:
                found.append(process)
    return found


def test_scancel_ends_as_cancelled(submit: Callable[..., str], devcluster: Cluster, probe: Probe) -> None:
    job, run = submit(*SMOKE, *LONG, *TWO_NODES, "run.name=r"), probe("r")
    run.reach(15)
    devcluster.run("scancel", job)
    wait_for(lambda: run.events("attempt_ended"), "the end", 30)
    devcluster.wait_for_state(job, "CANCELLED", 40)
    assert run.causes() == ["cancelled"]
    assert not run.events("requeued")
    ended = run.events("attempt_ended")[0]["step"]
    assert (run.path / "checkpoints" / f"checkpoint-{ended}" / "manifest.json").is_file()


def test_a_cancelled_job_stays_cancelled_after_an_earlier_preemption(
    submit: Callable[..., str], devcluster: Cluster, probe: Probe
) -> None:
    job, run = submit(*SMOKE, *LONG, *TWO_NODES, "run.name=r"), probe("r")
    run.reach(5)
    preempt(devcluster)
    run.reach(20, attempt=2)
    devcluster.run("scancel", job)
    devcluster.wait_for_state(job, "CANCELLED", 40)
    assert run.causes() == ["preempted", "cancelled"]
    assert len(run.events("requeued")) == 1


def test_a_signal_in_start_up(
    submit: Callable[..., str], devcluster: Cluster, probe: Probe, smoke_weights: str
) -> None:
    job, run = submit(*SMOKE, *LONG, *TWO_NODES, "run.name=r"), probe("r")
    wait_for(lambda: run.events("attempt_started"), "the attempt's start", 60)
    devcluster.run("scancel", "--signal=TERM", job)
    wait_for(lambda: run.events("requeued"), "the requeue", 20)
    wait_for(lambda: run.events("finished"), "the end")
    assert run.causes() == ["preempted", "finished"]
    assert not [e for e in run.events("checkpoint") if e["kind"] == "emergency"]
    assert run.weights() == smoke_weights


def test_one_task_of_an_array_requeues_itself_alone(devcluster: Cluster, probe: Probe, tmp_path: Path) -> None:
    script = f"bash {REPOSITORY}/slurm/train.sbatch {' '.join([*SMOKE, *LONG])} run.name=cell-$SLURM_ARRAY_TASK_ID"
    env = {**devcluster.env, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["sbatch", "--parsable", "--array=0-1", "--requeue", "-c", "1", "--wrap", script]
    array = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout.strip()
    cells = [probe("cell-0"), probe("cell-1")]
    for cell in cells:
        cell.reach(10)
    devcluster.run("scancel", "--signal=USR1", f"{array}_1")
    for cell in cells:
        wait_for(lambda c=cell: c.events("finished"), f"the end of {cell.path.name}")
    assert cells[0].causes() == ["finished"]
    assert cells[1].causes() == ["preempted", "finished"]
    assert cells[1].events("requeued")[0]["job_id"] == f"{array}_1"
    assert cells[0].weights() == cells[1].weights()


def test_the_same_command_again_submits_nothing(
    submit: Callable[..., str], outlast: Start, devcluster: Cluster, probe: Probe
) -> None:
    arguments = [*SMOKE, *LONG, *TWO_NODES, "run.name=r"]
    job = submit(*arguments)
    again = outlast("train", *arguments, OUTLAST_DEVCLUSTER=str(devcluster.directory))
    assert again.wait(60) == 0, again.output
    assert f"job {job} is in the queue already" in again.output
    wait_for(lambda: probe("r").events("finished"), "the end")
    after = outlast("train", *arguments, OUTLAST_DEVCLUSTER=str(devcluster.directory))
    assert after.wait(60) == 0, after.output
    assert "has finished already, at step 80" in after.output
    status = outlast("status", "--json", OUTLAST_DEVCLUSTER=str(devcluster.directory))
    assert status.wait(60) == 0, status.output
    assert json.loads(status.output)[0]["state"] == "finished"
