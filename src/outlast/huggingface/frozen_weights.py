"""What of a checkpoint is frozen weights, which need not be there."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NAMED = 3
"""How many tensors a message names."""


def frozen_weights(directory: Path, model: "torch.nn.Module") -> dict[str, int]:
    """Tensors in the safetensors files of a checkpoint that training never changes: `{name: bytes}`.

    PEFT's own models save their adapters alone; layers injected by hand, or an embedding that PEFT saves "to be sure",
    bring the frozen base weights into each checkpoint.
    """
    from safetensors import safe_open

    # With ZeRO 3 a rank holds none of a parameter; its size is noted beside it.
    sizes = {name: getattr(p, "ds_numel", p.numel()) * p.element_size() for name, p in model.named_parameters()}
    frozen = {name: sizes[name] for name, p in model.named_parameters() if not p.requires_grad}
    found: dict[str, int] = {}
    for path in sorted(directory.glob("*.safetensors")) if frozen else ():
        with safe_open(path, framework="pt") as file:
            found |= {name: frozen[name] for name in file.keys() if name in frozen}  # noqa: SIM118 (no mapping)
    return found


def named(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
