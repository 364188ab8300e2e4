"""Estimates, before anything runs, the bytes that a run of a Hugging Face Trainer will write.

The model is built on the meta device, its adapters applied by PEFT there: parameters are counted exactly, in no memory.
What is made of them stands in `file_sizes.py`; `benchmarks/footprint.py` compares the estimate with real bytes.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from outlast.config.configuration import Config
from outlast.config.model import Lora, NoPeft, PretrainedModel, TinyModel
from outlast.files import bytes_used
from outlast.rundir.directory import RunDirectory
from outlast.storage.budget import Footprint

from ..training import models, source, trainer_arguments
from . import dataset_size, file_sizes, parameters

if TYPE_CHECKING:
    import torch

LOG_ENTRY, EVAL_ENTRY, STATE = 340, 420, 900
"""Bytes of an entry of `trainer_state.json` for a logged step and for an evaluation, and of its rest (TRL 1.16)."""
MANIFEST, MANIFEST_FILE = 900, 130
"""Bytes of a manifest without entries, and of an entry."""
DIGESTS, DIGEST = 2_500, 22
"""Bytes of `digests.json` without its tensors, and of a tensor's line beyond its name."""
DEEPSPEED_ARGUMENTS = 1_100
"""Bytes that DeepSpeed's configuration adds to `training_args.bin`."""
SHARD = 50_000_000_000
"""Above this, transformers cuts weights into several files (`save_pretrained`, `max_shard_size`)."""
LINE, RECORDS = 300, 131_072
"""Bytes of a line of a log or of the ledger, and of all other records of a run."""
TOKENIZER_TOKEN = 72
"""Bytes of `tokenizer.json` per token of `model=tiny`, above the first 300 (measured: 62 to 72, growing)."""


def footprint(config: Config, *, zero_stage: int | None = None) -> Footprint:
    """Estimate the bytes of a run of `job=sft`, part by part; its configuration has been checked.

    Args:
        zero_stage: of DeepSpeed's ZeRO, 0 without DeepSpeed; left out, it is that of `parallel`. With stage 3 the
            weights are gathered when they are saved (`stage3_gather_16bit_weights_on_model_save`).

    Raises:
        OSError, ValueError: the model's configuration or tokenizer can't be read.
    """
    ranks, gpus = config.parallel.world_size, config.parallel.gpus_per_rank * config.parallel.ranks_per_node
    zero_stage = config.parallel.zero_stage if zero_stage is None else zero_stage
    half = _half(config) if zero_stage else None
    with file_sizes.quiet(), _no_logging():
        args, run = _arguments(config), RunDirectory(config.directory)
        if isinstance(config.model, PretrainedModel):
            tokenizer, tokens = _tokenizer(str(config.model.path), config.model.trust_remote_code)
        else:
            tokenizer, tokens = None, _tiny_tokenizer_bytes(config, run)
        describing = _describing_bytes(_key(config))
        saved, optimizer, copies, digests, notes = _learned(_key(config), zero_stage, half, ranks)
        data = _prepared(config) if source.spared(config) else dataset_size.estimate(config, tokenizer)
        total = dataset_size.optimizer_steps(config, data)
        small = describing + file_sizes.torch_file(args) + (DEEPSPEED_ARGUMENTS if zero_stage else 0)
        final = {"weights": saved, "tokenizer": tokens, "small files": small}
        logged, evaluated = _entries(config, total)
        checkpoint = {
            "weights": saved,
            "optimizer": optimizer,
            "DeepSpeed's copy of the weights": copies,
            "random states": ranks * file_sizes.random_states(gpus),
            "schedule": _schedule_bytes(args),
            "trainer state": STATE + logged * LOG_ENTRY + evaluated * EVAL_ENTRY,
            "tokenizer": tokens,
            "small files": small + (file_sizes.DEEPSPEED_SCRIPTS if zero_stage else 0),
            "digests": digests,
            "manifest": MANIFEST + MANIFEST_FILE * (12 + ranks * (1 + bool(zero_stage) + (zero_stage == 3))),
        }
    fixed = {"records and logs": RECORDS + LINE * (logged + evaluated) + 16_384 * ranks}
    if isinstance(config.model, TinyModel):
        fixed["prepared model"] = _tiny_bytes(config) + tokens
    if data is not None:
        fixed["prepared data"] = dataset_size.prepared_bytes(config, data)
    else:
        notes = (*notes, "the size of the prepared data is not known before the dataset has been read")
    if run.prepared.is_dir():  # a run that has begun: what is there is known
        fixed["prepared model"] = bytes_used(run.prepared / "model")
        fixed["prepared data"] = bytes_used(run.prepared / "data") or fixed.get("prepared data", 0)
    used = {part: size for part, size in checkpoint.items() if size}
    final["manifest"] = MANIFEST + 10 * MANIFEST_FILE
    return Footprint(checkpoint=used, final=final, fixed=fixed, notes=notes)


