"""What happened to a run: attempts, causes, steps, seconds and bytes, from its ledger and its directory."""

from pathlib import Path

from rich.console import Console

from outlast.errors import Exit
from outlast.files import to_json

from ..display.report import render
from ..runs.find import run_named
from ..runs.summary import summarize


def main(name: str, root: Path, *, as_json: bool) -> int:
    """`outlast report RUN`: a name under `root`, or a run directory's path."""
    summary = summarize(run_named(name, root))
    if as_json:
        print(to_json(summary, indent=1))
    else:
        console = Console(highlight=False)
        render(summary, console if console.is_terminal else Console(highlight=False, width=200))
    return Exit.DONE
