"""One save, every file event on every rank: SIGKILL before it, and with what is written torn in half; then resume.

A base run with two sealed checkpoints is made once for each configuration and copied for each kill point. Its next
attempt is killed in one of the windows below; the one after that starts as any other does and trains to the end.
Which files a save writes depends on LoRA, who writes them on the number of ranks, and neither on the other: by default
each window has a cell with LoRA and one without, one with one rank and one with two.
`OUTLAST_KILL_POINTS`: points in each cell of all, or `all`, or one by its name, as a failure prints it (`0:kill:53`).
"""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from outlast.checkpoint.manifest import verify
from outlast.errors import CheckpointError

from .harness import (
    Base,
    Bases,
    FileEvent,
    Server,
    events,
    in_parallel,
    litter,
    resumable_steps,
    weights,
)
from .windows import WINDOWS, log_window, prepare

pytestmark = pytest.mark.usefixtures("counting")

DEFAULT_POINTS = 12
POINTS = os.environ.get("OUTLAST_KILL_POINTS", "")
LINGER_S = 30.0


@dataclass(frozen=True)
class Point:
    """Where one rank dies."""

    rank: int
    what: str
    number: int
    event: str

    @property
    def name(self) -> str:
        return f"{self.rank}:{self.what}:{self.number}"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("window", WINDOWS)
def test_killed_at_any_file_event(
    window: str,
    lora: bool,
    ranks: int,
    bases: Bases,
    server: Server,
    work: Path,
    note: Callable[[str], None],
) -> None:
    pair = list(WINDOWS).index(window) % 2
    if not POINTS and (ranks == 2) != (lora == pair):
        pytest.skip("OUTLAST_KILL_POINTS: by default two of a window's four cells")
    check(server, bases(lora, ranks), window, work, note)


def test_killed_while_large_files_are_written(
    server: Server, tmp_path_factory: pytest.TempPathFactory, note: Callable[[str], None]
) -> None:
    """Of 10 and 20 MB, on a disk: they go past the page cache, in pieces, from a thread."""
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as path:
        work = Path(path)
        base = Bases(server, work)(False, 1, 512)
        writes = [e for e in log_window(server, base, "periodic", work / "log", 0) if e.kind == "write"]
        for name in ("model.safetensors", "optimizer.pt"):
            assert sum(e.path.endswith(name) for e in writes) > 1, f"{name} is not large enough for several pieces"
        check(server, base, "periodic", work, note)


def check(server: Server, base: Base, window: str, work: Path, note: Callable[[str], None]) -> None:
    began = time.monotonic()
    everything = all_points(server, base, window, work)
    points = chosen(everything)
    problems = [p for p in in_parallel(lambda point: kill_and_resume(server, base, window, work, point), points) if p]
    kinds = [sum(text.startswith(kind) for _, text in problems) for kind in ("unable", "different", "older")]
    name = f"{'LoRA' if base.lora else 'full'}{', large' * (base.hidden > 100)}, {base.ranks} rank(s), {window}"
    note(
        f"kill matrix, {name}: {len(points)} of {len(everything)} kill points, {kinds[0]} unable to resume, "
        f"{kinds[1]} with different weights, {kinds[2]} from an older step, {len(problems) - sum(kinds)} otherwise "
        f"wrong; {time.monotonic() - began:.0f} s"
    )
    assert not problems, "\n\n".join(f"kill point {point.name} ({point.event}): {text}" for point, text in problems)


def all_points(server: Server, base: Base, window: str, work: Path) -> list[Point]:
    """Every file event of the window on every rank, as the uninterrupted attempt makes them."""
    found = []
    for rank in range(base.ranks):
        log = log_window(
            server, base, window, work / f"log-{window}-{base.lora}-{base.ranks}-{base.hidden}-{rank}", rank
        )
        for event in log:
            text = f"{event.kind} {event.path} {event.target}".rstrip()
            found.append(Point(rank, "kill", event.number, text))
            if event.kind == "write" and event.bytes > 1:
                found.append(Point(rank, "tear", event.number, text))
        if window != "emergency":  # the last event of that one is followed by the end of the process anyway
            found.append(Point(rank, "kill", len(log) + 1, "after the last"))
        check_coverage(log, window, rank)
    return found


