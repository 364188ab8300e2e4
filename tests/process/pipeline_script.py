"""A Trainer whose data, model and callbacks have state that no checkpoint of the Trainer holds.

Arguments: run directory, what is peculiar about it (words joined by commas), steps in which it signals itself.
"""

import itertools
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

import outlast

run = outlast.start(sys.argv[1])
words, stops = sys.argv[2].split(","), [int(step) for step in filter(None, sys.argv[3].split(","))]
dice = random.Random(5)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
        self.noise, self.calls = torch.Generator().manual_seed(2), 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        if "model" in words:
            x = x + 0.1 * torch.randn(x.shape, generator=self.noise) + 0.01 * self.calls
        return {"loss": torch.nn.functional.mse_loss(self.layer(torch.dropout(x, 0.1, True)), labels)}


class Collator:
    def __init__(self) -> None:
        self.batches, self.scale, self.own = 0, 1.0, torch.Generator().manual_seed(3)
        self.turns = itertools.cycle([0.1, 0.2]) if "iterator" in words else None
        self.late: Any = None

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        self.batches += 1
        x = torch.stack([row["x"] for row in rows])
        if "own" in words:
            x = x + torch.randn(x.shape, generator=self.own) + 0.1 * self.batches
        if "closure" in words:
            x = x + dice.random()
        if self.turns is not None:
            self.late = self.late or (0.1 * number for number in itertools.count())
            x = x + next(self.turns) + next(self.late)
        noise = torch.rand(x.shape) + random.random()
        return {"x": self.scale * (x + noise), "labels": torch.stack([row["labels"] for row in rows])}


class Scale:
    """Another number each time."""

    def __init__(self) -> None:
        self.calls, self.dice = 0, torch.Generator().manual_seed(4)

    def __call__(self) -> float:
        self.calls += 1
        return 1 + 0.1 * self.calls + torch.rand(1, generator=self.dice).item()


class Curriculum(TrainerCallback):
    steps, epochs = 0, 0
    trainer: Trainer

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.epochs += 1

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        random.random()
        Path(args.output_dir, f"checkpoint-{state.global_step}", "notes.txt").write_text(str(self.steps))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1
        collator.scale = 1.0 + 0.05 * self.steps + self.epochs
        if state.global_step in stops and not os.path.exists(f"{sys.argv[1]}.{state.global_step}"):
            open(f"{sys.argv[1]}.{state.global_step}", "w").close()
            os.kill(os.getpid(), signal.SIGUSR1)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from data


class SizedStream(Stream):
    def __len__(self) -> int:
        return 40


class Mine(Trainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale, self.scales = Scale(), [Scale(), Scale()]
        self.turns, self.pool = (itertools.cycle([1, 2]), None) if "iterator" in words else (None, None)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if "iterator" in words:
            self.pool = self.pool or Scale()
            return loss * next(self.turns) * self.pool()
        return loss * self.scale() * self.scales[1]() if "parts" in words else loss

    def get_train_dataloader(self) -> Any:
        if "loader" in words:
            return DataLoader(data, batch_size=4, shuffle=True, collate_fn=self.data_collator)
        return super().get_train_dataloader()

    def _get_train_sampler(self, *args: Any) -> Any:
        if "weighted" in words:
            return WeightedRandomSampler([1.0] * 40, 40, generator=torch.Generator().manual_seed(7))
        return super()._get_train_sampler(*args)


torch.manual_seed(0)
data = [{"x": torch.randn(8), "labels": torch.randn(1)} for _ in range(40)]
collator = Collator()
arguments = TrainingArguments(
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2 if "accumulate" in words else 1,
    max_steps=24,
    save_strategy="no",
    learning_rate=0.02,
    dataloader_num_workers=2 if "workers" in words else 0,
    dataloader_prefetch_factor=3 if "workers" in words else None,
    remove_unused_columns=False,
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
)
rows = SizedStream() if "sized" in words else Stream() if "stream" in words else data
curriculum = Curriculum()
trainer = Mine(model=Net(), args=arguments, train_dataset=rows, data_collator=collator, callbacks=[curriculum])
curriculum.trainer = trainer
if "iterator" not in words:
    run.keep("dice of the test", random.Random(1))
run.train(trainer)
