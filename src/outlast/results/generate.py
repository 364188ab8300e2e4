"""Lets a model go on with a prompt, so that a person sees at once whether it has learned."""

import json
from dataclasses import dataclass
from typing import Any

from outlast.config.data import JsonlData, PythonDocs
from outlast.errors import ConfigError

from .source import Source


@dataclass(frozen=True)
class Tried:
    """What a model said."""

    text: str
    tokens: int
    """How many it generated."""
    chat: bool
    """Whether the prompt was put into the chat template."""


def generate(source: Source, prompt: str, *, max_tokens: int, temperature: float, seed: int, plain: bool) -> Tried:
    """Generate what follows a prompt; without a temperature the most likely token each time, so that it is repeatable.

    Args:
        plain: give the model the prompt as it is, without a chat template.

    Raises:
        ConfigError: the run has no tokenizer, or its model generates no text.
        OutlastError: the model can't be loaded.
    """
    source.check()
    import torch

    from . import model as models

    tokenizer, model = models.tokenizer(source), models.load(source)
    if tokenizer is None or not model.can_generate():
        what = "a model that generates text" if tokenizer is not None else "a run that has saved its tokenizer"
        raise ConfigError("RUN", source.run.path.name, f"valid: {what}")
    inputs, chat = _inputs(source, tokenizer, prompt, plain=plain)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = inputs["input_ids"].shape[1]
    if length == 0 or (room and length >= room):
        valid = f"valid: at least one token, and fewer than the model's {room} positions"
        raise ConfigError("PROMPT", f"{length} tokens", valid)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        torch.manual_seed(seed)
        choice = {"do_sample": True, "temperature": temperature}
    with torch.inference_mode():
        tokens = model.to(device).generate(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            max_new_tokens=min(max_tokens, room - length) if room else max_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **choice,
        )[0]
    new = tokens if model.config.is_encoder_decoder else tokens[length:]
    return Tried(tokenizer.decode(new, skip_special_tokens=True), len(new), chat)


def _inputs(source: Source, tokenizer: Any, prompt: str, *, plain: bool) -> tuple[dict[str, Any], bool]:
    """The tokens of the prompt: as the user's message of a chat, unless the run was trained without a template."""
    if not plain and tokenizer.chat_template and not _is_plain(source):
        found = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return {name: found[name] for name in ("input_ids", "attention_mask")}, True
    found = tokenizer(prompt, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}, False


def _is_plain(source: Source) -> bool:
    """Whether the run is known to have been trained on plain text, although its tokenizer has a chat template."""
    match source.config.data if source.config else None:
        case PythonDocs():
            return True
        case JsonlData(train=str() as path):
            try:
                with open(path) as file:
                    row = json.loads(file.readline())
            except (OSError, ValueError):
                return False
            return isinstance(row, dict) and "messages" not in row and not isinstance(row.get("prompt"), list)
    return False
