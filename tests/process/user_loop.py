"""A user's own training loop, as accelerate's documentation writes it, with outlast.

Arguments: run directory, epochs.
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

import outlast

run = outlast.start(sys.argv[1])

set_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
x = torch.randn(80, 8)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=4, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

checkpoint = run.resume_point()
step = checkpoint.step if checkpoint else 0
if checkpoint:
    accelerator.load_state(str(checkpoint.path))
run.begin(step)
for _epoch, batches in run.epochs(loader, int(sys.argv[2])):
    for inputs, targets in batches:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            run.step_end(step, lambda directory: accelerator.save_state(str(directory)), loss=loss.item())
run.finish(step, lambda directory: accelerator.save_model(model, str(directory)))
