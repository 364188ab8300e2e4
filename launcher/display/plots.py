"""The plots of a run: the time line of its attempts, its curves, its bytes on disk."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from ..runs.accounting import cause_of
from ..runs.sweep_summary import as_number
from .progress import duration, size
from .svg import NARROW, WIDE, Axes, Drawing, Point, number, smoothed, time_text, time_ticks

ROOM_FOR_CAUSE = 90
"""Pixels beside the line of a stop for the words why."""

Summary = dict[str, Any]
Draw = Callable[[Summary, int], Drawing]


def both(draw: Draw, summary: Summary) -> str:
    """A plot in two widths, of which the page shows the one that fits."""
    return draw(summary, WIDE).svg("wide") + draw(summary, NARROW).svg("narrow")


def share_bar(summary: Summary, width: int) -> Drawing:
    """What the wall time went into, as one bar."""
    accounting = summary["accounting"]
    drawing = Drawing(width, 30, "What the time since the first start went into")
    x, whole = 0.0, accounting["wall_s"] or 1.0
    for name, seconds in ordered(accounting["parts"]):
        length = seconds / whole * width
        if length > 0:
            drawing.rect(x, 0, max(length - 1, 0.5), 30, name, f"{name}: {duration(seconds)}, {seconds / whole:.1%}")
        x += length
    return drawing


def colour_key(summary: Summary, width: int) -> Drawing:
    """What the colours of the time line mean: for pictures, which have no page around them."""
    drawing = Drawing(width, 22, "What the colours mean")
    x = 34.0
    for name, seconds in ordered(summary["accounting"]["parts"]):
        if seconds > 0:
            drawing.rect(x, 4, 11, 11, name, round=3)
            drawing.text(x + 16, 14, name, "tick")
            x += 40 + 7 * len(name)
    return drawing


ORDER = ("training", "evaluating", "saving", "starting", "stopping", "lost", "queued", "stopped")
"""The parts of time in the order in which they are shown: what counts first, the waits last."""


def ordered(parts: dict[str, float]) -> list[tuple[str, float]]:
    """Parts and their seconds as they are shown."""
    return [(name, parts[name]) for name in ORDER]


def timeline(summary: Summary, width: int) -> Drawing:
    """A bar for each attempt, coloured by what it did; thin, the wait before it."""
    rows = summary["attempts"]
    high = 26 if len(rows) <= 40 else 12
    first = rows[0]["end"] - rows[0]["allocated_s"]
    length = max(summary["accounting"]["wall_s"], 1e-6)
    narrow = width < 600
    drawing = Drawing(width, high * len(rows) + 44, f"Time line of {len(rows)} attempts")
    axes = Axes(drawing, (0.0, length), (0.0, 1.0), left=34, right=76 if narrow else 110, top=8)
    for value in time_ticks(length, 3 if narrow else 6):
        x, _ = axes.at(value, 0)
        drawing.line(x, axes.top, x, drawing.height - axes.bottom, "grid")
    for number_, row in enumerate(rows):
        y = axes.top + number_ * high
        start, end = row["end"] - row["allocated_s"] - first, row["end"] - first
        where = f"attempt {row['number']}" + (f", job {row['job_id']}" if row["job_id"] else "")
        waited = start - row["queued_s"] - row["stopped_s"]
        for name in ("stopped", "queued"):
            if row[f"{name}_s"] > 0:
                x, after = axes.at(waited, 0)[0], axes.at(waited + row[f"{name}_s"], 0)[0]
                title = f"{name} {duration(row[f'{name}_s'])} before attempt {row['number']}"
                drawing.rect(x, y + high * 0.4, after - x, high * 0.2, name, title)
                waited += row[f"{name}_s"]
        for name, began, ended in row["spans"]:
            x, after = axes.at(began - first, 0)[0], axes.at(ended - first, 0)[0]
            drawing.rect(x, y + high * 0.15, after - x, high * 0.7, name, f"{where}: {name} {duration(ended - began)}")
        if high > 20 or row["number"] % 5 == 0:
            drawing.text(axes.left - 8, y + high / 2 + 4, row["number"], "tick", "end")
            drawing.text(axes.at(end, 0)[0] + 6, y + high / 2 + 4, ended_as(row), f"tick cause {ended_as(row, '-')}")
    axes.grid_x("", time_ticks(length, 3 if narrow else 6), time_text)
    return drawing


def ended_as(row: Summary, space: str = " ") -> str:
    """How an attempt ended, in words."""
    return cause_of(row).replace("_", space)


def loss_curve(summary: Summary, width: int) -> Drawing:
    """Training loss by step over all attempts, evaluations where they are a loss too, and where the run was stopped."""
    curves = summary["curves"]
    losses = [(float(step), value) for step, value in curves["losses"] if value is not None]
    found = _evaluations(curves) if is_loss(curves) else []
    return _curve(summary, width, losses, found, "Loss by step")


def metric_curve(summary: Summary, width: int) -> Drawing:
    """The metric that decides which checkpoint is the best, by step, where it is not a loss."""
    return _curve(summary, width, [], _evaluations(summary["curves"]), f"{summary['curves']['metric']} by step")


def is_loss(curves: Summary) -> bool:
    """Whether the deciding metric has the scale of the training loss."""
    return curves["metric"] in (None, "loss", "eval_loss")


def _evaluations(curves: Summary) -> list[Point]:
    return [(float(step), value) for step, value in curves["evaluations"]]


def _curve(summary: Summary, width: int, losses: list[Point], found: list[Point], label: str) -> Drawing:
    drawing = Drawing(width, 240 if width < 600 else 300, label)
    stops = [stop for stop in summary["curves"]["stops"] if stop["step"]]
    steps = [x for x, _ in [*losses, *found]] + [float(stop["step"]) for stop in stops]
    axes = Axes(drawing, (min(steps), max(steps)), value_range([y for _, y in losses], [y for _, y in found]))
    axes.grid_y()
    axes.grid_x("step")
    places = [axes.at(float(stop["step"]), axes.y[0])[0] for stop in stops]
    for stop, x, following in zip(stops, places, [*places, float(width)][1:], strict=True):
        title = f"attempt {stop['attempt']} {stop['cause'].replace('_', ' ')} at step {stop['step']}"
        drawing.line(x, axes.top, x, drawing.height - axes.bottom, f"stop {stop['cause'].replace('_', '-')}", title)
        if following - x > ROOM_FOR_CAUSE and width > NARROW:
            drawing.text(x + 6, axes.top + 9, stop["cause"].replace("_", " "), "tick")
    smooth = len(losses) > 80
    drawing.path([axes.at(*point) for point in losses], "loss faint" if smooth else "loss")
    if smooth:
        drawing.path([axes.at(*point) for point in smoothed(losses)], "loss")
    drawing.path([axes.at(*point) for point in found], "evaluation")
    best = summary["best"]
    for step, value in found:
        is_best = best is not None and best["step"] == step
        title = f"{summary['curves']['metric']} {number(value)} at step {step:.0f}" + ", the best" * is_best
        drawing.circle(*axes.at(step, value), 6 if is_best else 3.5, "evaluation-point" + " best" * is_best, title)
    return drawing


def value_range(losses: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The range of y: all evaluations, and all losses but a few that are far higher than the others."""
    usual = sorted(losses)
    top = [usual[-1]] if usual else []
    if len(usual) > 40:
        cut = usual[int(len(usual) * 0.98)]
        top = [min(usual[-1], cut + (cut - usual[0]) * 0.5)]
    low, high = min([*usual[:1], *values]), max([*top, *values])
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (max(low - room, 0.0) if low >= 0 else low - room), high + room


