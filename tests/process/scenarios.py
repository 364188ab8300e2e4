"""Trainings of many kinds, each a few steps of a tiny model, struck where it is told to.

Arguments: scenario, run directory, file for what came of it, strike (`any:12:USR1`: the twelfth event of a callback in
this attempt; `on_evaluate:2:KILL`; empty: left alone).
"""

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ExportableState

import outlast

VOCABULARY = 48
SCENARIOS: dict[str, Callable[[], Trainer]] = {}
OUTPUT = "unused"


def scenario(make: Callable[[], Trainer]) -> Callable[[], Trainer]:
    SCENARIOS[make.__name__] = make
    return make


# What they are made of ----------------------------------------------------------------------------------------------


class Strike(TrainerCallback):
    """Counts the events of this attempt, and raises a signal at one of them: `NAME:NUMBER:SIGNAL`, `any` counts all.

    `NAME:NUMBER:SIGNAL:fits` and `...:short` also say whether there is time for what is under way, which without Slurm
    nobody knows.
    """

    def __init__(self, at: str, run: outlast.Run) -> None:
        self.name, number, self.signal, *time = at.split(":") if at else ("", "-1", "")
        self.attempt = threading.local()  # nothing that a run would keep: each attempt counts anew
        self.attempt.left, self.attempt.count = int(number), 0
        if time:
            run.steps.time_for = lambda *_: time == ["fits"]

    def hit(self, name: str) -> None:
        self.attempt.count += 1
        self.attempt.left -= self.name in (name, "any")
        if self.attempt.left == 0:
            self.attempt.left = -1
            os.kill(os.getpid(), getattr(signal, f"SIG{self.signal}"))


for _event in (
    *("on_epoch_begin", "on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_substep_end", "on_step_end"),
    *("on_log", "on_prediction_step", "on_evaluate", "on_save", "on_epoch_end", "on_train_end"),
):
    setattr(Strike, _event, lambda self, *_, name=_event, **__: self.hit(name))


def gpt2(**config: Any) -> GPT2LMHeadModel:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **config}))


def rows(count: int, length: int = 8, seed: int = 0) -> list[dict[str, list[int]]]:
    numbers = random.Random(seed)
    made = []
    for _ in range(count):
        ids = [numbers.randrange(VOCABULARY) for _ in range(length)]
        made.append({"input_ids": ids, "labels": ids})
    return made


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}


def arguments(kind: type[TrainingArguments] = TrainingArguments, **values: Any) -> Any:
    usual = {
        "output_dir": OUTPUT,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
    }
    return kind(**{**usual, **values})


def trainer(
    kind: type[Trainer] = Trainer, model: Any = None, train: Any = None, more: dict[str, Any] | None = None, **args: Any
) -> Trainer:
    """A Trainer with rows of random tokens, 6 batches an epoch."""
    return kind(
        model=None if more and "model_init" in more else model or gpt2(),
        args=arguments(**args),
        train_dataset=rows(24) if train is None else train,
        **{"eval_dataset": rows(12, seed=1), "data_collator": collate, **(more or {})},
    )


STEPS = {"max_steps": 9, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
EPOCHS = {"num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "epoch"}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}

# The Trainer --------------------------------------------------------------------------------------------------------


@scenario
def epochs_best_linear() -> Trainer:
    return trainer(**EPOCHS, **BEST, save_total_limit=1)


@scenario
def accumulation_smoothing_cosine() -> Trainer:
    return trainer(
        train=rows(22),
        **{**STEPS, "save_steps": 2, "max_steps": 7},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        label_smoothing_factor=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=2,
    )


@scenario
def adafactor_plateau() -> Trainer:
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}}
    return trainer(**STEPS, **BEST, **plateau, optim="adafactor")


@scenario
def sgd_polynomial_neftune() -> Trainer:
    return trainer(**EPOCHS, optim="sgd", lr_scheduler_type="polynomial", neftune_noise_alpha=5.0)


@scenario
def adagrad_checkpointing() -> Trainer:
    schedule = {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2}
    return trainer(**STEPS, **schedule, optim="adagrad", activation_checkpointing=True)


