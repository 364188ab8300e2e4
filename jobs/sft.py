"""Fine-tunes a language model under supervision (`job=sft`), with TRL's SFTTrainer and PEFT.

What is prepared once for all attempts stands in `prepared/` of the run directory: the model built by `model=tiny`, and
the tokenized, packed data. A resumed attempt reads it and tokenizes nothing.
"""

from typing import TYPE_CHECKING, Any

from outlast.config.cluster import LocalCluster
from outlast.config.configuration import Config
from outlast.config.model import TinyModel
from outlast.errors import ConfigError, OutlastError, ResumeRefusedError
from outlast.files import staged_directory
from outlast.ranks.meeting import use_private_store

from .training import beginning, chat, data, deepspeed, left_out, models, prepared, source, trainer_arguments

if TYPE_CHECKING:
    from outlast import Run
    from outlast.storage.budget import Footprint


def check(config: Config) -> None:
    """Refuse, before anything starts, what this job would not accept (ConfigError)."""
    if not (spared := source.spared(config)):
        data.check(config)  # first: it imports nothing heavy
    models.check(config)
    trainer_arguments.check(config)
    _check_gpus(config)
    deepspeed.check(config)
    source.check(config, source.digests(config))
    if not spared and (tokenizer := models.known_tokenizer(config)) is not None:
        chat.check_plan(config, tokenizer)


def _check_gpus(config: Config) -> None:
    import torch

    gpus = config.parallel.gpus_per_rank
    if gpus and isinstance(config.cluster, LocalCluster) and not torch.cuda.is_available():
        raise ConfigError("parallel.gpus_per_rank", gpus, "valid on this machine: 0; torch sees no GPU")


def footprint(config: Config) -> "Footprint":
    """Estimate the bytes that the run will write; no model is allocated.

    Raises:
        Exception: the model's configuration or tokenizer can't be read.
    """
    from .estimate import footprint

    return footprint.footprint(config)


def training(config: Config) -> dict[str, Any]:
    """Describe the training for the plan: rows of a forward pass, accumulation, DeepSpeed's configuration, hazards."""
    trainer = trainer_arguments.with_defaults(config)
    of_data = [source.SPARED] if source.spared(config) else [*data.notes(config), *left_out.foreseen(config)]
    values = {
        "micro_batch": trainer["per_device_train_batch_size"],
        "accumulation": trainer["gradient_accumulation_steps"],
        "hazards": [*trainer_arguments.hazards(config), *of_data],
    }
    return values | ({"deepspeed": deepspeed.resolved(config)} if config.parallel.zero_stage else {})


def changes(config: Config) -> list[tuple[str, Config]]:
    """List what would make the run write less: each change as it would be typed, and the configuration with it."""
    from .estimate import footprint

    return footprint.changes(config)


def main(run: "Run", config: Config) -> None:
    """Train, from where the run stands, to its end; every rank calls it."""
    from trl import SFTTrainer

    use_private_store()
    extra = deepspeed.prepare(config) if config.parallel.zero_stage else {}
    args = trainer_arguments.sft_config(config, run.directory.checkpoints, **extra)
    base, tokenized = run.directory.prepared / "model", run.directory.prepared / "data"

    run.collectives.on_rank_0(lambda: prepared.verify(run.directory), ResumeRefusedError)
    made_of, notes = _notice_changed_data(run, config), list[str]()
    train: Any
    evaluation: Any
    train, evaluation = _first(run, lambda: prepared.load(tokenized)) or (None, None)
    raw = train is None
    if raw:
        train, evaluation = data.load(config, notes.append)
        if isinstance(config.model, TinyModel) and run.rank == 0 and not base.is_dir():
            run.say("building the model and its tokenizer")
            texts = data.texts(train)
            with staged_directory(base) as directory:
                models.prepare_tiny(config, texts, directory)
        run.collectives.barrier()
    else:
        prepared.reuse(args)

    model, tokenizer = models.load(config, base)
    splits = {"train": train} | ({} if evaluation is None or args.eval_strategy == "no" else {"eval": evaluation})
    try:
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=splits.get("eval"),
            processing_class=tokenizer,
            peft_config=models.peft_config(config),
        )
    except Exception:
        chat.check(config, tokenizer, chat.all_rows(config))  # if it was a row, this names it
        raise
    if raw:
        made = {"train": trainer.train_dataset} | ({"eval": trainer.eval_dataset} if "eval" in splits else {})
        notes += left_out.notes(config, args, splits, made)
        _say(run, len(train), notes)
        run.check_budget("prepared data", prepared.size(trainer.train_dataset, trainer.eval_dataset))
        if run.rank == 0:
            prepared.save(tokenized, trainer.train_dataset, trainer.eval_dataset)
            source.keep(run.directory, made_of)
    beginning.load(run, trainer, config)
    run.train(trainer)


def _notice_changed_data(run: "Run", config: Config) -> dict[str, str]:
    """Refuse or forget what was prepared from files that have changed; return their digests.

    Raises:
        ResumeRefusedError: they have changed since a checkpoint was made.
    """

    def look() -> dict[str, str]:
        found = source.digests(config)
        source.check(config, found)
        if source.spared(config):
            run.say(f"WARNING: {source.SPARED}")
        if source.clear_changed(run.directory, found):
            run.say("WARNING: the data has changed since it was prepared: it is prepared anew")
        return found

    found: dict[str, str] = run.collectives.on_rank_0(look, ResumeRefusedError)
    run.describe(source=found or None)
    return found


def _say(run: "Run", rows: int, notes: list[str]) -> None:
    """Write down what of the data is trained on."""
    run.record("data", rows=rows, notes=notes)
    for note in notes:
        run.say(f"WARNING: {note}")


def _first(run: "Run", load: Any) -> Any:
    """Load on every rank if rank 0 finds something: a late rank must not find what rank 0 has written since."""
    found = load() if run.rank == 0 else None
    if not run.collectives.from_rank_0(found is not None):
        return None
    if run.rank != 0:
        found = load()
        if found is None:
            raise OutlastError(f"{run.directory.prepared}: rank 0 sees the prepared data, rank {run.rank} does not")
    return found
