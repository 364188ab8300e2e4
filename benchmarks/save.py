"""What a checkpoint costs: the stall of a periodic save, and the time from a signal to a sealed checkpoint.

Beside them, in the same run and in shuffled order: the Trainer's own save, with and without a flush to disk, and a
plain write of as many bytes. `README.md` in this folder says what each arm is. Everything happens in a directory of its
own inside `--dir`, which is removed at the end, also after Ctrl-C.

Example:
    python benchmarks/save.py --gb 1.0 --rounds 5 --dir /scratch/me
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil
from children import Child, ChildError
from figures import machine, summary, tables
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from shutdown import SIGNALS, shut_down

DISK_PER_GB, MEMORY_PER_GB, MEMORY_GB = 2.5, 4.0, 1.0
"""Space that is needed at once, as a multiple of --gb, and memory, with what the libraries take."""


def parser() -> argparse.ArgumentParser:
    text = argparse.RawDescriptionHelpFormatter
    arguments = argparse.ArgumentParser(prog="save.py", description=__doc__, formatter_class=text)
    arguments.add_argument("--gb", type=float, default=1.0, help="weights and AdamW state, in GB (default 1.0)")
    arguments.add_argument("--rounds", type=int, default=5, help="rounds of saves (default 5)")
    arguments.add_argument(
        "--signals", type=int, default=None, help="rounds of signals (default: as --rounds, at most 3)"
    )
    arguments.add_argument(
        "--dir", type=Path, default=Path(), help="where to write: the file system to measure (default .)"
    )
    arguments.add_argument(
        "--seed", type=int, default=None, help="of the order and of the moments (default: a random one)"
    )
    arguments.add_argument("--json", action="store_true", help="print the values instead of tables")
    return arguments


def check(options: argparse.Namespace) -> str | None:
    """Why it can't be run with these options, if so."""
    if options.gb < 0.002 or options.rounds < 1 or options.signals < 1:
        return "--gb must be at least 0.002, --rounds and --signals at least 1"
    if not options.dir.is_dir():
        return f"--dir: {options.dir} is not a directory"
    free, memory = shutil.disk_usage(options.dir).free / 1e9, psutil.virtual_memory().available / 1e9
    if free < DISK_PER_GB * options.gb:
        return f"--dir: {options.dir} has {free:.1f} GB free; --gb {options.gb:g} needs {DISK_PER_GB * options.gb:.1f}"
    if memory < MEMORY_PER_GB * options.gb + MEMORY_GB:
        need = MEMORY_PER_GB * options.gb + MEMORY_GB
        return f"{memory:.1f} GB of memory are available; --gb {options.gb:g} needs {need:.1f}"
    return None


def measure_stalls(options: argparse.Namespace, scratch: Path, progress: Progress) -> dict[str, Any]:
    """The arms of `stall.py`, in one training process."""
    task = progress.add_task("saves: building the model", total=None)
    lines = []
    with Child("stall", scratch / "stall", gb=options.gb, rounds=options.rounds, seed=options.seed) as child:
        while (line := child.line()) is not None:
            if "arms" in line:
                progress.update(task, total=line["arms"])
                continue
            label = f"round {line['round']}" if line["round"] else "warm-up"
            _show(progress, task, f"saves: {label}, {line['arm']} {line['seconds']:.2f} s")
            lines += [line] * (line["round"] > 0)
        if code := child.wait():
            raise child.error(f"failed with exit code {code}")
    shutil.rmtree(scratch / "stall")
    return summary(lines)


def measure_shutdowns(options: argparse.Namespace, scratch: Path, progress: Progress) -> dict[str, Any]:
    """Signalled runs, with outlast and with the Trainer's own means, in an order of their own each round."""
    rng = random.Random(options.seed)
    task = progress.add_task("signals", total=options.signals * len(SIGNALS))
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in SIGNALS}
    for _ in range(options.signals):
        for mode in rng.sample(list(SIGNALS), len(SIGNALS)):
            found[mode].append(shut_down(mode, scratch / mode, options.gb, rng))
            shutil.rmtree(scratch / mode)
            _show(progress, task, f"signals: {mode} {found[mode][-1]['saved_s']:.2f} s")
    return found


def main() -> int:
    options = parser().parse_args()
    options.signals = min(options.rounds, 3) if options.signals is None else options.signals
    options.seed = random.randrange(10**6) if options.seed is None else options.seed
    if problem := check(options):
        print(f"save.py: {problem}", file=sys.stderr)
        return 2
    errors = Console(stderr=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    directory = options.dir.resolve()
    report: dict[str, Any] = {
        "machine": machine(directory),
        "seed": options.seed,
        "gb": options.gb,
        "rounds": options.rounds,
    }
    errors.print(f"seed {options.seed}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".outlast-benchmark-", dir=directory) as scratch,
            Progress(*columns, console=errors) as progress,
        ):
            report["stall"] = measure_stalls(options, Path(scratch), progress)
            report["shutdown"] = measure_shutdowns(options, Path(scratch), progress)
    except ChildError as error:
        print(f"save.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(report, indent=1)) if options.json else Console().print(tables(report))
    return 0


def _show(progress: Progress, task: TaskID, text: str) -> None:
    progress.update(task, advance=1, description=text)
    if not progress.console.is_terminal:  # where the bar is drawn once, at the end
        progress.console.print(text)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
