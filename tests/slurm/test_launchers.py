"""Ranks started by `srun`, and by an agent per node: preempted, they leave in order and leave nothing behind."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from outlast.slurm.commands import slurm_timestamp

from ..conftest import SMOKE, Command, RunProbe, is_alive, wait_for
from .cluster import Cluster, processes_of
from .test_runs import LONG, sbatch

Start = Callable[..., Command]
Probe = Callable[[str], RunProbe]

TWO_NODES = ["cluster=devcluster", "parallel.nodes=2", "parallel.cpus_per_rank=1"]
WORKERS = [
    "job=sft",
    "model.vocab_size=512",
    "model.hidden_size=32",
    "model.layers=2",
    "data.max_pairs=300",
    "checkpoint.every=1000",
    "trainer.max_steps=2000",
    "trainer.eval_strategy=no",
    "trainer.load_best_model_at_end=false",
    "trainer.dataloader_num_workers=1",
    "trainer.max_length=128",
    "trainer.per_device_train_batch_size=1",
]


@pytest.fixture
def submit(outlast: Start, devcluster: Cluster) -> Iterator[Callable[..., str]]:
    """Submits a run by `outlast train` and gives the job's id; what is left of it afterwards is cancelled."""

    def run(*arguments: str) -> str:
        command = outlast("train", *arguments, "run.name=r", OUTLAST_DEVCLUSTER=str(devcluster.directory))
        assert command.wait(60) == 0, command.output
        return command.output.split("submitted job ")[1].split()[0]

    yield run
    devcluster.cancel_all()


@dataclass
class Processes:
    """All processes of a job's first start that were ever seen, on all nodes."""

    job: str
    seen: set[psutil.Process] = field(default_factory=set)

    def look(self) -> None:
        for process, env in processes_of(self.job):
            if env.get("SLURM_RESTART_COUNT", "0") == "0":
                self.seen.add(process)

    def alive(self) -> list[psutil.Process]:
        self.look()
        return [process for process in self.seen if is_alive(process)]


@pytest.mark.parametrize("launch", ["srun", "accelerate"])
def test_a_preempted_job_leaves_nothing_behind_and_none_of_it_is_killed(
    submit: Callable[..., str], devcluster: Cluster, probe: Probe, launch: str
) -> None:
    """Nor the workers of a rank's DataLoader, which are the rank's affair, whoever has started it."""
    training = [*WORKERS, "parallel.ranks_per_node=1"]
    if launch == "accelerate":
        training = [*SMOKE, "parallel.ranks_per_node=2", "trainer.max_steps=2000", "trainer.step_s=0.1"]
    job, run = submit(*training, *TWO_NODES, f"parallel.launch={launch}"), probe("r")
    run.reach(8)
    processes = Processes(job)
    least = 4 if launch == "srun" else 6
    assert len(processes.alive()) >= least, "two ranks with a worker each, or two agents' four ranks"
    devcluster.run("sbatch", "-p", "high", "-N", "4", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    wait_for(lambda: run.events("requeued"), "the requeue", 30)
    requeued = run.events("requeued")[0]["time"]
    wait_for(lambda: not processes.alive(), "the end of all processes of the first attempt", 15)
    gone = time.time()
    wait_for(lambda: len(run.events("attempt_started")) == 2, "the next attempt", 60)
    started = slurm_timestamp(devcluster.job(job)["StartTime"])
    assert started is not None
    print(f"{launch}: processes gone {gone - requeued:.1f} s, next start {started - requeued:.1f} s after the requeue")
    assert gone < started <= requeued + 30  # Slurm alone holds it for 120
    log = (run.path / "logs" / f"{job}.log").read_text()
    assert set(re.findall(r"srun: error: n\d: tasks? [\d-]+: (.*)", log)) == {"Exited with exit code 75"}
    if launch == "accelerate":
        ended = re.findall(r"\[outlast\] rank (\d) (.*)", log)
        assert sorted(ended) == [(str(rank), "ended with exit code 75") for rank in range(4)]
    wait_for(lambda: run.events("resumed"), "the resume", 120)
    assert run.steps_repeated() == 0


def test_an_agent_that_is_killed_takes_its_ranks_along_and_the_job_is_retried(
    devcluster: Cluster, probe: Probe, tmp_path: Path
) -> None:
    """Submitted without the launcher: what `train.sbatch` needs for agents is one task per node."""
    flags = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
    job = sbatch(
        devcluster,
        tmp_path,
        flags,
        *SMOKE,
        "parallel.nodes=2",
        *LONG,
        "parallel.launch=accelerate",
        "run.name=r",
    )
    run, processes = probe("r"), Processes(job)
    run.reach(25)
    second = next(p for p in processes.alive() if p.environ().get("RANK") == "1").parent()
    assert second is not None
    killed = time.time()
    second.kill()
    wait_for(lambda: not processes.alive(), "the end of all processes of the first attempt", 15)
    wait_for(lambda: run.events("finished"), "the end")
    assert run.causes() == ["failed", "finished"]
    assert run.events("resumed")[0]["step"] == run.saved()
    assert run.events("requeued")[0]["time"] - killed < 30
    assert run.events("attempt_started")[0]["world_size"] == 2
    devcluster.wait_for_state(job, "COMPLETED", 30)
