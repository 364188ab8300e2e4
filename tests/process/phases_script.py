"""Two runs in one script, and what follows them: a Trainer's, then a loop's on its model, on data drawn in between.

Arguments: directory of the runs, where to raise USR1 (`a:3`, `between`, `b:5`, `after`; empty: nowhere), variant.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import outlast

runs, strike, variant = Path(sys.argv[1]), sys.argv[2], sys.argv[3]


def reached(place):
    if place == strike:
        os.kill(os.getpid(), signal.SIGUSR1)


class Strike(TrainerCallback):
    def on_optimizer_step(self, args, state, control, **_):
        reached(f"a:{state.global_step + 1}")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))

    def forward(self, x, labels=None):
        return {"loss": torch.nn.functional.mse_loss(self.layers(x), labels)}


def trainer_of(steps):
    arguments = TrainingArguments(
        output_dir=str(runs / "own"),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_steps=steps,
        save_steps=3,
        logging_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    made = Trainer(model=Net(), args=arguments, train_dataset=data, eval_dataset=data[:8])
    made.add_callback(Strike())
    return made


run = outlast.start(runs / "a")
torch.manual_seed(0)
data = [{"x": torch.randn(8), "labels": torch.randn(1)} for _ in range(24)]
if variant == "other data":
    data = data[:20]
trainer = trainer_of(8 if variant == "longer" else 5)
before = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
output = run.train(trainer)
assert (trainer.args.output_dir, trainer.args.save_strategy) == (str(runs / "own"), "steps")
assert trainer.callback_handler.callbacks == before[1]
hidden = [name for name in vars(trainer) if name not in before[0] and callable(getattr(Trainer, name, None))]
assert not hidden, hidden
found = {"evaluated": trainer.evaluate()["eval_loss"], "steps": output.global_step, "logged": trainer.state.log_history}
found["mean loss"] = output.training_loss
found["logged"] = [entry["loss"] for entry in found["logged"] if "loss" in entry]
if variant == "again":
    run.train(trainer)
reached("between")

run = outlast.start(runs / ("a" if variant == "same directory" else "b"))
rows = torch.randn(24, 8)  # of the random numbers that training left
loader = DataLoader(TensorDataset(rows, rows.sum(1, keepdim=True)), batch_size=4, shuffle=True)
model = trainer.model.layers
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
checkpoint = run.resume_point()
if checkpoint:
    state = torch.load(checkpoint.path / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
step = checkpoint.step if checkpoint else 0
run.begin(step)


def save(directory):
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, directory / "state.pt")


for epoch, batches in run.epochs(loader, 3 if variant == "more epochs" else 2):
    for x, y in batches:
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        reached(f"b:{step}")
        run.step_end(step, save)
    if variant == "ends early" and epoch == 0:
        break
run.finish(step, lambda directory: torch.save(model.state_dict(), directory / "model.pt"))
reached("after")
found |= {"weights": [p.tolist() for p in model.parameters()], "drawn": torch.rand(2).tolist(), "run": run.finished}
(runs / "found.json").write_text(json.dumps(found))
