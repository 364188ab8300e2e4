"""Processes: how a Python is started, signals held back, what a parent's end means to a child, leaving at once."""

import contextlib
import ctypes
import io
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from .errors import OutlastError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Each of them means "save and leave"."""
PARENT_ENV = "OUTLAST_PARENT"
"""Tells a rank the pid of the process that has started it."""
_PR_SET_PDEATHSIG = 1
IMPLAUSIBLE_S = 3600.0
"""No process needs so long to begin: the kernel counts from another moment than the clock does."""


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Hold the three signals back in this thread; a process started inside inherits that.

    A rank started this way keeps an early signal pending until its guard is in place, and a helper command such as
    `scontrol` is not cut down by the TERM that Slurm sends to every process of the step.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shield_worker(worker_id: int = 0) -> None:
    """`worker_init_fn` for a `DataLoader`: its workers ignore the three signals, and end with their parent.

    Slurm signals every process of a step. PyTorch's workers die from TERM, and the loader then fails the step that the
    main process would have finished and saved. That their parent has gone they notice by themselves only after 5 s, in
    which they hold the run directory's lock.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    at_parents_death(signal.SIGKILL)


def end_workers_at_exit() -> None:
    """Kill, when this Python ends, the workers that :func:`shield_worker` has made deaf to TERM.

    That is what `multiprocessing` ends daemonic children with at exit; then it waits for them, and would for ever.
    """
    from multiprocessing import util

    util.Finalize(None, _end_deaf_children, exitpriority=0)  # finalizers come before that


def _end_deaf_children() -> None:
    import multiprocessing

    deaf = [child for child in multiprocessing.active_children() if child.daemon and _blocks_term(child.pid)]
    if deaf:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error: a worker was killed
    for child in deaf:
        child.kill()


def _blocks_term(pid: int | None) -> bool:
    try:
        with open(f"/proc/{pid}/status") as status:
            masks = [int(line.split()[1], 16) for line in status if line.startswith("SigBlk:")]
    except OSError:  # it has ended
        return False
    return any(mask >> (signal.SIGTERM - 1) & 1 for mask in masks)


class _Lossy(io.FileIO):
    """A file that takes whatever is written to it, also where the disk is full or the terminal is gone."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def ignore_output_errors() -> None:
    """Have what this process prints never fail: a lost log line must not end a run.

    A line is written as a whole, also under `python -u`: several processes write to one log, and would tear it.
    Standard output and error that a notebook or a test runner has put in place of the process's own stay as they are.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue  # also if this was done before
        with contextlib.suppress(OSError):
            stream.flush()
        raw = _Lossy(stream.fileno(), "w", closefd=False)
        lossy = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering or stream.write_through,
        )
        setattr(sys, name, lossy)


def at_parents_death(number: signal.Signals) -> None:
    """Have the kernel send this process signal `number` when the thread that has started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def python_module_command(*module: str) -> list[str]:
    """The command that runs a module as a program, with this Python: everything of outlast's is started by it.

    `-P` keeps the working directory from being imported from. `-m` would put it first, and a checkout called `outlast`
    in it, which is where `git clone` leaves one, would be taken for the package.

    Args:
        module: the module's name and its arguments; without any, the words that come before them.
    """
    return [sys.executable, "-P", "-u", "-m", *module]


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on, below those that the kernel hands out by itself.

    Raises:
        OutlastError: there are not so many.
    """
    sockets: list[socket.socket] = []
    try:
        for port in random.SystemRandom().sample(range(20000, 32000), 2000):
            candidate = socket.socket()
            try:
                candidate.bind(("", port))
                sockets.append(candidate)
            except OSError:
                candidate.close()
            if len(sockets) == count:
                return sorted(sock.getsockname()[1] for sock in sockets)
        raise OutlastError("no free port between 20000 and 32000")
    finally:
        for sock in sockets:
            sock.close()


def exit_at_once(code: int) -> NoReturn:
    """End the process: no atexit hooks, no destructors, nothing that could take time or fail."""
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(1.0)  # another thread may hang in a write
    os._exit(code)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def seconds_alive() -> float:
    """How long ago this process began, by the kernel, whatever clock was set since; 0 if it does not say."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0.0
    alive = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return alive if 0.0 <= alive < IMPLAUSIBLE_S else 0.0


def die_with(variable: str, number: signal.Signals) -> None:
    """If the parent that `variable` names is killed, get signal `number`, instead of training on unseen.

    TERM: save and leave.
    """
    parent = os.environ.get(variable)
    if parent is not None:
        at_parents_death(number)
        if os.getppid() != int(parent):
            signal.raise_signal(number)  # it went before we asked
