"""Has callbacks' `on_save` run while a checkpoint is written, so that what they write is sealed with it."""

from pathlib import Path
from typing import TYPE_CHECKING

from . import random_state

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


def leave_out_on_save(trainer: "Trainer") -> None:
    """Have `trainer` not call `on_save` after a save: :func:`call_on_save` has done so, an emergency save included."""

    def saved(args: "TrainingArguments", state: "TrainerState", control: "TrainerControl") -> "TrainerControl":
        control.should_save = False
        return control

    trainer.callback_handler.on_save = saved


def call_on_save(trainer: "Trainer", staged: Path) -> None:
    """Call the callbacks' `on_save`, with the staging area as `args.output_dir`.

    The random numbers that they draw don't count: an interrupted run saves more often.
    """
    args, handler, before = trainer.args, trainer.callback_handler, random_state.capture()
    output, args.output_dir = args.output_dir, str(staged.parent)
    try:
        trainer.control = type(handler).on_save(handler, args, trainer.state, trainer.control)
    finally:
        args.output_dir = output
        random_state.restore(before)
