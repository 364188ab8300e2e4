"""Gives a run the weights of another that it begins with, where none of its own checkpoints has newer ones."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from outlast.checkpoint import digests
from outlast.checkpoint.listing import check_listing
from outlast.checkpoint.manifest import read_manifest
from outlast.config.configuration import Config
from outlast.errors import CheckpointError, ResumeRefusedError
from outlast.results.evaluations import weights_digest
from outlast.rundir import ancestry
from outlast.rundir.ancestry import START
from outlast.rundir.directory import RunDirectory

from .prepared import begin_again

if TYPE_CHECKING:
    from outlast import Run


def load(run: "Run", trainer: Any, config: Config) -> None:
    """Load the weights that the run begins with, if it does; every rank calls it.

    Raises:
        ResumeRefusedError: they are not there, or not what was copied.
        OSError: they can't be read just now.
    """
    from outlast.huggingface.finished import load_into
    from outlast.huggingface.frozen_weights import shortened
    from outlast.huggingface.loaded import different

    restart = "restart" in config.checkpoint.allow
    words = run.collectives.on_rank_0(lambda: _to_load(run.directory, restart), ResumeRefusedError, OSError)
    if words is None:
        return
    run.say(f"beginning with {words}")
    start = run.directory.prepared / START
    load_into(trainer, start)
    if wrong := different(trainer.model, digests.read(start, 0)):
        raise ResumeRefusedError(
            f"{start}: {shortened(wrong)} differ from what was in memory when {words} was saved; is the base model "
            "under adapters the one that they were trained on?"
        )


def _to_load(run: RunDirectory, restart: bool) -> str | None:
    """What the run begins with, in words; None if nothing is to be loaded. One rank decides it for all.

    Args:
        restart: the run may begin anew although it has checkpoints.
    """
    start = run.prepared / START
    try:
        made = ancestry.required(run)
    except CheckpointError as error:
        raise ResumeRefusedError(f"{error}. Put it back, or begin anew with another run.name") from None
    if made is None and start.is_dir():
        why = f"{run.path / ancestry.ANCESTRY}, which says what they are, is not"
        raise ResumeRefusedError(f"{start} holds weights to begin with, and {why}. Put it back, or remove {start}")
    if made is None or made.optimizer or (not restart and _has_checkpoint(run)):
        return None
    if not start.is_dir():
        raise ResumeRefusedError(
            f"{start} is gone, with the weights of {made.words} that this run begins with; {begin_again(made)}"
        )
    try:
        files = check_listing(start)
    except CheckpointError as error:
        raise ResumeRefusedError(f"{start} is not what was copied: {error}; {begin_again(made)}") from None
    if weights_digest(files) != made.weights:
        raise ResumeRefusedError(f"{start} holds other weights than those of {made.words}; {begin_again(made)}")
    return made.words


def _has_checkpoint(run: RunDirectory) -> bool:
    """Whether a resume loads a checkpoint of this run, or refuses: its weights then replace any others."""
    for path in run.checkpoints.glob("checkpoint-*"):
        with suppress(CheckpointError):
            if not read_manifest(path).light:
                return True
    return False
