"""Tells a signal that is only the starter's answer to a rank's death from one that is meant.

`srun` sends TERM to the other ranks when one has died, and so does torch's agent. Slurm then says of the job what it
says when somebody has sent a signal on purpose: nothing.
"""

import os
import time
from collections.abc import Sequence

from outlast.ranks.lost import Lost
from outlast.ranks.started import ELASTIC_ENV
from outlast.slurm.environment import in_own_batch_script

from .cause import StopCause
from .signals import PreemptionGuard

ECHO_S = 2.0
"""A rank whose peer has died sees its connection break at once, and a moment later `srun`'s TERM. It waits for that, so
that the ledger gets the cause and not the effect."""


def wait_for_echo(guard: PreemptionGuard) -> None:
    """Wait until this rank is signalled, :data:`ECHO_S` at most, where a batch script finds out what it meant."""
    deadline = time.monotonic() + ECHO_S if in_own_batch_script() else 0.0
    while guard.requested is None and time.monotonic() < deadline:
        time.sleep(0.05)


def is_left_to_epilogue(cause: StopCause) -> bool:
    """Whether this signal may be an echo, which the batch script will find out.

    Where all ranks still agree, none has died; where they can't, only the batch script sees how `srun` ended.
    """
    if not in_own_batch_script():
        return False
    cause.ask_why()
    return not cause.is_explained


def may_be_echo(lost: Sequence[Lost], cause: StopCause) -> bool:
    """Whether a rank has died, and the TERM that this rank got may be the answer to that."""
    died = any(one.how == "gone" for one in lost)
    return died and (in_own_batch_script() or (not cause.in_job and ELASTIC_ENV in os.environ))