def _prepared(config: Config) -> dataset_size.DatasetSize:
    """The size of data that is prepared already."""
    size = bytes_used(RunDirectory(config.directory).prepared / "data")
    return dataset_size.DatasetSize(source.prepared_rows(config), size // dataset_size.BYTES_OF_TOKEN)


def changes(config: Config) -> list[tuple[str, Config]]:
    """List what would make the run write less, as it would be typed, the least intrusive change first."""
    found: list[tuple[str, Config]] = []
    optimizer = config.trainer.get("optim", "adamw_torch_fused")
    if isinstance(config.model, PretrainedModel) and config.model.dtype in ("auto", "float32"):
        found.append(("model.dtype=bfloat16", replace(config, model=replace(config.model, dtype="bfloat16"))))
    if optimizer != "adafactor":
        found.append(("trainer.optim=adafactor", replace(config, trainer=config.trainer | {"optim": "adafactor"})))
    if isinstance(config.peft, NoPeft):
        head = ["lm_head"] if isinstance(config.model, TinyModel) else None  # as conf/peft/lora/tiny.yaml has it
        found.append(("peft=lora", replace(config, peft=Lora(modules_to_save=head))))
        return found
    if config.peft.modules_to_save:
        found.append(("peft.modules_to_save=null", replace(config, peft=replace(config.peft, modules_to_save=None))))
    if config.peft.r > 8:
        found.append(("peft.r=8", replace(config, peft=replace(config.peft, r=8))))
    return found


# Weights and optimizer ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Key:
    """The values that weights and optimizer depend on; the cells of a sweep often share them."""

    text: str
    config: Config = field(compare=False)


def _key(config: Config) -> _Key:
    values, trainer = config.identity(), config.trainer
    chosen = [values["model"], values["peft"], trainer.get("optim"), trainer.get("optim_args")]
    return _Key(json.dumps(chosen, sort_keys=True, default=str), config)


@lru_cache(maxsize=16)
def _learned(
    key: _Key, zero_stage: int, half: "torch.dtype | None", ranks: int
) -> tuple[int, int, int, int, tuple[str, ...]]:
    """Return the bytes of the saved weights, the optimizer's state, DeepSpeed's copy and the digests; and notes."""
    found = parameters.collect(key.config, zero_stage, half)
    size = file_sizes.safetensors_file(found.saved)
    digests = (
        DIGESTS
        + ranks * 250
        + sum(
            (len(name) + DIGEST) * (1 + p.requires_grad)
            for name, p in found.model.named_parameters(remove_duplicate=False)
        )
    )
    digests += sum(len(name) + DIGEST for name in found.saved) if zero_stage == 3 else 0
    if size > SHARD:
        size += 150 * len(found.saved)  # the index
    name, notes = str(_arguments(key.config).optim.value), []
    if name.endswith("8bit") and "torch" not in name and "galore" not in name:
        optimizer = file_sizes.optimizer_8bit(name, found.groups) + 3 * 2 * found.embeddings
        return size, optimizer, 0, digests, ("the optimizer's 8-bit state is counted by a formula",)
    try:
        from transformers import Trainer

        cls, arguments = Trainer.get_optimizer_cls_and_kwargs(_arguments(key.config))
        if zero_stage:
            shards = {"stage": zero_stage, "ranks": ranks}
            zero = file_sizes.zero_files(found.model, found.module, found.groups, cls, arguments, **shards)
            return size, *zero, digests, ()
        return size, file_sizes.torch_file(file_sizes.stepped(found.groups, cls, arguments)), 0, digests, ()
    except Exception as error:  # optimizers that need a GPU, a package that is not here, or the real model
        notes.append(f"the state of trainer.optim={name} is taken to be AdamW's: it can't be counted here ({error})")
        numel = sum(file_sizes.numel(shape) for group in found.groups for shape, _ in group)
        copies = sum(t.numel() * t.element_size() for t in found.module.values()) if zero_stage in (1, 2) else 0
        return size, (12 if zero_stage else 8) * numel, copies, digests, tuple(notes)


def _half(config: Config) -> "torch.dtype | None":
    """Return the type that DeepSpeed gives the module: that of mixed precision, or none."""
    import torch

    trainer = config.trainer
    if trainer.get("fp16"):
        return torch.float16
    wanted = trainer.get("bf16", None)
    return torch.bfloat16 if wanted or (wanted is None and config.parallel.gpus_per_rank) else None


# The rest -------------------------------------------------------------------------------------------------------


def _arguments(config: Config) -> Any:
    """Make the Trainer's arguments without a GPU and without a process group."""
    import torch
    from trl import SFTConfig

    dry = type("DrySFTConfig", (SFTConfig,), {"device": property(lambda _: torch.device("cpu"))})
    values = trainer_arguments.as_arguments(config, RunDirectory(config.directory).checkpoints, cuda=False, bf16=False)
    args = dry(**{key: value for key, value in values.items() if key not in ("tf32", "bf16", "fp16")})
    args.__class__ = SFTConfig  # so that it can be pickled
    return args


def _schedule_bytes(args: Any) -> int:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))] * 1, lr=0.1)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    try:
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, args.lr_scheduler_kwargs)
    except (TypeError, ValueError):  # one that wants more than that
        return 2_000
    return file_sizes.torch_file(schedule.state_dict())


