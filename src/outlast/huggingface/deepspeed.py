"""Saves DeepSpeed's checkpoints so that no rank hangs, and loads them so that no code runs.

Saving is collective, with barriers and gathers inside, and every rank writes its shard between them. So a rank that
could not write takes part in all of them, and raises its error after the last.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from outlast.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import Trainer


@contextmanager
def saving_shards(trainer: "Trainer", directory: Path) -> Iterator[None]:
    """Hold back failures while `trainer` saves to `directory`; raise the first at the end, on its own rank.

    `latest`, which names the shards' directory, is written last.
    """
    engine, failures = trainer.model_wrapped, list[Exception]()

    def held(act: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(act)
        def acting(*args: Any, **kwargs: Any) -> Any:
            try:
                return act(*args, **kwargs)
            except Exception as error:
                failures.append(error)

        return acting

    replaced: list[tuple[Any, str, Any]] = [
        (trainer, "save_model", held(trainer.save_model)),  # its gather comes before its files
        (engine, "save_checkpoint", functools.partial(engine.save_checkpoint, save_latest=False)),
        (engine, "_copy_recovery_script", held(engine._copy_recovery_script)),
        (engine.checkpoint_engine, "save", held(engine.checkpoint_engine.save)),
        (engine.checkpoint_engine, "makedirs", held(engine.checkpoint_engine.makedirs)),
    ]
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
        if trainer.args.should_save:
            held((directory / "latest").write_text)(f"global_step{engine.global_steps}")
    finally:
        for owner, name, own in before:
            delattr(owner, name) if own is None else setattr(owner, name, own)
    if failures:
        raise failures[0]


@contextmanager
def loading_shards() -> Iterator[None]:
    """Let `classes()` be read from shards, beside what `guard_loads` lets through."""
    with torch.serialization.safe_globals(classes()):
        yield


def load_weights(trainer: "Trainer", checkpoint: Path) -> None:
    """Load the weights of a light checkpoint, whose shards are gone; all ranks.

    Raises:
        CheckpointError: it holds a weight that the model does not have.
    """
    from deepspeed.runtime.zero import GatheredParameters
    from peft import PeftModel, set_peft_model_state_dict
    from peft.utils import load_peft_weights
    from safetensors import safe_open

    model = trainer.model
    if isinstance(model, PeftModel):
        with GatheredParameters([p for p in model.parameters() if p.requires_grad], modifier_rank=0):
            set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device="cpu"))
        return
    known = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if name not in known:
                    raise CheckpointError(f"{path}: the model has no weight {name}")
                with GatheredParameters([known[name]], modifier_rank=0), torch.no_grad():
                    known[name].copy_(file.get_tensor(name))


def classes() -> list[Any]:
    """The classes that DeepSpeed's shards hold besides tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
