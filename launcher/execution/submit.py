"""`cluster=slurm` and `cluster=devcluster`: one job, submitted once, and then left alone."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from outlast.config.cluster import SlurmCluster
from outlast.config.configuration import Config, load
from outlast.deletion import delete
from outlast.errors import ConfigError, SlurmError
from outlast.files import write_atomically
from outlast.rundir.directory import RunDirectory
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
from ..runs.submissions import submission_of
from . import snapshot
from .freeze import freeze, make_run_directory

SCRIPT = "job.sbatch"
"""The batch script as it was submitted, in the run directory."""


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

    A job whose launcher was killed before it had the id is found by its comment. A run that was never submitted, and
    one whose job Slurm no longer has, is absent.

    Raises:
        SlurmError: Slurm does not answer. A cluster whose configuration is gone (a devcluster that is down) is none.
    """
    submissions = {run.path: entry for run in runs if (entry := submission_of(run)) is not None}
    confs = {path: entry.submission.slurm_conf for path, entry in submissions.items()}
    newest = {p: e for p, e in submissions.items() if (conf := confs[p]) is None or os.path.exists(conf)}
    if not newest:
        return {}
    wanted = [JobKey(confs[path], entry.job_id) for path, entry in newest.items() if entry.job_id is not None]
    owners = {os.stat(path).st_uid for path in newest} | {os.getuid()}
    answer = queue.ask(wanted, owners, {confs[path] for path in newest})
    for reason in answer.silent.values():
        raise SlurmError(f"{reason}. Nothing was submitted: what is in the queue is not known")
    found = {}
    for path, entry in newest.items():
        job_id = entry.job_id or entry.job_id_in(answer.tokens.get((confs[path], entry.submission.comment)))
        state = answer.jobs.get(JobKey(confs[path], job_id)) if job_id is not None else None
        if job_id is not None and state is not None:
            found[path] = (job_id, state)
    return found
