"""Finds where state of the user's may be in what trains a model: optimizer, schedule, hooks, arguments.

A checkpoint of the Trainer holds the `state_dict` of the optimizer and of the schedule, and the model's tensors. It
leaves out what an optimizer of one's own counts or draws in attributes, what the functions of a `LambdaLR` close over,
what hooks know, and arguments that a callback has changed.
"""

from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from outlast.attempt.values import PLAIN

if TYPE_CHECKING:
    from transformers import Trainer

_OF_ATTEMPT = ("output_dir", "logging_dir", "local_rank", "_n_gpu", "eval_on_start", "resume_from_checkpoint")
SAVING_CHANGES = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
"""Keys of a model's configuration that decide no weight, or that saving changes."""
_HOOKS_OF_MODULE = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOKS_OF_PARAMETER = ("_backward_hooks", "_post_accumulate_grad_hooks")
_HOOKS_OF_OPTIMIZER = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


PROJECTORS = {
    "galore": (("galore_torch.galore_projector", "GaLoreProjector"),),
    "apollo": (
        ("apollo_torch.random_projector", "GradientProjector"),
        ("apollo_torch.svd_projector", "GaLoreProjector"),
    ),
}
"""What these optimizers keep in their state: numbers and tensors, in an object of this class."""


def allow_projectors(optimizer: str) -> None:
    """Have `torch.load` read what an optimizer of this name keeps in its state, as it reads tensors."""
    for module, name in PROJECTORS.get(optimizer.partition("_")[0], ()):
        torch.serialization.add_safe_globals([getattr(import_module(module), name)])


def roots_of(trainer: "Trainer") -> dict[str, Any]:
    """What to look through for state, by name; nothing where the Trainer has no optimizer yet, or DeepSpeed's."""
    roots: dict[str, Any] = {}
    optimizer, schedule = trainer.optimizer, trainer.lr_scheduler
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "accelerator_state"):
        optimizer = getattr(optimizer, "optimizer", None)  # accelerate's is an Optimizer that holds the user's
        if optimizer is None:
            break
    if optimizer is not None and not trainer.is_deepspeed_enabled:
        roots["optimizer"] = optimizer
        roots["optimizer.hooks"] = _hooks(optimizer, _HOOKS_OF_OPTIMIZER)
    if functions := list(_lambdas(getattr(schedule, "scheduler", schedule))):
        roots["lr_scheduler"] = functions
    return roots


def of_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The attributes that an optimizer's class has added, without parameters and code."""
    return {
        name: value
        for name, value in vars(optimizer).items()
        if name not in _usual() and not callable(value) and not _holds_parameters(value)
    }


def is_settings(value: Any) -> bool:
    """Whether `value` is a Trainer's arguments, or a model's configuration."""
    from transformers import GenerationConfig, PretrainedConfig, TrainingArguments

    return isinstance(value, TrainingArguments | PretrainedConfig | GenerationConfig)


def settings_of(settings: Any) -> dict[str, Any]:
    """The plain values among settings, which callbacks may change, but for those of this attempt alone."""
    return {
        name: value
        for name, value in vars(settings).items()
        if type(value) in PLAIN and name not in (*_OF_ATTEMPT, *SAVING_CHANGES)
    }


def hooks_of(module: torch.nn.Module) -> dict[str, Callable[..., Any]]:
    """The hooks of a module and of its own parameters, in the order of their registration."""
    found = _hooks(module, _HOOKS_OF_MODULE)
    for name, parameter in module.named_parameters(recurse=False):
        found |= {f"{name}.{hook}": item for hook, item in _hooks(parameter, _HOOKS_OF_PARAMETER).items()}
    return found


def _hooks(owner: Any, kinds: tuple[str, ...]) -> dict[str, Any]:
    return {
        f"{kind.strip('_')}{number}": hook
        for kind in kinds
        for number, hook in enumerate((getattr(owner, kind, None) or {}).values())
    }


@cache
def _usual() -> frozenset[str]:
    """The attributes of any optimizer, those that a schedule sets on it included."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return frozenset(vars(optimizer))


def _holds_parameters(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, torch.nn.Parameter) for item in items)


def _lambdas(schedule: Any) -> Iterator[Any]:
    """The functions of a schedule, and of those that it is made of; its `state_dict` leaves them out."""
    yield from getattr(schedule, "lr_lambdas", ())
    for inner in getattr(schedule, "_schedulers", ()):
        yield from _lambdas(inner)
