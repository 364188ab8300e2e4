"""Tells whether this rank's trainable weights are finite numbers: what training is lost by, whatever a loss says."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


def are_finite(parameters: Iterable[torch.Tensor]) -> bool | None:
    """Whether all trainable ones are, as far as this rank holds them; None if it holds none. It waits for a GPU."""
    from torch.distributed.tensor import DTensor

    known, finite = False, True
    for parameter in parameters:
        shard = getattr(parameter, "ds_tensor", parameter)  # with ZeRO-3 the parameter itself is empty
        if isinstance(shard, DTensor):
            shard = shard.to_local()
        if parameter.requires_grad and shard.numel():
            known = True
            finite = finite and bool(torch.isfinite(shard.detach()).all())
    return finite if known else None


class Stepped:
    """Notes the optimizers of a hand-written loop as they step, since nothing else tells of its weights."""

    def __init__(self) -> None:
        self._optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._hook = register_optimizer_step_post_hook(lambda optimizer, *_: self._optimizers.add(optimizer))

    def are_finite(self) -> bool | None:
        """Whether the weights that were stepped are finite; None if there are none."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        return are_finite(parameter for group in groups for parameter in group["params"])

    def close(self) -> None:
        """Stop noting."""
        self._hook.remove()
