"""The report of a sweep as one HTML file: its table, what each override did, its curves."""

from typing import Any

from ..runs.sweep_summary import as_number
from .page import Td, legend, page, percent, seconds, section, state_of, table, tiles, words
from .plots import effect_plot, overlay_plot
from .progress import duration, size
from .report import hours
from .svg import NARROW, WIDE, escape

Summary = dict[str, Any]

SMALL = 330
"""Width of each of several plots side by side, in pixels."""


def sweep_page(summary: Summary, cells: list[Summary]) -> str:
    """The report of one sweep, its cells in this order."""
    states = sorted(summary["states"].items(), key=lambda state: -state[1])
    done = state_of("finished") if [state for state, _ in states] == ["finished"] else ""
    sections = [
        f"<h1>{escape(summary['sweep'])} {done}</h1>",
        f'<p class="lead">{escape(summary["path"])}</p>',
        tiles(_figures(summary, cells, ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in states))),
    ]
    if summary["effects"]:
        plots = "".join(
            f"<div><h3>{escape(effect['key'])}</h3>{effect_plot(summary, effect, SMALL).svg()}</div>"
            for effect in summary["effects"]
        )
        what = f"Each point is a cell; the line is the median of a value. The metric is {summary['metric']}."
        sections.append(
            section(
                "What each override did", f'<p class="quiet">{escape(what)}</p><div class="small-plots">{plots}</div>'
            )
        )
    if any(cell["curve"] for cell in cells):
        marks = legend([("evaluation", f"the best: {summary['best']}", ""), ("loss", "the others", "")], "line")
        both = overlay_plot(summary, WIDE).svg("wide") + overlay_plot(summary, NARROW).svg("narrow")
        sections.append(section(f"{summary['metric'] or 'Loss'} by step", marks + both))
    sections.append(section("Cells", _cells(summary, cells)))
    return page(f"{summary['sweep']}: outlast report", "\n".join(sections))


def _figures(summary: Summary, cells: list[Summary], states: str) -> list[tuple[str, str, str]]:
    parts, lost = summary["parts"], sum(cell["steps_lost"] for cell in cells)
    held = sum(value for name, value in parts.items() if name not in ("queued", "stopped"))
    useful = (parts["training"] + parts["evaluating"]) / held if held else None
    preempted = sum(cell["preemptions"] for cell in cells)
    found = [
        ("Cells", f"{len(cells):,}", states),
        ("Goodput", percent(useful), "of the time in attempts"),
        ("Rank time", hours(summary["accelerator_hours"]) or "0 h", "of all ranks together"),
        ("Preemptions", f"{preempted:,}", f"{lost:,} steps repeated"),
        ("In the queue", duration(parts.get("queued", 0.0)), "of all cells together"),
    ]
    if summary["best"] is not None:
        best = next(cell for cell in cells if cell["cell"] == summary["best"])
        found.insert(0, (f"Best {summary['metric']}", f"{best['metric']['value']:.4g}", summary["best"]))
    return found


def _cells(summary: Summary, cells: list[Summary]) -> str:
    headers = ["cell", *summary["keys"], "state", summary["metric"] or "metric", "step", "attempts", "preempted"]
    headers += ["lost", "goodput", "hours", "time", "bytes"]
    texts = {key for cell in cells for key, value in cell["overrides"].items() if isinstance(as_number(value), str)}
    rows = []
    for cell in cells:
        metric, total, swept = cell["metric"], cell["total_steps"], cell["overrides"]
        goodput, used = cell["goodput"], cell["bytes_used"]
        rows.append(
            [
                words(cell["cell"]),
                *(
                    Td(swept.get(key, ""), float(swept[key]) if key in swept else None)
                    if key not in texts
                    else words(swept.get(key, ""))
                    for key in summary["keys"]
                ),
                words(cell["state"].replace("_", " ")),
                Td(f"{metric['value']:.4g}", metric["value"]) if metric else Td(""),
                Td(f"{cell['step']:,}" + ("" if total in (None, cell["step"]) else f" of {total:,}"), cell["step"]),
                Td(str(cell["attempts"]), cell["attempts"]),
                Td(str(cell["preemptions"] or ""), cell["preemptions"]),
                Td(str(cell["steps_lost"] or ""), cell["steps_lost"]),
                Td("" if goodput is None else f"{goodput:.1%}", goodput),
                Td(hours(cell["accelerator_hours"]), cell["accelerator_hours"]),
                seconds(cell["wall_s"]),
                Td("" if used is None else size(used), used),
            ]
        )
    best = next((number for number, cell in enumerate(cells) if cell["cell"] == summary["best"]), None)
    tools = (
        '<div class="tools"><input id="filter" type="search" placeholder="Filter: a word, or state:failed" '
        'aria-label="Filter the cells"><span id="count" class="quiet" role="status">'
        f"{len(cells)} of {len(cells)}</span></div>"
    )
    return tools + table(headers, rows, id="cells", best=best)
