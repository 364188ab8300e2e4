"""TensorBoard: one directory of event files, cut at the checkpoint that an attempt goes on from."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import rewrite_logs

from .event_files import cut, event_files, points_of
from .gate import Logs, Point, Start, logged_points, once, tracking_directory

if TYPE_CHECKING:
    from outlast.attempt.attempt import RankAttempt


class TensorBoard:
    """Keeps the event files of one run.

    They are only ever appended to, so they are cut: what was written after the checkpoint is gone, as the steps are. A
    TensorBoard that shows the run meanwhile is told by the new file (`purge_step`).
    """

    name = "tensorboard"

    def __init__(self, run: "RankAttempt", callback: TensorBoardCallback) -> None:
        self._run, self._callback = run, callback

    def begin(self, start: Start, args: Any, state: Any, history: list[Logs]) -> Callable[[Point], bool]:
        """Open the event files, cut at what the run had logged."""
        callback, run = self._callback, self._run.directory.path
        logged = logged_points(history, self.named)
        if callback.tb_writer is not None:
            self._run.say("WARNING: TensorBoard writes with a writer of the script's: what is repeated is there twice")
            start(args)
            return once(logged)
        if callback.logging_dir is None:
            callback.logging_dir = str(tracking_directory(self._run, self.name))
        place = Path(callback.logging_dir)
        begun = bool(event_files(place))
        if place.resolve().is_relative_to(run.resolve()):
            left = cut(place, step=state.global_step, logged=logged, inside=run)
        else:  # nothing outside the run directory is deleted: readers leave out what `purge_step` says
            left = points_of(place, until=state.global_step)
        if begun:
            callback.tb_writer = callback._SummaryWriter(log_dir=str(place), purge_step=state.global_step + 1)
        if ("args", 0) not in left:
            start(args)
        return once(left)

    def named(self, key: str) -> str:
        """The tag of a value."""
        return str(next(iter(rewrite_logs({key: 0}))))

    def end(self) -> None:
        """Do nothing: the callback has closed its writer."""
