"""`outlast checkpoints`: what a run has saved, and whether it is still what was written. Reads only.

It may be asked while the run goes on: what is deleted between being listed and being read is left out.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from outlast.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from outlast.checkpoint.manifest import verify as verify_checkpoint
from outlast.errors import CheckpointError, Exit
from outlast.files import bytes_used, to_json
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger

from ..display.progress import duration, size
from ..runs.find import run_named
from ..runs.settings import evaluations, settings_of

CheckpointState = Literal["sealed", "light", "final", "unsealed", "unreadable", "quarantined"]
SEALED = ("sealed", "light", "final")
STYLES: dict[CheckpointState, str] = {"unsealed": "yellow", "unreadable": "red", "quarantined": "yellow"}


@dataclass(kw_only=True)
class CheckpointRow:
    """One checkpoint. Sizes are bytes on disk, times Unix seconds, lengths seconds."""

    name: str
    path: str
    state: CheckpointState
    step: int | None = None
    kind: str | None = None
    """`periodic`, `emergency`, `final`, as its manifest says; None without a manifest."""
    best: bool = False
    """Whether it is the best by the metric, as known when the newest was sealed."""
    metric: dict[str, Any] | None = None
    """`name` and `value` of the metric that decides which is the best, where it was evaluated at this step."""
    bytes: int | None = None
    time: float | None = None
    age_s: float | None = None
    reason: str | None = None
    """Why it is not sealed, or what does not verify."""
    verified: bool | None = None
    """Whether each file has the digest of its manifest; None if that was not looked at."""


def main(name: str, root: Path, *, verify: bool, as_json: bool) -> int:
    """`outlast checkpoints RUN`. Exit code 1 if `verify` finds one that is not what was written."""
    run = run_named(name, root)
    rows = look(run)
    if verify:
        rows = [row for row in _with_bar(rows) if _verified(row)]
    if as_json:
        values = {"run": run.path.name, "path": str(run.path), "checkpoints": [asdict(row) for row in rows]}
        print(to_json(values, indent=1))
    else:
        console = Console(highlight=False)
        # In a pipe or a file, each checkpoint has a line to itself.
        render(run, rows, console if console.is_terminal else Console(highlight=False, width=200))
    return Exit.FAILED if any(row.verified is False for row in rows) else Exit.DONE


def look(run: RunDirectory) -> list[CheckpointRow]:
    """The checkpoints of a run: by step, then the finished model, then what was put aside."""
    found = [_row(path) for path in _directories(run.checkpoints) if re.fullmatch(r"checkpoint-\d+", path.name)]
    aside = [_row(path, quarantined=True) for path in _directories(run.quarantine)]
    pairs = [pair for pair in [*found, _row(run.final), *aside] if pair is not None]
    known = [manifest for row, manifest in pairs if manifest and manifest.best_step is not None and row.state in SEALED]
    best_step = max(known, key=lambda manifest: manifest.step).best_step if known else None
    metrics = {e["step"]: e for e in evaluations(Ledger(run.ledger).read(), settings_of(run)["trainer"])}
    for row, manifest in pairs:
        best_known = manifest is not None and manifest.best_step is not None
        metric = metrics.get(row.step) if row.state != "final" or best_known else None
        row.metric = metric and {"name": metric["name"], "value": metric["value"]}
        row.best = row.step == best_step is not None and row.state in ("sealed", "light")
    order = ("final", "quarantined")
    rows = [row for row, _ in pairs]
    return sorted(rows, key=lambda row: (order.index(row.state) if row.state in order else -1, row.step or 0, row.name))


def _directories(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{parent} can't be read: {error.strerror}") from None


def _row(path: Path, *, quarantined: bool = False) -> tuple[CheckpointRow, Manifest | None] | None:
    """Describe a checkpoint as it is now, with its manifest if that can be read; None if there is none."""
    manifest, reason, present = _steady(path, read_manifest)
    state: CheckpointState = "final" if path.name == "final" else "sealed"
    if manifest is None:
        state = "unreadable" if present else "unsealed"
        reason = reason if present else "it has no manifest: it was never sealed, or is being deleted"
    elif manifest.light:
        state = "light"
    if quarantined:
        state = "quarantined"
        with suppress(OSError):
            reason = path.with_name(f"{path.name}.reason.txt").read_text().strip()
    number = re.match(r"checkpoint-(\d+)", path.name)
    row = CheckpointRow(name=path.name, path=str(path), state=state, reason=reason)
    row.step = manifest.step if manifest else int(number[1]) if number else None
    row.kind = manifest.kind if manifest else None
    try:
        row.time = manifest.time if manifest else path.stat().st_mtime
        row.age_s = max(time.time() - row.time, 0.0)
        row.bytes = bytes_used(path)
    except OSError as error:
        row.reason = row.reason or f"{error.filename} can't be read: {error.strerror}"
    return (row, manifest) if path.is_dir() else None


def _verified(row: CheckpointRow) -> bool:
    """Compare every file with the manifest, and note the answer; return False if the checkpoint has gone meanwhile."""
    if row.state not in (*SEALED, "unreadable"):
        return True
    manifest, reason, present = _steady(Path(row.path), verify_checkpoint)
    if present:
        row.verified, row.reason = manifest is not None, reason
    return present


def _steady(path: Path, read: Callable[[Path], Manifest]) -> tuple[Manifest | None, str | None, bool]:
    """The manifest that `read` gives, or the reason why it gives none; and whether there is one.

    It is asked again if the manifest was replaced meanwhile: the run has lightened, deleted or made the checkpoint.
    """
    while True:
        before = _manifest_bytes(path)
        try:
            return read(path), None, True
        except CheckpointError as error:
            if _manifest_bytes(path) == before:
                return None, str(error), before is not None


def _manifest_bytes(path: Path) -> bytes | None:
    try:
        return (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None
    except OSError:
        return b"unreadable"


def _with_bar(rows: Iterable[CheckpointRow]) -> Iterator[CheckpointRow]:
    """The rows one by one, with a bar of the bytes read on a terminal's stderr."""
    rows, console = list(rows), Console(stderr=True)
    total = sum(row.bytes or 0 for row in rows)
    columns = (TextColumn("verifying {task.description}"), BarColumn(), DownloadColumn())
    with ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        for row in rows:
            bar.update(task, description=row.name)
            yield row
            bar.advance(task, row.bytes or 0)


