"""A tracker that fails or hangs neither ends nor delays a run; what it lacks is added by the next attempt."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerState

from outlast.huggingface.tracking import gate
from outlast.huggingface.tracking.gate import Gate, Logs, Point, Start, once, up_to


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
    assert "has not written everything in time. What it has not written is missing there" in run.said[0]
    forever.set()


def test_a_signal_ends_the_wait(opened: Opened) -> None:
    run, callback, _ = opened()
    forever, began = threading.Event(), time.monotonic()
    callback.wait = lambda: forever.wait() and None
    run.asked_to_stop = True
    log(callback, TrainerState(), loss=1.0)
    callback.on_train_end(None, TrainerState(), None)
    assert time.monotonic() - began < gate.CLOSE_S / 2
    assert not run.events  # the next attempt adds the rest
    forever.set()


def test_training_waits_until_a_tracker_has_begun(opened: Opened) -> None:
    """From then on the script's own callbacks may log to it, in the main thread; the callback sees all arguments."""
    _, callback, own = opened()
    seen: list[Any] = []

    def begin(start: Start, *_: Any) -> Callable[[Point], bool]:
        time.sleep(0.1)
        start(None)
        return once(Counter())

    own._tracker.begin = begin  # type: ignore[method-assign]
    own._own["train_begin"] = lambda *_, **more: seen.append(more)
    callback.on_train_begin(None, TrainerState(), None, model="model", processing_class="tokenizer")
    assert seen == [{"model": "model", "processing_class": "tokenizer"}]


def test_an_evaluation_that_is_made_up_for_is_logged() -> None:
    """Preempted at step 4 with one due: the next attempt makes it, at a step at which the tracker has the loss."""
    is_there = up_to(4, Counter({("train/loss", 2): 1, ("eval/loss", 2): 1, ("train/loss", 4): 1}))
    assert is_there(("eval/loss", 2))
    assert is_there(("train/loss", 4))
    assert not is_there(("eval/loss", 4))
    assert not is_there(("train/loss", 5))
    is_there = up_to(4, Counter({("eval/loss", 4): 1}))
    assert is_there(("eval/loss", 4))
    assert not is_there(("eval/loss", 4))


def test_no_secret_is_written(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123abcd")
    run, callback, own = opened()

    def fail() -> None:
        raise OSError("https://user:to@ken@host/path, sqlite:///plain, key 0123abcd")

    callback.wait = fail
    log(callback, TrainerState(global_step=1), loss=1.0)
    own.work.join()
    assert run.events[0][1]["error"] == "OSError: https://***@host/path, sqlite:///plain, key ***"
    assert "0123abcd" not in run.said[0]
    assert "ken" not in run.said[0].replace("broken", "")


def test_the_callback_gets_its_methods_back(opened: Opened) -> None:
    _, callback, own = opened()
    assert "on_log" in vars(callback)
    own.open()
    assert not {name for name in vars(callback) if name.startswith("on_")}