def check_coverage(log: list[FileEvent], window: str, rank: int) -> None:
    """That the window holds what it is there for; without it the matrix would prove nothing."""
    kinds = {event.kind for event in log}
    if rank > 0:
        assert window == "recovery" or kinds >= {"create", "write", "fsync"} or window == "final"
        return
    assert kinds >= {"create", "write", "fsync", "rename"}
    gone = [e for e in log if e.kind == "unlink"]
    assert bool(gone) == (window != "final"), f"{window}: {len(gone)} files deleted"
    assert "mmap" not in kinds, "a file is written through memory: its writes can't be seen"


def chosen(points: list[Point]) -> list[Point]:
    """All, one, or as many as `OUTLAST_KILL_POINTS` says: one of each kind on each rank, the rest spread."""
    wanted = POINTS or str(DEFAULT_POINTS)
    if wanted == "all":
        return points
    if ":" in wanted:
        return [point for point in points if point.name == wanted]
    picked: dict[str, Point] = {}
    seen: set[tuple[object, ...]] = set()
    for point in points:
        kind = (point.rank, point.what, point.event.split()[0], "ledger" in point.event and point.what == "tear")
        if kind not in seen:
            picked[point.name] = point
        seen.add(kind)
    missing = max(int(wanted) - len(picked), 0)
    for i in range(missing):
        point = points[(2 * i + 1) * len(points) // (2 * missing)]
        picked[point.name] = point
    return list(picked.values())


def kill_and_resume(server: Server, base: Base, window: str, work: Path, point: Point) -> tuple[Point, str] | None:
    """What is wrong with this kill point, in words, or None."""
    name = f"{window}-{base.lora}-{base.ranks}-{base.hidden}-{point.name.replace(':', '-')}"
    attempt, arming = prepare(base, window, work / name, point.rank)
    run = Path(attempt.directory)
    before = resumable_steps(run)[-1]
    arming.what, arming.number = point.what, point.number
    attempt.arming = arming
    # The other ranks are killed with it, as `srun` may do, or find out by themselves, in turn. Before they are
    # connected they can't, and wait for the one that is dead as long as torch's rendezvous does.
    linger_s = LINGER_S * (window != "recovery" and point.number % 2)
    killed = server.run(attempt, work / f"{name}.killed", ranks=base.ranks, linger_s=linger_s)
    if killed.codes[point.rank] != -signal.SIGKILL:
        return point, f"the process was not killed there: {killed}"
    if killed.hung:
        return point, f"another rank hung for {LINGER_S:g} s: {killed.output}"
    steps = resumable_steps(run)
    if not steps or steps[-1] < before:
        return point, f"older: after the kill the sealed checkpoints are {steps}, before it the newest was {before}"
    try:
        verify(run / f"checkpoints/checkpoint-{steps[-1]}")
    except CheckpointError as error:
        return point, f"unable: checkpoint-{steps[-1]} is whole, but the library says: {error}"
    had_finished = bool(events(run, "finished"))
    attempts_before = {e["attempt"] for e in events(run, "resumed")}

    again = server.run(base.attempt(directory=str(run)), work / f"{name}.resumed", ranks=base.ranks)
    if again.codes != [0] * base.ranks:
        return point, f"unable to resume: {again}\nkilled attempt: {killed.output}"
    resumed = [e["step"] for e in events(run, "resumed") if e["attempt"] not in attempts_before]
    if not had_finished and resumed != [steps[-1]]:
        return point, f"older step resumed from: {resumed}, the sealed checkpoints were {steps}: {again.output}"
    if weights(run) != base.twin:
        return point, f"different weights: {again.output}"
    problem = check_end(run, did_nothing=had_finished)
    return (point, problem) if problem else remove(work, name)


def check_end(run: Path, *, did_nothing: bool) -> str | None:
    """What is wrong with a finished run directory.

    Args:
        did_nothing: it was finished when the last attempt began, which did not clean up either.
    """
    shown = (".progress.json.", ".losses.json.")
    left = [name for name in litter(run) if not (did_nothing and name.startswith(shown))]
    if left:
        return f"left over: {left}"
    started, ended = ({e["attempt"] for e in events(run, f"attempt_{what}")} for what in ("started", "ended"))
    if started - ended or max(ended) not in started:
        return f"attempts {started} have begun and {ended} have ended, by the ledger"
    aside = {p.name.split(".")[0] for p in (run / "quarantine").glob("*") if p.is_dir()}
    if aside - {e["checkpoint"] for e in events(run, "quarantined")}:
        return f"in quarantine, but not in the ledger: {aside}"
    return None


def remove(work: Path, name: str) -> None:
    shutil.rmtree(work / name)
    for path in work.glob(f"{name}.*"):
        path.unlink()
