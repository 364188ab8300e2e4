"""What a run is called by trackers: the same in every attempt, wherever the run's directory is."""

import threading
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outlast.errors import OutlastError
from outlast.files import write_atomically
from outlast.rundir.sweep import SWEEP_MANIFEST, read_sweep_manifest

if TYPE_CHECKING:
    from outlast.attempt.attempt import RankAttempt

_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Identity:
    """Names of one run for trackers."""

    id: str
    """Stable, and no other run's."""
    name: str
    """The run's, for people: its directory when it began."""
    sweep: str | None
    """The sweep that it is a cell of."""

    @classmethod
    def of(cls, run: "RankAttempt") -> "Identity":
        """Read what the first attempt has written down, or write it down."""
        with _one_at_a_time:
            return cls._of(run)

    @classmethod
    def _of(cls, run: "RankAttempt") -> "Identity":
        path, file = run.directory.path, run.directory.tracking / "id"
        if not file.exists():
            sweep = ""
            if (path.parent / SWEEP_MANIFEST).exists():
                try:
                    sweep = read_sweep_manifest(path.parent).name
                except OutlastError:
                    sweep = path.parent.name
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, "\n".join((uuid.uuid4().hex[:12], path.name, sweep)) + "\n")
        one, name, sweep = file.read_text().split("\n")[:3]
        return cls(one, name, sweep or None)
