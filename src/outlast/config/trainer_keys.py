"""Sorts the keys of `trainer` by what they decide, which says what a run may change while it lasts.

A key that is not named here decides the weights, or what is kept as the best of them: another value is another run.
"""

from collections.abc import Mapping
from typing import Any

LOGGING = frozenset((
    "logging_steps", "logging_strategy", "logging_first_step", "logging_nan_inf_filter", "log_level",
    "log_level_replica", "log_on_each_node", "report_to", "run_name", "project", "disable_tqdm",
    "include_num_input_tokens_seen", "skip_memory_metrics", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id",
))  # fmt: skip
"""What is written down, and where."""

EVALUATION = frozenset((
    "per_device_eval_batch_size", "eval_accumulation_steps", "eval_strategy", "eval_steps", "eval_delay",
    "eval_on_start", "prediction_loss_only", "eval_do_concat_batches", "batch_eval_metrics", "eval_use_gather_object",
    "bf16_full_eval", "fp16_full_eval",
))  # fmt: skip
"""When and how the model is evaluated. Each evaluation draws a random number, so that another number of them gives
other weights than those of the undisturbed run: as good, and not the same."""

RESOURCES = frozenset((
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataset_num_proc",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "torch_empty_cache_steps", "ddp_timeout", "save_total_limit",
))  # fmt: skip
"""What it takes of machine and disk. Recomputed activations are the same activations."""

BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""How a step's rows are split; their product decides the weights."""

LENGTH = ("max_steps", "num_train_epochs")
"""How long the run is. It decides the weights through the schedule alone, unless that is one of ANY_LENGTH."""

ANY_LENGTH = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules whose rate at a step does not depend on the number of steps. The warm-up must be a number of steps too."""

FREE = LOGGING | EVALUATION | RESOURCES


def deciding(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that decide the weights; of those that split a step, the product."""
    free = FREE.union(BATCH, LENGTH if length_refusal(trainer) is None else ())
    kept = {key: value for key, value in trainer.items() if key not in free}
    return kept | {" * ".join(BATCH): rows_of(trainer)}


def rows_of(trainer: Mapping[str, Any]) -> int:
    """Rows of an optimizer step and rank."""
    return int(trainer.get(BATCH[0]) or 8) * int(trainer.get(BATCH[1]) or 1)


def length_refusal(trainer: Mapping[str, Any]) -> str | None:
    """Why a run can't be made longer or shorter; None if it can."""
    schedule = trainer.get("lr_scheduler_type", "linear")
    warmup = float(trainer.get("warmup_steps") or 0.0)
    if schedule not in ANY_LENGTH:
        return (
            f"with trainer.lr_scheduler_type={schedule} the rate of each step depends on it, also of those that are "
            f"done; a run can change it with {', '.join(ANY_LENGTH)}"
        )
    if schedule != "constant" and 0 < warmup < 1:
        return f"trainer.warmup_steps={warmup:g} is a share of it, also of the steps that are done"
    return None
