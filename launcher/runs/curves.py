"""The curves of a run over all of its attempts: losses, evaluations, where it was stopped, bytes on disk."""

from typing import Any

from outlast.rundir import losses
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Event

from .accounting import cause_of
from .attempts import made_again_from
from .settings import evaluations

MOST = 400
"""The most points of a curve over time."""


def curves(
    run: RunDirectory, rows: list[dict[str, Any]], events: list[Event], trainer: dict[str, Any]
) -> dict[str, Any]:
    """Loss and deciding metric by step. A step that was made again after a kill counts once, as it was made last.

    Args:
        rows: of the attempts, as `attempt_rows` returns them.
        trainer: the section `trainer` of the configuration.
    """
    remade = made_again_from(rows)
    counts = [e for e in events if e["event"] == "evaluated" and e["step"] <= remade.get(e["attempt"], e["step"])]
    found = evaluations(counts, trainer)
    by_step = {one["step"]: one["value"] for one in found}
    return {
        "losses": [list(point) for point in losses.read(run)],
        "metric": found[0]["name"] if found else None,
        "evaluations": [[step, by_step[step]] for step in sorted(by_step)],
        "stops": [
            {"attempt": row["number"], "step": row["last_step"], "cause": cause_of(row)}
            for row in rows
            if cause_of(row) not in ("finished", "running")
        ],
    }


def disk(events: list[Event]) -> list[list[float]]:
    """Bytes of checkpoints and finished model over time, by the ledger: pairs of Unix seconds and bytes."""
    there: dict[str, int] = {}
    points: list[list[float]] = []
    for event in events:
        match event["event"]:
            case "checkpoint":
                there["final" if event["kind"] == "final" else f"checkpoint-{event['step']}"] = event["bytes"]
            case "deleted":
                there.pop(event["checkpoint"], None)
            case "lightened" if event["checkpoint"] in there:
                there[event["checkpoint"]] -= event["bytes"]
            case _:
                continue
        points.append([event["time"], sum(there.values())])
    size = -(-len(points) // MOST) or 1
    return [max(points[n : n + size], key=lambda point: point[1]) for n in range(0, len(points), size)]
