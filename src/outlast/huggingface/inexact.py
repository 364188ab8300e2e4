"""Training arguments that rule out exact resuming: one table, asked by the launcher and by a user's script.

Each rule marked "measured" was seen to change the weights after a resume (transformers 5.23, CPU). This module imports
no training library.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from outlast.errors import ConfigError

ORDER = "the data order would change on resume (measured)"
HOOKS = "any that keeps its state in its state_dict; this one keeps it elsewhere, in no checkpoint"


@dataclass(frozen=True)
class Rule:
    """Says which values of an argument rule out exact resuming."""

    refused: tuple[Any, ...] | Callable[[Any], bool]
    """The values, or a function that tells them."""
    valid: str
    """What is accepted instead, and why."""

    def applies_to(self, value: Any) -> bool:
        if callable(self.refused):
            return self.refused(value)
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.refused)


def _keeps_state_elsewhere(optimizer: Any) -> bool:
    name = str(getattr(optimizer, "value", optimizer))
    return name.endswith("_layerwise") or name in ("adalomo", "grokadamw")


INEXACT = {
    "save_only_model": Rule((True,), "false; a checkpoint without the optimizer's state can't be resumed exactly"),
    "ignore_data_skip": Rule((True,), "false; a resumed run would train on other data (measured)"),
    "auto_find_batch_size": Rule(
        (True,), "false; it changes the batch size in mid-run: set per_device_train_batch_size to what fits"
    ),
    "enable_jit_checkpoint": Rule((True,), "false; outlast saves on a signal, by agreement of all ranks"),
    "resume_from_checkpoint": Rule(
        lambda value: bool(value), "null; outlast resumes from the newest checkpoint that verifies"
    ),
    "dataloader_persistent_workers": Rule((True,), "false; a resumed run would draw other random numbers (measured)"),
    "dataloader_in_order": Rule((False,), "true; the order of batches would depend on timing (measured)"),
    "train_sampling_strategy": Rule(
        ("group_by_length",), "random, sequential, batch_rebalance: those resume (measured)"
    ),
    "optim": Rule(_keeps_state_elsewhere, HOOKS),
    "accelerator_config.dispatch_batches": Rule((True,), f"false or null; {ORDER}"),
    "accelerator_config.split_batches": Rule((True,), "false; set per_device_train_batch_size for each rank instead"),
    "accelerator_config.use_seedable_sampler": Rule((False,), f"true; {ORDER}"),
}
"""The rules, by the argument's name; after a dot, the name inside a mapping."""

INEXACT_ADAPTERS = {
    "ADALORA": "which shrinks in training: a resumed run could not load it (measured)",
    "P_TUNING": "of which PEFT saves what its encoder gives, not the encoder that is trained (measured)",
}
"""Kinds of PEFT adapters that can't be resumed, each with the reason."""


def refuse_inexact(arguments: Any, prefix: str = "") -> None:
    """Refuse arguments with which a resumed run would not be the same run.

    Args:
        arguments: a mapping, or `TrainingArguments`. What it leaves out is not looked at.
        prefix: stands before an argument's name in the message (`trainer.`).

    Raises:
        ConfigError: names the argument, its value, and what is valid.
    """
    for key, rule in INEXACT.items():
        found, value = _value(arguments, key.split("."))
        if found and rule.applies_to(value):
            raise ConfigError(f"{prefix}{key}", getattr(value, "value", value), f"valid: {rule.valid}")


def refuse_adapters(model: Any) -> None:
    """Refuse adapters that a checkpoint of the Trainer does not bring back.

    Raises:
        ConfigError: names the adapter, or its kind.
    """
    adapters = getattr(model, "peft_config", None)
    if getattr(model, "_hf_peft_config_loaded", False):  # by transformers' own `add_adapter`
        valid = "valid: peft.get_peft_model(model, config); a Trainer can't load what it saves of this one (measured)"
        raise ConfigError("model.add_adapter", list(adapters or ()), valid)
    active = list(getattr(model, "active_adapters", ())) if isinstance(adapters, Mapping) else []
    if len(active) > 1 or (len(adapters or ()) > 1 and active and active != ["default"]):
        valid = "valid: one active adapter, named default; a Trainer loads no other beside it (measured)"
        raise ConfigError("active_adapters", active, valid)
    for config in adapters.values() if isinstance(adapters, Mapping) else ():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind in INEXACT_ADAPTERS:
            raise ConfigError("peft_type", kind, f"valid: any but {kind}, {INEXACT_ADAPTERS[kind]}")


def _value(arguments: Any, path: list[str]) -> tuple[bool, Any]:
    value = arguments
    for name in path:
        values = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
        if name not in values:
            return False, None
        value = values[name]
    return True, value
