"""The report as one HTML file: no network, no other file, readable without its script."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from string import Template
from typing import Any

from .plots import both, ended_as, is_loss, is_near, ordered, plots_of, share_bar
from .progress import duration, size
from .report import hours, notes_of
from .svg import HERE, WIDE, escape

Summary = dict[str, Any]

SHOWN = 6
"""Hosts of an attempt that are named, at most."""


@dataclass(frozen=True)
class Td:
    """A cell of a table: its text, and the number by which it is sorted."""

    text: str
    number: float | None = None
    is_number: bool = True

    def html(self) -> str:
        if not self.is_number:
            return f'<td class="long">{escape(self.text)}</td>'
        value = "" if self.number is None else f"{self.number:.8g}"
        return f'<td class="number" data-v="{value}">{escape(self.text)}</td>'


def words(text: object) -> Td:
    """A cell of text."""
    return Td(str(text), is_number=False)


def seconds(value: float | None) -> Td:
    """A cell with a length of time; empty if there is none."""
    return Td(duration(value) if value is not None and value >= 0.05 else "", value)


def table(headers: Sequence[str], rows: Sequence[Sequence[Td]], *, id: str = "", best: int | None = None) -> str:
    """A table whose headers sort it.

    Args:
        best: the row that is marked.
    """
    kinds = ["" if not rows or not cell.is_number else ' class="number"' for cell in (rows[0] if rows else ())]
    heads = "".join(
        f'<th scope="col"{kind}><button type="button">{escape(name)}</button></th>'
        for name, kind in zip(headers, kinds or [""] * len(headers), strict=True)
    )
    body = "".join(
        ('<tr class="best">' if number == best else "<tr>") + "".join(cell.html() for cell in row) + "</tr>"
        for number, row in enumerate(rows)
    )
    name = f' id="{id}"' if id else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table"><table class="sortable"{name}>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def tiles(facts: Sequence[tuple[str, str, str]]) -> str:
    """Figures that are seen at once: name, value, a few words more."""
    return "".join(
        f'<dl class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}<span class="note">{escape(note)}</span></dd></dl>'
        for name, value, note in facts
    ).join(['<div class="tiles">', "</div>"])


def legend(items: Sequence[tuple[str, str, str]], kind: str = "") -> str:
    """What colours mean: class, name, a value."""
    return "".join(
        f'<li><i class="{name} {kind}" aria-hidden="true"></i><b>{escape(text)}</b> '
        f'<span class="value">{escape(value)}</span></li>'
        for name, text, value in items
    ).join(['<ul class="legend">', "</ul>"])


def state_of(state: str) -> str:
    """A state as a label beside a title."""
    return f'<span class="state {state.replace("_", "-")}">{escape(state.replace("_", " "))}</span>'


def page(title: str, body: str) -> str:
    """The whole file."""
    read = {kind: (HERE / f"report.{kind}").read_text() for kind in ("html", "css", "js")}
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return Template(read["html"]).substitute(
        title=escape(title),
        version=escape(version("outlast")),
        style=read["css"],
        script=read["js"],
        body=body,
        footer=f"Made by outlast {escape(version('outlast'))} on {now}.",
    )


def run_page(summary: Summary) -> str:
    """The report of one run."""
    accounting, name = summary["accounting"], summary["name"]
    sections = [
        f"<h1>{escape(name)} {state_of(summary['state'])}</h1>",
        f'<p class="lead">{escape(_lead(summary))}</p>',
        tiles(_figures(summary)),
        section("Where the time went", _shares(summary)),
    ]
    for title, draw in plots_of(summary):
        sections.append(section(title, _explained(title, summary) + both(draw, summary)))
    sections.append(section("Attempt by attempt", table(*_attempts(summary))))
    costs = sorted(accounting["cost"].items(), key=lambda cost: -cost[1]["accelerator_hours"])
    rows = [
        [
            words(cause.replace("_", " ")),
            Td(hours(c["accelerator_hours"]), c["accelerator_hours"]),
            seconds(c["seconds"]),
        ]
        for cause, c in costs
    ]
    what = (
        "How an attempt ended costs its stopping, what was lost, the wait after it and the start of the next. "
        "The time of all ranks together is accelerator hours, where each rank has one."
    )
    sections.append(
        section("What it has cost", f'<p class="quiet">{what}</p>' + table(("cause", "rank time", "time"), rows))
    )
    if notes := notes_of(summary):
        facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in notes.items())
        sections.append(section("Also", f'<dl class="facts">{facts}</dl>'))
    return page(f"{name}: outlast report", "\n".join(sections))


def section(title: str, body: str) -> str:
    """A part of the page, with its title."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def percent(share: float | None) -> str:
    """A share, or a question mark."""
    return "?" if share is None else f"{share:.1%}"


