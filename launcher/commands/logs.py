"""`outlast logs`: what a run's ranks print, or the batch job's own log where no rank has started."""

import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from outlast.errors import ConfigError, Exit
from outlast.rundir.attempts import Attempt
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger

from ..runs.find import name_of, run_named
from ..runs.state import State, started_attempts, state_of
from ..runs.submissions import submission_of

POLL_S = 0.25
REQUEUE_S = 10.0
"""How long a run that ended, but did not finish, may take to be requeued."""


@dataclass(frozen=True)
class Source:
    """One log. `path` may not be there yet."""

    path: Path
    title: str
    attempt: int | None = None
    """None: the batch job's."""


def main(name: str, root: Path, *, attempt: int | None, rank: int | None, job: bool, follow: bool, lines: int) -> int:
    """`outlast logs RUN`. The log goes to stdout, what it is to stderr.

    Raises:
        ConfigError: there is no such run, attempt or rank.
    """
    run = run_named(name, root)
    if lines < 0:
        raise ConfigError("-n", lines, "valid: lines, 0 (all) or more")
    if job and (attempt is not None or rank is not None):
        raise ConfigError("--job", True, "the batch job's log is of all attempts and ranks; valid: one of the two")
    source = choose(run, attempt, rank, job=job)
    try:
        if follow:
            _follow(run, source, rank, lines, stay=job or attempt is not None)
        else:
            _say(source)
            _write(tail(source.path, lines)[0])
    except KeyboardInterrupt:
        pass
    return Exit.DONE


def choose(run: RunDirectory, attempt: int | None = None, rank: int | None = None, *, job: bool = False) -> Source:
    """Choose the log that the command asks for.

    Raises:
        ConfigError: there is no such attempt or rank, or nothing that could have a log.
    """
    events, ranks = Ledger(run.ledger).read(), _ranks(run)
    tries = {one.number: one for one in started_attempts(events)}
    known = sorted(tries.keys() | ranks.keys())
    if attempt is not None and attempt not in known:
        raise ConfigError("--attempt", attempt, [str(number) for number in known] or "valid: none has started yet")
    submission = submission_of(run)
    began = max((event["time"] for event in events), default=0.0)
    waiting = submission is not None and attempt is None and submission.time > began
    if job or not known or waiting:
        if submission is None:
            raise ConfigError("RUN", name_of(run), "no attempt of it has started, and no job of it was submitted")
        if submission.log is None:
            raise ConfigError("RUN", name_of(run), "no attempt of it has started; its job has no log that is known of")
        since = (
            "" if job else f"no attempt has started since job {submission.job_id} was submitted; the job's own log: "
        )
        return Source(submission.log, f"{since}{submission.log}")
    number = known[-1] if attempt is None else attempt
    chosen = _rank_that_failed(tries.get(number)) if rank is None else rank
    if rank is not None and number in ranks and rank not in ranks[number]:
        raise ConfigError("--rank", rank, [str(one) for one in sorted(ranks[number])])
    path = run.log(number, chosen)
    if not path.exists() and not run.config.exists() and submission is None:
        why = "it is a script's run, which prints where it was started (in a job, into the job's log); nothing is kept"
        raise ConfigError("RUN", name_of(run), f"{why}. `outlast report` says what happened")
    if number not in ranks and (log := _before_the_ranks(run, number, tries.get(number))) is not None:
        return Source(log, f"no rank of attempt {number} has begun; what was printed before: {log}", number)
    return Source(path, f"attempt {number}, rank {chosen}: {path}", number)


def _before_the_ranks(run: RunDirectory, number: int, attempt: Attempt | None) -> Path | None:
    """The log of what starts the ranks: the agent's, else the batch job's."""
    if run.agent_log(number).is_file():
        return run.agent_log(number)
    ended, submission = (attempt.ended if attempt else None) or {}, submission_of(run)
    return Path(ended["log"]) if "log" in ended else submission.log if submission else None


def _ranks(run: RunDirectory) -> dict[int, set[int]]:
    """The ranks that have a log, by attempt."""
    found: dict[int, set[int]] = {}
    for name in os.listdir(run.logs) if run.logs.is_dir() else []:
        if match := re.fullmatch(r"attempt-(\d+)\.rank-(\d+)\.log", name):
            found.setdefault(int(match[1]), set()).add(int(match[2]))
    return found


def _rank_that_failed(attempt: Attempt | None) -> int:
    ended = (attempt.ended if attempt else None) or {}
    return int(ended.get("rank") or 0)


def tail(path: Path, lines: int) -> tuple[bytes, int]:
    """Read the last lines of a file (all for 0), and where they end; nothing if there is no file."""
    try:
        with open(path, "rb") as file:
            end = position = file.seek(0, os.SEEK_END)
            data = b""
            while position > 0 and (lines == 0 or data.count(b"\n") <= lines):
                start = max(position - 65536, 0)
                file.seek(start)
                data, position = file.read(position - start) + data, start
    except FileNotFoundError:
        return b"", 0
    kept = data.splitlines(keepends=True)
    return b"".join(kept[-lines:] if lines else kept), end


def _follow(run: RunDirectory, source: Source, rank: int | None, lines: int, *, stay: bool) -> None:
    """Print the log and what is added to it, until the run, or the attempt asked for, is over."""
    _say(source)
    text, position = tail(source.path, lines)
    _write(text)
    silent_since: float | None = None
    while True:
        rest_s = _rest_s(run, source, stay=stay)  # before the look at the log: what was said last is still shown
        added, position = _added(source.path, position)
        _write(added)
        newest = source if stay else choose(run, rank=rank)
        if newest.path != source.path:
            _write(_added(source.path, position)[0])
            source, position = newest, 0
            _say(source)
            continue
        silent_since = None if rest_s is None or added else silent_since or time.monotonic()
        if silent_since is not None and time.monotonic() - silent_since >= (rest_s or 0.0):
            return
        time.sleep(POLL_S)


def _rest_s(run: RunDirectory, source: Source, *, stay: bool) -> float | None:
    """Say after how many seconds of silence the log is complete; None while the run goes on."""
    events = Ledger(run.ledger).read()
    if stay and source.attempt is not None:
        tries = started_attempts(events)
        ended = any(one.number == source.attempt and one.ended for one in tries)
        return 0.0 if ended or any(one.number > source.attempt for one in tries) else None
    state = state_of(run, events)
    if state in (State.FINISHED, State.GAVE_UP):
        return 0.0
    return REQUEUE_S if state in (State.FAILED, State.CANCELLED, State.INTERRUPTED) else None


def _added(path: Path, position: int) -> tuple[bytes, int]:
    """Read what has been added since `position`, and give the new one. A file begun anew is read from its start."""
    try:
        with open(path, "rb") as file:
            if file.seek(0, os.SEEK_END) < position:
                position = 0
            file.seek(position)
            added = file.read()
    except FileNotFoundError:
        return b"", position
    return added, position + len(added)


def _say(source: Source) -> None:
    there = "" if source.path.exists() else " (nothing there yet)"
    print(f"==> {source.title}{there}", file=sys.stderr, flush=True)


def _write(text: bytes) -> None:
    if text:
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
