"""Weights & Biases: one run id; offline, one directory that holds the whole run.

A transaction log (`run-<id>.wandb`) can't be continued by another process, and two of one run don't sync as one. So
each attempt writes the rows of the attempts before it into its own, and the older ones go.
"""

import json
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast.deletion import delete

from .gate import CLOSE_S, Logs, Point, Start, logged_points, once, tracking_directory, up_to, without_secrets
from .identity import Identity
from .rows import STEP, SUMMARY, named

if TYPE_CHECKING:
    from transformers.integrations import WandbCallback

    from outlast.attempt.attempt import RankAttempt

BLOCK = 32_768
"""Bytes of a block of a transaction log, whose format is that of LevelDB's logs."""
INIT_S = 12.0
"""Seconds after which a server that does not answer is left out, and the run goes on offline."""

_opened: set[str] = set()
"""Ids of the runs that this process has opened."""


class Wandb:
    """Keeps one run of Weights & Biases."""

    name = "wandb"

    def __init__(self, run: "RankAttempt", callback: "WandbCallback") -> None:
        self._run, self._callback = run, callback
        self._whole: Path | None = None
        """The directory that holds the whole run; None if a server does."""

    def begin(self, start: Start, args: Any, state: Any, history: list[Logs]) -> Callable[[Point], bool]:
        """Open the run, online or not, with the rows that it had at the checkpoint."""
        import wandb

        place, who = tracking_directory(self._run, self.name), Identity.of(self._run)
        logged = logged_points(history, self.named)
        if wandb.run is not None and wandb.run.id in _opened - {who.id}:
            wandb.run.finish()  # of an earlier run of this script
        if wandb.run is not None and wandb.run.id not in _opened:
            self._run.say("WARNING: the script has called wandb.init: what is repeated after a kill is logged twice")
            start(args)
            return once(logged)
        older = {path: _until(path, state.global_step, logged) for path in _directories(place)}
        fullest = max(older, key=lambda path: len(older[path]), default=None)
        kept = older[fullest] if fullest else []
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        own = wandb.run or _open(wandb, place, who, mode)
        _opened.add(own.id)
        start(args)
        if not own.settings._offline:  # nothing can be taken away there
            last = int(own.summary.get(STEP, -1)) if own.starting_step else -1
            return up_to(last, logged)
        self._whole = Path(own.dir).parent
        self._delete_all_but(self._whole, fullest)  # which goes when this one is known to hold the whole run
        there: Counter[Point] = Counter()
        for row in kept:
            own.log(row)
            there.update((key, int(row[STEP])) for key in row if STEP in row)
        steps = {step for _, step in there}
        there.update(
            (key, entry["step"]) for entry in history for key in SUMMARY if key in entry and entry["step"] in steps
        )
        return once(there)

    def named(self, key: str) -> str:
        """The name of a value in a row."""
        return named(key)

    def end(self) -> None:
        """Remove the directories of earlier attempts: this one's holds the whole run.

        The run itself stays open, as transformers leaves it; the process's end closes it.
        """
        if self._whole is not None:
            self._delete_all_but(self._whole)

    def _delete_all_but(self, *kept: Path | None) -> None:
        names = {path.name for path in kept if path is not None}
        for path in _directories(tracking_directory(self._run, self.name)):
            if path.name not in names:
                delete(path, inside=self._run.directory.path)


def _open(wandb: Any, place: Path, who: Identity, mode: str) -> Any:
    """Open the run; where a server does not answer in time, offline."""
    more = {} if "WANDB_RUN_GROUP" in os.environ or who.sweep is None else {"group": who.sweep}

    def init(mode: str) -> Any:
        settings = wandb.Settings(console="off", init_timeout=INIT_S, finish_timeout=CLOSE_S)
        return wandb.init(
            id=os.environ.get("WANDB_RUN_ID", who.id),
            resume="allow",
            mode=mode,
            dir=str(place),
            project=os.environ.get("WANDB_PROJECT", "huggingface"),
            name=os.environ.get("WANDB_NAME", who.name),
            settings=settings,
            **more,
        )

    if mode == "online":
        try:
            return init(mode)
        except Exception as error:
            wandb.termwarn(f"going on offline: {without_secrets(str(error))}")
            wandb.teardown()  # else the run counts as in use
            mode = "offline"
    return init(mode)


def _directories(place: Path) -> list[Path]:
    """The directories of attempts, the oldest first."""
    return sorted(place.glob("wandb/*run-*-*"), key=lambda path: path.name.partition("run-")[2])


def _until(directory: Path, step: int, logged: Counter[Point]) -> list[Logs]:
    """The rows of an attempt, up to the first that was written after the checkpoint of `step`."""
    kept: list[Logs] = []
    seen: Counter[Point] = Counter()
    for path in directory.glob("run-*.wandb"):
        for row in rows(path):
            at = row.get(STEP)
            if isinstance(at, int | float):
                seen.update(
                    (key, int(at)) for key in row if key.startswith(("train/", "eval/", "test/")) and key != STEP
                )
                beyond = at == step and any(seen[key, step] > logged[key, step] for key in row if (key, step) in seen)
                if at > step or beyond:
                    return kept
            kept.append(row)
    return kept


def rows(path: Path) -> Iterator[Logs]:
    """Yield the rows of a transaction log that are whole: what was logged together, with its time."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    for data in records_of(path):
        try:
            record = Record.FromString(data)
        except DecodeError:
            return
        if record.HasField("history"):
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            yield {key: value for key, value in items.items() if key == "_timestamp" or not key.startswith("_")}


def records_of(path: Path) -> Iterator[bytes]:
    """Yield the records of a transaction log: each in one piece, or in a first, middle and last one."""
    data, at, whole = path.read_bytes(), 7, b""  # 7: after the header
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        piece, at = data[at + 7 : at + 7 + length], at + 7 + length
        if kind not in (1, 2, 3, 4) or len(piece) < length:
            return
        whole = piece if kind in (1, 2) else whole + piece
        if kind in (1, 4):
            yield whole
