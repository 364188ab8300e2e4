"""Finds the trackers among a Trainer's callbacks, and has each see one run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .gate import Gate, Tracker

if TYPE_CHECKING:
    from transformers import Trainer

    from outlast.attempt.attempt import RankAttempt

KNOWN = ("tensorboard", "wandb", "mlflow", "trackio")


@contextmanager
def tracked(run: "RankAttempt", trainer: "Trainer") -> Iterator[None]:
    """Have each tracker among the callbacks of `trainer` see one run while it trains; rank 0 alone logs."""
    gates = []
    for callback in trainer.callback_handler.callbacks if run.rank == 0 else ():
        if (tracker := _tracker(run, callback)) is not None:
            gates.append(Gate(run, callback, tracker))
    try:
        yield
    finally:
        for gate in gates:
            gate.open()


def _tracker(run: "RankAttempt", callback: Any) -> Tracker | None:
    from transformers import integrations

    if isinstance(callback, integrations.TensorBoardCallback):
        from .tensorboard import TensorBoard

        return TensorBoard(run, callback)
    if isinstance(callback, integrations.WandbCallback):
        from .wandb import Wandb

        return Wandb(run, callback)
    if isinstance(callback, integrations.MLflowCallback):
        from .mlflow import Mlflow

        return Mlflow(run, callback)
    if isinstance(callback, integrations.TrackioCallback):
        from .trackio import Trackio

        return Trackio(run, callback)
    if type(callback) in integrations.INTEGRATION_TO_CALLBACK.values():
        run.say(
            f"WARNING: {type(callback).__name__} knows nothing of attempts: after a preemption it may begin another "
            f"run, and steps that are repeated are there twice. These see one run: {', '.join(KNOWN)}"
        )
    return None