@scenario
def rmsprop_restarts_every_eval_saved_if_best() -> Trainer:
    schedule = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}
    steps = {**STEPS, "save_strategy": "best", "eval_steps": 2}
    return trainer(**steps, **BEST, **schedule, optim="rmsprop")


@scenario
def uneven_epoch_fraction() -> Trainer:
    """The last batch is smaller, the last step of an epoch has fewer micro-batches, epochs are cut in the middle."""
    return trainer(
        train=rows(21),
        num_train_epochs=1.6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        eval_strategy="steps",
        eval_steps=0.4,
        eval_delay=2,
        logging_first_step=True,
        include_num_input_tokens_seen="all",
        average_tokens_across_devices=False,
    )


@scenario
def sequential_drop_last_by_epoch() -> Trainer:
    return trainer(
        **EPOCHS, train=rows(22), train_sampling_strategy="sequential", dataloader_drop_last=True, data_seed=3
    )


@scenario
def model_init_with_metrics_in_batches() -> Trainer:
    class Metrics:
        """Sums up over the batches of an evaluation."""

        def __init__(self) -> None:
            self.right = self.all = 0

        def __call__(self, found: Any, compute_result: bool) -> dict[str, float]:
            predicted = found.predictions.argmax(-1)[:, :-1]
            self.right += int((predicted == found.label_ids[:, 1:]).sum())
            self.all += predicted.numel()
            if not compute_result:
                return {}
            accuracy, self.right, self.all = self.right / self.all, 0, 0
            return {"accuracy": accuracy}

    more = {"model_init": lambda: gpt2(), "compute_metrics": Metrics()}
    return trainer(more=more, **STEPS, batch_eval_metrics=True, **{**BEST, "metric_for_best_model": "accuracy"})


def galore_or_apollo(name: str) -> Trainer:
    options = {"optim_target_modules": ["q_proj", "v_proj"], "optim_args": "rank=2,update_proj_gap=3,scale=1.0"}
    return trainer(model=llama(), **STEPS, optim=name, **options)


@scenario
def needs_galore_torch() -> Trainer:
    return galore_or_apollo("galore_adamw")


@scenario
def needs_apollo_torch() -> Trainer:
    return galore_or_apollo("apollo_adamw")


# Decisions ----------------------------------------------------------------------------------------------------------


@scenario
def early_stopping_on_one_of_two_from_the_start() -> Trainer:
    evaluated = {"eval_dataset": {"a": rows(8, seed=1), "b": rows(12, seed=2)}, "callbacks": [EarlyStoppingCallback(2)]}
    best = {**BEST, "metric_for_best_model": "eval_b_loss"}
    steps = {**STEPS, "max_steps": 20, "eval_steps": 2, "save_steps": 2}
    return trainer(more=evaluated, **steps, **best, eval_on_start=True, learning_rate=0.1)


@scenario
def two_early_stoppings_of_different_patience_by_epoch() -> Trainer:
    callbacks = [EarlyStoppingCallback(3), EarlyStoppingCallback(2, early_stopping_threshold=0.1)]
    epochs = {**EPOCHS, "num_train_epochs": 6}
    return trainer(more={"callbacks": callbacks}, train=rows(8), **epochs, **BEST, learning_rate=0.1)


