"""The plots of a run as one picture, for papers and chats: SVG by ourselves, PNG by the library resvg."""

from typing import Any

from outlast.errors import ConfigError

from .plots import colour_key, plots_of
from .svg import WIDE, standalone

Summary = dict[str, Any]

ZOOM = 2
"""Pixels of a PNG for each of the SVG's."""


def as_svg(summary: Summary) -> str:
    """Time line, curves and bytes, one under the other, in the light colours."""
    (_, first), *others = plots_of(summary)
    begin = [(f"{summary['name']}: attempts", colour_key(summary, WIDE)), ("", first(summary, WIDE))]
    return standalone([*begin, *((title, draw(summary, WIDE)) for title, draw in others)])


def as_png(summary: Summary) -> bytes:
    """The same, as pixels.

    Raises:
        ConfigError: the library that draws them is not installed.
    """
    try:
        import resvg_py
    except ImportError:
        way = (
            "it needs the package resvg-py: pip install 'outlast[plot]', or `pip install resvg-py`; --svg needs nothing"
        )
        raise ConfigError("--png", summary["run"], way) from None
    return bytes(resvg_py.svg_to_bytes(svg_string=as_svg(summary), zoom=ZOOM))
