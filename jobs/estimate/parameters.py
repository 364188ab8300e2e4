"""Collects what a run trains and saves, as meta tensors: they have names, shapes and types, and take no memory.

The model's own code and PEFT's make them, so that they are counted exactly, tied weights once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast.config.configuration import Config
from outlast.config.model import PretrainedModel, TinyModel
from outlast.errors import ConfigError

from ..training import models

if TYPE_CHECKING:
    import torch

    from .file_sizes import Groups


@dataclass(frozen=True)
class Parameters:
    """The tensors that are trained and those that are saved, on the meta device."""

    model: Any
    saved: "dict[str, torch.Tensor]"
    """The tensors that are saved, by the name that the finished model has for them."""
    groups: "Groups"
    """The trainable parameters, as the Trainer groups them: with weight decay, and without."""
    embeddings: int
    """The number of elements of trainable embeddings."""
    module: "dict[str, torch.Tensor]"
    """The tensors of which DeepSpeed writes a copy: the module's state without what is frozen."""


def collect(config: Config, zero_stage: int, half: "torch.dtype | None") -> Parameters:
    """Collect what the run trains and saves.

    Args:
        zero_stage: of DeepSpeed's ZeRO; 0 without DeepSpeed.
        half: the type that DeepSpeed gives all weights, if it gives them one.
    """
    import torch
    from transformers import Trainer

    model = base_model(config)
    adapter = models.peft_config(config)
    if adapter is None:
        saved = module = _untied(model.state_dict(keep_vars=True))
    else:
        from peft import get_peft_model_state_dict

        # As TRL does it: with stage 3 adapters have the type of the model, else PEFT makes half precision 32-bit.
        model = adapted(model, adapter, autocast_adapter_dtype=zero_stage != 3)
        saved = get_peft_model_state_dict(model)
        module = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if half is not None:
        saved, module = ({n: t.to(half) for n, t in tensors.items()} for tensors in (saved, module))
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [[p for n, p in trained if n in decayed], [p for n, p in trained if n not in decayed]]
    embeddings = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    return Parameters(
        model=model,
        saved=saved,
        groups=[[(tuple(p.shape), p.dtype) for p in group] for group in groups],
        embeddings=sum(p.numel() for _, p in trained if id(p) in embeddings),
        module=module,
    )


def adapted(model: Any, adapter: Any, **options: Any) -> Any:
    """Add the adapters, on the meta device.

    Raises:
        ConfigError: PEFT refuses them: there are no such modules.
    """
    import torch
    from peft import get_peft_model

    try:
        with torch.device("meta"):
            return get_peft_model(model, adapter, **options)
    except ValueError as error:
        key = "target_modules" if "target" in str(error).lower() else "modules_to_save"
        kinds = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")})
        valid = f"PEFT says: {' '.join(str(error).split())} Modules with weights: {', '.join(kinds)}"
        raise ConfigError(f"peft.{key}", getattr(adapter, key), valid) from None


def _untied(state: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """Return each tensor once: a tied weight is saved under its first name."""
    seen: set[int] = set()
    return {name: t for name, t in state.items() if not (id(t) in seen or seen.add(id(t)))}  # type: ignore[func-returns-value]


def base_model(config: Config) -> Any:
    """Build the model on the meta device, without its adapter."""
    import torch
    from transformers import AutoModelForCausalLM

    described = _model_config(config)
    dtype = getattr(torch, str(described.dtype).removeprefix("torch.") if described.dtype else "float32")
    trust = isinstance(config.model, PretrainedModel) and config.model.trust_remote_code
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(described, dtype=dtype, trust_remote_code=trust)


def _model_config(config: Config) -> Any:
    """Return the model's configuration, with the type that its weights will have."""
    from transformers import AutoConfig

    match config.model:
        case TinyModel() as tiny:
            return models.tiny_config(tiny)
        case PretrainedModel() as chosen:
            described = AutoConfig.from_pretrained(chosen.path, trust_remote_code=chosen.trust_remote_code)
            if chosen.dtype != "auto":
                described.dtype = chosen.dtype
            elif described.dtype is None:
                described.dtype = _first_dtype(Path(chosen.path or ""))
            return described


def _first_dtype(directory: Path) -> str:
    """Return what `dtype: auto` means where the model's configuration names no type: that of the first weight."""
    from safetensors import safe_open

    for path in sorted(directory.glob("*.safetensors"))[:1]:
        with safe_open(str(path), "pt") as file:
            kinds = (file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
            return {"BF16": "bfloat16", "F16": "float16"}.get(next(kinds, ""), "float32")
    return "float32"