class Asks(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Asks to save and evaluate at odd moments, ends epochs early, and in the end training."""

    def __init__(self) -> None:
        self.seen = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seen": self.seen}}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen += 1
        control.should_evaluate |= self.seen % 4 == 1
        control.should_save |= self.seen % 5 == 2
        control.should_epoch_stop |= self.seen % 7 == 4
        control.should_training_stop |= self.seen == 13

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate |= state.global_step == 8

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate = True


@scenario
def a_callback_asks_for_everything() -> Trainer:
    return trainer(more={"callbacks": [Asks()]}, num_train_epochs=5, logging_steps=1)


@scenario
def a_callback_evaluates_by_itself() -> Trainer:
    class Evaluates(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            made.evaluate()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % 4 == 2:
                made.evaluate(rows(8, seed=3), metric_key_prefix="probe")

    made = trainer(more={"callbacks": [EarlyStoppingCallback(3)]}, **STEPS, **BEST)
    made.add_callback(Evaluates())
    return made


# State of one's own -------------------------------------------------------------------------------------------------


class Curriculum(Trainer):  # type: ignore[misc]
    """Counts what it has seen, weighs the loss by it, and keeps an average of the weights that it pulls towards.

    Before a step it uses the model as it is: after an evaluation without dropout, else with it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen, self.recent, self.before = 0, [0.0], 0.0
        self.average = gpt2()
        self.average.load_state_dict(self.model.state_dict())

    def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
        with torch.no_grad():
            self.before = model(**inputs).loss.item()
        return super().training_step(model, inputs, *args)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            self.seen += 1
            self.recent = [*self.recent[-3:], loss.item()]
            pull = sum(
                ((a - b.detach()) ** 2).sum()
                for a, b in zip(model.parameters(), self.average.parameters(), strict=True)
            )
            loss = loss * (1 + 0.1 * self.seen) / (1 + sum(self.recent) + self.before) + 0.1 * pull
            for mean, now in zip(self.average.parameters(), model.parameters(), strict=True):
                mean.data.mul_(0.5).add_(now.data, alpha=0.5)
        return (loss, outputs) if return_outputs else loss


@scenario
def a_subclass_with_state() -> Trainer:
    return trainer(Curriculum, **STEPS, lr_scheduler_type="constant_with_warmup", warmup_steps=1)


class PlainModule(torch.nn.Module):
    """No model of transformers: tied weights, a layer that is used twice, and a weight that isn't contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(VOCABULARY, 8), torch.nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        layer, self.turned = torch.nn.Linear(8, 8), torch.nn.Parameter(torch.rand(8, 8).t())
        self.layers = torch.nn.ModuleList([layer, layer])

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.embedding(input_ids) @ self.turned
        for layer in self.layers:
            hidden = torch.dropout(torch.relu(layer(hidden)), 0.1, self.training)
        logits = self.head(hidden)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


@scenario
def plain_module_tied() -> Trainer:
    return trainer(model=PlainModule(), **STEPS, load_best_model_at_end=True)


class Lion(torch.optim.Optimizer):
    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    parameter.add_(torch.sign(0.9 * mean + 0.1 * parameter.grad), alpha=-group["lr"])
                    mean.mul_(0.99).add_(parameter.grad, alpha=0.01)


@scenario
def optimizer_and_schedule_passed_in() -> Trainer:
    model = gpt2()
    optimizer = Lion(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=9, cycle_momentum=False)

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) * 2

    return trainer(model=model, more={"optimizers": (optimizer, schedule), "compute_loss_func": loss}, **STEPS)


class Batches:
    """No DataLoader, but batches of random rows, and their number."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Any:
        for _ in range(5):
            yield collate(rows(4, seed=random.randrange(100)))


class OwnBatches(Trainer):  # type: ignore[misc]
    def get_train_dataloader(self) -> Any:
        return Batches()


@scenario
def batches_of_no_dataloader() -> Trainer:
    return trainer(OwnBatches, **EPOCHS)


class ScheduleFree(torch.optim.Optimizer):
    """SGD that averages, as the schedule-free optimizers: gradients are taken between the average and its own point."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "train_mode": False, "k": 0})

    def _move(self, group: dict[str, Any], weight: float) -> None:
        for p in group["params"]:
            if "z" in self.state[p]:
                p.data.lerp_(self.state[p]["z"], weight)

    def train(self) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                self._move(group, 0.1)
                group["train_mode"] = True

    def eval(self) -> None:
        for group in self.param_groups:
            if group["train_mode"]:
                self._move(group, 1 - 1 / 0.9)
                group["train_mode"] = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.detach().clone())
                    p.lerp_(z, 1 / group["k"]).add_(p.grad, alpha=group["lr"] * (0.9 * (1 - 1 / group["k"]) - 1))
                    z.sub_(p.grad, alpha=group["lr"])


@scenario
def schedule_free() -> Trainer:
    """It ends without an evaluation."""
    model = gpt2()
    optimizer = ScheduleFree(model.parameters(), 1e-2)
    return trainer(model=model, more={"optimizers": (optimizer, None)}, **{**STEPS, "eval_strategy": "no"})


@scenario
def schedule_free_best() -> Trainer:
    model = gpt2()
    optimizer = ScheduleFree(model.parameters(), 1e-2)
    return trainer(model=model, more={"optimizers": (optimizer, None)}, **STEPS, **BEST)


class Noisy(torch.optim.SGD):
    """Keeps what its `state_dict` leaves out: a counter, a generator, slow weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model.parameters(), lr=1e-2, momentum=0.9)
        self.calls, self.noise, self.slow = 0, torch.Generator().manual_seed(5), torch.zeros(())

    def step(self, closure: Any = None) -> None:
        super().step()
        self.calls += 1
        self.slow = 0.5 * self.slow + self.calls
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(1e-4 * self.slow * torch.randn(parameter.shape, generator=self.noise))


