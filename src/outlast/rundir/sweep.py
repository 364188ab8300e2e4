"""The manifest of a sweep, `sweep.json`, lists its cells for the login node and the compute nodes.

::

    <sweep>/sweep.json     name, overrides as typed, cells, submissions
    <sweep>/<cell>/        a run directory like any other
    <sweep>/code/          the code of all cells (`code-2/`: of those that were submitted again later)
    <sweep>/logs/          what batch scripts and `srun` print, by job and task
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from outlast.errors import OutlastError
from outlast.files import write_atomically

from .submission import Submission

SWEEP_MANIFEST = "sweep.json"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    index: int
    """Its place in the manifest, which never changes. Its task in an array is `index - submission.offset`."""
    name: str
    directory: str
    """Its run directory, relative to the sweep's."""
    overrides: list[str]
    """The overrides that it does not share with the other cells."""
    config_digest: str


@dataclass(kw_only=True)
class SweepManifest:
    """The contents of `sweep.json`."""

    name: str
    overrides: list[str] = field(default_factory=list)
    """As they were typed last."""
    cells: list[Cell] = field(default_factory=list)
    submissions: list[Submission] = field(default_factory=list)

    def write(self, sweep: Path) -> None:
        write_atomically(sweep / SWEEP_MANIFEST, json.dumps(asdict(self), indent=1) + "\n", private=True)


def read_sweep_manifest(sweep: Path) -> SweepManifest:
    """The manifest of the sweep in `sweep`.

    Raises:
        OutlastError: it is missing or damaged.
    """
    try:
        values: dict[str, Any] = json.loads((sweep / SWEEP_MANIFEST).read_text())
        cells = [Cell(**cell) for cell in values.pop("cells")]
        known = {field.name for field in fields(Submission)}  # a newer version's may have more
        submissions = [
            Submission(**{name: value for name, value in submission.items() if name in known})
            for submission in values.pop("submissions")
        ]
        return SweepManifest(**values, cells=cells, submissions=submissions)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutlastError(f"{sweep / SWEEP_MANIFEST} can't be read: {error}") from None