def disk_curve(summary: Summary, width: int) -> Drawing:
    """Bytes of checkpoints and finished model over time, against the budget."""
    drawing = Drawing(width, 200 if width < 600 else 220, "Bytes of checkpoints over time, against the budget")
    rows, budget, peak = summary["attempts"], summary["budget_bytes"], summary["bytes_peak"]
    first = rows[0]["end"] - rows[0]["allocated_s"]
    length = max(summary["accounting"]["wall_s"], 1e-6)
    top = max([peak, *(bytes_ for _, bytes_ in summary["disk"]), *([budget] if budget else [])])
    shown = top if not budget or is_near(budget, peak) else peak * 1.6
    axes = Axes(drawing, (0.0, length), (0.0, shown * 1.12), left=68, right=16)
    axes.grid_y(lambda value: size(int(value)), 3)
    axes.grid_x("", time_ticks(length, 3 if width < 600 else 6), time_text)
    steps: list[Point] = [(0.0, 0.0)]
    for at, bytes_ in [*summary["disk"], [first + length, summary["disk"][-1][1] if summary["disk"] else 0]]:
        x = min(max(at - first, 0.0), length)
        steps += [(x, steps[-1][1]), (x, float(bytes_))]
    outline = [axes.at(*point) for point in steps]
    drawing.path([*outline, axes.at(length, 0), axes.at(0, 0)], "bytes-area", close="Z")
    drawing.path(outline, "bytes")
    right = width - axes.right
    for name, value in (("peak of the run directory", peak), ("budget", budget)):
        if value and value <= axes.y[1]:
            _, y = axes.at(0, value)
            drawing.line(axes.left, y, right, y, f"limit {name.split()[0]}", f"{name}: {size(value)}")
            drawing.text(right, y - 5, f"{name} {size(value)}", "tick", "end")
    return drawing