class Follows(TrainerCallback):
    """Holds the model's parameters, and changes arguments."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        args.max_grad_norm = 1.0 / state.global_step
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=True):
                average.lerp_(parameter, 0.1)
                parameter.lerp_(average, 0.1)


@scenario
def optimizer_schedule_hooks_and_arguments_with_state() -> Trainer:
    model, asked = gpt2(), [0, 0, 0]

    def rate(step: int) -> float:
        asked[0] += 1
        return 1 / asked[0]

    def turn(gradient: torch.Tensor) -> torch.Tensor:
        asked[1] += 1
        return gradient * (1 + asked[1] % 3)

    def damp(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        asked[2] += 1
        return output * (1 + 0.01 * asked[2])

    model.transformer.wpe.weight.register_hook(turn)
    model.lm_head.register_forward_hook(damp)
    optimizer = Noisy(model)
    more = {
        "optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)),
        "callbacks": [Follows(model)],
    }
    return trainer(model=model, more=more, **STEPS)


CALLS: int
"""Not there before the first step."""


class Counts(Trainer):  # type: ignore[misc]
    """Counts in its class, and weighs the loss by that and by the model's configuration."""

    seen = 0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        Counts.seen += model.training
        Counts.late = getattr(Counts, "late", 0) + 1  # what a class has only since training began
        global CALLS
        try:
            CALLS += 1
        except NameError:
            CALLS = 1
        loss = loss * (1 + 0.1 * Counts.seen + 0.01 * Counts.late + 0.02 * CALLS)
        loss = loss * getattr(model.config, "loss_scale", 1.0)
        return (loss, outputs) if return_outputs else loss


class Harder(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows that depend on a level, which stands in the class until a callback raises it."""

    level = 1

    def __len__(self) -> int:
        return 24

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        ids = [(number * self.level + place) % VOCABULARY for place in range(8)]
        return {"input_ids": ids, "labels": ids}


class Raises(TrainerCallback):
    """Changes the model's configuration, the data, a buffer that no checkpoint holds, and which weights are trained."""

    def __init__(self, data: Harder) -> None:
        self.data = data

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.data.level += 1
        model.config.loss_scale = 1 + 1 / state.global_step
        model.scale *= 1.05
        model.transformer.h[0].attn.requires_grad_(state.global_step not in range(2, 7))
        model.transformer.wpe.requires_grad_(state.global_step >= 4)


@scenario
def classes_configuration_and_buffers_with_state() -> Trainer:
    model, data = gpt2(), Harder()
    model.transformer.wpe.requires_grad_(False)
    model.register_buffer("scale", torch.ones(()), persistent=False)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * model.scale)
    return trainer(Counts, model=model, train=data, more={"callbacks": [Raises(data)]}, **STEPS)


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        yield from rows(20)


@scenario
def stream_longer_than_training() -> Trainer:
    return trainer(train=Stream(), **{**STEPS, "max_steps": 4, "eval_steps": 2}, gradient_accumulation_steps=1)


