"""A user's own training script: a plain Trainer, and outlast in three lines. Arguments: run directory, steps."""

import sys

import torch
from transformers import Trainer, TrainingArguments

import outlast

run = outlast.start(sys.argv[1])


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": torch.nn.functional.mse_loss(self.layers(x), labels)}


torch.manual_seed(0)
data = [{"x": torch.randn(8), "labels": torch.randn(1)} for _ in range(80)]
arguments = TrainingArguments(
    per_device_train_batch_size=4,
    max_steps=int(sys.argv[2]),
    save_strategy="steps",
    save_steps=10,
    eval_strategy="epoch",
    logging_steps=5,
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
)
trainer = Trainer(model=Net(), args=arguments, train_dataset=data, eval_dataset=data[:20])
run.train(trainer)
print("trained to step", trainer.state.global_step)
