"""How an attempt begins: not on a run that has finished, and with a line that says where it runs."""

import socket
from collections.abc import Callable

from outlast.checkpoint.manifest import versions
from outlast.errors import Exit
from outlast.ranks.identity import Identity
from outlast.rundir.attempts import finished
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger, Record
from outlast.rundir.place import place_of
from outlast.slurm.environment import hostnames


class AlreadyFinished(SystemExit):
    """The run has finished before: the process ends well, having done nothing."""

    def __init__(self, step: int, code: Exit = Exit.DONE) -> None:
        super().__init__(int(code))
        self.step = step


def leave_if_finished(run: RunDirectory, say: Callable[[str], None], code: Exit = Exit.DONE) -> None:
    """End this process if the run has finished.

    Args:
        code: its exit code; other than 0 where it must take ranks along that wait for this one.

    Raises:
        AlreadyFinished: the run has finished.
    """
    if done := finished(Ledger(run.ledger).read()):
        say(f"{run.path} has finished already, at step {done['step']}; nothing to do")
        raise AlreadyFinished(done["step"], code)


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
