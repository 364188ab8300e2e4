"""`cluster=slurm` and `cluster=devcluster`: one job through submitit, submitted once, and then left alone.

submitit writes the batch script, pickles the call and starts one `srun` task per rank. Its own signal handling is
bypassed: the rank's guard takes the signals over before they are let through (`prologue.sh`), so that submitit's
handler, which would save on rank 0 alone, is never reached.
"""

import json
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from outlast import rank, slurm
from outlast.config import Config
from outlast.errors import ConfigError, SlurmError
from outlast.rundir import RunDirectory, write_atomically
from outlast.sections import SlurmCluster

from . import devcluster
from .plan import Plan, freeze, shell_file

if TYPE_CHECKING:
    from submitit import SlurmExecutor

ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD", "STOPPED")
OWNED = ("requeue", "open-mode", "signal", "output", "error", "nodes", "ntasks-per-node", "cpus-per-task", "array")


@dataclass(frozen=True)
class Submitted:
    """A job in the queue."""

    job_id: str
    cluster: str
    log: str
    slurm_conf: str | None
    time: float
    again: bool = False
    """Whether it was there before: the same command again submits nothing."""


def use_cluster(config: Config) -> None:
    """Point Slurm's commands at the cluster that `config` names."""
    if config.cluster.kind == "devcluster":
        os.environ.update(devcluster.env(devcluster.default_directory()))


def batch_script(config: Config) -> str:
    """The batch script that would be submitted."""
    executor = _executor(config)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "plan"))


def submit(plan: Plan) -> Submitted:
    """Submit the run, or find it in the queue.

    Raises:
        SlurmError: Slurm does not answer, or refuses the job.
    """
    use_cluster(plan.config)
    run = plan.directory
    record = run.path / "submitted.json"
    before = _read(record)
    same_cluster = before is not None and before.slurm_conf == os.environ.get("SLURM_CONF")
    if before is not None and same_cluster and slurm.queue_states([before.job_id]).get(before.job_id) in ACTIVE:
        return Submitted(**{**asdict(before), "again": True})
    freeze(plan)  # not before: a job in the queue keeps the configuration that it was submitted with
    job = _submit(plan.config, run)
    submitted = Submitted(
        job_id=job,
        cluster=plan.config.cluster.kind,
        log=str(run.logs / f"{job}_0_log.out"),
        slurm_conf=os.environ.get("SLURM_CONF"),
        time=time.time(),
    )
    write_atomically(record, json.dumps(asdict(submitted)))
    return submitted


def _submit(config: Config, run: RunDirectory) -> str:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        job = _executor(config).submit(rank.main, str(run.path))
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError(f"sbatch refused the job: {str(error).strip().splitlines()[-1]}") from None
    return str(job.job_id)


def _read(record: Path) -> Submitted | None:
    try:
        return Submitted(**json.loads(record.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _executor(config: Config) -> "SlurmExecutor":
    from submitit import SlurmExecutor

    cluster, parallel, preemption = config.cluster, config.parallel, config.preemption
    assert isinstance(cluster, SlurmCluster)
    for flag in cluster.sbatch:
        if flag.replace("_", "-") in OWNED:
            raise ConfigError(f"cluster.sbatch.{flag}", cluster.sbatch[flag], "outlast sets this flag itself")
    use_cluster(config)
    hold = '"${OUTLAST_HOLD[@]}"'
    try:
        executor = SlurmExecutor(
            folder=RunDirectory(config.directory).logs, python=f"{hold} {shlex.quote(sys.executable)}"
        )
    except RuntimeError:
        raise SlurmError("there is no Slurm on this machine (no `srun` on the PATH)") from None
    optional = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "mem": f"{int(cluster.mem_gb * 1000)}M" if cluster.mem_gb else None,
        "constraint": cluster.constraint,
        "nodelist": cluster.nodelist,
        "exclude": cluster.exclude,
        "gpus_per_node": parallel.gpus_per_rank * parallel.ranks_per_node or None,
    }
    executor.update_parameters(
        **{name: value for name, value in optional.items() if value is not None},
        job_name=config.run.name,
        time=cluster.time_min,
        nodes=parallel.nodes,
        ntasks_per_node=parallel.ranks_per_node,
        cpus_per_task=parallel.cpus_per_rank,
        stderr_to_stdout=True,
        setup=[
            *cluster.setup,
            f"export OMP_NUM_THREADS={parallel.cpus_per_rank}",
            f". {_quoted(shell_file('prologue.sh'))}",
        ],
        srun_args=["--kill-on-bad-exit=1"],
        additional_parameters={
            "requeue": True,
            "signal": f"{preemption.signal}@{preemption.lead_s}",
            **cluster.sbatch,
        },
    )
    return executor


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
