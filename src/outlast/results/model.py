"""Loads the model of a checkpoint, and makes sure that it is the one that was trained.

No code of the model's own is run, and nothing is unpickled but tensors. What a library would pass over is refused: a
weight that is missing, or that it does not know, and another base model than the adapters were trained on.
"""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from outlast.attempt.loading import guard_loads
from outlast.checkpoint import digests
from outlast.errors import CheckpointError, ConfigError, OutlastError
from outlast.huggingface.frozen_weights import shortened
from outlast.huggingface.loaded import different

from .source import Source, header


def load(source: Source) -> Any:
    """The model, for use (`eval`), on the CPU; a `PeftModel` where there are adapters.

    Raises:
        ConfigError: it needs code of its own, or the base model is another one.
        CheckpointError: not every weight was loaded.
        OutlastError: a library can't load it.
    """
    guard_loads(source.run)
    transformers_logging.disable_progress_bar()
    if source.adapter is None:
        return _whole(source)
    base = pretrained(str(source.base), source.dtype, causal=source.is_causal)
    model = with_adapters(base, source.path)
    _compare_base(source, model)
    return model


def with_adapters(base: Any, path: Path) -> Any:
    """The base model with the adapters in `path`; all of their weights are in it.

    Raises:
        CheckpointError: some of them are not.
        OutlastError: PEFT can't load them.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    resized = _resize(base, path)
    try:
        model = PeftModel.from_pretrained(base, str(path))
        saved = load_peft_weights(str(path), device="cpu")
    except Exception as error:
        raise OutlastError(f"{path}: PEFT can't load the adapters: {_first_line(error)}") from error
    loaded = model.state_dict() | get_peft_model_state_dict(model, save_embedding_layers=resized)
    lost = [name for name, tensor in saved.items() if not _holds(loaded, name, tensor)]
    if lost:
        raise CheckpointError(f"{path}: not all weights were loaded: {shortened(lost)}")
    return model.eval()


def _holds(loaded: dict[str, Any], name: str, tensor: Any) -> bool:
    found = loaded.get(name)
    return found is not None and found.shape == tensor.shape and torch.equal(found.to(tensor.dtype), tensor)


def _resize(base: Any, path: Path) -> bool:
    """Give the base model as many embeddings as were saved with the adapters, where training has added tokens.

    PEFT has then saved the embeddings as a whole, so that what the new ones begin with does not matter.

    Returns:
        Whether it did.
    """
    embeddings = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    own = next((name for name, module in base.named_modules() if module is embeddings), None)
    for file in path.glob("adapter_model*.safetensors") if own else ():
        for name, tensor in header(file).items():
            if re.search(
                rf"{re.escape(str(own))}(\.(token_adapter|base_layer|original_module|modules_to_save))*\.weight$", name
            ):
                if tensor["shape"][0] == base.get_input_embeddings().weight.shape[0]:
                    return False
                base.resize_token_embeddings(tensor["shape"][0], mean_resizing=False)
                return True
    return False


def pretrained(path: str, dtype: str, *, causal: bool = False) -> Any:
    """What `from_pretrained` makes of a path or a name, every weight loaded.

    Args:
        causal: load it as a causal language model; what its files hold besides is left out, as in training.

    Raises:
        CheckpointError: a weight is missing in the files, of another shape, or not of this model.
        OutlastError: transformers can't load it.
    """
    named = _class_of(path)
    kind = AutoModelForCausalLM if causal else named
    try:
        model, info = kind.from_pretrained(path, dtype=dtype, trust_remote_code=False, output_loading_info=True)
    except OutlastError:
        raise
    except Exception as error:  # the hub's client and every file format raise their own kinds
        raise OutlastError(f"{path} can't be loaded: {_first_line(error)}") from error
    if causal and named is not AutoModelForCausalLM and type(model) is not named:
        info = info | {"unexpected_keys": []}
    _refuse_lost(path, info)
    return model.eval()


def _refuse_lost(where: str, info: dict[str, Any]) -> None:
    """Refuse a model that has weights which were not in the files, or the other way round."""
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    if lost := [str(name) for kind in kinds for name in info.get(kind, ())]:
        raise CheckpointError(f"{where}: not all weights were loaded: {shortened(lost)}")


def _class_of(path: str) -> Any:
    """The class that its configuration names."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise ConfigError("model", path, f"transformers can't read its configuration: {_first_line(error)}") from None
    for name in config.architectures or ():
        if (found := getattr(transformers, name, None)) is None:
            valid = (
                f"valid: a model of transformers {transformers.__version__}; it is a {name}, and no other code is run"
            )
            raise ConfigError("model", path, valid)
        return found
    return AutoModelForCausalLM


def _whole(source: Source) -> Any:
    path = str(source.path)
    if not source.shards:
        return pretrained(path, source.dtype)
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    weights = consolidated(source.path)
    model, info = _class_of(path).from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    _refuse_lost(path, info)
    return model.eval()


def consolidated(path: Path) -> dict[str, Any]:
    """The whole float32 weights, made of DeepSpeed's shards.

    Raises:
        OutlastError: DeepSpeed is not installed, or can't put them together.
    """
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError:
        raise OutlastError(f"{path} holds DeepSpeed's shards alone: pip install 'outlast[deepspeed]'") from None
    from outlast.huggingface.deepspeed import loading_shards

    shards = sorted(path.glob("global_step*"))[-1].name
    try:
        with loading_shards():
            found: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=shards)
    except Exception as error:
        raise OutlastError(f"{path}: DeepSpeed can't put its shards together: {_first_line(error)}") from error
    return found


def _compare_base(source: Source, model: Any) -> None:
    """Refuse another base model than the one under the adapters in training, where a checkpoint knows which it was."""
    places = [source.path, *sorted(source.run.checkpoints.glob("checkpoint-*"), reverse=True)]
    known = next(filter(None, (digests.read(place, 0) for place in places)), None)
    if known is None or "whole" in known or not known.get("base"):
        return  # each rank digested its own shard
    if wrong := different(model, {"base": known["base"]}):
        valid = f"valid: the base model that the adapters were trained on; {shortened(wrong)} differ"
        raise ConfigError("model.path", source.base, valid)


def tokenizer(source: Source) -> Any | None:
    """The tokenizer, with its chat template; None if the run has none.

    Raises:
        OutlastError: transformers can't load it.
    """
    if source.tokenizer is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source.tokenizer), trust_remote_code=False)
    except Exception as error:
        raise OutlastError(f"{source.tokenizer}: its tokenizer can't be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