def _entries(config: Config, total: int | None) -> tuple[int, int]:
    """Return how many log lines and evaluations the whole run makes."""
    trainer, steps = config.trainer, total or 10_000
    every = trainer.get("logging_steps", 10)
    logged = steps / every if every >= 1 else 1 / every
    evaluated = 0.0
    if trainer.get("eval_strategy") == "steps":
        every = trainer.get("eval_steps") or every
        evaluated = steps / every if every >= 1 else 1 / every
    elif trainer.get("eval_strategy") == "epoch":
        evaluated = trainer.get("num_train_epochs", 3)
    return int(logged) + 1, int(evaluated) + 1


@lru_cache(maxsize=4)
def _tokenizer(path: str, trust: bool) -> tuple[Any, int]:
    """Load the tokenizer of a pretrained model; return it and its bytes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    return tokenizer, file_sizes.written(tokenizer.save_pretrained)


def _tiny_tokenizer_bytes(config: Config, run: RunDirectory) -> int:
    """Return the bytes of a tiny model's tokenizer, which may not exist yet."""
    made = run.prepared / "model" / "tokenizer.json"
    if made.is_file():
        return made.stat().st_size + 700
    assert isinstance(config.model, TinyModel)
    return 9_000 + TOKENIZER_TOKEN * (config.model.vocab_size - 300)


@lru_cache(maxsize=16)
def _describing_bytes(key: _Key) -> int:
    """Return the bytes of what describes the model (its two configurations), or the adapter (configuration, card)."""
    model, adapter = parameters.base_model(key.config), models.peft_config(key.config)
    if adapter is None:
        return file_sizes.written(model.config.save_pretrained, model.generation_config.save_pretrained)
    adapted = parameters.adapted(model, adapter)
    return file_sizes.written(adapted.create_or_update_model_card, adapter.save_pretrained)


def _tiny_bytes(config: Config) -> int:
    return file_sizes.safetensors_file(parameters.base_model(config).state_dict()) + 1_000


@contextmanager
def _no_logging() -> Iterator[None]:
    """Drop what libraries log while a plan is made."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
