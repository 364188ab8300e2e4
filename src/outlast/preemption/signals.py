"""The preemption guard turns signals into a flag, and the training loop acts on it.

TERM, USR1 and USR2 all mean "save and leave": Slurm's default preemption sends TERM, `--signal` sends whatever it was
told to, and neither is under the job's control. The handler sets the flag, notes the time and returns. A thread
reads the interpreter's wake-up descriptor, so that a signal is noticed at once also while the main thread is inside
one long C call (one that lets go of the interpreter's lock, as torch's do). During start-up, when no loop polls the
flag yet, that thread is what lets the job leave.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

from outlast import clock
from outlast.processes import SIGNALS

CLOCK = "clock"
"""In the place of a signal's name: the job is near its time limit, and nobody has sent a signal."""

_active: "PreemptionGuard | None" = None


class PreemptionGuard:
    """One per process, installed first of all in the main thread.

    Args:
        interrupt: Ctrl-C, too, means "save and leave"; a second one interrupts as usual. So does the end of the
            terminal (HUP), unless it is ignored, as under `nohup`.
    """

    def __init__(self, *, interrupt: bool = False) -> None:
        hears_hangup = interrupt and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
        self._signals = (*SIGNALS, *[signal.SIGINT] * interrupt, *[signal.SIGHUP] * hears_hangup)
        self.requested: str | None = None
        """The first signal: "TERM", "USR1", "USR2", "INT", "HUP" or `CLOCK`; or None. Later ones change nothing."""
        self.requested_at = 0.0
        """When it came, by `outlast.clock`."""
        self._on_startup: Callable[[str], None] | None = None
        self._on_signal: Callable[[], None] | None = None
        self._pid = os.getpid()
        self._interrupts = 0
        self._in_startup = True
        self._startup_lock = threading.Lock()

    def install(self) -> None:
        """Set the handlers, start the watching thread, and let signals that were held back through.

        Raises:
            RuntimeError: another guard is active in this process, or this is not the main thread.
        """
        global _active
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("the preemption guard must be installed in the main thread")
        if _active is not None:
            raise RuntimeError("a preemption guard is already active in this process")
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        threading.Thread(target=self._watch, name="outlast-preemption-guard", daemon=True).start()
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in self._signals:
            signal.signal(number, self._handle)
        _active = self
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)

    def uninstall(self) -> None:
        """Give the default actions back: for a process that goes on after its run has finished."""
        global _active
        if _active is not self:
            return
        _active = None
        signal.set_wakeup_fd(-1)
        for number in self._signals:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        self._write.close()

    def request(self, name: str) -> None:
        """Ask for a stop, as a signal does. Only the first request counts."""
        if self.requested is None:
            self.requested_at = clock.now()
            self.requested = name

    def notify(self, *, on_startup: Callable[[str], None], on_signal: Callable[[], None]) -> None:
        """Call these in the guard's thread when a signal comes from here on.

        Args:
            on_startup: called with the signal's name before :meth:`end_startup`; expected to end the process.
            on_signal: called at the first signal, to prepare what the loop will need: tell the ranks, ask Slurm why.
        """
        self._on_startup, self._on_signal = on_startup, on_signal

    def end_startup(self) -> None:
        """From here on the loop looks at `requested`; a signal no longer ends the process by itself."""
        with self._startup_lock:  # waits, if the thread is on its way out with the process
            self._in_startup = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:
            self.request(signal.Signals(number).name.removeprefix("SIG"))
            if number == signal.SIGINT:
                # Counted here: `requested` can't tell which is the first, the watching thread may have set it already.
                self._interrupts += 1
                if self._interrupts > 1:
                    raise KeyboardInterrupt

    def _watch(self) -> None:
        prepared = False
        while data := self._read.recv(64):
            names = [signal.Signals(byte).name.removeprefix("SIG") for byte in data if byte in self._signals]
            if not names:
                continue
            self.request(names[0])
            with self._startup_lock:
                if self._in_startup and self._on_startup is not None:
                    self._on_startup(names[0])
            if self._on_signal is not None and not prepared:
                prepared = True
                self._on_signal()


def _before_fork() -> None:
    if _active is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _after_fork_in_parent() -> None:
    if _active is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _after_fork_in_child() -> None:
    # The child shares the parent's wake-up descriptor: it must let go of it before it can receive a signal.
    global _active
    if _active is not None:
        _active = None
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if not _is_data_loaders():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _is_data_loaders() -> bool:
    """Whether torch's `DataLoader` has just forked this process.

    Such a worker keeps the signals blocked from its first instruction, not only from `shield_worker` on: one that dies
    from TERM in between fails the step that the main process would have saved.
    """
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__") != "torch.utils.data.dataloader":
        frame = frame.f_back
    return frame.f_globals.get("__name__") == "torch.utils.data.dataloader"


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
