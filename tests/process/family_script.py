"""A fine-tune of one tiny architecture by a plain Trainer.

Arguments: run directory, architecture, step to stop in, what is broken (see `break_`), what is accepted. The checkpoint
that it takes for the best is the one with the largest loss, which is not the last. `roundtrip` in the place of the run
directory: save, build anew, load, for each of the architectures that follow.
"""

import contextlib
import os
import signal
import sys
import tempfile
from typing import Any

import torch
from architectures import build, rows
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import outlast
from outlast.huggingface import trainer as huggingface


class StopIn(TrainerCallback):
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGUSR1)


def train(directory: str, name: str, broken: str = "", allow: str = "") -> None:
    run = outlast.start(directory, allow=[allow] if allow else [])
    set_seed(1)
    arguments = TrainingArguments(
        max_steps=10,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    model = build(name)
    if broken.startswith(("adapter", "base", "buffer")):
        model = adapted(model, broken)
    trainer = Trainer(model, arguments, train_dataset=rows(name, 12), eval_dataset=rows(name, 4))
    trainer.add_callback(StopIn())
    break_(trainer, broken)
    run.train(trainer)
    if broken:
        return
    weights = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    compare(name, weights, type(trainer.model).from_pretrained(run.final).state_dict(), "from_pretrained")


def adapted(model: Any, broken: str) -> Any:
    from peft import LoraConfig, get_peft_model

    if broken == "base":  # another one than before, in one weight
        with torch.no_grad():
            model.lm_head.weight[3, 3] += 1
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))


def break_(trainer: Any, what: str) -> None:
    """Have something not be restored, as a library may fail to."""
    if what == "names":  # as transformers saves by default
        huggingface.own_names = contextlib.nullcontext
    elif what == "weights":
        load = trainer._load_from_checkpoint

        def load_most(*args: Any) -> None:
            before = trainer.model.model.norm.weight.clone()
            load(*args)
            with torch.no_grad():
                trainer.model.model.norm.weight.copy_(before)

        trainer._load_from_checkpoint = load_most
    elif what in ("optimizer", "schedule"):
        torch_class = torch.optim.AdamW if what == "optimizer" else torch.optim.lr_scheduler.LambdaLR
        torch_class.load_state_dict = lambda self, state: None
    elif what == "random":
        trainer._load_rng_state = lambda checkpoint: torch.manual_seed(0)
    elif what == "best":
        trainer._load_best_model = lambda: None
    elif what == "adapter":
        type(trainer.model).load_adapter = lambda self, *args, **kwargs: None
    elif what.startswith("buffer"):
        trainer.model.register_buffer("scale", torch.tensor(1.0 if what == "buffer-first" else 2.0), persistent=False)
        trainer.model.register_buffer("seen", torch.zeros(1), persistent=False)
        trainer.add_callback(Counting())


class Counting(TrainerCallback):
    """Trains a buffer that is in no file of the weights."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.seen += 1


def compare(name: str, saved: dict[str, Any], loaded: dict[str, Any], how: str) -> None:
    different = [key for key in saved if key not in loaded or not torch.equal(saved[key], loaded[key])]
    assert not different, f"{name}, {how}: {different}"


def roundtrip(name: str) -> None:
    from safetensors.torch import load_file

    from outlast.huggingface.names import own_names

    model = build(name)
    saved = model.state_dict()
    with tempfile.TemporaryDirectory() as directory:
        with own_names():
            model.save_pretrained(directory)
        again = build(name)
        again.load_state_dict(load_file(f"{directory}/model.safetensors"), strict=False)
        compare(name, saved, again.state_dict(), "load_state_dict")
        compare(name, saved, type(model).from_pretrained(directory).state_dict(), "from_pretrained")
    print(name, "is what it was")


if sys.argv[1] == "roundtrip":
    for architecture in sys.argv[2:]:
        roundtrip(architecture)
else:
    train(sys.argv[1], sys.argv[2], *sys.argv[4:])
