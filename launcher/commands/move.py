"""`outlast move`: a run gets another place, on this file system or another, and goes on from there."""

import errno
import os
import stat
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from outlast.config.run import VALID, is_name
from outlast.deletion import delete
from outlast.errors import ConfigError, Exit, RunBusyError, SlurmError
from outlast.files import bytes_used, flush_directory, make_durably
from outlast.rundir.directory import MOVED_FROM, RunDirectory
from outlast.rundir.lock import RunLock
from outlast.rundir.submission import submission_lock
from outlast.storage.file_system import free_space, quotas

from ..display.progress import size
from ..execution import moving
from ..runs import queue
from ..runs.find import is_writable, run_named
from ..runs.prunable import version_of
from ..runs.queue import ACTIVE
from ..runs.standing import RunStatus, collect
from ..runs.state import State
from ..runs.submissions import sweep_at

LIMIT_S = 10.0
ALIVE = (State.RUNNING, State.QUEUED, State.PREEMPTED)


def main(name: str, target: Path, root: Path) -> int:
    """`outlast move RUN|SWEEP/CELL DEST`. The same command again goes on with what was interrupted.

    Raises:
        ConfigError: the run or its destination is refused, with the reason.
        RunBusyError: the run is in use.
        SlurmError: whether the run is in the queue can't be known.
        CopyError: the copy is not what was read.
    """
    target = Path(os.path.abspath(target.expanduser()))
    if (source := _interrupted(name, root, target)) is not None:
        moving.remove_leftover(source, target)
        return _say_done(name, source, target, [])
    run = run_named(name, root)
    source = run.path
    if not source.is_dir():
        raise ConfigError("RUN", name, "it has not begun, and has no directory yet")
    version = version_of(run)
    [row] = collect([run], ask=partial(queue.ask, limit_s=LIMIT_S))
    _refuse_alive(row)
    _refuse_places(name, source, target)
    sweep = sweep_at(source.parent)
    with ExitStack() as held:
        held.enter_context(submission_lock(sweep.path if sweep else source))
        lock = RunLock(run)
        lock.acquire("outlast move")
        held.callback(lock.release)
        if version_of(run) != version:
            raise RunBusyError(f"{source} has started, or was submitted, meanwhile: nothing was moved")
        links = _links(source)
        try:
            _move(source, target)
        except KeyboardInterrupt:
            print(_state(source, target), file=sys.stderr)
            return Exit.RESUME_ME
        except OSError as error:
            print(f"outlast: {error.filename or target}: {error.strerror}. {_state(source, target)}", file=sys.stderr)
            return Exit.FAILED
    if sweep:
        print(f"{sweep.path.name} still lists this cell: the sweep's own command would begin it anew, in its old place")
    return _say_done(name, source, target, links)


def _move(source: Path, target: Path) -> None:
    make_durably(target.parent)
    if not os.path.lexists(target):
        try:
            if not os.path.lexists(moving.staged_at(target, source)):
                os.rename(source, target)
                delete(RunDirectory(target).lease, inside=target)  # held by this process, under the old name
                flush_directory(target.parent)
                flush_directory(source.parent)
                return
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        _refuse_full(source, target)
        moving.copy(source, target, print)
    moving.remove(source, target)


def _interrupted(name: str, root: Path, target: Path) -> Path | None:
    """The source that an interrupted move to `target` has left without its name, to be deleted; else None."""
    for source in ((root / name).absolute(), Path(name).absolute()):
        if not os.path.lexists(source) and moving.is_copy_of(target, source):
            return source
    return None