# TRL ----------------------------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = trainers.BpeTrainer(
        vocab_size=260, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["hello world"], learner)
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<eos>' }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", chat_template=template)


def llama(kind: Any = LlamaForCausalLM, **config: Any) -> Any:
    sizes = {"vocab_size": 260, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    special = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None, "attention_dropout": 0.1}
    return kind(LlamaConfig(**{**sizes, **heads, **special, **config}))


def saved(model: Any) -> Any:
    """The model, read from a directory: some trainers read it a second time, to refer to it."""
    path = Path(OUTPUT).parent.with_suffix(".model")
    model.save_pretrained(path)
    return type(model).from_pretrained(path)


def dataset(make: Callable[[int], dict[str, Any]], count: int = 24) -> Any:
    from datasets import Dataset

    return Dataset.from_list([make(number) for number in range(count)])


def pair(number: int) -> dict[str, Any]:
    return {"prompt": f"word {number} is", "chosen": f" good {number}" * 2, "rejected": f" bad {number % 5}"}


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@scenario
def sft_packed_lora() -> Trainer:
    from trl import SFTConfig, SFTTrainer

    args = arguments(SFTConfig, **{**STEPS, "max_steps": 6}, **BEST, packing=True, max_length=16)
    data = dataset(lambda n: {"text": f"line {n} says hello {n * n}"}, 40)
    return SFTTrainer(
        llama(), args, train_dataset=data, eval_dataset=data, processing_class=tokenizer(), peft_config=lora()
    )


@scenario
def sft_completion_only() -> Trainer:
    from trl import SFTConfig, SFTTrainer

    args = arguments(SFTConfig, **EPOCHS, completion_only_loss=True, max_length=24, gradient_accumulation_steps=2)
    data = dataset(lambda n: {"prompt": f"say {n}", "completion": f" yes {n}"})
    return SFTTrainer(llama(), args, train_dataset=data, eval_dataset=data, processing_class=tokenizer())


@scenario
def dpo_with_a_reference_that_follows() -> Trainer:
    from trl import DPOConfig, DPOTrainer

    sync = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    args = arguments(DPOConfig, **{**STEPS, "max_steps": 6}, **sync, max_length=32)
    set_seed(2)
    return DPOTrainer(
        llama(), llama(), args, train_dataset=dataset(pair), eval_dataset=dataset(pair, 8), processing_class=tokenizer()
    )


@scenario
def dpo_lora_precomputed() -> Trainer:
    from trl import DPOConfig, DPOTrainer

    args = arguments(DPOConfig, **EPOCHS, **BEST, precompute_ref_log_probs=True, max_length=32)
    data = {"train_dataset": dataset(pair), "eval_dataset": dataset(pair, 8)}
    return DPOTrainer(llama(), args=args, processing_class=tokenizer(), peft_config=lora(), **data)


@scenario
def reward() -> Trainer:
    from trl import RewardConfig, RewardTrainer

    args = arguments(RewardConfig, **{**STEPS, "max_steps": 6}, max_length=32, center_rewards_coefficient=0.01)
    model = llama(LlamaForSequenceClassification, num_labels=1)
    return RewardTrainer(
        model, args, train_dataset=dataset(pair), eval_dataset=dataset(pair, 8), processing_class=tokenizer()
    )


@scenario
def kto() -> Trainer:
    from trl import KTOConfig, KTOTrainer

    def row(number: int) -> dict[str, Any]:
        return {"prompt": f"word {number} is", "completion": f" thing {number}", "label": number % 3 > 0}

    args = arguments(KTOConfig, **{**STEPS, "max_steps": 6}, max_length=32)
    return KTOTrainer(
        llama(), llama(), args, train_dataset=dataset(row), eval_dataset=dataset(row, 8), processing_class=tokenizer()
    )


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(text.count(vowel) for vowel in "aeiou") + 0.01 * len(text) for text in completions]


