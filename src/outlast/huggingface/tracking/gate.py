"""Stands between a Trainer and the callback of a tracker, so that the tracker sees one run in all attempts.

What the run has logged is known exactly: the Trainer's `log_history` is in each checkpoint. When an attempt begins, a
tracker is brought to it: what it has beyond is taken away, or is not logged again where nothing can be taken away; what
it lacks (after a kill, a full disk) is added.

The callback works in a thread of its own, in order. So a tracker that is slow or hangs delays neither training nor the
way out of an attempt, which does not wait for it; and one that fails is left alone from there on.
"""

import copy
import os
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from outlast.attempt.attempt import RankAttempt

Logs = dict[str, Any]
Point = tuple[str, int]
"""The name that a tracker gives to a value, and the optimizer step that it belongs to."""
Start = Callable[[Any], None]
START_S = 15.0
"""Seconds that training waits for a tracker to begin: the script's own callbacks may log to it from then on."""
CLOSE_S = 30.0
"""Seconds that a tracker may take to write the rest when training has ended. A sign of life is wanted more rarely."""
_SECRET = re.compile(r"(KEY|TOKEN|PASSWORD|SECRET)$", re.IGNORECASE)
"""What the names of environment variables end with that hold secrets."""


class Tracker(Protocol):
    """What differs from tracker to tracker; all methods are called in its thread."""

    name: str

    def begin(self, start: Start, args: Any, state: Any, history: list[Logs]) -> Callable[[Point], bool]:
        """Open the run.

        Args:
            start: the callback's own `on_train_begin`, to be called with `args`.
            args: a copy of the Trainer's arguments.
            history: all that the run has logged up to the checkpoint that this attempt goes on from.

        Returns:
            Whether the tracker has a value already; asked once for each of `history`, then for each that is logged.
        """

    def named(self, key: str) -> str:
        """The tracker's name for a value that the Trainer calls `key`."""

    def end(self) -> None:
        """Close the run, after the callback's own `on_train_end`."""


class Gate:
    """Replaces the methods of one tracker's callback, on rank 0; :meth:`open` puts them back."""

    def __init__(self, run: "RankAttempt", callback: "TrainerCallback", tracker: Tracker) -> None:
        self._run, self._callback, self._tracker = run, callback, tracker
        self._failed = False
        self._is_there: Callable[[Point], bool] = lambda point: False
        self.work: queue.Queue[Callable[[], None]] = queue.Queue()
        """What the thread has still to do."""
        self._own = {name: getattr(callback, f"on_{name}") for name in ("train_begin", "log", "train_end", "save")}
        replaced: dict[str, Callable[..., None]] = {
            "train_begin": self._begin,
            "log": self._log,
            "train_end": self._end,
        }
        for name, method in replaced.items():
            setattr(callback, f"on_{name}", partial(self._called, method))
        callback.on_save = _nothing  # a tracker's copies of checkpoints would be in no budget
        threading.Thread(target=self._work, name=f"outlast-{tracker.name}", daemon=True).start()

    def open(self) -> None:
        """Give the callback its own methods back."""
        self.work.put(_stop)
        for name in self._own:
            vars(self._callback).pop(f"on_{name}", None)

    # In the main thread ---------------------------------------------------------------------------------------------

    def _called(
        self, method: Callable[..., None], args: Any, state: Any, control: Any, logs: Logs | None = None, **more: Any
    ) -> None:
        """Have the thread call `method`, with the state and the arguments as they are now."""
        then = copy.copy(state)
        if method == self._begin:
            then.log_history = copy.deepcopy(state.log_history)
        self.work.put(partial(method, copy.copy(args), then, control, dict(logs or {}), more))
        if method == self._begin:
            self._wait(START_S)
        elif method == self._end and not self._wait(CLOSE_S) and not self._run.asked_to_stop:
            error = TimeoutError("it has not written everything in time")
            self._fails(error, state.global_step, "What it has not written is missing there")

    def _wait(self, seconds: float) -> bool:
        """Wait until the thread has done its work, but no longer than this or than a signal; return whether it has."""
        deadline = time.monotonic() + seconds
        while self.work.unfinished_tasks and time.monotonic() < deadline and not self._run.asked_to_stop:
            time.sleep(0.02)
        return not self.work.unfinished_tasks

    # In the tracker's thread ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (call := self.work.get()) is not _stop:
            try:
                if not self._failed:
                    call()
            finally:
                self.work.task_done()

    def _guarded(self, call: Callable[[], Any], step: int) -> None:
        try:
            call()
        except Exception as error:
            self._fails(error, step)

    def _fails(self, error: Exception, step: int, then: str = "A next attempt adds what is missing") -> None:
        self._failed = True
        text = without_secrets(f"{type(error).__name__}: {error}")[:500]
        self._run.record("tracking_failed", tracker=self._tracker.name, step=step, error=text)
        self._run.say(f"WARNING: {self._tracker.name} fails, training goes on without it: {text}. {then}")

    def _begin(self, args: Any, state: Any, control: Any, logs: Logs, more: Logs) -> None:
        def begin() -> None:
            def start(args: Any) -> None:
                self._own["train_begin"](args, state, control, **more)

            self._is_there = self._tracker.begin(start, args, state, state.log_history)
            for entry in state.log_history:
                self._add(args, state, control, entry, int(entry["step"]), more)

        self._guarded(begin, state.global_step)

    def _log(self, args: Any, state: Any, control: Any, logs: Logs, more: Logs) -> None:
        step = state.global_step
        self._guarded(lambda: self._add(args, state, control, logs, step, more), step)

    def _end(self, args: Any, state: Any, control: Any, logs: Logs, more: Logs) -> None:
        def end() -> None:
            self._own["train_end"](args, state, control, **more)
            self._tracker.end()

        self._guarded(end, state.global_step)

    def _add(self, args: Any, state: Any, control: Any, entry: Logs, step: int, more: Logs) -> None:
        """Log one entry of the history, but for what the tracker has already."""
        logs = {
            key: value
            for key, value in entry.items()
            if key != "step" and value is not None and not self._is_there((self._tracker.named(key), step))
        }
        if logs:
            then = copy.copy(state)
            then.global_step = step
            self._own["log"](args, then, control, logs=logs, **more)


def once(there: Counter[Point]) -> Callable[[Point], bool]:
    """Answer as often that a value is there as it is there."""

    def is_there(point: Point) -> bool:
        found = there[point] > 0
        there[point] -= found
        return found

    return is_there


def logged_points(history: list[Logs], named: Callable[[str], str]) -> Counter[Point]:
    """How often a run has logged each value."""
    return Counter((named(key), int(entry["step"])) for entry in history for key in entry if key != "step")


def up_to(last: int, logged: Counter[Point]) -> Callable[[Point], bool]:
    """Answer whether a value is there, where no more is known than the last step that is.

    At that step the evaluation may be still to come: it was due when the attempt was preempted.

    Args:
        logged: what the run had logged at the checkpoint.
    """
    in_history = once(logged)
    return lambda point: point[1] < last or (point[1] == last and (in_history(point) or point[0].startswith("train/")))


def without_secrets(text: str) -> str:
    """Return a text without the secrets that this process knows: it goes into the log and the ledger."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= 4:
            text = text.replace(value, "***")
    return re.sub(r"://[^/\s]+@", "://***@", text)


def tracking_directory(run: "RankAttempt", name: str) -> Path:
    """Where a tracker keeps its files in the run directory; made if need be."""
    path = run.directory.tracking / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _stop() -> None:
    return None
