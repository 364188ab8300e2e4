"""Where a run lives, and what runs."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from .section import Passes, Section

LONGEST = 200
"""Bytes in a run's name: file systems allow 255, of which what is written beside it needs some."""
VALID = f"a directory name of {LONGEST} bytes at most, without '/', '%' and ':'"


def is_name(name: str) -> bool:
    """Whether a run may have this name: Slurm replaces `%` in paths, and PYTHONPATH splits at `:`."""
    if len(os.fsencode(name)) > LONGEST:
        return False
    return name.strip() == name not in ("", ".", "..") and name.isprintable() and not {"/", "%", ":"} & set(name)


@dataclass(kw_only=True)
class RunSection(Section):
    """Where the run lives: its directory is `<run.root>/<run.name>`."""

    name: Annotated[str, Passes(is_name, VALID)] | None = None
    """Directory name under `root`; null: derived from the configuration, so the same command resumes the run."""
    root: Annotated[str, Passes(lambda root: ":" not in root, "a path without ':', which PYTHONPATH splits at")] = (
        "runs"
    )
    """Directory in which run directories live; on a cluster, on a file system that all nodes share."""

    def __post_init__(self) -> None:
        self.root = str(Path(self.root).expanduser().absolute())


@dataclass(kw_only=True)
class JobSection(Section):
    """What runs."""

    name: Literal["sft", "smoke"] = "sft"
    """Program that trains: `sft` (supervised fine-tuning with TRL) or `smoke` (a tiny loop, for trying things out)."""
