"""Slurm's commands, as scripts that answer what a test tells them to."""

import os
from pathlib import Path

import pytest

from outlast.rundir.directory import RunDirectory

from .runs import Make


class Slurm:
    """Slurm's commands as shell scripts that say what a test writes down, and note how they were called."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("scontrol", "sacct", "sinfo", "sbatch"):
            (directory / f"{name}.answer").touch()
            (directory / name).write_text(
                f'#!/bin/sh\necho "{name} $*" >> {directory}/calls\n'
                f'[ "$1" = requeue ] && [ -e {directory}/refuse ] && exit 1\ncat {directory}/{name}.answer\n'
            )
            (directory / name).chmod(0o755)

    def says(self, command: str, text: str) -> None:
        (self.directory / f"{command}.answer").write_text(text)

    def refuse_requeue(self) -> None:
        (self.directory / "refuse").touch()

    def calls(self, beginning: str) -> list[str]:
        log = self.directory / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if line.startswith(beginning)]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    return Slurm(tmp_path / "bin")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run directory with a frozen configuration, under one root."""

    def make(name: str, config: str = "storage: {budget_gb: 1.0}\ntrainer: {max_steps: 100}\n") -> RunDirectory:
        run = RunDirectory(tmp_path / name)
        run.create()
        run.config.write_text(config)
        return run

    return make
