"""The ledger records what happened to a run: one JSON object a line, only ever appended to.

Every line has `time` (Unix seconds), `attempt` (from 1) and `event`, which decides the other fields (see `EVENTS`).
Status, report, the requeue policy and the tests read it.
"""

import contextlib
import ctypes
import fcntl
import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Protocol

from outlast import clock
from outlast.errors import RunBusyError
from outlast.files import to_json

from .lease import wait_for_lease

Cause = Literal[
    "finished", "preempted", "time_limit", "cancelled", "failed", "node_failure", "requeued", "out_of_memory"
]
"""Why an attempt ended. `requeued`: somebody else than the run has put the job back into the queue."""
Event = dict[str, Any]

RESERVE = 65_536
"""Bytes beyond the end of the ledger that are reserved for its next lines."""
_FALLOC_FL_KEEP_SIZE = 1

EVENTS: dict[str, tuple[str, ...]] = {
    "attempt_started": ("job_id", "restart_count", "hosts", "world_size", "versions"),
    "began": ("step", "seconds"),
    "resumed": ("step", "checkpoint", "seconds"),
    "converted": ("checkpoint", "ranks", "bytes", "seconds"),
    "data": ("rows", "notes"),
    "differs": ("checkpoint", "names"),
    "restarted": ("reason",),
    "signal": ("name", "step", "deadline_s"),
    "step_cut": ("step", "micro_batches"),
    "notice_short": ("needed_s", "save_s", "reaction_s", "notice_s", "lead_s"),
    "evaluated": ("step", "metrics"),
    "checkpoint": ("step", "kind", "bytes", "stall_s", "sealed_s"),
    "checkpoint_failed": ("step", "kind", "reason"),
    "over_budget": ("bytes", "budget_bytes", "parts"),
    "measured": ("bytes", "save_total_limit", "off"),
    "batches_unknown": (),
    "frozen_weights": ("bytes", "tensors"),
    "not_saved": ("objects",),
    "batch_differs": ("step",),
    "unsaved_buffers": ("names",),
    "quarantined": ("checkpoint", "reason"),
    "deleted": ("checkpoint", "reason"),
    "delete_failed": ("checkpoint", "reason"),
    "lightened": ("checkpoint", "reason", "bytes"),
    "interval": ("seconds", "cost_s", "mtbf_s"),
    "requeued": ("cause", "job_id"),
    "straggler": ("rank", "host", "seconds", "how"),
    "attempt_ended": ("cause", "step"),
    "gave_up": ("reason",),
    "not_finite": ("step", "values"),
    "spike": ("step", "loss", "median"),
    "tracking_failed": ("tracker", "step", "error"),
    "trained": ("metrics",),
    "finished": ("step", "seconds"),
}
"""Events and the fields that each line of them has; lines may carry further fields."""

_NUMBER, _MAYBE = (int, float), (int, float, NoneType)
_TYPES: dict[type | tuple[type, ...], tuple[str, ...]] = {
    int: ("attempt", "restart_count", "world_size", "rank", "micro_batches", "ranks"),
    _NUMBER: (
        "time",
        "bytes",
        "stall_s",
        "seconds",
        "cost_s",
        "mtbf_s",
        "needed_s",
        "save_s",
        "reaction_s",
        "run_bytes",
        "last_seen",
    ),
    _MAYBE: ("step", "sealed_s", "deadline_s", "notice_s", "model_step"),
    str: ("event", "checkpoint", "reason", "name", "kind", "cause", "how"),
    (str, NoneType): ("job_id", "detail", "error", "log"),
    list: ("hosts", "notes"),
    dict: ("versions", "metrics", "objects", "place"),
}
_TYPE_OF = {field: kind for kind, fields in _TYPES.items() for field in fields}
_STEPS = ("resumed", "checkpoint", "evaluated", "finished", "signal")
"""Events whose step is never unknown."""


KILLED = "killed"
"""The `detail` of an attempt that was killed before it could say how it ended."""


class Numbered(Protocol):
    """Anything that has the number of an attempt."""

    @property
    def attempt(self) -> int: ...


@dataclass(frozen=True)
class AttemptNumber:
    """The number of an attempt that this process is not a rank of."""

    attempt: int


class Record(Protocol):
    """Appends one line for the current attempt (on rank 0; elsewhere it does nothing)."""

    def __call__(self, event: str, **values: Any) -> None: ...


