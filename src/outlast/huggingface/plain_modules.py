"""Saves the weights of a model that is no `PreTrainedModel`, tied or otherwise laid out as safetensors refuses."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import Trainer


def save_shared_weights(trainer: "Trainer") -> None:
    """Have `trainer` save the tensors of a plain module apart from each other, each under all of its names.

    A Trainer hands a plain module's `state_dict` to safetensors as it is, which refuses tensors that share memory or
    aren't contiguous. A model of transformers or PEFT saves itself, and knows which of its weights are tied.
    """
    from peft import PeftModel
    from transformers import PreTrainedModel

    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if not isinstance(model, torch.nn.Module) or isinstance(model, (PreTrainedModel, PeftModel)):
        return
    save = trainer._save

    def saved(output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        save(output_dir, state_dict=apart(trainer.model.state_dict() if state_dict is None else state_dict))

    trainer._save = saved


def apart(state: dict[str, Any]) -> dict[str, Any]:
    """Return `state` with a contiguous copy for each tensor that shares memory with another, or isn't contiguous."""
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    uses = Counter(map(_memory, tensors.values()))
    copies = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
        if uses[_memory(tensor)] > 1 or not tensor.is_contiguous()
    }
    return state | copies


def _memory(tensor: torch.Tensor) -> tuple[torch.device, int]:
    """Where the memory begins that a tensor lies in, or a part of it."""
    return tensor.device, tensor.untyped_storage().data_ptr()
