"""Finds frozen weights in a checkpoint, which need not be there."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHOWN = 3
"""The number of tensors that a message names."""


def frozen_weights(directory: Path, model: "torch.nn.Module") -> dict[str, int]:
    """Find the tensors in a checkpoint's safetensors files that training never changes: `{name: bytes}`.

    PEFT's own models save their adapters alone; layers injected by hand, or an embedding that PEFT saves "to be sure",
    bring the frozen base weights into each checkpoint.
    """
    from safetensors import safe_open

    # With ZeRO 3 a parameter is empty on every rank; DeepSpeed notes its full size in `ds_numel`.
    sizes = {name: getattr(p, "ds_numel", p.numel()) * p.element_size() for name, p in model.named_parameters()}
    frozen = {name: sizes[name] for name, p in model.named_parameters() if not p.requires_grad}
    found: dict[str, int] = {}
    for path in sorted(directory.glob("*.safetensors")) if frozen else ():
        with safe_open(path, framework="pt") as file:
            found |= {name: frozen[name] for name in file.keys() if name in frozen}  # noqa: SIM118 (no mapping)
    return found


def shortened(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
