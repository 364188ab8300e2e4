"""The ancestry of a run that began with another run's weights: `ancestry.json` in its directory."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outlast.files import read_json, write_atomically

from .directory import RunDirectory

ANCESTRY = "ancestry.json"


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
    """The ancestry of a run; None if it began by itself."""
    values = read_json(_path(run))
    try:
        return Ancestry(**values) if isinstance(values, dict) else None
    except TypeError:
        return None


def write(run: RunDirectory, ancestry: Ancestry) -> None:
    """Write it down, as the last thing that a fork does."""
    write_atomically(_path(run), json.dumps(asdict(ancestry), indent=1))


def _path(run: RunDirectory) -> Path:
    return run.path / ANCESTRY
