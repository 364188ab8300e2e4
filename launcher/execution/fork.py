"""Finds what a fork begins with, and copies it into its run directory, whole or not at all."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from outlast.checkpoint.listing import check_listing, write_listing
from outlast.checkpoint.manifest import Sealed, check_files, write_manifest
from outlast.config.configuration import Config, load
from outlast.deletion import delete
from outlast.errors import CheckpointError, ConfigError
from outlast.files import staged_directory
from outlast.results.evaluations import weights_digest
from outlast.rundir import ancestry
from outlast.rundir.ancestry import Ancestry
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.storage.budget import gb

from ..planning.compose import parsed
from ..planning.fork import Fork, check_same, configured, exactness, has_same_data, refuse_other_training
from ..runs.chosen import chosen, kept
from ..runs.find import is_named, run_named


def compose_fork(
    text: str, overrides: Sequence[str], *, config_dir: Path | None, optimizer: bool
) -> tuple[Config, Fork | None, list[str]]:
    """The configuration of a fork, what it takes over, and how exact that is, in words.

    Args:
        text: `RUN`, or `RUN@` and `final`, `best`, `newest` or a step.
        optimizer: take over the optimizer, the schedule and the position in the data too.

    Returns:
        No fork where the run has begun already, and so has taken over what it needs.

    Raises:
        ConfigError: there is no such run or checkpoint, or the run to be made is refused.
    """
    values = {str(one.key_or_group): one.value() for one in map(parsed, overrides) if not one.is_sweep_override()}
    if not values.get("run.name"):
        raise ConfigError("run.name", values.get("run.name"), "valid: a name for the new run, as in run.name=second")
    root = Path(str(values.get("run.root", "runs"))).expanduser()
    target = RunDirectory(root.absolute() / str(values["run.name"]))
    name, at, which = text.rpartition("@")
    if not at or is_named(text, root):
        name, which = text, ""
    if target.config.is_file() and has_begun(target):
        record = ancestry.required(target)
        if record is None or record.run != Path(name).name or record.optimizer != optimizer:
            made = f"began with {record.words}" if record else "began by itself"
            raise ConfigError("run.name", target.path.name, f"that run {made}; choose another run.name")
        if which.isdecimal() and int(which) != record.step:
            raise ConfigError("--from", text, f"{target.path.name} began with {record.words}; choose another run.name")
        return configured(target, overrides, config_dir, target=target), None, []
    source = run_named(name, root)
    if not source.config.is_file():
        raise ConfigError("--from", text, "valid: a run of `outlast train`; a script loads the weights by itself")
    if source.path.resolve() == target.path.resolve():
        raise ConfigError("run.name", target.path.name, "that is the run it is to begin with; valid: another name")
    config, before = configured(source, overrides, config_dir, target=target), load(source.config)
    check_same(before, config, source.path.name)
    if config.job.name != "sft" and not optimizer:
        raise ConfigError("--from", text, f"job={config.job.name} does not load weights alone; valid: with --optimizer")
    if config.job.name == "sft" and config.model.kind == "tiny" and not (source.prepared / "model").is_dir():
        raise ConfigError("--from", text, f"{source.prepared / 'model'} is gone, with the tokenizer of its weights")
    found = chosen(source, which or ("newest" if optimizer else None), key="--from", whole=optimizer)
    if optimizer:
        refuse_other_training(before, config, found.manifest)
    fork = _fork(source, found, optimizer=optimizer, same_data=optimizer and has_same_data(before, config))
    if fork.bytes > config.storage.budget_bytes:
        valid = f"valid: more than the {gb(fork.bytes)} that it begins with"
        raise ConfigError("storage.budget_gb", config.storage.budget_gb, valid)
    return config, fork, exactness(before, config, found, fork)


def _fork(source: RunDirectory, found: Sealed, *, optimizer: bool, same_data: bool) -> Fork:
    """Take what is needed.

    Raises:
        ConfigError: the checkpoint has no optimizer.
    """
    sealed = kept(source)
    if optimizer and (found.light or found.path.name == "final"):
        steps = ", ".join(str(one.step) for one in sealed if not one.light)
        valid = f"it has no optimizer; valid with --optimizer: {steps or 'no checkpoint of this run'}"
        raise ConfigError("--from", found.path.name, valid)
    before = ancestry.read(source)
    older = [{key: value for key, value in asdict(before).items() if key != "ancestors"}] if before else []
    made = Ancestry(
        run=source.path.name,
        path=str(source.path),
        checkpoint=found.path.name,
        step=found.step,
        weights=weights_digest(found.manifest.files),
        optimizer=optimizer,
        ancestors=older + (before.ancestors if before else []),
    )
    best = [one for one in sealed if optimizer and one.step == found.manifest.best_step != found.step]
    return Fork(made, source, [*best, found], same_data)


def has_begun(run: RunDirectory) -> bool:
    """Whether an attempt of the run has begun, by its ledger or by a checkpoint of its own."""
    record = ancestry.required(run)
    last = record.step if record is not None and record.optimizer else -1
    return bool(Ledger(run.ledger).read()) or (record is not None and any(one.step > last for one in kept(run)))


def carry_over(fork: Fork, run: RunDirectory) -> None:
    """Note the ancestry, then copy weights, or checkpoints with all training state; or leave nothing of it.

    If it is killed, the ancestry without a `config.yaml` says that what is there may be copied again.

    Raises:
        ConfigError: what was copied is not what the other run has saved: it has changed meanwhile.
        OSError: it can't be read or written.
    """
    if has_begun(run):
        raise ConfigError("run.name", run.path.name, "it has begun meanwhile; the same command again resumes it")
    _clear(run)
    ancestry.write(run, fork.ancestry)
    try:
        _copy(fork, run)
    except BaseException as error:
        _clear(run)
        if isinstance(error, FileNotFoundError | CheckpointError):
            raise ConfigError(
                "--from", fork.ancestry.run, f"what is to be copied is gone, or is not what was written: {error}"
            ) from None
        raise


def _clear(run: RunDirectory) -> None:
    """Remove what was taken over from another run, the ancestry last; of a run that took over nothing, nothing."""
    if (record := run.path / ancestry.ANCESTRY).exists():
        for path in (*run.checkpoints.glob("checkpoint-*"), run.prepared, record):
            delete(path, inside=run.path)


def _copy(fork: Fork, run: RunDirectory) -> None:
    for checkpoint in fork.checkpoints:
        whole = fork.ancestry.optimizer
        target = run.checkpoints / checkpoint.path.name if whole else run.prepared / ancestry.START
        names = [name for one, name in fork.files if one is checkpoint]
        with staged_directory(target) as staged:
            for name in names:
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint.path / name, staged / name)
            check_files(staged, {name: checkpoint.manifest.files[name] for name in names})
            if whole:
                write_manifest(staged, checkpoint.manifest)
            else:
                write_listing(staged)
    names = ["model", *(["data", "source.json"] if fork.same_data else [])]
    for path in (fork.source.prepared / name for name in names):
        if path.is_dir():
            with staged_directory(run.prepared / path.name) as staged:
                shutil.copytree(path, staged, dirs_exist_ok=True)
                check_listing(staged)
        elif path.is_file():
            run.prepared.mkdir(exist_ok=True)
            shutil.copyfile(path, run.prepared / path.name)
