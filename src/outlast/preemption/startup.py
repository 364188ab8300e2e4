"""A signal before the first step: there is nothing to save, and no group through which ranks could agree."""

import threading
import time
from typing import TYPE_CHECKING

from outlast.errors import Exit
from outlast.processes import exit_at_once

if TYPE_CHECKING:
    from outlast.checkpoint.store import CheckpointStore
    from outlast.ranks.collectives import Agreement
    from outlast.rundir.ledger import Ledger

    from .shutdown import Departure
    from .signals import PreemptionGuard


class StartupLeave:
    """Called with the signal's name, in the guard's thread.

    Rank 0 acts for all. The others follow it, so that no straggler brings Slurm's requeue hold back; if only one
    of them was signalled, the first agreement finds its flag.
    """

    def __init__(
        self,
        departure: "Departure",
        guard: "PreemptionGuard",
        store: "CheckpointStore",
        ledger: "Ledger",
        agreement: "Agreement",
    ) -> None:
        self._departure, self._guard, self._store, self._ledger = departure, guard, store, ledger
        self._rank, self._world_size = agreement.rank, agreement.world_size

    def __call__(self, name: str) -> None:
        if self._rank == 0:
            step = max((checkpoint.step for checkpoint in self._store.sealed()), default=0)
            if self._world_size > 1 and self._departure.left_to_settle():
                self._departure.announce(name, self._guard, step, unexplained=True)
                exit_at_once(Exit.DONE)  # all ranks do: another code, then, is that of one that has died
            self._departure.announce(name, self._guard, step)
            exit_at_once(self._departure.requeue(step))
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        # Not before the requeue: srun ends the whole step, rank 0 included, when one rank leaves early.
        while self._departure.signal is None:
            own = [event for event in self._ledger.read() if event["attempt"] == self._departure.attempt]
            if any(event.get("unexplained") for event in own):
                exit_at_once(Exit.DONE)
            if self._departure.is_settled():
                exit_at_once(Exit.RESUME_ME)
            time.sleep(0.2)
