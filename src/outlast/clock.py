"""A clock for durations and deadlines, in Unix seconds, that nobody can set while the process runs.

The wall clock may be set back or forward under a run: by NTP after a node's boot, by a suspended machine, by hand. What
was measured with it would then be negative or hours long. This clock agrees with it when the process starts, and from
there on only counts, time in suspend included.
"""

import time

_OFFSET = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def now() -> float:
    """The time, Unix seconds."""
    return _OFFSET + time.clock_gettime(time.CLOCK_BOOTTIME)
