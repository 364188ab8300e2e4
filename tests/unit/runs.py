"""Run directories in all states, written by hand, and a Slurm that knows what it is told."""

import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from outlast.launcher.display import status_table
from outlast.launcher.runs.queue import Answer, JobKey, JobState
from outlast.launcher.runs.standing import Ask, RunStatus, collect
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.rundir.submission import Submission
from outlast.rundir.sweep import Cell, SweepManifest

Make = Callable[..., RunDirectory]


def start(run: RunDirectory, attempt: int = 1, job_id: str | None = None, **values: Any) -> Ledger:
    ledger, values = Ledger(run.ledger), {"hosts": ["a"], "world_size": 1, "versions": {}} | values
    ledger.append("attempt_started", attempt, job_id=job_id, restart_count=0, **values)
    return ledger


def save(ledger: Ledger, step: int, attempt: int = 1) -> None:
    ledger.append("checkpoint", attempt, step=step, kind="periodic", bytes=10, stall_s=0.1, sealed_s=0.1)


def end(ledger: Ledger, cause: str, step: int = 40, attempt: int = 1) -> None:
    ledger.append("attempt_ended", attempt, cause=cause, step=step)


def row(run: RunDirectory, ask: Ask | None = None) -> RunStatus:
    return collect([run], ask or nobody)[0]


def nobody(wanted: list[JobKey], users: set[int], clusters: set[str | None]) -> Answer:
    raise AssertionError(f"Slurm was asked for {wanted}")


def says(_reason: str | None = None, /, **states: str) -> Ask:
    """A Slurm that knows jobs, by `J<number>`."""
    jobs = {JobKey(None, job.removeprefix("J")): JobState(state, _reason) for job, state in states.items()}
    return lambda wanted, users, clusters: Answer(jobs)


def submit(run: RunDirectory, job_id: str | None, at: float | None = None, **values: Any) -> Submission:
    """As the launcher notes it."""
    at = time.time() if at is None else at
    submission = Submission(token="t0", job_id=job_id, cluster="slurm", slurm_conf=None, time=at, log="x", **values)
    (run.path / "submitted.json").write_text(json.dumps(asdict(submission)))
    return submission


def progress(run: RunDirectory, losses: list[Any] | None = None, **values: Any) -> None:
    now = {"attempt": 1, "phase": "training", "step": 42, "total_steps": 100, "time": time.time()}
    run.progress.write_text(json.dumps(now | values))
    run.losses.write_text(json.dumps({"losses": losses or []}))


def shown(rows: list[RunStatus], terminal: int | None = None) -> str:
    """What is printed; `terminal`: on one of so many columns."""
    out = io.StringIO()
    status_table.show(rows, Console(file=out, width=terminal, force_terminal=terminal is not None, color_system=None))
    return out.getvalue()


def sweep_of(root: Path, jobs: list[tuple[str | None, list[int]]], cells: int = 3, offset: int = 0) -> Path:
    """A sweep's directory, with one submission for each of `jobs`."""
    path = root / "s"
    path.mkdir()
    manifest = SweepManifest(name="s")
    for index in range(cells):
        name = f"seed={index}"
        manifest.cells.append(Cell(index=index, name=name, directory=name, overrides=[name], config_digest="d"))
        run = RunDirectory(path / name)
        run.create()
        run.config.write_text("trainer: {max_steps: 5}\n")
    for number, (job_id, indices) in enumerate(jobs):
        log, at = str(path / "logs" / "%A_%a.log"), time.time() + number
        manifest.submissions.append(
            Submission(token=f"t{number}", job_id=job_id, cluster="slurm", slurm_conf=None, time=at, log=log,
                       indices=indices, offset=offset)
        )  # fmt: skip
    manifest.write(path)
    return path
