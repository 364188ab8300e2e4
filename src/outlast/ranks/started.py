"""Refuses ranks that a framework starts by itself: they have to be there when a run begins.

A run knows its ranks from what their starter tells them (`RANK`, `WORLD_SIZE`). Fabric, Lightning and accelerate's
`notebook_launcher` start them from inside the script, which has begun a run of one rank by then: they would wait for
each other, or for the run directory.
"""

import os
import sys

from outlast.errors import ConfigError
from outlast.slurm.environment import export_ranks

ELASTIC_ENV = "TORCHELASTIC_RUN_ID"
"""Set by torch's agent for its ranks, under `accelerate launch` and `torchrun`."""
_VALID = (
    "valid: ranks that are started before the script, `python -m outlast.launch --ranks {} SCRIPT ...`, torchrun or "
    "srun; Fabric and Trainer(devices=...) then take them as they are"
)


def refuse_half_a_rank() -> None:
    """Refuse a process that was told of other ranks, but not which of them it is.

    Raises:
        ConfigError: it is one, as frameworks start them.
    """
    export_ranks()
    env = os.environ
    ranks, local = int(env.get("WORLD_SIZE") or 1), int(env.get("LOCAL_RANK") or 0)
    if "RANK" not in env and (ranks > 1 or local > 0):
        raise ConfigError("RANK", None, f"{_VALID.format(max(ranks, local + 1))}, which say which rank this one is")


def refuse_late_ranks(known: int) -> None:
    """Refuse ranks that torch knows of by now, if the run has begun with another number.

    Raises:
        ConfigError: there are others than `known`.
    """
    if "torch.distributed" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and (ranks := dist.get_world_size()) != known:
        raise ConfigError("world size", ranks, f"the run has begun with {known}; {_VALID.format(ranks)}")
