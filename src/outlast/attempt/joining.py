"""Joins an attempt: who this process is, that no other attempt is alive on the run, and where it runs."""

import itertools
import os
import socket
from collections.abc import Callable

from outlast import clock
from outlast.checkpoint.manifest import versions
from outlast.errors import ConfigError, Exit, denied
from outlast.processes import end_workers_at_exit, seconds_alive
from outlast.ranks.collectives import Collectives
from outlast.ranks.identity import Identity
from outlast.rundir.attempts import ATTEMPT_ENV, attempt_of, finished
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger, Record
from outlast.rundir.lock import LOCK_FD_ENV, RunLock
from outlast.rundir.place import place_of
from outlast.slurm.environment import current_job, hostnames, in_own_batch_script

_started = itertools.count()
"""How many attempts this process has started: only the first began with it."""


class AlreadyFinished(SystemExit):
    """The run has finished before, and there is nothing to go on with: the process ends well, with code 0."""

    def __init__(self, step: int, code: Exit = Exit.DONE) -> None:
        super().__init__(int(code))
        self.step = step


def join(
    run: RunDirectory, collectives: Collectives, say: Callable[[str], None], *, requeue: bool
) -> tuple[Identity, RunLock]:
    """Find out who this process is; rank 0 takes the run's lock, unless the launcher holds it.

    Args:
        say: prints a line in the log.
        requeue: the Slurm job around this process is the run's, though its batch script is not ours.

    Raises:
        AlreadyFinished: the run has finished before.
        RunBusyError: another attempt is alive on the directory.
        ConfigError: this user may not write there.
    """
    try:
        return _join(run, collectives, say, requeue)
    except OSError as error:
        if (text := denied(error)) is None:
            raise
        raise ConfigError("run", str(run.path), text) from None


def _join(
    run: RunDirectory, collectives: Collectives, say: Callable[[str], None], requeue: bool
) -> tuple[Identity, RunLock]:
    around = current_job()
    job = around if requeue or in_own_batch_script() else None
    ledger = Ledger(run.ledger)
    _leave_if_finished(run, say)
    run.create()
    lock = RunLock(run)
    lock.share()
    if collectives.rank == 0 and LOCK_FD_ENV not in os.environ:
        # A predecessor of the same job may still be on its way out, on another node.
        lock.acquire(f"job {job.job_id}" if job else "a training script", wait_s=60.0)
        try:  # it may have finished meanwhile; the other ranks, which wait for this one, end with it
            _leave_if_finished(run, say, Exit.DONE if collectives.world_size == 1 else Exit.RESUME_ME)
        except AlreadyFinished:
            lock.release()
            raise
    lock.keep_from_children()
    end_workers_at_exit()
    number = int(os.environ.get(ATTEMPT_ENV, 0)) or attempt_of(
        ledger.read(), (job.job_id, job.restart_count) if job else None
    )
    return Identity(collectives.rank, collectives.world_size, job, number, around), lock


def _leave_if_finished(run: RunDirectory, say: Callable[[str], None], code: Exit = Exit.DONE) -> None:
    if done := finished(Ledger(run.ledger).read()):
        say(f"{run.path} has finished already, at step {done['step']}")
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
        **({"process_started": clock.now() - seconds_alive()} if next(_started) == 0 else {}),
    )
    say(f"attempt {identity.attempt} on {', '.join(hosts)}, {ranks} rank(s)")
