"""The little of a run's configuration that a reader needs, and the evaluations that decide which is its best."""

import math
import re
from typing import Any

import yaml

from outlast.files import parse_yaml
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Event


def settings_of(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """Two sections of `config.yaml` as they stand, unchecked: a run stays readable when its data has moved.

    Only these two are parsed, which takes a third of the time: it is done for a thousand runs at once.
    """
    try:
        text = run.config.read_text(errors="replace")
    except OSError:
        text = ""
    return {name: _section(text, name) for name in ("storage", "trainer")}


def _section(text: str, name: str) -> dict[str, Any]:
    found = re.search(rf"^{name}:.*\n?(?:[ #].*\n?|\n)*", text, re.MULTILINE)
    try:
        tree = parse_yaml(found[0]) if found else None
    except yaml.YAMLError:
        tree = None
    section = tree.get(name) if isinstance(tree, dict) else None
    return section if isinstance(section, dict) else {}


def budget_of(settings: dict[str, dict[str, Any]]) -> int | None:
    """`storage.budget_gb` in bytes."""
    budget = settings["storage"].get("budget_gb")
    return None if budget is None else int(float(budget) * 1e9)


def evaluations(events: list[Event], trainer: dict[str, Any]) -> list[dict[str, Any]]:
    """All values of the metric that decides which checkpoint is the best: `name`, `value`, `step`."""
    wanted = _deciding_metric(trainer)
    return [
        {"name": name, "value": value, "step": event["step"]}
        for event in events
        if event["event"] == "evaluated"
        for name, value in event["metrics"].items()
        if name.removeprefix("eval_") == wanted and isinstance(value, int | float) and math.isfinite(value)
    ]


def best_metric(events: list[Event], trainer: dict[str, Any]) -> dict[str, Any] | None:
    """The best evaluation, by the Trainer's own rule: `metric_for_best_model`, lower is better for a loss."""
    sign = -1 if lower_is_better(trainer) else 1
    return max(evaluations(events, trainer), key=lambda evaluation: sign * evaluation["value"], default=None)


def lower_is_better(trainer: dict[str, Any]) -> bool:
    """Whether a lower value of the deciding metric is better, by the Trainer's own rule."""
    greater = trainer.get("greater_is_better")
    return not greater if greater is not None else _deciding_metric(trainer).endswith("loss")


def _deciding_metric(trainer: dict[str, Any]) -> str:
    return str(trainer.get("metric_for_best_model") or "loss").removeprefix("eval_")
