"""Passes the signals that a command gets on to what it has started."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def passing_on_signals(stop: Callable[[], None], send: Callable[[int], None]) -> Iterator[None]:
    """Pass signals on: USR1 and USR2 are a preemption that this command resumes from, the others mean save and leave.

    A signal that is ignored stays so, as HUP does under `nohup`.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        if number in (signal.SIGUSR1, signal.SIGUSR2):
            send(number)
        else:
            stop()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
