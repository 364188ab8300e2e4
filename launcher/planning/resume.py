"""The configuration of a run that is resumed with other resources, logging or evaluation.

It starts from the run's own `config.yaml`, so nothing but the overrides given here can differ. What decides the weights
can't be changed: that would be another run. Keys of `trainer` are sorted in `outlast/config/trainer_keys.py`.
"""

import copy
from collections.abc import Sequence
from typing import Any

from outlast.config.configuration import IDENTITY, Config, build, load
from outlast.config.trainer_keys import BATCH, FREE, LENGTH, length_refusal, rows_of
from outlast.errors import ConfigError
from outlast.rundir.directory import RunDirectory

from .compose import parsed

LAYOUT = ("parallel.nodes", "parallel.ranks_per_node", "parallel.launch")
"""How many ranks there are, and how they are spread over nodes: a run adapts to it."""


def changed(run: RunDirectory, overrides: Sequence[str]) -> Config:
    """The configuration of a run, at the place where it is now, with other resources.

    Raises:
        ConfigError: an override of something that decides the weights, or that is no value of a section.
    """
    before = load(run.config)
    tree = copy.deepcopy(before.as_dict())
    tree["run"] |= {"name": run.path.name, "root": str(run.path.parent)}
    for text in overrides:
        _set(tree, text)
    rows, asked = rows_of(before.trainer), rows_of(tree["trainer"])
    if rows != asked:
        key = " * ".join(f"trainer.{name}" for name in BATCH)
        raise ConfigError(key, asked, f"the rows of a step decide the weights; valid: {rows}, however it is split")
    return build(tree)


def _set(tree: dict[str, Any], text: str) -> None:
    """Apply one override to plain values."""
    override = parsed(text)
    key = str(override.key_or_group)
    section, _, rest = key.partition(".")
    value = None if override.is_delete() else override.value()
    if override.is_delete() or override.is_sweep_override():
        raise ConfigError(key, text, "valid: one value, key=value")
    if section == "trainer" and rest in LENGTH:
        if reason := length_refusal(tree["trainer"]):
            if tree["job"]["name"] != "sft":  # it has no schedule that could be another
                reason = "it would be another run: `outlast train … run.name=…`"
            raise ConfigError(key, value, f"it decides the weights: {reason}")
    elif section in IDENTITY and key not in LAYOUT and not (section == "trainer" and rest in FREE.union(BATCH)):
        raise ConfigError(
            key, value, "it decides the weights, so it would be another run: `outlast train … run.name=…`"
        )
    if section == "run":
        raise ConfigError(key, value, "a run is its directory; move that, or start another with `outlast train`")
    if not rest:
        raise ConfigError(key, value, f"a resumed run changes values, not groups; valid: {section}.<key>=…")
    *path, last = rest.split(".")
    place = tree.setdefault(section, {})
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ConfigError(key, value, f"{part} has no keys of its own")
    place[last] = value
