"""The ancestry of a run that began with another run's weights: `ancestry.json` in its directory."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outlast.errors import CheckpointError
from outlast.files import write_atomically

from .directory import RunDirectory

ANCESTRY = "ancestry.json"
START = "start"
"""Where in `prepared/` the weights are that a run begins with."""
TAKEN_OVER = (START, "model")
"""What in `prepared/` a run that begins with another's weights can't make again by itself."""


@dataclass(frozen=True, kw_only=True)
class Ancestry:
    """What a run began with."""

    run: str
    """The name of the other run."""
    path: str
    """Its directory, when it was forked."""
    checkpoint: str
    """The name of the directory of its checkpoint, or `final`."""
    step: int
    weights: str
    """Digest of the files of the weights."""
    optimizer: bool
    """Whether all of the training state was taken over, so that this run counts steps from there."""
    ancestors: list[dict[str, Any]]
    """The ancestry of the other run, the nearest first."""

    @property
    def words(self) -> str:
        """In one line: `first@4 (weights)`."""
        what = "weights, optimizer and position" if self.optimizer else "weights"
        older = "".join(f", itself of {one['run']}@{one['step']}" for one in self.ancestors)
        return f"{self.run}@{self.step} ({what}){older}"


def read(run: RunDirectory) -> Ancestry | None:
    """The ancestry of a run, to be shown; None if it began by itself, or that can't be read."""
    try:
        return required(run)
    except (CheckpointError, OSError):
        return None


def required(run: RunDirectory) -> Ancestry | None:
    """The ancestry of a run, to be relied on; None if it began by itself.

    Raises:
        CheckpointError: its record is damaged.
        OSError: its record can't be read just now.
    """
    try:
        return Ancestry(**json.loads(_path(run).read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{_path(run)}, which says with whose weights it began, is damaged: {error}") from None


def write(run: RunDirectory, ancestry: Ancestry) -> None:
    """Write it down, before anything is copied: what is found without the rest is then known to be a beginning."""
    write_atomically(_path(run), json.dumps(asdict(ancestry), indent=1))


def own_preparations(run: RunDirectory) -> list[Path]:
    """What a run can prepare again: all in `prepared/`, without what it has taken over; records of it last."""
    taken = TAKEN_OVER if _path(run).exists() else ()
    found = [path for path in run.prepared.iterdir() if path.name not in taken] if run.prepared.is_dir() else []
    return sorted(found, key=lambda path: not path.is_dir())


def _path(run: RunDirectory) -> Path:
    return run.path / ANCESTRY
