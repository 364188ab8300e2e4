"""Checks the `trainer` section of `job=sft` against the installed TRL, and makes its `SFTConfig`.

A run must come back bit for bit, so what would break that is refused, as in a script of one's own
(`outlast/huggingface/inexact.py`). Refused here is what the job decides itself, with the key to use instead.
"""

import types
import warnings
from dataclasses import fields
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from outlast.config.configuration import Config
from outlast.config.model import Lora, PretrainedModel
from outlast.errors import ConfigError
from outlast.huggingface.inexact import refuse_inexact

from . import buildable

HUB = "outlast trains without the hub; push the run's final/ directory when it has finished"
SAVES = "outlast saves; use checkpoint.every"
RANKS = "outlast sets up the ranks; choose with parallel="
MODEL = "it belongs to the model: model.dtype, model.path, model.trust_remote_code"

RESERVED = {
    "output_dir": "it is the run directory; use run.root and run.name",
    "seed": "use the top-level key, seed=",
    **dict.fromkeys(("save_strategy", "save_steps"), SAVES),
    "save_on_each_node": "run.root lies on a file system that all nodes share; one copy is saved",
    "accelerator_config": "outlast sets it: other samplers and dispatchers change the data order on resume (measured)",
    "push_to_hub": HUB,
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "local_rank"), RANKS),
    "ddp_backend": "it follows from the machine: nccl if there is a GPU, else gloo",
    "use_cpu": "it follows from the machine: CPU if there is no GPU",
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code"), MODEL),
}
"""Keys that outlast sets itself; each with what to do instead."""

WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
WORDS |= {type(None): "null", dict: "a mapping", list: "a list"}
BATCH = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
ADAPTERS, ALL_WEIGHTS = (2e-4, 2e-3), (2e-5, 2e-4)
"""Learning rates for a pretrained model, with Adam: the usual one, and the one from which it loses what it knows."""
POSITIVE = (*BATCH, "num_train_epochs", "save_total_limit", "max_length")


def with_defaults(config: Config) -> dict[str, Any]:
    """Return `config.trainer`, and for what it leaves out the defaults of the installed `SFTConfig`."""
    from trl import SFTConfig

    return {f.name: f.default for f in fields(SFTConfig)} | config.trainer


def check(config: Config) -> None:
    """Check `config.trainer` against the installed `SFTConfig`; its values are replaced by converted ones.

    Needs no GPU and leaves nothing behind: no file, no process group, no device state.

    Raises:
        ConfigError: an unknown or reserved key, a wrong type or value, or a combination that would fail later.
    """
    import torch
    from trl import SFTConfig

    hints = get_type_hints(SFTConfig)
    choices = {f.name: f.metadata.get("choices") for f in fields(SFTConfig)}
    for key, value in config.trainer.items():
        reason = RESERVED.get(key) or (HUB if key.startswith("hub_") else None)
        if reason:
            raise ConfigError(f"trainer.{key}", "..." if "token" in key else value, reason)
        if key not in hints:
            raise ConfigError("trainer", key, _unknown(key, [name for name in hints if name not in RESERVED]))
        config.trainer[key] = _converted(key, value, hints[key], choices[key])
    _check_values(config.trainer)
    _check_trackers(config)
    _check_evaluation(config)
    # Made for real, the class sets up a device and perhaps a process group; this one's device is set up already.
    cpu = torch.device("cpu")
    dry = type("DrySFTConfig", (SFTConfig,), {"device": property(lambda _: cpu)})
    arguments = as_arguments(config, Path("unused"), cuda=False, bf16=False)
    arguments.pop("tf32", None)  # refused where there is no GPU, which may be here but not on the compute node
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = dry(**arguments)
    except (ValueError, TypeError, KeyError, ImportError, OSError) as error:
        named = {key: value for key, value in config.trainer.items() if key in str(error)}
        raise ConfigError("trainer", named or config.trainer, f"SFTConfig says: {error}") from None
    buildable.check(made)


def hazards(config: Config) -> list[str]:
    """Name, in words for the user, what is accepted but is most likely a mistake."""
    trainer = with_defaults(config)
    usual, largest = ADAPTERS if isinstance(config.peft, Lora) else ALL_WEIGHTS
    rate, adam = trainer["learning_rate"], "adam" in str(trainer["optim"])
    if not isinstance(config.model, PretrainedModel) or not adam or usual / 1000 <= rate < largest:
        return []
    kind = "adapters" if isinstance(config.peft, Lora) else "full fine-tuning"
    follows = "is likely to destroy what the model knows" if rate >= largest else "will hardly change the model"
    return [f"trainer.learning_rate={rate:g} {follows}; for {kind} of a pretrained model, {usual:g} is usual"]


def sft_config(config: Config, output_dir: Path, **extra: Any) -> Any:
    """Make the `SFTConfig` of a checked configuration, on this machine.

    Args:
        output_dir: where transformers may write.
        extra: further arguments, which win.
    """
    import torch
    from trl import SFTConfig

    cuda = torch.cuda.is_available()
    arguments = as_arguments(config, output_dir, cuda=cuda, bf16=cuda and torch.cuda.is_bf16_supported())
    return SFTConfig(**{**arguments, **extra})


