"""The record of `outlast evaluate`: `evaluations/<data>.jsonl` in the run directory, one line for each model scored.

A line is a JSON object:

================  ==================================================================================================
`checkpoint`      name of its directory when it was scored
`step`            of the weights
`weights`         digest of its weights' files: by it a line is found again, whatever the directory is called
`data`, `name`    digest and name of the evaluation data
`loss`            as the Trainer computes it on one rank: the mean of `losses`
`losses`          each row's share, in the order of the rows (see :class:`Line`)
`seconds`         that scoring took
`time`            when it was done, Unix seconds
================  ==================================================================================================

Lines are only added. A torn one is left out; of several for the same weights and data, the last counts.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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


def read(path: Path, data: str | None = None) -> dict[str, Line]:
    """The lines of a record by digest of the weights.

    Args:
        data: digest of the data; None: that of the last line.
    """
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(Line(**json.loads(text)))
        except (ValueError, TypeError):
            continue
    wanted = data or (lines[-1].data if lines else None)
    return {line.weights: line for line in lines if line.data == wanted}


def append(run: RunDirectory, path: Path, line: Line, budget_bytes: int) -> None:
    """Add a line, flushed to disk; a torn one before it is closed first.

    Raises:
        ConfigError: the run's budget has no room for it.
    """
    values: dict[str, Any] = asdict(line) | {"losses": [float(f"{loss:.7g}") for loss in line.losses]}
    text = (to_json(values) + "\n").encode()
    if (used := bytes_used(run.path)) + len(text) > budget_bytes:
        valid = (
            f"valid: {gb(used + len(text))} or more, since what is scored is kept in the run directory ({path.name})"
        )
        raise ConfigError("storage.budget_gb", budget_bytes / 1e9, valid)
    path.parent.mkdir(exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        os.write(fd, b"\n" * torn + text)
        os.fsync(fd)
    finally:
        os.close(fd)
