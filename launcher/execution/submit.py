"""`cluster=slurm` and `cluster=devcluster`: one job, submitted once, and then left alone."""

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from outlast.config.cluster import SlurmCluster
from outlast.config.configuration import Config, load
from outlast.deletion import delete
from outlast.errors import ConfigError, RunBusyError, SlurmError
from outlast.files import write_atomically
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.rundir.place import place_of
from outlast.rundir.submission import Submission, new_token, submission_lock
from outlast.slurm.environment import slurm_conf
from outlast.slurm.refusal import refusal_of
from outlast.slurm.submit import submit_recorded

from ..devcluster import cluster as devcluster
from ..planning import storage
from ..planning.batch_script import Target, batch_script, target_of
from ..planning.plan import Plan
from ..runs import queue
from ..runs.queue import JobKey, JobState
from ..runs.state import is_locked, job_id_of, started_attempts
from ..runs.submissions import Submitted, submission_of
from . import snapshot
from .freeze import freeze, make_run_directory

SCRIPT = "job.sbatch"
"""The batch script as it was submitted, in the run directory."""
LEAVING_S = 60.0
"""How long a job that is on its way out is waited for: it may save, and have `KillWait` (30 s by default) for that."""
FREE_S = 5.0
"""How long processes may outlive their job."""
POLL_S = 1.0
OVER = ("finished", "failed", "cancelled", "out_of_memory")
"""Causes after which a job does not come back, unless it is written that it does."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job in the queue."""

    job_id: str
    log: str
    again: bool = False
    """Whether it was there before: the same command again submits nothing."""
    left_out: Sequence[str] = ()
    """What of the project was not copied (see `snapshot.Snapshot`)."""


def use_cluster(config: Config) -> None:
    """Point Slurm's commands at the cluster that `config` names.

    Raises:
        SlurmError: it is the devcluster, which is not up.
    """
    if config.cluster.kind == "devcluster":
        directory = devcluster.default_directory()
        variables = devcluster.env(directory)
        if not os.path.exists(variables["SLURM_CONF"]):  # the commands would try for a minute
            where = "`outlast devcluster up` starts one; OUTLAST_DEVCLUSTER=DIR says where one is"
            raise SlurmError(f"no devcluster is up in {directory}: {where}")
        os.environ.update(variables)


def submit(plan: Plan) -> SubmittedJob:
    """Submit the run, or find it in the queue.

    Raises:
        ConfigError: the directory holds another run, the code can't be frozen, or the job in the queue has other
            values.
        ConfigError: Slurm refuses the job; of a run that was not there before, nothing is left.
        RunBusyError: an attempt is alive on it outside Slurm, or its job does not leave.
        SlurmError: Slurm does not answer.
    """
    use_cluster(plan.config)
    run, target = plan.directory, target_of(plan.config)
    record = run.path / "submitted.json"
    fresh = not run.config.exists() and not run.ledger.exists()
    others = set(os.listdir(run.path)) if run.path.is_dir() else None
    make_run_directory(run)
    with submission_lock(run.path) as lock:
        job_id, state = in_queue([run]).get(run.path, ("", None))
        if state is not None and state.active:
            check_same(plan, job_id)
            return SubmittedJob(job_id, str(target.log).replace("%j", job_id), again=True)
        deadline = time.monotonic() + FREE_S
        while is_locked(run) and time.monotonic() < deadline:
            time.sleep(0.1)
        if is_locked(run):
            raise RunBusyError(f"{run.path} is in use by a process of this machine, and not by a job. Stop it first.")
        try:
            check_code(plan)
        except ConfigError:
            if fresh:
                _undo(run.path, others)
            raise
        freeze(plan)  # not before: a job in the queue keeps the configuration that it was submitted with
        left_out = take_code(plan.config, target)
        write_atomically(run.path / SCRIPT, batch_script(plan.config, target), private=True)
        before = record.read_text() if record.exists() else None
        try:
            done = submit_recorded(
                Submission(
                    token=new_token(),
                    cluster=plan.config.cluster.kind,
                    slurm_conf=slurm_conf(),
                    log=str(target.log),
                    place=place_of(run.path),
                ),
                run.path / SCRIPT,
                [],
                lock,
                lambda entry: write_atomically(record, json.dumps(asdict(entry))),
            )
        except SlurmError as error:
            refusal = refusal_of(error, plan.config.flat())
            if refusal is None:
                raise
            if fresh:  # nothing is left that would look like a run
                _undo(run.path, others)
            elif before is not None:
                write_atomically(record, before)
            else:
                delete(record, inside=run.path)
            raise refusal from None
    assert done.job_id is not None
    return SubmittedJob(done.job_id, done.log, left_out=left_out)


