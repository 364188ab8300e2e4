"""Compares two models by their weights' digests, and by what they answer to a fixed input."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from outlast.checkpoint.digests import differences, digest
from outlast.errors import OutlastError
from outlast.huggingface.frozen_weights import shortened

TOKENS = 16
"""Length of the fixed input."""
SAME = 1e-5
"""How far the logits of the same weights may be apart, as a share of the largest."""
ROUNDED = {"float64": 1e-3, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""The same where weights were merged, or rounded to this number format: that has 24, 11 or 8 binary digits."""


@dataclass(frozen=True)
class Answer:
    """What a model answers to the fixed input."""

    logits: torch.Tensor | None
    """Of shape (1, tokens, vocabulary), float32; None for a model that takes no tokens."""


def answer(model: Any) -> Answer:
    """Ask a model, in use, for its logits of a fixed sequence of tokens."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    vocabulary = getattr(config, "vocab_size", None)
    if not vocabulary or model.main_input_name != "input_ids":
        return Answer(None)
    tokens = (torch.arange(TOKENS) * 7919 % int(vocabulary)).unsqueeze(0)
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})
    with torch.inference_mode():
        output = model(**inputs)
    logits = getattr(output, "logits", None)
    return Answer((output[0] if logits is None else logits).float().cpu())


def compare(source: Answer, copy: Answer, rounded: Sequence[str]) -> float | None:
    """Find how far the logits are apart: the largest difference, as a share of the largest logit of the source.

    Args:
        rounded: the number formats that the two calculate in, if weights were merged or are in another format; the
            coarser of them counts. Empty: the weights are the same.

    Returns:
        None where the models take no tokens.

    Raises:
        OutlastError: they are further apart than rounding explains, or not finite.
    """
    if source.logits is None or copy.logits is None:
        return None
    limit = max((ROUNDED[one] for one in rounded), default=SAME)
    apart = float((source.logits - copy.logits).abs().max() / source.logits.abs().max().clamp_min(1e-30))
    if not apart <= limit:  # NaN neither
        raise OutlastError(
            f"what was written answers otherwise than the run's model: logits are {apart:.2g} apart (as a share of the "
            f"largest), and {limit:g} is allowed; nothing is published"
        )
    return apart


def weights(model: Any, like: dict[str, torch.dtype] | None = None) -> tuple[dict[str, str], dict[str, torch.dtype]]:
    """Digest all weights and saved buffers of a model.

    Args:
        like: number formats to compare in, by name; those that the tensors have, if left out.

    Returns:
        The digests and the number formats, by name.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    formats = {name: tensor.dtype for name, tensor in state.items()}
    wanted = formats | (like or {})
    return {name: digest(tensor.to(wanted[name])) for name, tensor in state.items()}, formats


def same_weights(written: dict[str, str], loaded: dict[str, str]) -> None:
    """Refuse a copy whose weights are not those that were written.

    Raises:
        OutlastError: it names them.
    """
    if different := differences(written, loaded):
        raise OutlastError(f"what was written loads as other weights: {shortened(different)}; nothing is published")
