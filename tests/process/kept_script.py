"""Training that depends on objects which only `run.keep` saves. Arguments: run directory, kind.

`loop` is a hand-written loop, the others a Hugging Face Trainer. In attempt 1, if the directory's name says so, it
signals itself at the end of step 3 (`trainer`), in the evaluation after it, or in the middle of step 4 with no time to
finish that. The values of the objects at the end go into a JSON file beside the directory.
"""

import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

import outlast

run = outlast.start(sys.argv[1])
STEPS = 6


class Tally:
    """Weighs each input by what came before it."""

    def __init__(self) -> None:
        self.sums: list[float] = []
        self.mean = torch.zeros(4)

    def weigh(self, x: torch.Tensor) -> torch.Tensor:
        self.sums.append(round(x.sum().item(), 4))
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return x + self.mean + len(self.sums)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.mean = state["sums"], state["mean"]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(x).square().mean()}


def strike(step: int) -> None:
    if step == 3 and run.attempt == 1 and "struck" in sys.argv[1]:
        os.kill(os.getpid(), signal.SIGUSR1)


torch.manual_seed(0)
model, data = Net(), torch.randn(4 * STEPS, 4)
tally, dice, noise = Tally(), random.Random(5), torch.Generator().manual_seed(6)
hidden = threading.local()  # where nothing looks for state by itself
hidden.objects = tally, dice, noise
for name, obj in {"tally": tally, "dice": dice, "noise": noise}.items():
    run.keep(name, obj)


def draw(module: torch.nn.Module, args: Any, kwargs: dict[str, torch.Tensor]) -> Any:
    """Change the input."""
    tally, dice, noise = hidden.objects
    x = tally.weigh(kwargs["x"]) + dice.random()
    return args, {"x": x + torch.randn(x.shape, generator=noise)}


model.register_forward_pre_hook(draw, with_kwargs=True)

kind = sys.argv[2]
if kind != "loop":
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Strike(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if kind == "trainer":
                strike(state.global_step)

        def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            strike(state.global_step)

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            strike(state.global_step)

    options: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    options |= {"eval_strategy": "steps", "eval_steps": 3} if kind == "evaluation" else {}
    options |= {"gradient_accumulation_steps": 2} if kind == "mid-step" else {}
    arguments = TrainingArguments(max_steps=STEPS, per_device_train_batch_size=4, learning_rate=0.1, **options)
    rows = [{"x": row} for row in data]
    if kind == "mid-step":
        run.steps.time_for = lambda work, count: False
    run.train(Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:12], callbacks=[Strike()]))
else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    checkpoint = run.resume_point()
    done = checkpoint.step if checkpoint else 0
    if checkpoint:
        state = torch.load(checkpoint.path / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    run.begin(done)

    def save(directory: Path) -> None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, directory / "state.pt")

    for step in range(done + 1, STEPS + 1):
        optimizer.zero_grad()
        model(x=data[4 * step - 4 : 4 * step])["loss"].backward()
        optimizer.step()
        strike(step)
        run.step_end(step, save)
    run.finish(STEPS, save)

found = {
    "sums": tally.sums,
    "mean": tally.mean.tolist(),
    "dice": dice.random(),
    "noise": noise.get_state().sum().item(),
}
found["weights"] = model.layer.weight.tolist()
Path(f"{sys.argv[1]}.json").write_text(json.dumps(found))
