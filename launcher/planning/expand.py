"""From the overrides of `outlast train -m` to cells: Hydra's sweep grammar, and a name for each combination.

Choices (`seed=1,2`), ranges (`seed=range(1,4)`) and globs over groups (`model=glob(*)`) are read by Hydra's own parser
and combined as its basic sweeper does: the product of all, the last override of a key counts.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from math import prod
from typing import Any

from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from outlast.errors import ConfigError

from .compose import Composer, parsed, quoted

MOST_CELLS = 10_000
"""Slurm's default `MaxJobCount`; more are a mistake in a range."""
LONGEST_NAME = 150
"""Bytes; file systems allow 255, and names of files are made from it."""


@dataclass(frozen=True)
class Combination:
    """What makes one cell differ from the others."""

    name: str
    """Readable, unique among the combinations of the same keys, and safe as a directory's name."""
    overrides: tuple[str, ...]
    """One override for each swept key, as a single run would take it."""


def expand(overrides: Sequence[str], composer: Composer) -> tuple[list[str], list[Combination]]:
    """Split overrides into those that all cells share and the combinations of those that are swept.

    Raises:
        ConfigError: an override that does not parse or can't be enumerated, or that names the sweep itself.
    """
    last = {_key(text): text for text in overrides}
    shared = [text for text in overrides if last[_key(text)] == text and not parsed(text).is_sweep_override()]
    swept = {key: _elements(parsed(text), composer) for key, text in last.items() if parsed(text).is_sweep_override()}
    count = prod(len(elements) for elements in swept.values())
    if count > MOST_CELLS:
        raise ConfigError("sweep", " ".join(overrides), f"it has {count} cells; valid: {MOST_CELLS} at most")
    labels = _labels(list(swept))
    combinations = []
    for elements in product(*swept.values()):
        texts = tuple(f"{key}={element}" for key, element in zip(swept, elements, strict=True))
        parts = [f"{labels[key]}={_readable(parsed(text))}" for key, text in zip(swept, texts, strict=True)]
        combinations.append(Combination(_short(",".join(parts)) or "cell", texts))
    names = Counter(combination.name for combination in combinations)
    if twice := [name for name, times in names.items() if times > 1]:
        raise ConfigError("sweep", ", ".join(twice), "it stands there more than once; valid: each value once")
    return shared, combinations


def _key(text: str) -> str:
    return str(parsed(text).key_or_group)


def _elements(override: Override, composer: Composer) -> list[str]:
    """The values of one swept override, as text of the grammar."""
    key, typed = override.key_or_group, override.get_value_string()
    if key in ("run.name", "run.root"):
        raise ConfigError(key, typed, "it belongs to the sweep; cells get their names from what is swept")
    if override.package is not None:
        raise ConfigError(key, override.input_line, "valid: group=a,b")
    sweep: Any = override.value()
    if isinstance(sweep, Glob):
        options = composer.options(key)
        chosen = [str(name) for name in sweep.filter(options)]
        if not chosen:
            raise ConfigError(key, typed, options or "a glob picks files of a group, and this is none")
        return chosen
    if not override.is_discrete_sweep():
        raise ConfigError(key, typed, "an interval has no end of values; valid: a,b,c or range(start,stop,step)")
    try:
        elements = list(islice(override.sweep_string_iterator(), MOST_CELLS + 1))
    except (HydraException, ValueError) as error:
        raise ConfigError(key, typed, str(error).strip().partition("\n")[0]) from None
    if not elements:
        raise ConfigError(key, typed, "it has no values")
    return [_parsable(key, element) for element in elements]


def _parsable(key: str, element: str) -> str:
    """Quote a value that needs it: `choice('ü')` loses its quotes in Hydra."""
    try:
        parsed(f"{key}={element}")
    except ConfigError:
        return quoted(element)
    return element


def _labels(keys: list[str]) -> dict[str, str]:
    """The shortest end of each dotted key that no other swept key has."""
    labels = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        others = [other for other in keys if other != key]
        free = (end for end in ends if not any(other == end or other.endswith("." + end) for other in others))
        labels[key] = _safe(next(free, key))
    return labels


def _readable(override: Override) -> str:
    """A value as part of a name. What had to be changed for that gets a few digits of the value itself, always, so
    that names stay as they are when the sweep grows."""
    value = override.value()
    text = value if isinstance(value, str) else override.get_value_string()
    safe = _safe(text)
    return safe if safe == text else f"{safe}-{_digits(text, 6)}".lstrip("-")


def _safe(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "\0", text).strip("\0").replace("\0", "-")


def _short(name: str) -> str:
    data = name.encode()
    if len(data) <= LONGEST_NAME:
        return name
    return f"{data[: LONGEST_NAME - 12].decode(errors='ignore')}-{_digits(name, 10)}"


def _digits(text: str, count: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:count]
