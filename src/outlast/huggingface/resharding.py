"""Resumes a Trainer on another number of ranks, with the same rows in each optimizer step.

`ranks/layout.py` decides which rows a rank reads. This module applies it to the Trainer: to its gradient accumulation,
its DataLoader, DeepSpeed's configuration, and the random state of a rank that has none saved.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from outlast.checkpoint.manifest import Sealed
from outlast.errors import ResumeRefusedError
from outlast.ranks.layout import Layout, RankBatches, derived_seed

if TYPE_CHECKING:
    from transformers import Trainer


def adapt(trainer: "Trainer", layout: Layout) -> None:
    """Have `trainer`, which has not begun to train, read the rows that `layout` gives this rank.

    Raises:
        ResumeRefusedError: the order of its rows differs between ranks, or depends on the number of ranks.
    """
    args = trainer.args
    if args.gradient_accumulation_steps != layout.accumulation:
        args.gradient_accumulation_steps = layout.accumulation
        if trainer.is_deepspeed_enabled:
            _tell_deepspeed(trainer, layout)
    if layout.moved:
        options = args.accelerator_config
        if args.train_sampling_strategy not in ("random", "sequential"):
            raise _bound("train_sampling_strategy", args.train_sampling_strategy, "random, sequential")
        for name, valid in (("split_batches", False), ("dispatch_batches", None), ("even_batches", True)):
            if getattr(options, name) != valid:
                raise _bound(f"accelerator_config.{name}", getattr(options, name), str(valid))
        trainer.get_train_dataloader = _resharded(trainer.get_train_dataloader, layout, args.process_index)


def _bound(key: str, value: Any, valid: str) -> ResumeRefusedError:
    return ResumeRefusedError(
        f"{key}={value!r} orders rows by the number of ranks, so another number can't go on with them; valid: {valid}"
    )


def _tell_deepspeed(trainer: "Trainer", layout: Layout) -> None:
    """Correct DeepSpeed's configuration, which was filled in from the arguments before they were adapted."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    for config in (plugin.deepspeed_config, plugin.hf_ds_config.config):
        config["gradient_accumulation_steps"] = layout.accumulation
        if "train_batch_size" in config:
            config["train_batch_size"] = layout.global_batch


def _resharded(get: Callable[[], Any], layout: Layout, rank: int) -> Callable[[], Any]:
    def get_train_dataloader() -> Any:
        from torch.utils.data import IterableDataset

        loader = get()
        # accelerate deals out whole steps of a stream in order, whatever the number of ranks.
        return loader if isinstance(loader.dataset, IterableDataset) else with_batches(loader, layout, rank)

    return get_train_dataloader


def with_batches(loader: Any, layout: Layout, rank: int) -> Any:
    """Make the same accelerate DataLoader with other batches, from the arguments that `skip_first_batches` uses."""
    from accelerate.data_loader import _PYTORCH_DATALOADER_KWARGS, DataLoaderShard
    from torch.utils.data import RandomSampler

    inner = loader.batch_sampler
    batches = inner if layout.ranks == 1 else inner.batch_sampler  # accelerate wraps it to cut it into shards
    if isinstance(batches.sampler, RandomSampler) and not hasattr(batches.sampler, "set_epoch"):
        raise _bound("accelerator_config.use_seedable_sampler", False, "True")
    kept = {
        name: getattr(loader, name, default)
        for name, default in _PYTORCH_DATALOADER_KWARGS.items()
        if name not in ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last")
    }
    return DataLoaderShard(
        loader.dataset,
        device=loader.device,
        rng_types=loader.rng_types,
        synchronized_generator=loader.synchronized_generator,
        _drop_last=loader._drop_last,
        _non_blocking=loader._non_blocking,
        batch_sampler=RankBatches(batches.sampler, layout, rank, drop_last=batches.drop_last),
        **kept,
    )


def seed_rank(trainer: "Trainer", checkpoint: Sealed) -> bool:
    """Seed this rank if `checkpoint`, made by another number of ranks, has no random state for it.

    Returns:
        Whether it did.
    """
    args = trainer.args
    if checkpoint.manifest.world_size == args.world_size:
        return False
    from transformers import set_seed

    set_seed(derived_seed(args.seed, checkpoint.step, args.process_index, args.world_size))
    return True
