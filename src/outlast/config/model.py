"""What is trained: the model, and which of its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from .section import Number, Section, require


@dataclass(kw_only=True)
class TinyModel(Section):
    """A small Llama with fresh weights, and a tokenizer trained on the data; needs no network."""

    kind: Literal["tiny"] = "tiny"
    vocab_size: Annotated[int, Number("tokens", ge=300)] = 4096
    """Tokens that the tokenizer knows: 256 bytes, special tokens, and what it learns from the data."""
    hidden_size: Annotated[int, Number(gt=0)] = 128
    """Width of the model: a multiple of 2 * `heads`."""
    layers: Annotated[int, Number(gt=0)] = 4
    """Transformer layers."""
    heads: Annotated[int, Number(gt=0)] = 4
    """Attention heads of a layer."""
    max_length: Annotated[int, Number("tokens", gt=0)] = 1024
    """Longest sequence, in tokens, that the position encoding allows."""

    def __post_init__(self) -> None:
        valid = f"valid: a multiple of 2 * model.heads ({2 * self.heads})"
        require(self.hidden_size % (2 * self.heads) == 0, "model.hidden_size", self.hidden_size, valid)


@dataclass(kw_only=True)
class PretrainedModel(Section):
    """A causal language model with its tokenizer, as `save_pretrained` writes it."""

    kind: Literal["pretrained"] = "pretrained"
    path: str | None = None
    """Local directory, or name on the Hugging Face hub; required."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; `auto`: as they were saved."""
    trust_remote_code: bool = False
    """True: run the Python code that comes with the model."""

    def __post_init__(self) -> None:
        valid = "valid: a local directory or a hub name; model=pretrained needs it"
        require(bool(self.path), "model.path", self.path, valid)
        if Path(self.path or "").expanduser().is_dir():
            self.path = str(Path(self.path or "").expanduser().absolute())


@dataclass(kw_only=True)
class Lora(Section):
    """Low-rank adapters (PEFT's `LoraConfig`); all other weights stay frozen and are not part of a checkpoint."""

    kind: Literal["lora"] = "lora"
    r: Annotated[int, Number(gt=0)] = 16
    """Rank of the adapters."""
    alpha: Annotated[int, Number(gt=0)] = 32
    """Scale of the adapters: their output is multiplied by `alpha / r`."""
    dropout: Annotated[float, Number(ge=0, lt=1)] = 0.05
    """Share of the adapters' inputs that is dropped in training."""
    target_modules: str | list[str] | None = "all-linear"
    """Name, or list of names, of the modules that get an adapter; null: PEFT's choice for the architecture."""
    modules_to_save: list[str] | None = None
    """Names of further modules, which are trained and saved whole; null: none. `model=tiny` has `[lm_head]`."""


@dataclass(kw_only=True)
class NoPeft(Section):
    """Full fine-tuning: all weights are trained."""

    kind: Literal["none"] = "none"
