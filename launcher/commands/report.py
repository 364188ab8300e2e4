"""What happened to a run or a sweep, as text, JSON, page or picture; and what many runs have cost."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from outlast.errors import ConfigError, Exit
from outlast.files import to_json

from ..display.report import render, render_since, render_sweep
from ..runs.find import run_named, runs_named, runs_under, sweep_named
from ..runs.since import moment, summarize_since
from ..runs.summary import Summary, summarize
from ..runs.sweep_summary import sort_cells, summarize_sweep

PICTURES = ("svg", "png")


def main(
    name: str | None,
    root: Path,
    *,
    as_json: bool,
    files: dict[str, str | None] | None = None,
    sort: str | None = None,
    since: str | None = None,
) -> int:
    """`outlast report RUN|SWEEP`: a name under `root`, or a directory's path.

    Args:
        files: by kind (`html`, `svg`, `png`), a file to write it to, or an empty text for one named after the run.
        sort: the column by which the cells of a sweep are sorted.
        since: sum all runs under `root` (or those of RUN) from this moment on.

    Raises:
        ConfigError: there is no such run, or an option is wrong.
    """
    wanted = {kind: file for kind, file in (files or {}).items() if file is not None}
    if as_json and wanted:
        raise ConfigError("--json", "", f"valid without --{', --'.join(wanted)}, which write files")
    if since is not None:
        if wanted or sort is not None:
            raise ConfigError("--since", since, "valid with RUN, --root and --json")
        runs = runs_named([name], root) if name else runs_under(root)
        return _print(summarize_since(runs, moment(since, time.time())), as_json, render_since)
    if name is None:
        first = f"; it comes before --{next(iter(wanted))}, which takes a FILE" if wanted else ""
        raise ConfigError("RUN", "", f"valid: a run or a sweep, or --since 7d for all runs{first}")
    if (sweep := sweep_named(name, root)) is not None:
        return _sweep(summarize_sweep(sweep), as_json, wanted, sort)
    if sort is not None:
        raise ConfigError("--sort", sort, "valid for a sweep: a run has one row an attempt")
    summary = summarize(run_named(name, root))
    if not wanted:
        return _print(summary, as_json, render)
    for kind, file in wanted.items():
        _write(file, summary["run"], kind, lambda kind=kind: _drawn(summary, kind))  # type: ignore[misc]
    return Exit.DONE


def _sweep(summary: Summary, as_json: bool, files: dict[str, str], sort: str | None) -> int:
    summary["cells"] = cells = sort_cells(summary, sort)
    if pictures := [kind for kind in files if kind in PICTURES]:
        raise ConfigError(f"--{pictures[0]}", files[pictures[0]], "valid for a run or a cell; a sweep has --html")
    for file in files.values():
        from ..display.sweep_page import sweep_page

        _write(file, summary["sweep"], "html", lambda: sweep_page(summary, cells).encode())
    return Exit.DONE if files else _print(summary, as_json, lambda found, console: render_sweep(found, cells, console))


def _print(summary: Summary, as_json: bool, show: Callable[[Summary, Console], Any]) -> int:
    if as_json:
        print(to_json(summary, indent=1))
    else:
        console = Console(highlight=False)
        show(summary, console if console.is_terminal else Console(highlight=False, width=200))
    return Exit.DONE


def _drawn(summary: Summary, kind: str) -> bytes:
    """The report of a run as a file of some kind."""
    if kind == "html":
        from ..display.page import run_page

        return run_page(summary).encode()
    from ..display.picture import as_png, as_svg

    return as_png(summary) if kind == "png" else as_svg(summary).encode()


def _write(file: str, name: str, kind: str, draw: Callable[[], bytes]) -> None:
    path = Path(file or f"{name}.{kind}")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--{kind}", str(path), "valid: a file, in a directory that is there")
    data = draw()
    path.write_bytes(data)
    print(f"{path} ({len(data) / 1000:,.0f} kB)")