def _lead(summary: Summary) -> str:
    first = summary["attempts"][0]
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(first["start"]))
    return f"Began {began}. {summary['path']}"


def _figures(summary: Summary) -> list[tuple[str, str, str]]:
    accounting, total = summary["accounting"], summary["total_steps"]
    goodput, best = accounting["goodput"], summary["best"]
    number, preempted = len(summary["attempts"]), summary["preemptions"]
    found = [
        ("Goodput", percent(goodput["wall"]), f"{percent(goodput['allocated'])} of the time in attempts"),
        (
            "Steps",
            f"{summary['step']:,}",
            f"of {'?' if total is None else f'{total:,}'}, {summary['steps_lost']:,} repeated",
        ),
        ("Attempts", str(number), f"{preempted} preempted"),
        ("Time", duration(accounting["wall_s"]), f"{duration(accounting['parts']['queued'])} in the queue"),
        ("Rank time", hours(accounting["accelerator_hours"]) or "0 h", "of all ranks together"),
        ("On disk", size(summary["bytes_used"]), f"peak {size(summary['bytes_peak'])}" + _of(summary["budget_bytes"])),
    ]
    if best is not None:
        found.append((f"Best {best['name']}", f"{best['value']:.4g}", f"at step {best['step']:,}"))
    return found


def _of(budget: int | None) -> str:
    return "" if budget is None else f" of {size(budget)}"


def _shares(summary: Summary) -> str:
    accounting = summary["accounting"]
    whole = accounting["wall_s"] or 1.0
    items = [
        (name, name, f"{duration(value)}, {value / whole:.1%}")
        for name, value in ordered(accounting["parts"])
        if value > 0
    ]
    wait = accounting["first_wait_s"]
    before = f" Before the first start it waited {duration(wait)} in the queue." if wait else ""
    return (
        share_bar(summary, WIDE).svg("share").replace("<svg ", '<svg preserveAspectRatio="none" ', 1)
        + legend(items)
        + f'<p class="quiet formula">{escape(accounting["goodput"]["formula"])}: '
        f"{percent(accounting['goodput']['wall'])} of all seconds since the first start, "
        f"{percent(accounting['goodput']['allocated'])} of those in attempts.{escape(before)}</p>"
    )


def _explained(title: str, summary: Summary) -> str:
    curves = summary["curves"]
    if title == "Attempts":
        return '<p class="quiet">Coloured as above; the thin line before a bar is the wait for it.</p>'
    if title == "On disk":
        budget = summary["budget_bytes"]
        far = budget is not None and not is_near(budget, summary["bytes_peak"])
        above = f" The budget, {size(budget)}, lies far above." if far else ""
        return f'<p class="quiet">Checkpoints and the finished model, as they were sealed and deleted.{above}</p>'
    items = [("loss", "training loss", "")] if title == "Loss" and curves["losses"] else []
    if curves["evaluations"] and (title != "Loss" or is_loss(curves)):
        items.append(("evaluation", str(curves["metric"]), ""))
    causes = sorted({stop["cause"] for stop in curves["stops"]})
    kinds = {
        cause: "stopping" if cause in ("preempted", "time_limit", "cancelled", "requeued") else "lost"
        for cause in causes
    }
    items += [(kinds[cause], cause.replace("_", " "), "") for cause in causes]
    return legend(items, "line")


def _attempts(summary: Summary) -> tuple[list[str], list[list[Td]]]:
    headers = [
        *("attempt", "where", "began (UTC)", "waited", "start-up", "training", "evaluating", "saving", "stopping"),
        *("signal to sealed", "lost", "steps", "repeated", "ended"),
    ]
    rows = []
    for row in summary["attempts"]:
        parts, began = row["parts"], row["end"] - row["allocated_s"]
        hosts = row["hosts"][:SHOWN] + [f"and {len(row['hosts']) - SHOWN} more"] * (len(row["hosts"]) > SHOWN)
        where = ", ".join(hosts) + (f", job {row['job_id']}" if row["job_id"] else "")
        rows.append(
            [
                Td(str(row["number"]), row["number"]),
                words(where),
                Td(time.strftime("%m-%d %H:%M:%S", time.gmtime(began)), began),
                seconds(row["queued_s"] + row["stopped_s"]),
                *(seconds(parts[name]) for name in ("starting", "training", "evaluating", "saving", "stopping")),
                seconds(row["signal_to_sealed_s"]),
                seconds(parts["lost"]),
                Td(f"{row['first_step']:,} to {row['last_step']:,}", row["last_step"]),
                Td(str(row["steps_lost"] or ""), row["steps_lost"]),
                words(ended_as(row) + (f" ({row['signal']})" if row["signal"] else "")),
            ]
        )
    return headers, rows
