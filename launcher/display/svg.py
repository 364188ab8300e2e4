"""Draws plots as SVG: marks, axes with round numbers, and text that is escaped. Colours are classes of `report.css`."""

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .progress import duration

HERE = Path(__file__).parent
WIDE, NARROW = 960, 400
"""Widths that a plot is drawn for, in pixels: a screen's, and a phone's."""
_SECONDS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800)
_INVALID = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")

Point = tuple[float, float]


def escape(text: object) -> str:
    """The text as HTML, XML and attributes may hold it; what XML can't hold is replaced."""
    return html.escape(_INVALID.sub("\ufffd", str(text)), quote=True)


def number(value: float) -> str:
    """A number as an axis shows it."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


@dataclass
class Drawing:
    """One plot of a given size: marks are added to it, in order."""

    width: int
    height: int
    label: str
    """What it shows, for who can't see it."""
    marks: list[str] = field(default_factory=list)

    @property
    def is_narrow(self) -> bool:
        return self.width < 600

    def rect(self, x: float, y: float, width: float, height: float, kind: str, title: str = "", round: int = 0) -> None:
        size = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}"'
        self._add("rect", size + (f' rx="{round}"' if round else ""), kind, title)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str, title: str = "") -> None:
        self._add("line", f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"', kind, title)

    def circle(self, x: float, y: float, radius: float, kind: str, title: str = "", more: str = "") -> None:
        self._add("circle", f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"{more}', kind, title)

    def path(self, points: Sequence[Point], kind: str, title: str = "", close: str = "", more: str = "") -> None:
        if points:
            joined = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            self._add("path", f'd="M{joined}{close}"{more}', kind, title)

    def text(self, x: float, y: float, text: object, kind: str = "", anchor: str = "start") -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.marks.append(f'<text class="{escape(kind)}" {place}>{escape(text)}</text>')

    def _add(self, tag: str, attributes: str, kind: str, title: str) -> None:
        inner = f"><title>{escape(title)}</title></{tag}>" if title else "/>"
        self.marks.append(f'<{tag} class="{escape(kind)}" {attributes}{inner}')

    def svg(self, kind: str = "") -> str:
        """The plot as an element of a page."""
        size = f'viewBox="0 0 {self.width} {self.height}"'
        return (
            f'<svg class="plot {kind}" role="img" {size} aria-label="{escape(self.label)}">{"".join(self.marks)}</svg>'
        )


@dataclass(frozen=True)
class Axes:
    """Maps values to places in a drawing, and draws the axes."""

    drawing: Drawing
    x: tuple[float, float]
    y: tuple[float, float]
    left: int = 56
    right: int = 16
    top: int = 14
    bottom: int = 30
    log_x: bool = False

    def at(self, x: float, y: float) -> Point:
        """Where a point is drawn."""
        low, high = (math.log(edge) for edge in self.x) if self.log_x else self.x
        share = ((math.log(x) if self.log_x else x) - low) / ((high - low) or 1.0)
        height = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        bottom = self.drawing.height - self.bottom
        return (
            self.left + share * (self.drawing.width - self.left - self.right),
            bottom - min(max(height, 0.0), 1.0) * (bottom - self.top),
        )

    def grid_y(self, write: Callable[[float], str] = number, count: int = 4) -> None:
        """Draw lines at round values of y, with the values."""
        for value in ticks(*self.y, count):
            _, y = self.at(self.x[0], value)
            self.drawing.line(self.left, y, self.drawing.width - self.right, y, "grid")
            self.drawing.text(self.left - 8, y + 4, write(value), "tick", "end")

    def grid_x(
        self, name: str = "", values: Sequence[float] | None = None, write: Callable[[float], str] = number
    ) -> None:
        """Write round values of x under the plot, and its name."""
        y = self.drawing.height - self.bottom
        self.drawing.line(self.left, y, self.drawing.width - self.right, y, "axis")
        found = ticks(*self.x, 3 if self.drawing.is_narrow else 7) if values is None else values
        for value in found:
            x, _ = self.at(value, self.y[0])
            if not name or x < self.drawing.width - self.right - 8 * len(name) - 16:
                self.drawing.text(x, y + 18, write(value), "tick", "middle")
        self.drawing.text(self.drawing.width - self.right, y + 18, name, "tick", "end")


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values between two, about `count`."""
    if not 0 < high - low < math.inf:
        return [low]
    raw = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(raw))
    step = scale * next(nice for nice in (1, 2, 2.5, 5, 10) if nice * scale >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def time_ticks(length: float, count: int) -> list[float]:
    """Round times from 0 to `length` seconds, about `count`."""
    step = next(
        (float(step) for step in _SECONDS if step * count >= length), math.ceil(length / count / 86400) * 86400.0
    )
    return [n * step for n in range(int(length / step) + 1)]


def time_text(seconds: float) -> str:
    """A time as an axis shows it: `10 min`, `2 h`."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:g} {name}" if seconds % unit == 0 else duration(seconds)
    return f"{seconds:g} s"


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The points with the mean of the values around each, over a fortieth of all."""
    half, values = max(len(points) // 80, 1), [y for _, y in points]
    around = [values[max(n - half, 0) : n + half + 1] for n in range(len(values))]
    return [(x, sum(near) / len(near)) for (x, _), near in zip(points, around, strict=True)]


def standalone(drawings: Sequence[tuple[str, Drawing]]) -> str:
    """One SVG file of several titled plots, one under the other, in the light colours."""
    css = (HERE / "report.css").read_text()
    colours = dict(re.findall(r"--(\w+): light-dark\((#\w+),", css))
    rules = css[css.index("/* plots */") : css.index("/* end of plots */")]
    style = re.sub(r"var\(--([\w-]+)\)", lambda match: colours[match[1]], rules)
    width, y, parts = max(drawing.width for _, drawing in drawings), 24, []
    for title, drawing in drawings:
        if title:
            parts.append(f'<text class="heading" x="16" y="{y + 16}">{escape(title)}</text>')
            y += 26
        parts.append(f'<g transform="translate(0 {y})">{"".join(drawing.marks)}</g>')
        y += drawing.height + (0 if drawing.height < 30 else 24)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}">'
        f'<style>{style}</style><rect width="{width}" height="{y}" fill="{colours["paper"]}"/>{"".join(parts)}</svg>\n'
    )
