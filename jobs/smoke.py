"""Runs a hand-written accelerate loop (`job=smoke`) with the same life cycle as `job=sft`.

A small regression with dropout, so that a resume which is not exact shows in the weights. It starts in about three
seconds and stands in for a real job in tests and drills; `trainer.step_s` makes its steps as long as you like.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from outlast.config.configuration import Config
from outlast.config.section import Number, Section, section
from outlast.errors import ConfigError
from outlast.ranks.layout import derived_seed

if TYPE_CHECKING:
    from outlast import Run
    from outlast.storage.budget import Footprint


@dataclass(kw_only=True)
class SmokeTrainer(Section):
    """The keys that `trainer.*` may have for this job."""

    max_steps: Annotated[int, Number("steps", gt=0)] = 200
    per_device_train_batch_size: Annotated[int, Number("rows", gt=0)] = 8
    gradient_accumulation_steps: Annotated[int, Number("micro-batches", gt=0)] = 1
    learning_rate: Annotated[float, Number(gt=0)] = 0.01
    hidden_size: Annotated[int, Number(gt=0)] = 32
    dataset_size: Annotated[int, Number("rows", gt=0)] = 256
    step_s: Annotated[float, Number("seconds", ge=0)] = 0.0
    """Seconds to sleep in each step."""


def check(config: Config) -> None:
    """Refuse, before anything starts, what this job would not accept (ConfigError)."""
    section("trainer", SmokeTrainer, config.trainer)
    if config.parallel.zero_stage:
        raise ConfigError("parallel", config.parallel.kind, "valid for job=smoke: ddp")
    if config.tracking.chosen:
        raise ConfigError("tracking", ", ".join(config.tracking.chosen), "valid for job=smoke, a loop by hand: none")


def footprint(config: Config) -> "Footprint":
    """Estimate the bytes that `accelerator.save_state` and `save_model` write of a model this small."""
    from outlast.storage.budget import Footprint

    settings = section("trainer", SmokeTrainer, config.trainer)
    ranks, width = config.parallel.world_size, settings.hidden_size
    weights = 4 * (18 * width + 1) + 320  # 32-bit, and a header
    parts = {"weights": weights, "manifest": 900 + 130 * (2 + 2 * ranks)}
    optimizer = {"optimizer": 8 * (18 * width + 1) + 4_200, "random states": 26_600 * ranks}
    fixed = {"records and logs": 65_536 + 16_384 * ranks + settings.max_steps}
    return Footprint(checkpoint=parts | optimizer, final=parts, fixed=fixed)


def training(config: Config) -> dict[str, Any]:
    """Describe the training for the plan: rows of a forward pass, and accumulation."""
    settings = section("trainer", SmokeTrainer, config.trainer)
    return {
        "micro_batch": settings.per_device_train_batch_size,
        "accumulation": settings.gradient_accumulation_steps,
    }


def changes(config: Config) -> list[tuple[str, Config]]:
    """List what would make the run write less: nothing that matters."""
    return []


def main(run: "Run", config: Config) -> None:
    """Train, from where the run stands, to its end; every rank calls it."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from torch import nn

    settings = section("trainer", SmokeTrainer, config.trainer)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), gradient_accumulation_steps=settings.gradient_accumulation_steps
    )
    set_seed(config.seed)
    x = torch.randn(settings.dataset_size, 16)
    y = x @ torch.randn(16, 1)
    width = settings.hidden_size
    model = nn.Sequential(nn.Linear(16, width), nn.Dropout(0.1), nn.ReLU(), nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    model, optimizer = accelerator.prepare(model, optimizer)

    run.describe(
        seed=config.seed,
        micro_batch=settings.per_device_train_batch_size,
        accumulation=settings.gradient_accumulation_steps,
        dataset=settings.dataset_size,
    )
    checkpoint = run.resume_point()
    accelerator.gradient_accumulation_steps = run.layout.accumulation  # what keeps the global batch, whatever the ranks
    step = checkpoint.step if checkpoint else 0
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint.path))
        if checkpoint.manifest.world_size != run.layout.ranks:
            accelerator.step = 0  # it counts micro-batches, and there were others to a step
            set_seed(derived_seed(config.seed, step, run.rank, run.layout.ranks))
    run.begin(step)

    def save(directory: Path) -> None:
        accelerator.save_state(str(directory))

    while step < settings.max_steps:
        for micro in range(run.layout.accumulation):
            batch = _batch(step * run.layout.accumulation + micro, run, settings)
            with accelerator.accumulate(model):
                output = model(x[batch].to(accelerator.device))
                loss = nn.functional.mse_loss(output, y[batch].to(accelerator.device))
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        time.sleep(settings.step_s)
        step += 1
        run.step_end(step, save, total=settings.max_steps, loss=loss.item())

    run.finish(step, lambda directory: accelerator.save_model(model, str(directory)))


def _batch(index: int, run: "Run", settings: SmokeTrainer) -> list[int]:
    """Return this rank's rows of micro-batch `index`: they follow from the step, so no data state is saved.

    The global batch is cut in order, so the rows of a step are the same for any number of ranks.
    """
    size = settings.per_device_train_batch_size
    first = (index * run.layout.ranks + run.rank) * size
    return [(first + i) % settings.dataset_size for i in range(size)]
