"""The run directory: the paths in it."""

import os
from dataclasses import dataclass
from pathlib import Path

from outlast.errors import ConfigError, whose
from outlast.files import read_json

from .place import is_at

MOVED_FROM = ".moved-from.json"
"""What a copy by `outlast move` holds until its source is gone: the source's place."""


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run; it holds no state, since what is on disk is the truth."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def progress(self) -> Path:
        """Where the run is now: one small JSON object, replaced as a whole (see `progress.py`)."""
        return self.path / "progress.json"

    @property
    def losses(self) -> Path:
        """The training losses of all attempts: a JSON object, replaced as a whole (see `losses.py`)."""
        return self.path / "losses.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def staging(self) -> Path:
        """Where a checkpoint is written before it is published; swept at start."""
        return self.checkpoints / ".staging"

    @property
    def trash(self) -> Path:
        """Where a checkpoint is moved before what is in it is deleted; swept at start."""
        return self.checkpoints / ".deleted"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def prepared(self) -> Path:
        """What is prepared once for all attempts: the tiny model, the tokenized data."""
        return self.path / "prepared"

    @property
    def tracking(self) -> Path:
        """What trackers (TensorBoard, ...) write, each into a directory of its own name."""
        return self.path / "tracking"

    @property
    def reserve(self) -> Path:
        """Bytes set aside for an emergency save (`storage.reserve`)."""
        return self.path / ".reserve"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def lease(self) -> Path:
        """The lock where the file system has none (see `lease.py`)."""
        return self.path / ".lease"

    def log(self, attempt: int, rank: int) -> Path:
        return self.logs / f"attempt-{attempt:03d}.rank-{rank}.log"

    def agent_log(self, attempt: int) -> Path:
        """The log of the agent that starts the ranks on this machine, and of what they print before they begin."""
        return self.logs / f"attempt-{attempt:03d}.agent.log"

    def create(self) -> None:
        """Make the directory and those of its parts that every attempt needs.

        Raises:
            ConfigError: a part in which things are deleted is a symbolic link, this user may not write there, or it is
                the copy of a run that is still whole in its old place: two would go on.
            OSError: it can't be made.
        """
        for path in (self.checkpoints, self.staging, self.trash, self.quarantine, self.prepared, self.tracking):
            if path.is_symlink():
                valid = "valid: a real directory, since nothing outside the run directory is ever deleted. "
                raise ConfigError("run", str(path), valid + "Make the run directory itself the link, or set run.root.")
        if is_at(place := read_json(self.path / MOVED_FROM) or {}):
            old = place["path"]
            valid = f"valid: one run, and {old} is whole too: a move was interrupted"
            again = f"outlast move {old} {self.path}"
            raise ConfigError("run", str(self.path), f"{valid}. Repeat it ({again}), or delete one of the two")
        for path in (self.checkpoints, self.logs):
            path.mkdir(parents=True, exist_ok=True)
        for path in (self.path, self.checkpoints, self.logs, self.ledger, self.lock):
            need = os.W_OK | os.X_OK if path.is_dir() else os.W_OK
            if path.exists() and not os.access(path, need, effective_ids=True):
                raise ConfigError("run", str(path), f"valid: a run that this user may write to; {whose(path)}")
