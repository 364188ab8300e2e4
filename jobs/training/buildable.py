"""Builds at plan time what the Trainer would build later: the schedule, the optimizer's class, the choice of the best.

What fails here would fail in the first attempt, and again in each that follows.
"""

import warnings
from typing import Any

from outlast.errors import ConfigError

METRICS = (
    "loss", "mean_token_accuracy", "entropy", "num_tokens", "aux_loss",
    "runtime", "samples_per_second", "steps_per_second",
)  # fmt: skip
"""What an evaluation measures, without `eval_`: transformers' metrics and TRL's (`aux_loss` of mixtures of experts)."""


def check(args: Any) -> None:
    """Build from the `SFTConfig` of a run.

    Raises:
        ConfigError: it can't be built; with the key, and what the library says.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _optimizer(args)
        _schedule(args)
    metric = args.metric_for_best_model
    if args.eval_strategy != "no" and metric is not None and metric.removeprefix("eval_") not in METRICS:
        raise ConfigError("trainer.metric_for_best_model", metric, [f"eval_{name}" for name in METRICS])


def _schedule(args: Any) -> None:
    import torch
    from transformers import get_scheduler

    steps = args.max_steps if args.max_steps > 0 else 100
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except Exception as error:  # each schedule raises what it likes about its arguments
        chosen = f"trainer.lr_scheduler_type={args.lr_scheduler_type.value}"
        valid = f"{chosen} can't be built with it: {_reason(error)}"
        raise ConfigError("trainer.lr_scheduler_kwargs", args.lr_scheduler_kwargs, valid) from None


def _optimizer(args: Any) -> None:
    import torch
    from transformers import Trainer

    name = args.optim.value
    try:
        cls, values = Trainer.get_optimizer_cls_and_kwargs(args)
    except Exception as error:
        if "pass a" in str(error) and "model" in str(error):
            return  # it is made of the model, which is not here
        key = "trainer.optim_args" if "optim_args" in str(error) else "trainer.optim"
        valid = f"trainer.optim={name} can't be built here: {_reason(error)}"
        raise ConfigError(key, name if key == "trainer.optim" else args.optim_args, valid) from None
    if cls.__module__.startswith("torch.") and args.optim_args:
        try:
            cls([torch.nn.Parameter(torch.zeros(1))], **values)
        except (TypeError, ValueError) as error:
            valid = f"trainer.optim={name} does not take it: {_reason(error)}"
            raise ConfigError("trainer.optim_args", args.optim_args, valid) from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
