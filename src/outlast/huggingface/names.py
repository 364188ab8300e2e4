"""Saves weights under the names that the model itself has, so that what is loaded is what was saved.

transformers 5 writes some architectures (Mixtral and other mixtures of experts, GPT-NeoX, ViT, ...) under the names
that the hub's files have. `from_pretrained` translates them back, but the Trainer does not: it loads weights with
`strict=False`, and what has another name stays as it was built. Both read the model's own names.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel


@contextmanager
def own_names() -> Iterator[None]:
    """Have every model's `save_pretrained`, whoever calls it, keep the model's own names."""
    save = PreTrainedModel.save_pretrained

    @functools.wraps(save)
    def save_with_own_names(self: Any, *args: Any, **kwargs: Any) -> Any:
        return save(self, *args, **{"save_original_format": False, **kwargs})

    PreTrainedModel.save_pretrained = save_with_own_names
    try:
        yield
    finally:
        PreTrainedModel.save_pretrained = save
