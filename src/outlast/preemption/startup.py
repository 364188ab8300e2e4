"""A signal before the first step: there is nothing to save, and no group through which ranks could agree."""

import threading
import time

from outlast.checkpoint.store import CheckpointStore
from outlast.errors import Exit
from outlast.processes import exit_at_once
from outlast.ranks.identity import Identity

from .cause import StopCause
from .echo import is_left_to_epilogue
from .outcome import Outcome
from .shutdown import Shutdown


class LeaveInStartup:
    """Called with the signal's name, in the guard's thread.

    Rank 0 acts for all. The others follow it, so that no straggler brings Slurm's requeue hold back; if only one
    of them was signalled, the first agreement finds its flag.
    """

    def __init__(
        self, identity: Identity, cause: StopCause, shutdown: Shutdown, outcome: Outcome, store: CheckpointStore
    ) -> None:
        self._identity, self._cause, self._shutdown, self._outcome = identity, cause, shutdown, outcome
        self._store = store

    def __call__(self, name: str) -> None:
        if self._shutdown.signal is not None:
            return
        if self._identity.rank == 0:
            step = max((checkpoint.step for checkpoint in self._store.sealed()), default=0)
            if self._identity.world_size > 1 and is_left_to_epilogue(self._cause):
                self._shutdown.announce(name, step, unexplained=True)
                exit_at_once(Exit.DONE)  # every rank does, so any other code comes from a rank that has died
            self._shutdown.announce(name, step)
            exit_at_once(self._shutdown.requeue(step))
        threading.Thread(target=self._follow, name="outlast-follow-rank-0", daemon=True).start()

    def _follow(self) -> None:
        # Not before the requeue: srun ends the whole step, rank 0 included, when one rank leaves early.
        while self._shutdown.signal is None:
            if self._outcome.is_left_to_epilogue:
                exit_at_once(Exit.DONE)
            if self._outcome.is_settled(in_job=self._identity.job is not None):
                exit_at_once(Exit.RESUME_ME)
            time.sleep(0.2)
