"""Derives DeepSpeed's configuration from the run's, and prepares a rank for DeepSpeed.

What other keys of the configuration say is not said again: batch sizes, clipping and precision come from `trainer`, the
stage from `parallel=`. `parallel.deepspeed.*` adds to that, and may not contradict it.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import redirect_stdout
from copy import deepcopy
from datetime import timedelta
from difflib import get_close_matches
from io import StringIO
from typing import Any

from outlast.config.cluster import LocalCluster
from outlast.config.configuration import Config
from outlast.config.parallel import Zero
from outlast.errors import ConfigError
from outlast.processes import free_ports

from . import trainer_arguments

SHARED_MEMORY = "deepspeed_shm_comm"
"""A C++ extension for inference on CPUs."""
GATHER = "stage3_gather_16bit_weights_on_model_save"
UNNAMED = {"comet", "comms_logger", "compile", "csv_monitor", "flops_profiler", "sparse_gradients", "timers", "wandb"}
"""Keys of DeepSpeed's configuration for which it has no constant."""
SHAPE = "outlast spreads a run over ranks in one way only: data parallel"
RESERVED = {
    "optimizer": "use trainer.optim, trainer.learning_rate, trainer.weight_decay",
    "scheduler": "use trainer.lr_scheduler_type and trainer.warmup_steps",
    "checkpoint": "outlast writes and seals the checkpoints",
    **dict.fromkeys(("nebula", "datastates_ckpt"), "outlast writes and seals the checkpoints"),
    "amp": "use trainer.bf16 or trainer.fp16",
    **dict.fromkeys(("elasticity", "autotuning"), "they change batch sizes; set those of trainer"),
    **dict.fromkeys(("data_efficiency", "curriculum_learning"), "they change the order of the data on resume"),
    **dict.fromkeys(("tensor_parallel", "pipeline", "sequence_parallel_size", "hybrid_engine"), SHAPE),
}
"""Keys of DeepSpeed's configuration that may not be given; each with what to do instead."""


def check(config: Config) -> None:
    """Refuse, before anything is submitted, what DeepSpeed would not take or other keys contradict (ConfigError)."""
    parallel = config.parallel
    if not isinstance(parallel, Zero):
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "parallel", parallel.kind, "DeepSpeed is not installed here: pip install 'outlast[deepspeed]'"
        )
    for key in parallel.deepspeed:
        if key in RESERVED:
            raise ConfigError(f"parallel.deepspeed.{key}", parallel.deepspeed[key], RESERVED[key])
    if isinstance(config.cluster, LocalCluster):
        _check_precision(config)
    _check_said_twice(config, parallel)
    if parallel.deepspeed:
        _check_by_deepspeed(parallel)


def configuration(config: Config) -> dict[str, Any]:
    """Return the configuration that DeepSpeed gets. The Trainer fills in "auto" from its arguments.

    DeepSpeed's own Adam for CPUs, which it would demand for offloading, is another extension to compile, and would
    ignore `trainer.optim`: it is off unless `parallel.deepspeed.zero_force_ds_cpu_optimizer=true`.
    """
    parallel = config.parallel
    assert isinstance(parallel, Zero)
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    if parallel.zero_stage == 3:
        zero[GATHER] = True  # what is saved can be used as it is
    if parallel.offload:
        zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    derived = {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    given = deepcopy(parallel.deepspeed)
    for key, _, _ in _said(config, parallel):
        section, last = _place(given, key)
        section.pop(last, None)  # checked to be the same
    return _merged(derived, given)


def resolved(config: Config) -> dict[str, Any]:
    """Return, for the plan, the same with what the Trainer will fill in, as far as the run's configuration says it."""
    parallel, found = config.parallel, configuration(config)
    assert isinstance(parallel, Zero)
    for key, _, value in _said(config, parallel):
        section, last = _place(found, key)
        if section.get(last) == "auto" and value is not None:  # None: it depends on the machine
            section[last] = value
    return found


def prepare(config: Config) -> dict[str, Any]:
    """Set up the process group for DeepSpeed. Every rank calls it, before anything else asks for a group.

    Returns:
        Arguments of `SFTConfig`.

    Raises:
        ConfigError: half precision without a GPU.
    """
    import torch

    env = os.environ
    if "RANK" not in env:  # accelerate takes a rank without these for one without DeepSpeed
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    arguments = {"deepspeed": configuration(config), "ddp_backend": None}
    if torch.cuda.is_available():
        return arguments
    _check_precision(config)
    # With `use_cpu` the Trainer would silently do without DeepSpeed, so it is told of a state that is there already.
    env |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    import deepspeed.ops
    from accelerate import PartialState

    # Training does not use it; it would be compiled at the first start, in a minute and a half, by a compiler that
    # compute nodes may not have, under a lock that outlives a rank that is killed meanwhile.
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY] = False
    PartialState(backend="gloo", timeout=timedelta(seconds=config.trainer.get("ddp_timeout", 1800)))
    return arguments | {"accelerator_config": {"use_configured_state": True}, "use_cpu": False, "bf16": False}


