"""Reads a job's environment: the job, the `srun` step, its ranks and its nodes."""

import os
import socket
from dataclasses import dataclass

from outlast.errors import SlurmError

from .commands import pairs, run_slurm

BATCH_JOB_ENV = "OUTLAST_BATCH_JOB"
"""Set by `prologue.sh` to the job's id: the batch script calls `outlast.epilogue` when the ranks are gone."""


@dataclass(frozen=True)
class SlurmJob:
    """The job (or array task) that this process belongs to."""

    job_id: str
    """As Slurm's commands take it: `123`, or `123_4` for one task of an array. An array task's bare number would,
    for one of the tasks, name the whole array."""
    restart_count: int
    nodelist: str


def current_job() -> SlurmJob | None:
    """The Slurm job around this process, or None."""
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        return None
    array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    job_id = f"{array}_{task}" if array and task else env["SLURM_JOB_ID"]
    return SlurmJob(job_id, int(env.get("SLURM_RESTART_COUNT", "0") or 0), env.get("SLURM_JOB_NODELIST", ""))


def in_own_batch_script() -> bool:
    """Whether the batch script of the job around this process is one of ours, with our prologue and epilogue.

    Such a job is there for its run and may be requeued. A notebook, an `salloc`, or a job that was submitted from
    inside one of ours may hold anything else.
    """
    job = os.environ.get("SLURM_JOB_ID")
    return bool(job) and os.environ.get(BATCH_JOB_ENV) == job


def current_node() -> str:
    """This machine's name in Slurm, which may differ from the host's; else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def slurm_conf() -> str | None:
    """The configuration file that Slurm's commands are told to use (`SLURM_CONF`); None: the machine's own."""
    return os.environ.get("SLURM_CONF")


def environment_without_job() -> dict[str, str]:
    """This process's environment without the Slurm job around it. Ranks that a foreground launcher starts inside an
    interactive allocation get it, since they must not requeue that job."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}


MEETING_ENV = "OUTLAST_MEETING"
"""Tells ranks that outlast or `srun` has started by what name they meet. Other launchers have ways of their own."""


@dataclass(frozen=True)
class Step:
    """The `srun` step around this process, one of its tasks."""

    task: int
    tasks: int
    local_task: int
    """Its number among the tasks on this node."""
    local_tasks: int
    address: str
    """An address of the first task's node that resolves."""
    port: int
    """One for the job's own use, which follows from its number: `launch.py` gives it to torch."""
    key: str = ""
    """What no other step of this cluster is called, of this attempt or another."""


def current_step() -> Step | None:
    """The `srun` step around this process, or None.

    Raises:
        SlurmError: the first node has no address that resolves.
    """
    env = os.environ
    if "SLURM_PROCID" not in env or "SLURM_STEP_ID" not in env:
        return None
    # The port differs between attempts and between jobs, and is below the range that the kernel gives out.
    job, restart = int(env["SLURM_JOB_ID"]), int(env.get("SLURM_RESTART_COUNT", "0") or 0)
    tasks = int(env["SLURM_NTASKS"])
    return Step(
        task=int(env["SLURM_PROCID"]),
        tasks=tasks,
        local_task=int(env.get("SLURM_LOCALID", "0")),
        local_tasks=int(env.get("SLURM_NTASKS_PER_NODE", "1").split("(")[0]),
        address="127.0.0.1" if tasks == 1 else address_of(hostnames(env["SLURM_JOB_NODELIST"])[0]),
        port=10_000 + (job * 1009 + restart) % 10_000,  # jobs with ids close together may share a node
        key=f"{job}.{restart}.{env['SLURM_STEP_ID']}",
    )


def export_ranks() -> None:
    """Set for torch and accelerate what `srun` told this task: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, and so on.

    Do nothing outside an `srun` step, or where a launcher has set them already (`agent.py`: then a step has one task
    per node).

    Raises:
        SlurmError: the first node has no address that resolves.
    """
    if "RANK" in os.environ or (here := current_step()) is None:
        return
    os.environ |= {
        "RANK": str(here.task),
        "WORLD_SIZE": str(here.tasks),
        "LOCAL_RANK": str(here.local_task),
        "LOCAL_WORLD_SIZE": str(here.local_tasks),
        "MASTER_ADDR": here.address,
        "MASTER_PORT": str(here.port),
        MEETING_ENV: here.key,
    }


def other_nodes() -> list[str]:
    """The names of the job's other nodes, if this process is in an `srun` step of several."""
    env = os.environ
    if "SLURM_STEP_ID" not in env or env.get("SLURM_JOB_NUM_NODES", "1") == "1":
        return []
    return [node for node in hostnames(env["SLURM_JOB_NODELIST"]) if node != current_node()]


def hostnames(nodelist: str) -> list[str]:
    """Expand a compressed list of nodes: `n[0-1]` gives `["n0", "n1"]`."""
    return run_slurm("scontrol", "show", "hostnames", nodelist).split()


def address_of(node: str) -> str:
    """An address that resolves: the node's name if it does, else the address by which Slurm reaches it."""
    address = node
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        address = pairs(run_slurm("scontrol", "show", "node", node, "-o")).get("NodeAddr", "")
        try:
            socket.getaddrinfo(address, None)
        except OSError:
            raise SlurmError(
                f"node {node}: neither its name nor Slurm's address for it ({address or 'none'}) resolves"
            ) from None
    return address
