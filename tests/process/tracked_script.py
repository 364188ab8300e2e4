"""A user's own script with trackers. Arguments: run directory, trackers (`tensorboard,wandb`), strikes.

A strike is `EVENT:STEP:SIGNAL`: in `on_log` (or another event of callbacks) of that step, the process signals itself.
Strikes are parted by commas, one for each attempt; the last attempt is left alone.
"""

import os
import signal
import sys
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import outlast
from outlast.huggingface.tracking.gate import Gate

run = outlast.start(sys.argv[1])
strikes = sys.argv[3].split(",")


class Strike(TrainerCallback):
    """Comes after the trackers, and waits for them, so that what is logged at the step is there."""


def hit(name: str, state: Any) -> None:
    at = strikes[run.attempt - 1].split(":") if run.attempt <= len(strikes) else []
    if at and at[0] == name and state.global_step == int(at[1]):
        for callback in trainer.callback_handler.callbacks:
            if isinstance(gate := getattr(getattr(callback.on_log, "args", [None])[0], "__self__", None), Gate):
                gate.work.join()
        os.kill(os.getpid(), getattr(signal, f"SIG{at[2]}"))


for event in ("on_step_begin", "on_step_end", "on_log", "on_evaluate", "on_train_end"):
    setattr(Strike, event, lambda self, args, state, control, name=event, **_: hit(name, state))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": torch.nn.functional.mse_loss(self.layers(input_ids / 10), labels)}


torch.manual_seed(0)
data = [{"input_ids": torch.randint(0, 9, (8,)), "labels": torch.randn(1)} for _ in range(48)]
arguments = TrainingArguments(
    per_device_train_batch_size=4,
    max_steps=20,
    save_strategy="steps",
    save_steps=6,
    eval_strategy="steps",
    eval_steps=5,
    logging_steps=1,
    include_num_input_tokens_seen="all",
    use_cpu=True,
    report_to=[name for name in sys.argv[2].split(",") if name],
    disable_tqdm=True,
)
trainer = Trainer(model=Net(), args=arguments, train_dataset=data, eval_dataset=data[:20], callbacks=[Strike()])
run.train(trainer)
