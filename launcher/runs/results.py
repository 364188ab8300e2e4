"""The results of runs that have ended, and the exit code for the worst of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from outlast.errors import Exit

from .standing import RunStatus
from .state import State


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one run, or of one cell of a sweep."""

    name: str
    overrides: list[str]
    """What the cell does not share with the others; empty for a single run."""
    state: State
    step: int
    metric: dict[str, Any] | None
    """The best evaluation (`name`, `value`, `step`); where nothing was evaluated, the last training loss."""
    path: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def result(row: RunStatus, overrides: Sequence[str] = ()) -> Result:
    """The result of a run, by its status."""
    loss = None if row.loss is None else {"name": "loss", "value": row.loss, "step": row.step}
    name = row.name.rpartition("/")[2]
    metric = row.best or loss
    return Result(name=name, overrides=list(overrides), state=row.state, step=row.step, metric=metric, path=row.path)


def exit_code(results: Sequence[Result]) -> Exit:
    """Choose the exit code of a command that waited, by the worst of its runs."""
    unfinished = {one.state for one in results} - {State.FINISHED}
    if not unfinished:
        return Exit.DONE
    if unfinished <= {State.INTERRUPTED, State.NOT_STARTED}:
        return Exit.RESUME_ME
    return Exit.GAVE_UP if unfinished <= {State.INTERRUPTED, State.NOT_STARTED, State.GAVE_UP} else Exit.FAILED


def metric_text(one: Result) -> str:
    """Write a result's metric as a table shows it: `eval_loss 1.23 at 40`."""
    return "" if one.metric is None else f"{one.metric['name']} {one.metric['value']:.4g} at {one.metric['step']}"
