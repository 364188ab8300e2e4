"""The cases of `footprint.py`, and what runs of each in processes of its own: the estimate, and a real run."""

import json
import os
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

RANKS = 2
"""With ZeRO."""
TINY = {"kind": "tiny", "vocab_size": 2048, "hidden_size": 128, "layers": 3, "heads": 4, "max_length": 128}
TEXTS = [{"text": f"Sentence number {i} of a text that is not long. " * 4} for i in range(16)]


@dataclass(frozen=True)
class Case:
    """One way to train."""

    parallel: str
    """`one` rank, or `zero1` to `zero3`."""
    peft: str
    dtype: str
    optim: str

    @property
    def name(self) -> str:
        return f"{self.parallel} {self.peft} {self.dtype} {self.optim}"

    @property
    def stage(self) -> int:
        return int(self.parallel[-1]) if self.parallel.startswith("zero") else 0

    def config(self, scratch: Path) -> Any:
        from outlast.config import configuration as config

        trainer: dict[str, Any] = {"optim": self.optim, "max_steps": 1, "max_length": 64, "logging_steps": 1}
        trainer |= {"report_to": "none", "gradient_checkpointing": False, "per_device_train_batch_size": 2}
        trainer |= {"optim_args": "momentum=0.9"} if self.optim == "sgd" else {}
        trainer |= {"bf16": True} if self.stage and self.dtype == "bf16" else {}
        data = scratch / "train.jsonl"
        return config.build(
            {
                "run": {"root": str(scratch), "name": self.name.replace(" ", "-")},
                "model": {
                    "kind": "pretrained",
                    "path": str(scratch / "model"),
                    "dtype": {"bf16": "bfloat16", "fp32": "float32"}[self.dtype],
                },
                "data": {"kind": "jsonl", "train": str(data)},
                "peft": {"kind": self.peft},
                "parallel": {"ranks_per_node": RANKS if self.stage else 1},
                "trainer": trainer,
            }
        )


def cases(pattern: str) -> list[Case]:
    """Those whose name begins with `pattern`."""
    every = product(("one", "zero1", "zero2", "zero3"), ("lora", "none"), ("fp32", "bf16"), ("adamw_torch", "sgd"))
    more = [Case("one", peft, "fp32", optim) for peft in ("lora", "none") for optim in ("adafactor", "rmsprop")]
    return [case for case in (*(Case(*values) for values in every), *more) if case.name.startswith(pattern)]


def prepare(scratch: Path) -> None:
    """The model that all cases start from, and the data."""
    from outlast.config import configuration as config
    from outlast.jobs.training import models

    (scratch / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    texts = (row["text"] for row in TEXTS)
    models.prepare_tiny(config.build({"model": TINY}), texts, scratch / "model")


def estimate(case: Case, scratch: Path) -> None:
    """What the plan would say."""
    from outlast.jobs.estimate import footprint

    found = footprint.footprint(case.config(scratch), zero_stage=case.stage)
    (scratch / "estimate.json").write_text(json.dumps(found.as_dict()))


def train(case: Case, scratch: Path, rank: int, port: int) -> None:
    """One rank of a real run, to its end: a checkpoint and the finished model."""
    ranks = RANKS if case.stage else 1
    os.environ["OMP_NUM_THREADS"] = "1"
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import outlast

    if case.stage:  # before anything builds a state; with use_cpu DeepSpeed would be ignored
        os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    import torch
    import transformers.training_args
    from accelerate import PartialState
    from datasets import Dataset
    from trl import SFTTrainer

    from outlast.jobs.training import models, trainer_arguments
    from outlast.jobs.training.deepspeed import SHARED_MEMORY

    torch.set_num_threads(1)
    config = case.config(scratch)
    extra: dict[str, Any] = {}
    if case.stage:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__[SHARED_MEMORY] = False  # it would be compiled first, and no training uses it
        PartialState(backend="gloo")
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # it trains, here on a CPU
        extra = {
            "deepspeed": _deepspeed(case),
            "accelerator_config": {"use_configured_state": True},
            "use_cpu": False,
            "ddp_backend": None,
        }
    run = outlast.start(config.directory, every=1)
    model, tokenizer = models.load(config, scratch / "model")
    trainer = SFTTrainer(
        model=model,
        args=trainer_arguments.sft_config(config, run.directory.checkpoints, **extra),
        train_dataset=Dataset.from_list(TEXTS),
        processing_class=tokenizer,
        peft_config=models.peft_config(config),
    )
    run.train(trainer)
    sys.stdout.flush()
    os._exit(0)  # process groups that are still there have nothing to say


def _deepspeed(case: Case) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": case.stage}
    if case.stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": case.dtype == "bf16"},
    }
