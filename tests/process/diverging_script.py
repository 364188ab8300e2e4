"""Training that goes wrong. Arguments: run directory, how, loop.

`nan` plants a loss that is no number at step 30, `spike` one that is a thousand times too high, `last` at the last
step, `eval` an evaluation's loss that is no number, `unlabelled` a batch without a label, whose loss is none but
changes no weight. With `late` the loss is read when it is saved, as on a GPU, with `signalled` in an emergency save.
`loop` is a hand-written loop; else it is a Trainer.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

import outlast
from outlast.huggingface import finite_loss

directory, how, kind = sys.argv[1:4]
STEPS, AT = (30 if how == "last" else 34), 30
run = outlast.start(
    directory,
    every=6,
    guard_action="report" if how == "reported" else "stop",
    guard_spike={"spike": 50.0, "mild": 5000.0}.get(how),
)
if how in ("late", "signalled"):
    finite_loss.READ_AT_ONCE = ()
WRONG = {"spike": 1000.0, "mild": 1000.0, "eval": 1.0}.get(how, float("nan"))


class Net(torch.nn.Module):
    """A model whose loss is wrong at one step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        at, rank = (x[:, 3] == AT).any(), run.rank
        loss = self.layer(x / 100).square().mean() + 1
        if at and how == "signalled" and run.attempt == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if at and how == "unlabelled":
            none = torch.full(x.shape[:1], -100)
            return {"loss": torch.nn.functional.cross_entropy(self.layer(x).expand(-1, 2), none)}
        if not self.training:
            return {"loss": loss * (float("nan") if how == "eval" else 1)}
        return {"loss": loss * WRONG if at and rank == run.world_size - 1 else loss}


torch.manual_seed(0)
model = Net()
data = torch.randn(STEPS * run.world_size, 4)
data[:, 3] = torch.arange(STEPS * run.world_size) // run.world_size + 1
if kind == "loop":
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    checkpoint = run.resume_point()
    done = checkpoint.step if checkpoint else 0
    if checkpoint:
        model.load_state_dict(torch.load(checkpoint.path / "model.pt", weights_only=True))
    run.begin(done)

    def save(path: Path) -> None:
        torch.save(model.state_dict(), path / "model.pt")

    for step in range(done + 1, STEPS + 1):
        optimizer.zero_grad()
        loss = model(data[step - 1 : step])["loss"]
        loss.backward()
        optimizer.step()
        run.step_end(step, save, loss=loss.item())
    run.finish(STEPS, save)
else:
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 10} if how == "eval" else {}
    arguments = TrainingArguments(
        max_steps=STEPS,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        learning_rate=1e-4,
        optim="sgd",
        logging_steps=7,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    rows = [{"x": row, "labels": 0.0} for row in data]
    run.train(Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4]))