def _undo(run: Path, others: set[str] | None) -> None:
    """Delete what a refused submission has made: all but `others`, or with None the run directory itself."""
    with suppress(OSError):
        if others is None:
            delete(run, inside=run.parent)
            return
        for name in set(os.listdir(run)) - others:
            delete(run / name, inside=run)


def check_same(plan: Plan, job_id: str) -> None:
    """See that a job in the queue does what is asked for now.

    Raises:
        ConfigError: it was submitted with other values.
    """
    changes = plan.config.all_differences(load(plan.directory.config))
    if changes:
        text = "; ".join(f"{key} is {its!r} there, not {mine!r}" for key, (mine, its) in changes.items())
        way = f"stop it first: outlast cancel {plan.directory.path.name}, then the same command"
        first = next(iter(changes))
        raise ConfigError(first, changes[first][0], f"no effect: job {job_id} is in the queue already: {text}; {way}")


def check_code(plan: Plan) -> None:
    """See that the budget holds the run together with the code that is about to be copied into its directory.

    Raises:
        ConfigError: it does not; the message has the arithmetic.
    """
    if parts := plan.storage.get("parts"):
        storage.check_code(parts, plan.config, snapshot.size(Path.cwd()))


def take_code(config: Config, target: Target) -> list[str]:
    """Freeze the code of the job, and name what was left out."""
    assert isinstance(config.cluster, SlurmCluster)
    return snapshot.take(target.code, Path.cwd(), limit_mb=config.cluster.code_limit_mb).left_out


def in_queue(runs: Sequence[RunDirectory]) -> dict[Path, tuple[str, JobState]]:
    """Ask Slurm for the newest job of each run: its id and state, by the run's path.

    A job whose launcher was killed before it had the id is found by its comment, one of a plain `sbatch` by the ledger.
    One that is on its way out is waited for: it may end, or come back. A run that was never submitted, and one whose
    job Slurm no longer has, is absent.

    Raises:
        RunBusyError: a job does not leave.
        SlurmError: Slurm does not answer. A cluster whose configuration is gone (a devcluster that is down) is none.
    """
    jobs = {run.path: job for run in runs if (job := _newest_job(run)) is not None}
    deadline, said = time.monotonic() + LEAVING_S, False
    while True:
        found = _look(jobs)
        leaving = [job_id for job_id, state in found.values() if state.state == "COMPLETING"]
        if not leaving:
            return found
        if time.monotonic() > deadline:
            raise RunBusyError(
                f"job {leaving[0]} is on its way out, and has not left within {LEAVING_S:g} s. Nothing was submitted: "
                "the same command again, when it has"
            )
        if not said:
            print(f"waiting for job {leaving[0]}, which is on its way out", file=sys.stderr)
        said = True
        time.sleep(POLL_S)


Job = tuple[str | None, str | None, Submitted | None]
"""The `slurm.conf` of a job's cluster, its id, and its submission, by which it is found if the id is not known."""


def _newest_job(run: RunDirectory) -> Job | None:
    submitted, tries = submission_of(run), started_attempts(Ledger(run.ledger).read())
    newest = tries[-1] if tries else None
    conf = submitted.submission.slurm_conf if submitted else slurm_conf()
    if conf is not None and not os.path.exists(conf):
        return None
    if submitted is not None and (newest is None or submitted.time > newest.last_time):
        return conf, submitted.job_id, submitted
    over = newest is not None and newest.ended and not newest.requeued and newest.ended["cause"] in OVER
    job_id = None if over else job_id_of(run, newest)
    if job_id is None and submitted is None:
        return None
    return conf, job_id or (submitted.job_id if submitted else None), submitted


def _look(jobs: dict[Path, Job]) -> dict[Path, tuple[str, JobState]]:
    if not jobs:
        return {}
    wanted = [JobKey(conf, job_id) for conf, job_id, _ in jobs.values() if job_id is not None]
    owners = {os.stat(path).st_uid for path in jobs} | {os.getuid()}
    answer = queue.ask(wanted, owners, {conf for conf, _, _ in jobs.values()})
    for reason in answer.silent.values():
        raise SlurmError(f"{reason}. Nothing was submitted: what is in the queue is not known")
    found = {}
    for path, (conf, job_id, entry) in jobs.items():
        if job_id is None and entry is not None:
            job_id = entry.job_id_in(answer.tokens.get((conf, entry.submission.comment)))
        state = answer.jobs.get(JobKey(conf, job_id)) if job_id is not None else None
        if job_id is not None and state is not None:
            found[path] = (job_id, state)
    return found
