"""The place of a record: by it, a run's own records are told from those that came with a copy."""

from pathlib import Path
from typing import Any


def place_of(directory: Path) -> dict[str, Any]:
    """Describe the place of a run or sweep: the path and the inode number of its directory.

    Either may change while the run stays the same (another mount, a `mv`); a copy differs in both.
    """
    return {"path": str(directory.resolve()), "inode": directory.stat().st_ino}


def is_of_another(place: Any, directory: Path) -> bool:
    """Whether a record was written in another directory, of which this one is a copy."""
    if not isinstance(place, dict):
        return False  # of an older version
    try:
        here = place_of(directory)
    except OSError:
        return False
    return all(place.get(name) != value for name, value in here.items())


def is_at(place: Any) -> bool:
    """Whether the directory that a record describes is still in its place."""
    try:
        return isinstance(place, dict) and place_of(Path(place["path"])).items() <= place.items()
    except (OSError, KeyError, TypeError):
        return False