def _refuse_alive(row: RunStatus) -> None:
    """Refuse a run that something works on, or will.

    Raises:
        ConfigError: it runs, or is in the queue, or is somebody else's.
        SlurmError: Slurm does not answer.
    """
    if row.note is not None:
        raise SlurmError(f"{row.note}. Whether {row.name} is in the queue can't be known: nothing was moved.")
    if row.state in ALIVE or row.slurm_state in ACTIVE:
        what = f"it is {row.state}" + (f" (job {row.job_id})" if row.job_id else "")
        raise ConfigError("RUN", row.name, f"{what}; stop it first: outlast cancel {row.name}")
    path = row.directory.path
    if path.is_symlink():
        where = path.resolve()
        raise ConfigError("RUN", row.name, f"{path} is a symbolic link; valid: what it leads to, {where}")
    for place in (path, path.parent):
        if not is_writable(place):
            raise ConfigError("RUN", row.name, f"it is {row.owner}'s: you may not write into {place}")
    above = path.parent.stat()
    if above.st_mode & stat.S_ISVTX and os.geteuid() not in (0, above.st_uid, path.stat().st_uid):
        raise ConfigError("RUN", row.name, f"it is {row.owner}'s, and only its owner may rename it in {path.parent}")


def _refuse_places(name: str, source: Path, target: Path) -> None:
    """Refuse a destination that is there, is inside of the run, or can be no run's.

    Raises:
        ConfigError: with the reason.
    """
    if not is_name(target.name) or ":" in str(target):
        raise ConfigError("DEST", str(target), f"valid: the run's new directory, whose name is {VALID}")
    if (target.parent.resolve() / target.name).is_relative_to(source.resolve()):
        raise ConfigError("DEST", str(target), f"it is {name} itself, or inside of it")
    if sweep_at(target.parent) is not None:
        raise ConfigError("DEST", str(target), f"{target.parent} is a sweep, which lists its cells; valid: elsewhere")
    if os.path.lexists(target) and not moving.is_copy_of(target, source):
        free = f", such as {target / source.name}" if target.is_dir() and not _is_run(target) else ""
        changed = " as the copy of a run that has changed since (delete one of the two)"
        went_on = changed if (target / MOVED_FROM).exists() else ""
        raise ConfigError("DEST", str(target), f"it exists{went_on}; valid: a directory that is not there yet{free}")
    if os.path.lexists(leftover := moving.leftover_of(source)):
        why = f"{leftover} is in the way, left of an earlier move from there. Delete it if that run is whole elsewhere"
        raise ConfigError("RUN", name, why)
    if (staged := moving.staged_at(target, source)).is_symlink():
        raise ConfigError("DEST", str(staged), "it is a symbolic link; valid: none, delete it")


def _is_run(path: Path) -> bool:
    run = RunDirectory(path)
    return run.config.exists() or run.ledger.exists()


def _refuse_full(source: Path, target: Path) -> None:
    """Refuse to copy what has no room.

    Raises:
        ConfigError: with what is needed, and what is there.
    """
    need = bytes_used(source) - bytes_used(moving.staged_at(target, source))
    for limit in (free_space(target.parent), *quotas(target.parent)):
        if limit.free_bytes < need:
            text = f"the run takes {size(need)} more there, and {limit.kind} is {size(limit.free_bytes)}"
            raise ConfigError("DEST", str(target), text)


def _links(source: Path) -> list[Path]:
    """Symbolic links in the run that lead somewhere, relative to it."""
    links = (Path(top) / name for top, folders, files in os.walk(source) for name in (*folders, *files))
    return [path.relative_to(source) for path in links if path.is_symlink() and path.exists()]


def _state(source: Path, target: Path) -> str:
    again = "the same command goes on"
    if os.path.lexists(source):
        if os.path.lexists(moving.staged_at(target, source)):
            again += f"; to give up, delete {moving.staged_at(target, source)}"
        return f"{source} is whole" + (f", and so is {target}" if os.path.lexists(target) else "") + f"; {again}"
    return f"{target} is whole; {again}" if os.path.lexists(moving.leftover_of(source)) else f"{target} is whole"


def _say_done(name: str, source: Path, target: Path, links: list[Path]) -> int:
    print(f"{name} is {target} now; it goes on there: outlast resume {target.name} --root {target.parent}")
    print(f"(or the command that started it, with run.name={target.name} run.root={target.parent})")
    for link in links:
        if not (target / link).exists():
            print(f"WARNING: the link {link} led to {os.readlink(target / link)}, where nothing is from its new place")
    return Exit.DONE
