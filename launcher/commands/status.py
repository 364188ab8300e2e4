"""`outlast status`: what the runs under a root are doing, one row a run."""

import sys
from collections.abc import Sequence
from pathlib import Path

from outlast.errors import ConfigError, Exit
from outlast.files import to_json

from ..runs.find import runs_named, runs_under, unreadable_under
from ..runs.standing import RunStatus, collect
from ..runs.state import State

SHOWN = 10
"""Names of directories that can't be read, at most."""


def main(
    names: Sequence[str], root: Path, *, states: Sequence[State] | None, watch_s: float | None, as_json: bool
) -> int:
    """`outlast status`.

    Raises:
        ConfigError: there is no such root or run.
    """
    from ..display import status_table

    if root != Path("runs") and not root.is_dir():
        raise ConfigError("--root", str(root), "valid: a directory that holds runs; there is none of that name")
    if not names and (closed := unreadable_under(root)):
        shown = ", ".join(path.name for path in closed[:SHOWN]) + (" …" if len(closed) > SHOWN else "")
        print(f"left out, for want of permission to read: {shown}", file=sys.stderr)

    def rows() -> list[RunStatus]:
        found = collect(runs_named(names, root) if names else runs_under(root))
        return [row for row in found if states is None or row.state in states]

    if as_json:
        print(to_json([row.as_dict() for row in rows()], indent=1))
    elif watch_s is not None:
        status_table.watch(rows, watch_s)
    else:
        status_table.show(rows())
    return Exit.DONE


def states_named(text: str) -> list[State]:
    """The states that `--state failed,running` names.

    Raises:
        ConfigError: there is no such state.
    """
    chosen = [state for state in State if state in text.replace(" ", "_").split(",")]
    for word in text.replace(" ", "_").split(","):
        if word not in list(State):
            raise ConfigError("--state", word, list(State))
    return chosen
