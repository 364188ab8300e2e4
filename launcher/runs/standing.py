"""Where runs stand: a value for each, from ledger, lock and disk, and one look at Slurm's queue."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from outlast.files import bytes_used
from outlast.rundir import progress
from outlast.rundir.attempts import Attempt
from outlast.rundir.directory import RunDirectory
from outlast.rundir.job_log import last_words
from outlast.rundir.ledger import Ledger
from outlast.rundir.progress import Progress
from outlast.slurm.environment import slurm_conf

from . import queue
from .find import name_of, owner_name, owner_of
from .queue import FAILURES, ON_NODES, WAITING, Answer, JobKey, JobState
from .settings import best_metric, budget_of, settings_of
from .state import State, is_locked, job_id_of, started_attempts, state_of
from .submissions import Submitted, submission_of, sweep_at

Ask = Callable[[list[JobKey], set[int], set[str | None]], Answer]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Where one run stands. Times in seconds, sizes in bytes; None where nothing is known."""

    name: str
    """Of a sweep's cell: `SWEEP/CELL`."""
    sweep: str | None
    path: str
    owner: str
    """The user whose directory it is."""
    state: State
    reason: str | None = None
    """Why Slurm lets it wait, or how it ended by Slurm's word."""
    attempts: int
    step: int
    total_steps: int | None
    eta_s: float | None
    checkpoint_step: int | None
    checkpoint_age_s: float | None
    bytes_used: int | None
    bytes_peak: int | None
    """The most that was seen in use."""
    budget_bytes: int | None
    loss: float | None
    best: dict[str, Any] | None
    """Best evaluation: name, value, step."""
    job_id: str | None
    """The Slurm job that runs it, or will."""
    slurm_conf: str | None = None
    """Configuration of the cluster that the job belongs to; None: the machine's own."""
    slurm_state: str | None = None
    """What Slurm says of the job; None: it does not know the job, or was not asked."""
    note: str | None = None

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(Path(self.path))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def collect(runs: Iterable[RunDirectory], ask: Ask = queue.ask) -> list[RunStatus]:
    """The status of each run.

    Args:
        ask: gives what Slurm says; called once at most, and not at all if no unfinished run has a job.
    """
    rows = [look(run) for run in runs]
    wanted = [row for row in rows if row.state != State.FINISHED and row.job_id is not None]
    nameless = [row for row in rows if row.state == State.QUEUED and row.job_id is None]
    unnamed = {row.path: found for row in nameless if (found := submission_of(row.directory)) is not None}
    clusters = {row.slurm_conf for row in rows if row.path in unnamed}
    if not wanted and not unnamed:
        return rows
    owners = {owner_of(Path(row.path)) for row in rows}
    answer = ask([_key(row) for row in wanted], owners, clusters)
    rows = [_with_job_id(row, answer, unnamed.get(row.path)) for row in rows]
    asked = {row.path for row in wanted} | unnamed.keys()
    return [_corrected(row, answer) if row.path in asked else row for row in rows]


def _key(row: RunStatus) -> JobKey:
    return JobKey(row.slurm_conf, row.job_id or "")


def _with_job_id(row: RunStatus, answer: Answer, submitted: Submitted | None) -> RunStatus:
    """Add the job id that a killed launcher could not write down; it is found by the job's comment."""
    if submitted is None:
        return row
    whole = answer.tokens.get((row.slurm_conf, submitted.submission.comment))
    return replace(row, job_id=submitted.job_id_in(whole))


def look(run: RunDirectory) -> RunStatus:
    """The status of one run, by its own records; Slurm is not asked."""
    events, settings = Ledger(run.ledger).read(), settings_of(run)
    tries, written = started_attempts(events), progress.read(run)
    state, trainer, submitted = state_of(run, events), settings["trainer"], submission_of(run)
    newest = tries[-1] if tries else None
    current = written if written and newest and written.attempt == newest.number else None
    saved = [event for attempt in tries for event in attempt.checkpoints]
    planned = (current and current.total_steps) or max(int(trainer.get("max_steps") or 0), 0)
    sweep = sweep_at(run.path.parent)
    return RunStatus(
        name=name_of(run),
        sweep=sweep.path.name if sweep else None,
        path=str(run.path),
        owner=owner_name(run.path),
        state=state,
        reason=_why(newest) if state == State.FAILED else None,
        attempts=len(tries),
        step=max(next((a.last_step for a in reversed(tries) if a.last_step), 0), current.step if current else 0),
        total_steps=planned or None,
        eta_s=seconds_left(current) if current and state == State.RUNNING else None,
        checkpoint_step=saved[-1]["step"] if saved else None,
        checkpoint_age_s=max(time.time() - saved[-1]["time"], 0.0) if saved else None,
        bytes_used=(written.bytes_used if written else None) or _walked(run),
        bytes_peak=written.bytes_peak or None if written else None,
        budget_bytes=budget_of(settings),
        loss=written.loss if written and written.loss is not None and math.isfinite(written.loss) else None,
        best=best_metric(events, trainer),
        job_id=job_id_of(run, newest),
        slurm_conf=submitted.submission.slurm_conf if submitted else slurm_conf(),
    )


