"""Reads and cuts TensorBoard's event files, which are only ever appended to.

A record is its length (8 bytes), a checksum of that (4), an `Event` protocol buffer, and a checksum (4).
"""

import os
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.deletion import delete

from .gate import Point

OF_TRAINER = ("train/", "eval/", "test/")
"""What the tags begin with that a Trainer's callback writes."""


@dataclass(frozen=True)
class Record:
    """One event, and the bytes of the file that it takes."""

    begin: int
    end: int
    event: Any
    """An `Event` protocol buffer."""


def event_files(directory: Path) -> list[Path]:
    """Event files of a directory, in the order in which TensorBoard reads them."""
    return sorted(directory.glob("events.out.tfevents.*"), key=lambda path: path.name)


def records(path: Path) -> Iterator[Record]:
    """Yield the records of an event file, up to the first that a kill or a full disk has damaged."""
    from google.protobuf.message import DecodeError

    try:
        from tensorboard.compat.proto.event_pb2 import Event
    except ImportError:  # transformers takes either
        from tensorboardX.proto.event_pb2 import Event

    data, at = path.read_bytes(), 0
    while at + 16 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        end = at + 16 + length
        if length == 0 or end > len(data):  # zeros are what a power loss leaves
            return
        try:
            event = Event.FromString(data[at + 12 : end - 4])
        except DecodeError:
            return
        yield Record(at, end, event)
        at = end


def points(event: Any) -> list[Point]:
    """The values in an event."""
    return [(value.tag.removesuffix("/text_summary"), event.step) for value in event.summary.value]


def points_of(directory: Path, *, until: int) -> Counter[Point]:
    """The values in a directory, up to a step."""
    every = (point for path in event_files(directory) for record in records(path) for point in points(record.event))
    return Counter(point for point in every if point[1] <= until)


def cut(directory: Path, *, step: int, logged: Counter[Point], inside: Path) -> Counter[Point]:
    """Cut what was written after the checkpoint of `step`; what comes after it is going to be made again.

    Args:
        logged: how often the run had logged each value at that checkpoint.
        inside: the run directory; no link below it is followed to delete.

    Returns:
        The values that are left.
    """
    left: Counter[Point] = Counter()
    over = False
    for path in event_files(directory):
        whole = 0
        for record in () if over else records(path):
            found = Counter(points(record.event))
            if any(_is_later(point, left[point] + count, step, logged) for point, count in found.items()):
                over = True
                break
            left += found
            whole = record.end
        if whole == 0:
            delete(path, inside=inside)
        elif whole < path.stat().st_size:
            os.truncate(path, whole)
    return left


def _is_later(point: Point, count: int, step: int, logged: Counter[Point]) -> bool:
    """Whether a value was written after the checkpoint; at its own step, what the run had logged by then tells."""
    tag, at = point
    return at > step or (at == step and tag.startswith(OF_TRAINER) and count > logged[point])
