"""The record of `outlast evaluate`: `evaluations/<data>.jsonl` in the run directory, one line for each model scored.

A line is a JSON object:

================  ==================================================================================================
`checkpoint`      name of its directory when it was scored
`step`            of the weights
`weights`         digest of its weights' files: by it a line is found again, whatever the directory is called
`data`, `name`    digest of the evaluation data and of how it is scored (batch size, kind of device, number format), and
                  the name of the data
`loss`            as the Trainer computes it on one rank: the mean of `losses`; null: it is NaN or infinite
`losses`          each row's share, in the order of the rows (see :class:`Line`); null as well
`seconds`         that scoring took
`time`            when it was done, Unix seconds
================  ==================================================================================================

Lines are only added, by one process at a time. A torn one is left out; of several for the same weights and data, the
last counts.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from outlast.checkpoint.manifest import FileEntry, is_weights
from outlast.errors import ConfigError
from outlast.files import bytes_used, to_json
from outlast.rundir.directory import RunDirectory
from outlast.storage.budget import gb


@dataclass(frozen=True, kw_only=True)
class Line:
    """The score of one checkpoint on one set of data.

    `losses` has a number for each row: its loss, summed over its tokens, times the rows of its batch over the tokens of
    its batch. Their mean is the evaluation loss of a Trainer, the mean over batches of each batch's mean over tokens,
    weighted by rows. The weights depend on the data alone, so that differences between checkpoints are paired.
    """

    checkpoint: str
    step: int
    weights: str
    data: str
    name: str
    loss: float
    losses: list[float]
    seconds: float
    time: float


def weights_digest(files: Mapping[str, FileEntry]) -> str:
    """Digest of a checkpoint's weights, by its manifest's entries: the same for a whole checkpoint and a light one."""
    entries = {name: entry for name, entry in files.items() if is_weights(name)}
    return xxhash.xxh3_64(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def path_of(run: RunDirectory, name: str) -> Path:
    """The record for a set of data: `eval`, the run's own, or another."""
    return run.path / "evaluations" / f"{name}.jsonl"


def read(path: Path, data: str) -> dict[str, Line]:
    """The lines of a record for one `data`, by digest of the weights."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            line = Line(**json.loads(text))
            losses = [_number(loss) for loss in line.losses]
            lines.append(replace(line, loss=_number(line.loss), losses=losses))
        except (ValueError, TypeError):
            continue
    return {line.weights: line for line in lines if line.data == data}


def _number(value: float | None) -> float:
    """A number as JSON has it, which knows no NaN."""
    return math.nan if value is None else float(value)


def require_room(run: RunDirectory, path: Path, size: int, budget_bytes: int) -> None:
    """Refuse what the run's budget has no room for.

    Args:
        size: bytes that are to be added to the record.

    Raises:
        ConfigError: it says how large a budget would do.
    """
    if (used := bytes_used(run.path)) + size > budget_bytes:
        valid = f"valid: {gb(used + size)} or more, since what is scored is kept in the run directory ({path.name})"
        raise ConfigError("storage.budget_gb", budget_bytes / 1e9, valid)


def append(run: RunDirectory, path: Path, line: Line, budget_bytes: int) -> None:
    """Add a line, flushed to disk; a torn one before it is closed first.

    Raises:
        ConfigError: the run's budget has no room for it.
    """
    values: dict[str, Any] = asdict(line) | {"losses": [float(f"{loss:.7g}") for loss in line.losses]}
    text = (to_json(values) + "\n").encode()
    require_room(run, path, len(text), budget_bytes)
    path.parent.mkdir(exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        left = memoryview(b"\n" * torn + text)
        while left:
            left = left[os.write(fd, left) :]
        os.fsync(fd)
    finally:
        os.close(fd)