class Ledger:
    """Appends to and reads one `ledger.jsonl`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, attempt: int, *, at: float | None = None, **values: Any) -> None:
        """Add one line and flush it to disk. A line torn by an earlier kill is closed first.

        Args:
            at: when it happened, Unix seconds; now, if left out.

        Raises:
            ValueError: an unknown event, or a field that it must have is missing.
        """
        missing = [name for name in EVENTS[event] if name not in values] if event in EVENTS else None
        if missing is None or missing:
            raise ValueError(f"ledger event {event!r}: " + (f"missing {missing}" if missing else "unknown"))
        line = to_json({"time": at or clock.now(), "attempt": attempt, "event": event, **values}) + "\n"
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(fd).st_size
            _reserve(fd, size)
            torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            data = (b"\n" if torn else b"") + line.encode()
            while data:  # one write, unless the disk fills up: then the second raises
                data = data[os.write(fd, data) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    def append_first(
        self, event: str, attempt: int, *, before: Sequence[tuple[str, dict[str, Any]]] = (), **values: Any
    ) -> bool:
        """Append a line unless the attempt has one of this event; of ranks that try at once, one succeeds.

        Args:
            before: lines that go first, as event and fields: a reader who finds this line finds them too.

        Returns:
            Whether this caller appended it.
        """
        with open(self.path, "ab") as lock, contextlib.ExitStack() as held:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                with contextlib.suppress(RunBusyError):
                    held.callback(wait_for_lease(self.path.with_name(f".{self.path.name}.lease")).release)
            if any(e["event"] == event and e["attempt"] == attempt for e in self.read()):
                return False
            for name, fields in before:
                self.append(name, attempt, **fields)
            self.append(event, attempt, **values)
            return True

    def read(self) -> list[Event]:
        """All whole lines, in order; a torn one (the writer was killed) or a damaged one is left out."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        try:
            parsed = json.loads(
                b"[" + b",".join(lines) + b"]"
            )  # parsing them at once is twice as fast, which shows with many runs
        except ValueError:
            parsed = [_parsed(line) for line in lines]
        return [_clamped(event) for event in parsed if _is_whole(event)]


def _reserve(fd: int, size: int) -> None:
    """Reserve blocks beyond the end of the file, so that the next lines fit even if others fill the disk. Where the
    file system can't, lines wait (see :class:`Recorder`)."""
    fallocate = getattr(ctypes.CDLL(None), "fallocate", None)
    if fallocate is not None:
        fallocate(fd, _FALLOC_FL_KEEP_SIZE, ctypes.c_int64(size), ctypes.c_int64(RESERVE))


def _is_whole(event: Any) -> bool:
    """Whether a line has all fields of its event, each of its type: what reads the ledger relies on that."""
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return False
    if not all(name in event for name in ("time", "attempt", *EVENTS.get(event["event"], ()))):
        return False
    if event["event"] in _STEPS and event["step"] is None:
        return False
    return all(isinstance(value, _TYPE_OF.get(name, object)) for name, value in event.items())


def _clamped(event: Event) -> Event:
    """Give the event with its durations as numbers from 0: a clock that was set while one was measured made others."""
    for name, value in event.items():
        if (
            (name == "seconds" or name.endswith("_s"))
            and isinstance(value, int | float)
            and not 0.0 <= value < math.inf
        ):
            event[name] = 0.0
    return event


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


class Recorder:
    """Records lines, also while the disk is full: those that can't be written wait for the next one.

    Args:
        attempt: the attempt that the lines belong to.
        say: prints a line in the log.
    """

    def __init__(self, ledger: Ledger, attempt: Numbered, say: Callable[[str], None]) -> None:
        self._ledger, self._attempt, self._say = ledger, attempt, say
        self._writing = threading.Lock()
        self.waiting: list[tuple[str, float, dict[str, Any]]] = []
        """Lines that could not be written yet: event, time, fields."""

    def __call__(self, event: str, **values: Any) -> None:
        with self._writing:
            self.waiting.append((event, clock.now(), values))
            try:
                while self.waiting:
                    name, at, fields = self.waiting[0]
                    self._ledger.append(name, self._attempt.attempt, at=at, **fields)
                    self.waiting.pop(0)
            except OSError as error:
                self._say(f"WARNING: the ledger can't be written: {error}; this waits: {to_json({event: values})}")
