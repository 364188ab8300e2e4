"""Guards what is read back: `torch.load` executes nothing that a checkpoint says, whoever calls it.

Libraries load with `weights_only=False` here and there, and a checkpoint may have been tampered with. What such a load
could not read is refused when it is saved, not when the run resumes.
"""

import functools
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from outlast.errors import ConfigError
from outlast.rundir.directory import RunDirectory

_directories: set[str] = set()
"""What is guarded, as real paths."""
NOT_CHECKED = ("random_states_*.pkl",)
"""Files that accelerate loads with exceptions of its own, which is why it can."""


def guard_loads(run: RunDirectory) -> None:
    """Have every `torch.load` of what the run has saved or prepared read tensors and plain values, and nothing else."""
    import torch

    if not _directories:
        torch.load = torch.serialization.load = _guarded(torch.load)
    _directories.update(os.path.realpath(path) for path in (run.checkpoints, run.quarantine, run.final, run.prepared))


def _guarded(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_tensors(f: Any, map_location: Any = None, pickle_module: Any = None, **options: Any) -> Any:
        if _is_guarded(f if isinstance(f, str | os.PathLike) else getattr(f, "name", None)):
            return load(f, map_location, **{**options, "weights_only": True})
        return load(f, map_location, pickle_module, **options)

    return load_tensors


def _is_guarded(file: Any) -> bool:
    if not isinstance(file, str | os.PathLike):
        return False
    path = os.path.abspath(file)
    places = (os.path.realpath(path), os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)))
    return any(os.path.commonpath((place, directory)) == directory for place in places for directory in _directories)


@contextmanager
def refusing_unreadable() -> Iterator[None]:
    """Refuse what a loop's `torch.save` writes meanwhile, if a guarded load would not read it.

    Raises:
        ConfigError: it names the file, and the classes that are in the way.
    """
    import torch

    save, written = torch.save, list[Path]()

    @functools.wraps(save)
    def noted_save(obj: Any, f: Any, *args: Any, **options: Any) -> None:
        save(obj, f, *args, **options)
        if isinstance(f, str | os.PathLike):
            written.append(Path(f))

    torch.save = noted_save
    try:
        yield
    finally:
        torch.save = save
    for path in written:
        if not any(fnmatch(path.name, pattern) for pattern in NOT_CHECKED):
            refuse_unreadable(path)


def refuse_unreadable(path: Path) -> None:
    """Refuse a file of `torch.save` that a guarded load would not read.

    Raises:
        ConfigError: it names the file, and the classes that are in the way.
    """
    if names := _unsafe(path):
        way = "keep what it holds as numbers, text, tensors, and lists or dicts of these (`state_dict`)"
        allow = "or name the classes: torch.serialization.add_safe_globals([...]) before each save and load"
        raise ConfigError(path.name, ", ".join(names), f"a resume reads no code from a checkpoint: {way}, {allow}")


def _unsafe(path: Path) -> list[str]:
    """What a file names that is neither a tensor nor a plain value, nor allowed."""
    import torch
    from accelerate.utils.other import TORCH_SAFE_GLOBALS

    if not zipfile.is_zipfile(path):  # by the former format, or removed meanwhile
        return []
    with torch.serialization.safe_globals(TORCH_SAFE_GLOBALS):
        return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