@scenario
def grpo_buffered() -> Trainer:
    from trl import GRPOConfig, GRPOTrainer

    buffer = {"num_iterations": 2, "steps_per_generation": 4, "num_generations": 2, "max_completion_length": 6}
    args = arguments(GRPOConfig, max_steps=7, **buffer, beta=0.1, sync_ref_model=True, ref_model_sync_steps=2)
    data = dataset(lambda n: {"prompt": f"word {n} is"})
    return GRPOTrainer(saved(llama()), vowels, args, train_dataset=data, processing_class=tokenizer())


@scenario
def rloo_buffered() -> Trainer:
    from trl import RLOOConfig, RLOOTrainer

    buffer = {"num_iterations": 2, "steps_per_generation": 2, "num_generations": 2, "max_completion_length": 6}
    args = arguments(RLOOConfig, max_steps=6, **buffer, gradient_accumulation_steps=2, beta=0.1)
    data = dataset(lambda n: {"prompt": f"word {n} is"})
    return RLOOTrainer(saved(llama()), vowels, args, train_dataset=data, processing_class=tokenizer())


# Refused ------------------------------------------------------------------------------------------------------------


@scenario
def refused_group_by_length() -> Trainer:
    return trainer(**STEPS, train_sampling_strategy="group_by_length")


@scenario
def refused_adalora() -> Trainer:
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(init_r=4, target_r=2, tinit=2, tfinal=2, total_step=9, target_modules=["c_attn"])
    return trainer(model=get_peft_model(gpt2(), config), **STEPS)


@scenario
def refused_p_tuning() -> Trainer:
    from peft import PromptEncoderConfig, get_peft_model

    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8)
    return trainer(model=get_peft_model(gpt2(), config), **STEPS)


@scenario
def refused_two_active_adapters() -> Trainer:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["c_attn"])
    model = get_peft_model(gpt2(), config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    return trainer(model=model, **STEPS)


@scenario
def refused_adapter_of_transformers_own() -> Trainer:
    from peft import LoraConfig

    model = gpt2()
    model.add_adapter(LoraConfig(target_modules=["c_attn"]))
    return trainer(model=model, **STEPS)


class Unfreezes(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.base_model.model.lm_head.requires_grad_(state.global_step >= 2)


@scenario
def refused_weights_that_are_unfrozen_under_adapters() -> Trainer:
    from peft import LoraConfig, get_peft_model

    return trainer(
        model=get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn"])), more={"callbacks": [Unfreezes()]}, **STEPS
    )


class SavesElsewhere(Trainer):  # type: ignore[misc]
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write nothing where it was told to."""


@scenario
def unsaved_model() -> Trainer:
    return trainer(SavesElsewhere, **STEPS)


class Moments:
    """Holds what an optimizer could hold as tensors."""

    def __init__(self) -> None:
        self.count = 0


class KeepsObjects(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].setdefault("moments", Moments()).count += 1


@scenario
def unsaved_objects_of_an_optimizer() -> Trainer:
    model = gpt2()
    return trainer(model=model, more={"optimizers": (KeepsObjects(model.parameters(), lr=1e-2), None)}, **STEPS)


def main(name: str, directory: str, result: str, strike: str) -> None:
    global OUTPUT
    run = outlast.start(directory)
    OUTPUT = str(run.directory.checkpoints)
    set_seed(1)
    made = SCENARIOS[name]()
    struck = Strike(strike, run)
    made.add_callback(struck)
    output = run.train(made)
    state = made.state
    times = ("runtime", "per_second", "preparation_time")
    evaluations = [
        {key: value for key, value in entry.items() if not any(time in key for time in times)}
        for entry in state.log_history
        if any(key.startswith(("eval_", "probe_")) for key in entry)
    ]
    found = {"steps": state.global_step, "epoch": state.epoch, "best": [state.best_global_step, state.best_metric]}
    found |= {"losses": [entry["loss"] for entry in state.log_history if "loss" in entry], "loss": output.training_loss}
    Path(result).write_text(json.dumps({**found, "evaluations": evaluations, "events": struck.attempt.count}))


if __name__ == "__main__":
    main(*sys.argv[1:])