def is_near(budget: int, peak: int) -> bool:
    """Whether a budget can be drawn in one plot with what was used of it."""
    return budget < 8 * peak


def plots_of(summary: Summary) -> list[tuple[str, Draw]]:
    """The plots that a run has something to show in, with their titles."""
    found: list[tuple[str, Draw]] = [("Attempts", timeline)]
    curves = summary["curves"]
    if any(loss is not None for _, loss in curves["losses"]) or (curves["evaluations"] and is_loss(curves)):
        found.append(("Loss", loss_curve))
    if curves["evaluations"] and not is_loss(curves):
        found.append((str(curves["metric"]), metric_curve))
    if summary["disk"]:
        found.append(("On disk", disk_curve))
    return found


def effect_plot(summary: Summary, effect: Summary, width: int) -> Drawing:
    """The metric of each cell by the value of one swept key, with the median of each value."""
    key, values = effect["key"], [one["value"] for one in effect["values"]]
    scored = [
        cell
        for cell in summary["cells"]
        if cell["metric"] and cell["metric"]["name"] == summary["metric"] and key in cell["overrides"]
    ]
    scored.sort(key=lambda cell: cell["cell"] == summary["best"])
    metrics = [cell["metric"]["value"] for cell in scored]
    drawing = Drawing(width, 190, f"{summary['metric']} by {key}")
    numbers = sorted({found for value in values if isinstance(found := as_number(value), float)})
    is_scale = len(numbers) == len(values)
    log = is_scale and _is_geometric(numbers)
    places = {value: float(value) for value in values} if is_scale else {v: n for n, v in enumerate(values)}
    low, high = min(places.values()), max(places.values())
    room = (high - low) * 0.08 if is_scale else 0.5
    ratio = (high / low) ** 0.08 if log else 1.0
    edges = (low / ratio, high * ratio) if log else (low - room, high + room)
    axes = Axes(drawing, edges, value_range([], metrics), left=58, log_x=log)
    axes.grid_y(count=3)
    named = {place: str(value) for value, place in places.items()}
    shown = sorted(named) if len(named) <= 6 else sorted(named)[:: -(-len(named) // 6)]
    axes.grid_x("", shown, lambda place: shortened(named[place], 12))
    for count, cell in enumerate(scored):
        x, y = axes.at(places[cell["overrides"][key]], cell["metric"]["value"])
        is_best = cell["cell"] == summary["best"]
        title = f"{cell['cell']}: {number(cell['metric']['value'])}"
        x += 0 if is_best else count * 7 % 11 - 5  # beside each other, where several have a value
        drawing.circle(x, y, 5 if is_best else 3.2, "cell" + " chosen" * is_best, title if len(scored) <= 300 else "")
    for one in effect["values"]:
        x, y = axes.at(places[one["value"]], one["median"])
        drawing.line(x - 10, y, x + 10, y, "middle", f"{key}={one['value']}: median {number(one['median'])}")
    return drawing


def _is_geometric(values: Sequence[float]) -> bool:
    """Whether values that rise are more evenly spaced by their ratios than by their differences."""
    if len(values) < 3 or values[0] <= 0:
        return False
    gaps = [b - a for a, b in pairwise(values)]
    ratios = [math.log(b / a) for a, b in pairwise(values)]
    return max(ratios) / min(ratios) < max(gaps) / min(gaps)


def shortened(text: str, most: int) -> str:
    """The text, cut to so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def overlay_plot(summary: Summary, width: int) -> Drawing:
    """The curves of all cells in one plot, that of the best in front."""
    cells = [cell for cell in summary["cells"] if cell["curve"]]
    cells.sort(key=lambda cell: cell["cell"] == summary["best"])
    points = {cell["cell"]: [(float(x), y) for x, y in cell["curve"] if y is not None] for cell in cells}
    all_points = [point for curve in points.values() for point in curve]
    drawing = Drawing(width, 240 if width < 600 else 300, f"{summary['metric']} of all cells by step")
    steps = [x for x, _ in all_points] or [0.0]
    axes = Axes(drawing, (min(steps), max(steps)), value_range([y for _, y in all_points] or [0.0], []))
    axes.grid_y()
    axes.grid_x("step")
    other = "other many" if len(cells) > 100 else "other"
    for cell in cells:
        is_best = cell["cell"] == summary["best"]
        curve = [axes.at(*point) for point in points[cell["cell"]]]
        drawing.path(curve, "evaluation" if is_best else other, cell["cell"] if len(cells) <= 300 else "")
    return drawing
