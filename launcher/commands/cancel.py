"""`outlast cancel`: runs save and stop, or leave the queue, and stay cancelled.

The mark (`cancelled.json`) goes first, then one `scancel` for all jobs of a cluster. A job whose requeue was on its way
comes back from the dead (Slurm requeues one that is completing), so the queue is watched until none does. A run on
this machine is told by a signal to whoever holds its lock.
"""

import signal
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from outlast.errors import ConfigError, Exit, SlurmError
from outlast.files import read_json
from outlast.rundir.directory import RunDirectory

from ..runs import queue
from ..runs.find import is_writable, owner_of, runs_named, runs_under
from ..runs.queue import ACTIVE, WAITING, JobKey
from ..runs.standing import RunStatus, collect
from ..runs.state import State, is_locked
from ..runs.submissions import mark_cancelled, unmark_cancelled

LIMIT_S = 10.0
"""How long Slurm may take to answer, and how long saves are waited for."""
POLL_S = 0.5
LISTED = 12
"""Runs up to which each has a line; more are counted."""


@dataclass(frozen=True)
class Done:
    """What became of one run."""

    name: str
    what: str
    detail: str = ""
    ok: bool = True


def main(names: Sequence[str], root: Path, *, everything: bool, sure: bool) -> int:
    """`outlast cancel RUN|SWEEP|SWEEP/CELL…`, or `--all`. Exit code 1 if one could not be cancelled.

    Raises:
        ConfigError: nothing was named, or there is no such run.
    """
    if bool(names) == everything:
        raise ConfigError(
            "RUN", " ".join(names), "valid: names of runs and sweeps, or --all for every run under --root"
        )
    runs = runs_under(root) if everything else runs_named(names, root)
    rows = collect(runs, ask=partial(queue.ask, limit_s=LIMIT_S))
    if everything:
        rows = [row for row in rows if row.state not in OVER or _in_queue(row)]
        if rows and not sure:
            _ask(rows, root)
    done = cancel(rows)
    _print(done)
    return Exit.DONE if all(one.ok for one in done) else Exit.FAILED


OVER = {
    State.FINISHED: "has finished already",
    State.FAILED: "has failed already",
    State.GAVE_UP: "has given up already",
    State.CANCELLED: "was cancelled before",
}
"""States in which there is nothing to cancel, in words."""


def _in_queue(row: RunStatus) -> bool:
    return row.slurm_state in ACTIVE


def _ask(rows: list[RunStatus], root: Path) -> None:
    if not sys.stdin.isatty():
        raise ConfigError("--all", f"{len(rows)} runs", "nobody is there to be asked; valid: --all --yes")
    if input(f"cancel {len(rows)} runs under {root}? [yes/no] ").strip().lower() not in ("y", "yes"):
        raise ConfigError("--all", "no", "nothing was cancelled")


def cancel(rows: Sequence[RunStatus]) -> list[Done]:
    """Cancel each run of `rows`, which are fresh from :func:`collect`."""
    queued: dict[str | None, list[RunStatus]] = defaultdict(list)
    local: list[RunStatus] = []
    done: list[Done] = []
    for row in rows:
        if (_in_queue(row) or row.state not in OVER) and not is_writable(row.directory.path):
            done.append(Done(row.name, f"is {row.owner}'s, and not cancelled: you may not write there", ok=False))
        elif _in_queue(row):
            queued[row.slurm_conf].append(row)
        elif row.state in OVER:
            done.append(Done(row.name, OVER[row.state]))
        elif row.note is not None:
            done.append(Done(row.name, "is not cancelled: Slurm does not answer", ok=False))
        elif row.state == State.RUNNING:
            local.append(row)
        else:
            mark_cancelled(row.directory, row.job_id)
            done.append(Done(row.name, "was neither running nor in the queue; it is cancelled now"))
    for conf, members in queued.items():
        done += _scancel(conf, members)
    return [*done, *_signal(local)]


