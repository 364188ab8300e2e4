"""Notices within seconds what others write into the run directory, says so, and keeps the logs within bounds.

What a training script, its libraries or other programs write there is not asked for permission. What exceeds the budget
is said once, and the next step's end makes up for it as far as older checkpoints may go.
"""

import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from outlast.checkpoint.manifest import Kind
from outlast.checkpoint.store import CheckpointStore
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Record
from outlast.rundir.logs import bound
from outlast.storage.budget import MARGIN, gb

LOOK_S = 3.0
"""Seconds between two looks; more where one takes long, such that looking takes 5 % of the time at most."""
BUDGET_S = 30.0
"""Seconds for which a budget counts: a share of a sweep's takes a look at all of its cells."""
LOGS_SHARE = 0.05
"""The largest share of the budget that logs may take."""


class BytesWatch:
    """Watches the bytes of one run, in a thread (rank 0).

    Args:
        attempt: the attempt's number.
        record: appends to the ledger.
        say: prints a line in the log.
    """

    def __init__(
        self, run: RunDirectory, store: CheckpointStore, attempt: int, record: Record, say: Callable[[str], None]
    ) -> None:
        self._run, self._store, self._attempt, self._record, self._say = run, store, attempt, record, say
        self._over = threading.Event()
        self._exceeded = self._said = False
        self._budget, self._asked = 0, -math.inf
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Cut the logs that earlier attempts have left, and start looking."""
        with suppress(OSError):
            self._cut_logs(self._store.space.budget())
        self._thread = threading.Thread(target=self._watch, name="outlast-bytes", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop looking; what is being written down is waited for."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(5.0)

    def make_up(self) -> None:
        """Remove what retention may spare, if too much is there; at a step's end, when no save is on."""
        if self._exceeded:
            self._exceeded = False
            with suppress(OSError):
                self._store.room.make_space(kind=Kind.PERIODIC, need=0)

    def _watch(self) -> None:
        wait_s = LOOK_S
        while not self._over.wait(wait_s):
            began = time.monotonic()
            try:
                self._look()
            except OSError:
                continue  # the file system does not answer just now
            wait_s = max(LOOK_S, 20 * (time.monotonic() - began))

    def _look(self) -> None:
        space = self._store.space
        if time.monotonic() - self._asked > BUDGET_S:
            self._budget, self._asked = space.budget(), time.monotonic()
        budget = self._budget
        self._cut_logs(budget)
        used = space.used()
        self._exceeded = used > budget
        if self._exceeded and not self._said:
            parts = space.beside_by_part()
            taken = ", ".join(f"{name} {gb(size)}" for name, size in sorted(parts.items(), key=lambda part: -part[1]))
            self._record("over_budget", bytes=used, budget_bytes=budget, parts=parts)
            self._say(
                f"WARNING: the run directory takes {gb(used)}, its budget is {gb(budget)}: {taken} beside checkpoints. "
                "Older checkpoints go as far as they may; no save is made while there is no room for it"
            )
        self._said = self._exceeded

    def _cut_logs(self, budget: int) -> None:
        if cut := bound(self._run, max(int(budget * LOGS_SHARE), MARGIN), self._attempt):
            self._say(f"the logs are cut by {gb(cut)}: they may take {LOGS_SHARE:.0%} of the budget")