def render(run: RunDirectory, rows: list[CheckpointRow], console: Console) -> None:
    """Print one line a checkpoint, and under them what is wrong with which."""
    if not rows:
        console.print(Text(f"{run.path.name} has no checkpoint yet"))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    headers = ["step", "kind", "state", "metric", "bytes", "age"]
    headers += ["verified"] if any(row.verified is not None for row in rows) else []
    for header in headers:
        table.add_column(header, no_wrap=header != "metric", overflow="fold")
    for row in rows:
        cells: list[str | Text] = [
            f"{'?' if row.step is None else row.step}{' *' if row.best else ''}",
            row.kind or "",
            Text(row.state, style=STYLES.get(row.state, "")),
            f"{row.metric['name']} {row.metric['value']:.4g}" if row.metric else "",
            size(row.bytes),
            "?" if row.age_s is None else duration(row.age_s),
            {None: Text(), True: Text("ok", style="green"), False: Text("FAILED", style="bold red")}[row.verified],
        ]
        table.add_row(*cells[: len(headers)])
    console.print(table)
    if any(row.best for row in rows):
        console.print(Text("* the best by its metric, as of the newest checkpoint", style="dim"))
    for row in rows:
        if row.reason:
            console.print(Text(f"{row.state} {row.name}: {row.reason}", style="yellow"), soft_wrap=True)