def _check_precision(config: Config) -> None:
    import torch

    for key in ("bf16", "fp16"):
        if config.trainer.get(key) and not torch.cuda.is_available():
            raise ConfigError(f"trainer.{key}", True, "valid without a GPU: false; there is none here")


def _said(config: Config, parallel: Zero) -> Iterator[tuple[str, str, Any]]:
    """Yield what DeepSpeed's configuration would repeat: its key, the key that decides, and the value."""
    trainer = trainer_arguments.with_defaults(config)
    micro, steps = trainer["per_device_train_batch_size"], trainer["gradient_accumulation_steps"]
    yield "train_micro_batch_size_per_gpu", "trainer.per_device_train_batch_size", micro
    yield "gradient_accumulation_steps", "trainer.gradient_accumulation_steps", steps
    product = "trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps * ranks"
    yield "train_batch_size", product, micro * steps * parallel.world_size
    yield "gradient_clipping", "trainer.max_grad_norm", trainer["max_grad_norm"]
    yield "bf16.enabled", "trainer.bf16", trainer["bf16"]
    yield "fp16.enabled", "trainer.fp16", trainer["fp16"]
    yield "zero_optimization.stage", f"parallel={parallel.kind}: the stage", parallel.zero_stage
    yield f"zero_optimization.{GATHER}", "outlast's checkpoints hold usable weights: this", True
    if parallel.offload:
        for part in ("offload_optimizer", "offload_param"):
            yield f"zero_optimization.{part}.device", f"parallel={parallel.kind}: the device", "cpu"


def _check_said_twice(config: Config, parallel: Zero) -> None:
    flat = dict(_flat(parallel.deepspeed))
    for key, decides, value in _said(config, parallel):
        section = key.partition(".")[0]
        if section != key and not isinstance(parallel.deepspeed.get(section, {}), dict):
            raise ConfigError(f"parallel.deepspeed.{section}", parallel.deepspeed[section], "valid: a mapping of keys")
        if flat.get(key, "auto") not in ("auto", value):
            valid = f"{decides} is {value}; leave it out here, and change what decides if need be"
            raise ConfigError(f"parallel.deepspeed.{key}", flat[key], valid)
    for part in ("offload_optimizer", "offload_param"):
        key = f"zero_optimization.{part}.device"
        if flat.get(key) == "nvme":
            raise ConfigError(f"parallel.deepspeed.{key}", "nvme", "valid: cpu, none; what lies on NVMe is not sealed")


def _check_by_deepspeed(parallel: Zero) -> None:
    """Check the keys here, as DeepSpeed ignores one that it does not know, or fails when the ranks are up."""
    from pydantic import ValidationError

    with redirect_stdout(StringIO()):  # it logs there, and a plan is printed there
        from deepspeed.runtime import config as named
        from deepspeed.runtime.zero import config as zero_named

    names = {value for module in (named, zero_named) for value in vars(module).values() if isinstance(value, str)}
    names |= UNNAMED
    for key in parallel.deepspeed:
        if key not in names:
            close = get_close_matches(key, names, n=1)
            guess = f"did you mean {close[0]}? " if close else ""
            raise ConfigError("parallel.deepspeed", key, f"{guess}valid: https://www.deepspeed.ai/docs/config-json/")
    zero = parallel.deepspeed.get("zero_optimization", {})
    try:
        zero_named.DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if value != "auto"})
    except (ValidationError, TypeError) as error:
        reason, key = str(error), "parallel.deepspeed.zero_optimization"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            key, reason = ".".join([key, *map(str, first["loc"])]), first["msg"]
            zero = first["input"]
        raise ConfigError(key, zero, f"DeepSpeed says: {reason}") from None


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _place(tree: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """Return the section that a dotted key is in, and its name there."""
    *path, last = dotted.split(".")
    for key in path:
        tree = tree.get(key, {})
    return tree, last


def _merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Merge `more` over `base`, section by section."""
    merged = dict(base)
    for key, value in more.items():
        inner = base.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
