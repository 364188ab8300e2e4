"""A tracker that fails or hangs neither ends nor delays a run; what it lacks is added by the next attempt."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerState

from outlast.huggingface.tracking import gate
from outlast.huggingface.tracking.gate import Gate, Logs, Point, Start, once


class Run:
    """What a gate needs of a run."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.asked_to_stop = False

    def say(self, text: str) -> None:
        self.said.append(text)

    def record(self, event: str, **values: Any) -> None:
        self.events.append((event, values))


class Recorder(TrainerCallback):  # type: ignore[misc]
    """A tracker's callback, and what it has logged."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, Logs]] = []
        self.wait = lambda: None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.wait()
        self.logged.append((state.global_step, logs))


class Plain:
    """A tracker that has some values already."""

    name = "plain"

    def __init__(self, there: Counter[Point]) -> None:
        self.there = there

    def begin(self, start: Start, args: Any, state: Any, history: list[Logs]) -> Callable[[Point], bool]:
        return once(self.there)

    def named(self, key: str) -> str:
        return key

    def end(self) -> None:
        pass


@pytest.fixture
def opened() -> Iterator[Callable[..., tuple[Run, Recorder, Gate]]]:
    gates: list[Gate] = []

    def make(there: Counter[Point] | None = None) -> tuple[Run, Recorder, Gate]:
        run, callback = Run(), Recorder()
        gates.append(Gate(run, callback, Plain(there or Counter())))  # type: ignore[arg-type]
        return run, callback, gates[-1]

    yield make
    for one in gates:
        one.open()


def log(callback: Recorder, state: TrainerState, **logs: float) -> None:
    callback.on_log(None, state, None, logs=logs)


Opened = Callable[..., tuple[Run, Recorder, Gate]]


def test_what_is_there_is_not_logged_again_and_what_is_missing_is(opened: Opened) -> None:
    """Of a history up to step 2 it lacks one value; step 3 was logged before a kill, and is made again."""
    there = Counter({("loss", 1): 1, ("loss", 3): 1})
    _, callback, own = opened(there)
    state = TrainerState(global_step=2, log_history=[{"loss": 0.5, "step": 1}, {"loss": 0.4, "lr": 1.0, "step": 2}])
    callback.on_train_begin(None, state, None)
    for step in (3, 4):
        state.global_step = step
        log(callback, state, loss=0.1 * step)
    own.work.join()
    assert callback.logged == [(2, {"loss": 0.4, "lr": 1.0}), (4, {"loss": 0.4})]


def test_one_that_fails_is_left_alone(opened: Opened) -> None:
    run, callback, own = opened()

    def fail() -> None:
        raise OSError(28, "No space left on device")

    callback.wait = fail
    state = TrainerState(global_step=1)
    for _ in range(3):
        log(callback, state, loss=1.0)
    own.work.join()
    assert [(event, values["tracker"], values["step"]) for event, values in run.events] == [
        ("tracking_failed", "plain", 1)
    ]
    assert "plain fails, training goes on without it: OSError: [Errno 28] No space left" in run.said[0]


def test_one_that_hangs_delays_neither_training_nor_its_end(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "CLOSE_S", 0.2)
    run, callback, _ = opened()
    forever, began = threading.Event(), time.monotonic()
    callback.wait = lambda: forever.wait() and None
    state = TrainerState(global_step=1)
    for _ in range(100):
        log(callback, state, loss=1.0)
    callback.on_train_end(None, state, None)
    assert time.monotonic() - began < 5
    assert "has not written everything in time" in run.said[0]
    forever.set()


def test_a_signal_ends_the_wait(opened: Opened) -> None:
    run, callback, _ = opened()
    forever, began = threading.Event(), time.monotonic()
    callback.wait = lambda: forever.wait() and None
    run.asked_to_stop = True
    log(callback, TrainerState(), loss=1.0)
    callback.on_train_end(None, TrainerState(), None)
    assert time.monotonic() - began < gate.CLOSE_S / 2
    forever.set()


def test_the_callback_gets_its_methods_back(opened: Opened) -> None:
    _, callback, own = opened()
    assert "on_log" in vars(callback)
    own.open()
    assert not {name for name in vars(callback) if name.startswith("on_")}
