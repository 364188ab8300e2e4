"""A signal that comes after training: the process leaves, and its job comes back for what follows.

The run has finished and its script goes on. Nothing is to be saved then, and no loop polls a flag. Without this the
process would die of the signal, and a batch script that sees a finished run would count its job as done, though what
follows training has not been.
"""

import os
import signal
import time
from types import FrameType
from typing import NoReturn

from outlast.config.preemption import PreemptionSection
from outlast.errors import Exit, SlurmError
from outlast.processes import SIGNALS, exit_at_once
from outlast.ranks.identity import Identity
from outlast.rundir.ledger import Event
from outlast.slurm.actions import requeue_job

from .cause import StopCause
from .echo import is_left_to_epilogue
from .outcome import Outcome

FOLLOW_S = 20.0
"""How long other ranks wait for rank 0 to requeue the job; `srun` ends them with it."""


class Afterwards:
    """Handles the three signals in one rank, in place of the guard, until the process ends or begins another run."""

    def __init__(self, identity: Identity, cause: StopCause, outcome: Outcome, preemption: PreemptionSection) -> None:
        self._identity, self._cause, self._outcome = identity, cause, outcome
        self._delay_s, self._pid = preemption.requeue_delay_s, os.getpid()

    def install(self) -> None:
        """Handle the three signals from here on; called in the main thread."""
        for number in SIGNALS:
            signal.signal(number, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Leave with exit code 75, on rank 0 after the job was requeued."""
        if os.getpid() != self._pid:  # a process that this one has forked
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(signal.Signals(number))
            return
        self.leave(signal.Signals(number).name.removeprefix("SIG"))

    def leave(self, name: str) -> NoReturn:
        """Leave because of signal `name`."""
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises an error when a worker has ended
        if self._identity.rank != 0:
            time.sleep(FOLLOW_S if self._identity.job is not None else 0.0)
            exit_at_once(Exit.RESUME_ME)
        print(f"[outlast] {name}: the run has finished; leaving what follows it to the next start", flush=True)
        exit_at_once(self.follow(name))

    def follow(self, name: str) -> Exit:
        """Requeue the job, if this process has one and the policy says so; the exit code to leave with."""
        if self._identity.job is None:
            return Exit.RESUME_ME
        if self._identity.world_size > 1 and is_left_to_epilogue(self._cause):
            return Exit.FAILED
        try:
            cause = self._cause.cause_after_saving(name)
            return self._outcome.follow(cause, self._requeue, self._cause.is_cancelled).exit_code
        except SlurmError as error:
            print(f"[outlast] could not requeue: {error}; submit it again", flush=True)
            return Exit.RESUME_ME

    def _requeue(self) -> Event:
        assert self._identity.job is not None
        done = requeue_job(self._identity.job, self._delay_s)
        return {"job_id": self._identity.job.job_id, "by": done.by, "hold_lifted": done.hold_lifted}