def seconds_left(progress: Progress) -> float | None:
    """Seconds left, seen from now instead of from when the progress was written."""
    if progress.eta_s is None or progress.phase == "done":
        return None
    return max(progress.eta_s - max(time.time() - progress.time, 0.0), 0.0)


def _walked(run: RunDirectory) -> int | None:
    """Count the bytes on disk where no attempt has: there is little to walk then."""
    try:
        return bytes_used(run.path)
    except OSError:
        return None


def _why(newest: Attempt | None) -> str | None:
    """The first line of what an attempt died of."""
    ended = (newest.ended if newest else None) or {}
    if ended.get("cause") == "out_of_memory":
        return "out of memory"
    text = str(ended.get("error") or ended.get("detail") or "").strip()
    return text.partition("\n")[0][:200] or None


def _corrected(row: RunStatus, answer: Answer) -> RunStatus:
    """Correct a row by what Slurm says of its job."""
    if row.slurm_conf in answer.silent:
        text = f"Slurm does not answer ({answer.silent[row.slurm_conf]}); states are from the ledgers alone"
        return replace(row, note=text)
    job = answer.jobs.get(_key(row))
    state = _state(row, job)
    eta = row.eta_s if state == State.RUNNING else None
    says = job.state if job else None
    return replace(row, state=state, eta_s=eta, slurm_state=says, reason=_reason(row, state, job))


def _state(row: RunStatus, job: JobState | None) -> State:
    """Combine what the ledger and Slurm say. A job that is gone from the queue runs no more.

    | the ledger says | Slurm says | it is |
    |---|---|---|
    | anything but finished | it waits (again) | queued |
    | queued, running, stopped unexpectedly | it is on nodes | running |
    | queued, running, stopped unexpectedly | failed, time-out, out of memory, ... | failed |
    | anything but failed, gave up | cancelled | cancelled |
    | preempted, or queued after an attempt | another end, or nothing | interrupted |
    | queued before any, or running | another end, or nothing | stopped unexpectedly |
    """
    says, open_end = job.state if job else "", row.state in (State.QUEUED, State.RUNNING, State.STOPPED_UNEXPECTEDLY)
    if says in WAITING:
        return State.QUEUED
    if row.state in (State.FAILED, State.GAVE_UP, State.CANCELLED, State.NOT_STARTED):
        return row.state
    if says in ON_NODES:
        return State.RUNNING if open_end else row.state
    if says == "COMPLETING":
        return row.state
    if says == "CANCELLED":
        return State.CANCELLED
    if row.state == State.RUNNING and is_locked(row.directory):
        return State.RUNNING  # on this very host: the next command will find Slurm up to date
    if says in FAILURES and open_end:
        return State.FAILED
    if row.state in (State.PREEMPTED, State.INTERRUPTED) or (row.state == State.QUEUED and row.attempts):
        return State.INTERRUPTED
    return State.STOPPED_UNEXPECTEDLY


def _reason(row: RunStatus, state: State, job: JobState | None) -> str | None:
    if job is not None and state == State.QUEUED:
        return job.reason if job.state == "PENDING" else job.state.lower()
    said = None
    if row.state == State.QUEUED and state in (State.FAILED, State.STOPPED_UNEXPECTEDLY):  # no rank has begun
        submitted = submission_of(row.directory)
        said = last_words(submitted.log) if submitted and submitted.log else None
    if job is not None and state == State.FAILED and row.state != State.FAILED:
        return f"{job.state} by Slurm's word" + (f": {said}" if said else "")
    return said or row.reason