def _scancel(conf: str | None, rows: list[RunStatus]) -> list[Done]:
    """Cancel jobs of one cluster, and see that they stay so."""
    jobs = {JobKey(conf, row.job_id): row for row in rows if row.job_id is not None}
    for row in rows:
        mark_cancelled(row.directory, row.job_id)
    try:
        queue.cancel(conf, [key.job_id for key in jobs])
        left = stay_cancelled(conf, list(jobs), {owner_of(row.directory.path) for row in rows})
    except SlurmError as error:
        for row in rows:
            unmark_cancelled(row.directory)
        return [Done(row.name, f"is not cancelled: {error}", _job(row), ok=False) for row in rows]
    done = []
    for key, row in jobs.items():
        if left.get(key) in WAITING:
            done.append(Done(row.name, "is in the queue again, whatever scancel says", _job(row), ok=False))
        elif row.slurm_state in WAITING:
            done.append(Done(row.name, "was waiting; taken out of the queue", _job(row)))
        elif key in left:
            done.append(Done(row.name, "was told to stop; it saves and leaves", _job(row)))
        else:
            done.append(Done(row.name, "was running; it has stopped", _job(row)))
    return done


def _job(row: RunStatus) -> str:
    return f"job {row.job_id}"


def stay_cancelled(conf: str | None, keys: list[JobKey], users: set[int]) -> dict[JobKey, str]:
    """Watch the jobs leave; cancel those again that come back. Returns those that have not left in time."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        answer = queue.ask([], users, [conf], limit_s=LIMIT_S)
        if conf in answer.silent:
            raise SlurmError(f"{answer.silent[conf]}, after scancel")
        left = {key: answer.jobs[key].state for key in keys if key in answer.jobs and answer.jobs[key].active}
        if not left or time.monotonic() > deadline:
            return left
        back = [key.job_id for key, state in left.items() if state in WAITING]
        if back:
            queue.cancel(conf, back)
        time.sleep(POLL_S)


def _signal(rows: list[RunStatus]) -> list[Done]:
    """Tell the runs of this machine that have no job to stop, and wait until they have saved."""
    done, told = [], []
    for row in rows:
        holder, refusal = _holder(row.directory)
        if holder is None:
            done.append(Done(row.name, f"is not cancelled: {refusal}", ok=False))
            continue
        mark_cancelled(row.directory, None)
        try:
            # A sweep's launcher holds the locks of all cells that it runs: there, a cell's own ranks are told.
            for process in _ranks(holder, row.path) if row.sweep else [holder]:
                process.send_signal(signal.SIGTERM)
            told.append((row, holder.pid))
        except psutil.Error as error:
            unmark_cancelled(row.directory)
            done.append(Done(row.name, f"is not cancelled: {error}", ok=False))
    deadline = time.monotonic() + LIMIT_S
    for row, pid in told:
        while is_locked(row.directory) and time.monotonic() < deadline:
            time.sleep(0.1)
        saves = is_locked(row.directory)
        done.append(Done(row.name, "was told to stop; it saves and leaves" if saves else "has stopped", f"pid {pid}"))
    return done


def _holder(run: RunDirectory) -> tuple[psutil.Process | None, str]:
    """The process that holds the run's lock, or why there is none to tell."""
    record: Any = read_json(run.lock)
    try:
        pid, host, since = int(record["pid"]), str(record["host"]), float(record["time"])
    except (ValueError, KeyError, TypeError):
        return None, "its lock does not say who runs it"
    if host != socket.gethostname():
        return None, f"process {pid} on {host} runs it: say it there"
    try:
        process = psutil.Process(pid)
        if process.create_time() <= since + 1.0:
            return process, ""
    except psutil.NoSuchProcess:
        pass
    return None, f"its launcher (pid {pid}) is gone, its ranks are on their way out"


def _ranks(holder: psutil.Process, path: str) -> list[psutil.Process]:
    return [child for child in holder.children() if child.cmdline()[-1:] == [path]]


def _print(done: list[Done]) -> None:
    if len(done) <= LISTED:
        for one in done:
            print(f"{one.name} {one.what}" + (f" ({one.detail})" if one.detail else ""))
    else:
        for what, count in Counter(one.what for one in done).items():
            print(f"{count} of {len(done)}: {what}")
    if not done:
        print("nothing to cancel")
    elif any(one.ok and one.what not in OVER.values() for one in done):
        print("What is cancelled stays so until you start it again: `outlast resume`, or the command that started it.")