def as_arguments(config: Config, output_dir: Path, *, cuda: bool, bf16: bool) -> dict[str, Any]:
    """Return the arguments of `SFTConfig` for a machine with or without a GPU (`cuda`) and bfloat16 (`bf16`)."""
    values = {"run_name": config.run.name, **config.trainer, "report_to": _trackers(config)}
    # transformers 5 renamed these; the old names work but warn, and lose against the new ones.
    values.setdefault("activation_checkpointing", values.pop("gradient_checkpointing", True))
    values.setdefault("activation_checkpointing_kwargs", values.pop("gradient_checkpointing_kwargs", None))
    if not values.get("fp16") and values.get("bf16") is None:
        values["bf16"] = bf16
    saving: dict[str, Any] = {"save_strategy": "no"}
    if values.get("load_best_model_at_end"):  # transformers wants both to agree
        saving["save_strategy"] = values["eval_strategy"]
        if values["eval_strategy"] == "steps":
            values["eval_steps"] = values.get("eval_steps") or values.get("logging_steps") or 10  # as TRL does
            saving["save_steps"] = values["eval_steps"]
    return {
        **values,
        **saving,
        "output_dir": str(output_dir),
        "seed": config.seed,
        "use_cpu": not cuda,
        # accelerate takes a backend to mean that there is a process group
        "ddp_backend": ("nccl" if cuda else "gloo") if config.parallel.world_size > 1 else None,
        "disable_tqdm": values.get("disable_tqdm", True),
    }


def _converted(key: str, value: Any, hint: Any, choices: list[Any] | None) -> Any:
    """Convert a value to the type that `SFTConfig` declares: numbers may come as text, whole numbers stay whole."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    enums = [part for part in parts if isinstance(part, type) and issubclass(part, Enum)]
    valid = [member.value for enum in enums for member in enum] or choices
    if value is False and valid and "no" in valid:
        value = "no"  # YAML reads a bare no as false
    name = f"trainer.{key}"
    if valid and value is not None and value not in valid:
        raise ConfigError(name, value, [str(choice) for choice in valid])
    names = [WORDS.get(get_origin(part) or part, str(part)) for part in parts if part not in enums]
    words = "valid: " + " or ".join(names)
    if isinstance(value, bool) and {int, float} & set(parts):
        raise ConfigError(name, value, words)
    try:
        converted = TypeAdapter(hint).validate_python(value)
    except ValidationError:
        raise ConfigError(name, value, words) from None
    if isinstance(converted, float) and not -float("inf") < converted < float("inf"):
        raise ConfigError(name, value, "valid: a finite number")
    return value if isinstance(value, int) and isinstance(converted, float) else converted


def _unknown(key: str, names: list[str]) -> str:
    import trl

    close = get_close_matches(key, names, n=3, cutoff=0.5)
    guess = f"did you mean {' or '.join(close)}? " if close else ""
    command = "python -c 'import trl; help(trl.SFTConfig)'"
    return f"{guess}valid: the {len(names)} arguments of SFTConfig (trl {trl.__version__}), see {command}"


def _check_values(trainer: dict[str, Any]) -> None:
    for key in POSITIVE:
        value = trainer.get(key)
        if value is not None and value <= 0:
            raise ConfigError(f"trainer.{key}", value, "valid: a positive number")
    refuse_inexact(trainer, "trainer.")
    steps = trainer.get("max_steps", -1)
    if steps != -1 and steps <= 0:
        raise ConfigError("trainer.max_steps", steps, "valid: a positive number, or -1 for trainer.num_train_epochs")
    if steps > 0 and "num_train_epochs" in trainer:
        valid = f"trainer.max_steps={steps} decides; set it to -1 as well"
        raise ConfigError("trainer.num_train_epochs", trainer["num_train_epochs"], valid)


def _trackers(config: Config) -> list[str]:
    """Return the trackers that `tracking` and `trainer.report_to` name, each once."""
    asked = config.trainer.get("report_to") or []
    named = [one for one in ([asked] if isinstance(asked, str) else asked) if one != "none"]
    return ["all"] if "all" in named else list(dict.fromkeys([*config.tracking.chosen, *named])) or ["none"]


def _check_trackers(config: Config) -> None:
    from transformers.integrations import get_available_reporting_integrations

    installed = ["none", "all", *get_available_reporting_integrations()]
    for tracker in _trackers(config):
        if tracker not in installed:
            key = "tracking" if tracker in config.tracking.chosen else "trainer.report_to"
            extra = f"; pip install 'outlast[{tracker}]' adds it" if hasattr(config.tracking, tracker) else ""
            raise ConfigError(key, tracker, f"valid, as installed here: {', '.join(installed)}{extra}")


def _check_evaluation(config: Config) -> None:
    strategy, best = config.trainer.get("eval_strategy", "no"), "load_best_model_at_end"
    if strategy == "no":
        if config.trainer.get(best):
            valid = "without evaluation there is no best model; set it to false, or trainer.eval_strategy=steps"
            raise ConfigError(f"trainer.{best}", True, valid)
        return
    kind = config.data.kind
    key, value = {"jsonl": ("eval", "FILE"), "hub": ("eval_split", "NAME")}.get(kind, ("kind", ""))
    if not getattr(config.data, key):
        valid = f"set data.{key}={value}, or trainer.eval_strategy=no trainer.{best}=false"
        raise ConfigError("trainer.eval_strategy", strategy, f"data={kind} has nothing to evaluate on; {valid}")
