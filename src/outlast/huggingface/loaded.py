"""Compares a model in memory with what was in memory when its weights were saved."""

from typing import Any

import torch

from outlast.checkpoint.digests import Digests, digest

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def different(model: Any, known: Digests | None) -> list[str]:
    """Names of weights that are others than those that were saved, or missing.

    Args:
        known: the digests of the checkpoint. None, or those of one rank's shard alone: nothing is compared.
    """
    loaded = dict(model.named_parameters(remove_duplicate=False))
    if known is None or "whole" in known or any(hasattr(parameter, "ds_id") for parameter in loaded.values()):
        return []
    loaded |= dict(model.named_buffers())
    saved = known.get("model", {}) | known.get("base", {})
    return [name for name, value in saved.items() if not is_same(loaded.get(name), value)]


def is_same(tensor: torch.Tensor | None, saved: str) -> bool:
    """Whether a tensor has the digest, also in another number format: DeepSpeed casts a model."""
    if tensor is None:
        return False
    formats = FLOATS if tensor.is_floating_point() else (tensor.dtype,)
    return any(digest(tensor.detach().to(dtype)) == saved for dtype in formats)
