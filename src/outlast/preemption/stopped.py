"""Knows when this process was stopped (SIGSTOP: a job that Slurm suspends) and went on.

Nothing tells a process that it is stopped; what tells it that it goes on is SIGCONT. Work that was under way meanwhile
has not taken as long as the clock says.
"""

import signal
import time

_went_on_at = float("-inf")


def note_stops() -> None:
    """Note from here on when this process goes on; unless somebody else handles SIGCONT. In the main thread."""
    if signal.getsignal(signal.SIGCONT) == signal.SIG_DFL:
        signal.signal(signal.SIGCONT, _note)


def was_stopped_since(moment: float) -> bool:
    """Whether this process may have been stopped after `moment`, by `time.monotonic`."""
    return _went_on_at >= moment


def _note(*_: object) -> None:
    global _went_on_at
    _went_on_at = time.monotonic()
