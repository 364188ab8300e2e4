"""Gives a Trainer back as it was before a run trained with it: its methods, callbacks and settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer

SETTINGS = ("output_dir", "save_strategy", "save_total_limit", "eval_on_start")
"""The arguments that a run sets to values of its own while it trains."""


@contextmanager
def given_back(trainer: "Trainer") -> Iterator[None]:
    """Undo at the end what a run has replaced in `trainer`."""
    own, settings = dict(vars(trainer)), {name: getattr(trainer.args, name) for name in SETTINGS}
    handler = trainer.callback_handler
    own_of_handler = dict(vars(handler))
    try:
        yield
    finally:
        for owner, before in ((trainer, own), (handler, own_of_handler)):
            for name in list(vars(owner)):
                if callable(getattr(type(owner), name, None)):  # a method, hidden by an attribute
                    setattr(owner, name, before[name]) if name in before else delattr(owner, name)
        handler.callbacks[:] = [one for one in handler.callbacks if type(one).__module__.split(".")[0] != "outlast"]
        for name, value in settings.items():
            setattr(trainer.args, name, value)
