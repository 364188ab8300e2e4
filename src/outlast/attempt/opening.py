"""Writes down where an attempt runs."""

import socket
from collections.abc import Callable

from outlast.checkpoint.manifest import versions
from outlast.ranks.identity import Identity
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Record
from outlast.rundir.place import place_of
from outlast.slurm.environment import hostnames


def write_start(run: RunDirectory, identity: Identity, record: Record, say: Callable[[str], None]) -> None:
    """Write where the attempt runs.

    Raises:
        SlurmError: Slurm does not say which nodes the job has.
    """
    job, ranks = identity.job, identity.world_size
    hosts = hostnames(job.nodelist) if job and job.nodelist else [socket.gethostname()]
    record(
        "attempt_started",
        job_id=job.job_id if job else None,
        restart_count=job.restart_count if job else 0,
        hosts=hosts,
        world_size=ranks,
        versions=versions(),
        place=place_of(run.path),
    )
    say(f"attempt {identity.attempt} on {', '.join(hosts)}, {ranks} rank(s)")
