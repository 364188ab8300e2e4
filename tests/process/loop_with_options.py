"""Loops of a user's own, with accelerate and a DataLoader, of the kinds that their test runs.

Arguments: run directory, epochs. `OPTIONS` (JSON) says which kind.
"""

import datetime
import json
import os
import random
import sys

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader, IterableDataset

import outlast

run = outlast.start(sys.argv[1])
epochs = int(sys.argv[2])
options = json.loads(os.environ.get("OPTIONS", "{}"))
generator = np.random.default_rng(0)


class Rows(torch.utils.data.Dataset):
    """Rows that are drawn anew each time they are read."""

    def __len__(self):
        return 44

    def __getitem__(self, row):
        x = torch.full((8,), row / 44) + torch.randn(8) * 0.1 + random.random() + np.random.rand()
        return x, x.sum().sin()


class Stream(IterableDataset):
    def __iter__(self):
        yield from (Rows()[row] for row in range(44))


def collate(rows):
    x, y = zip(*rows, strict=True)
    return torch.stack(x) + generator.random(), torch.stack(y)


accelerator = Accelerator(
    cpu=True,
    gradient_accumulation_steps=2,
    dataloader_config=DataLoaderConfiguration(use_seedable_sampler=options.get("seedable", False)),
)
if options.get("seed", True):
    set_seed(0)
torch.manual_seed(0) if options.get("seed", True) else None
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
stream = options.get("stream", False)
loader = DataLoader(
    Stream() if stream else Rows(),
    batch_size=4,
    shuffle=None if stream else True,
    collate_fn=collate,
    num_workers=options.get("workers", 0),
    persistent_workers=options.get("persistent", False),
)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)


class Clock:
    def state_dict(self):
        return {"now": datetime.datetime.now()}

    def load_state_dict(self, state):
        self.now = state["now"]


if options.get("clock", False):
    accelerator.register_for_checkpointing(Clock())
checkpoint = run.resume_point()
step = checkpoint.step if checkpoint else 0
if checkpoint:
    accelerator.load_state(str(checkpoint.path))
run.begin(step)
plain = options.get("plain", False)


def ahead(batches):
    """The next batch is read before the one at hand is given away, as people do to copy it to a GPU meanwhile."""
    at_hand = None
    for batch in batches:
        if at_hand is not None:
            yield at_hand
        at_hand = batch
    yield at_hand


for epoch, batches in ((e, loader) for e in range(epochs)) if plain else run.epochs(loader, epochs):
    for x, y in ahead(batches) if options.get("ahead", False) else batches:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.mse_loss(model(x).squeeze(-1), y)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            if step in options.get("stops", []) and run.attempt == 1 + options["stops"].index(step):
                os.kill(os.getpid(), 10)
            run.step_end(step, lambda directory: accelerator.save_state(str(directory)))
    with torch.no_grad():  # an evaluation draws random numbers too
        total = sum(
            accelerator.unwrap_model(model)(x).sum().item() + torch.rand(1).item()
            for x, _ in [next(iter(DataLoader(Rows(), 4)))]
        )
    print("epoch", epoch, "step", step, round(total, 6))
run.finish(step, lambda directory: accelerator.save_model(model, str(directory)))
