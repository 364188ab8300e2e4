"""Accounts for the time of a run: what each second went into, and what that has cost.

Inside an attempt, from when it got its nodes (or its process began) to its end:

    starting     until training began
    training     steps that count
    evaluating   evaluations that count
    saving       stalls of periodic saves and of the finished model
    stopping     from the signal to the end, the emergency save included
    lost         all of this after the step that a later attempt went on from

Between two attempts: `queued`, waiting for nodes, and `stopped`, in nobody's queue. Each second counts once, so the
parts sum to the wall time.

    goodput = (training + evaluating) / seconds since the first start, or / seconds in attempts
"""

from dataclasses import dataclass, field
from typing import Any

from outlast.rundir.attempts import Attempt
from outlast.rundir.ledger import Event

from .attempts import by_attempt, made_again_from

INSIDE = ("starting", "training", "evaluating", "saving", "stopping", "lost")
BETWEEN = ("queued", "stopped")
FORMULA = "goodput = (training + evaluating) / time"
SHORTEST = 1 / 2000
"""Share of the wall time below which a span is drawn with the one before it."""
SETUP_S = 600.0
"""How long a batch script may take before the run's first process, and that time is still the run's."""
_LOSES = ("training", "evaluating", "saving")


@dataclass(frozen=True)
class Span:
    """A stretch of an attempt's time, Unix seconds."""

    what: str
    start: float
    end: float


@dataclass
class AttemptTime:
    """Where the time of one attempt went, and of the wait before it."""

    start: float
    """When it got its nodes, if its process began soon after; else, and outside Slurm, when its process began."""
    end: float
    spans: list[Span] = field(default_factory=list)
    queued: float = 0.0
    stopped: float = 0.0

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def parts(self) -> dict[str, float]:
        """Seconds by what they went into; they sum to :attr:`seconds`."""
        sums = dict.fromkeys(INSIDE, 0.0)
        for span in self.spans:
            sums[span.what] += span.end - span.start
        return sums


def times(rows: list[dict[str, Any]], tries: list[Attempt], events: list[Event], submitted: float) -> list[AttemptTime]:
    """Account for each attempt.

    Args:
        rows: of the attempts, as `attempt_rows` returns them; `tries` are the same.
        submitted: when the run was submitted last, Unix seconds; 0: it was not.
    """
    found, lines = list[AttemptTime](), by_attempt(events)
    for row, attempt in zip(rows, tries, strict=True):
        own, previous = lines[attempt.number], found[-1].end if found else None
        ready = _ready(own)
        start = _start(row, attempt, ready)
        start = start if previous is None else max(start, previous)
        time = AttemptTime(start, max(float(row["end"]), start))
        time.spans = _spans(time, row, attempt, own)
        if previous is not None:
            before = tries[len(found) - 1]
            asked = [at for at in _known(ready.get("job_submitted"), submitted) if previous <= at <= start]
            since = previous if before.requeued is not None else min(asked, default=start)
            nodes = max(since, min([start, *_known(ready.get("job_started"))]))
            time.queued, time.stopped = nodes - since, since - previous + start - nodes
        found.append(time)
    _mark_lost(found, rows, tries)
    return found


def account(
    rows: list[dict[str, Any]], found: list[AttemptTime], submitted: float, events: list[Event]
) -> dict[str, Any]:
    """The accounting of a whole run, as `outlast report --json` shows it."""
    parts = {name: sum(time.parts()[name] for time in found) for name in INSIDE}
    parts |= {name: sum(getattr(time, name) for time in found) for name in BETWEEN}
    wall, allocated = found[-1].end - found[0].start, sum(time.seconds for time in found)
    useful = parts["training"] + parts["evaluating"]
    ready = _ready(events)
    nodes = min([found[0].start, *_known(ready.get("job_started"))])
    asked = [at for at in _known(ready.get("job_submitted"), submitted) if at <= nodes]
    return {
        "wall_s": wall,
        "allocated_s": allocated,
        "first_wait_s": nodes - min(asked) if asked else None,
        "parts": parts,
        "goodput": {
            "wall": useful / wall if wall > 0 else None,
            "allocated": useful / allocated if allocated > 0 else None,
            "formula": FORMULA,
        },
        "accelerator_hours": sum(hours_of(time.seconds, row) for time, row in zip(found, rows, strict=True)),
        "cost": cost(rows, found),
    }


def cost(rows: list[dict[str, Any]], found: list[AttemptTime]) -> dict[str, dict[str, float]]:
    """What each cause has cost, over what steps and evaluations that count took.

    How an attempt ended costs its stopping, what it lost, the wait after it, and the start of the next attempt.

    Returns:
        By cause (`preempted`, `time_limit`, ..., and `saving`, `first start`): `accelerator_hours` and `seconds`. The
        hours of all causes and those of useful time sum to all hours.
    """
    costs: dict[str, dict[str, float]] = {}

    def add(cause: str, row: dict[str, Any], held: float, waited: float = 0.0) -> None:
        entry = costs.setdefault(cause, {"accelerator_hours": 0.0, "seconds": 0.0})
        entry["accelerator_hours"] += hours_of(held, row)
        entry["seconds"] += held + waited

    for number, (row, time) in enumerate(zip(rows, found, strict=True)):
        parts = time.parts()
        before = rows[number - 1] if number else None
        why = "first start" if before is None else cause_of(before)
        add(why, row, parts["starting"], time.queued + time.stopped)
        add("saving", row, parts["saving"])
        add(cause_of(row), row, parts["stopping"] + parts["lost"])
    return {cause: entry for cause, entry in costs.items() if entry["seconds"] > 0}


def cause_of(row: dict[str, Any]) -> str:
    """Why an attempt ended, in one word; `running` if it has not."""
    return str(row["cause"] or ("killed" if row["killed"] else "running"))


def coarse(time: AttemptTime, wall: float) -> list[Span]:
    """The spans as they can be drawn: very short ones are taken into the one before them.

    Args:
        wall: seconds that the drawing covers.
    """
    least, drawn = wall * SHORTEST, list[Span]()
    for span in time.spans:
        if drawn and (span.end - span.start < least or span.what == drawn[-1].what):
            drawn[-1] = Span(drawn[-1].what, drawn[-1].start, span.end)
        else:
            drawn.append(span)
    return drawn


def hours_of(seconds: float, row: dict[str, Any]) -> float:
    """Accelerator hours of some seconds of an attempt: one accelerator a rank."""
    return seconds * (row["world_size"] or 1) / 3600


def _start(row: dict[str, Any], attempt: Attempt, ready: Event) -> float:
    """When an attempt got its nodes, or its process began: what lies before its first line in the ledger.

    A job that began much earlier has done something else first: another program's run, which counts that time itself.
    """
    start = float(row["start"])
    for process in _known((attempt.started or {}).get("process_started")):  # none: an earlier run in this process
        start = min(start, process)
        start = min([start, *(job for job in _known(ready.get("job_started")) if start - job <= SETUP_S)])
    return start


def _known(*moments: Any) -> list[float]:
    return [float(moment) for moment in moments if isinstance(moment, int | float) and moment > 0]


def _ready(lines: list[Event]) -> Event:
    """The line that an attempt wrote when training began; empty if it did not come so far."""
    return next((event for event in lines if event["event"] in ("began", "resumed")), {})


def _spans(time: AttemptTime, row: dict[str, Any], attempt: Attempt, lines: list[Event]) -> list[Span]:
    """What an attempt did, gapless from its start to its end; nothing is lost as yet."""
    ready, ended = _ready(lines), attempt.ended or {}
    began = float(ready["time"]) if ready else time.end
    if not ready and row["steps_done"] and "process_started" not in (attempt.started or {}):
        began = time.start  # an older version's ledger does not say when training began
    stop = time.end
    if attempt.signals and ended.get("cause") != "finished":
        stop = float(attempt.signals[0]["time"])
    busy = [("starting", time.start, min(began, stop))]
    for event in lines:
        at = float(event["time"])
        if event["event"] == "evaluated":
            took = (value for name, value in event["metrics"].items() if name.endswith("_runtime"))
            busy.append(("evaluating", at - sum(_known(*took)), at))
        elif event["event"] == "checkpoint" and event["kind"] != "emergency":
            busy.append(("saving", at - event["stall_s"], at))
    spans, now = list[Span](), time.start
    for what, start, end in [*sorted(busy, key=lambda span: span[1]), ("stopping", stop, time.end)]:
        last = time.end if what == "stopping" else max(min(stop, time.end), now)
        start, end = min(max(start, now), last), min(max(end, now), last)
        spans += [Span("training", now, start)] * (start > now) + [Span(what, start, end)] * (end > start)
        now = max(now, end)
    return spans + [Span("training", now, time.end)] * (time.end > now)


def _mark_lost(found: list[AttemptTime], rows: list[dict[str, Any]], tries: list[Attempt]) -> None:
    """Mark what an attempt did after the first step from which a later one went on as lost."""
    remade = made_again_from(rows)
    for time, row, attempt in zip(found, rows, tries, strict=True):
        if row["steps_lost"] > 0:
            since = _reached(remade[row["number"]], time, row, attempt)
            time.spans = [part for span in time.spans for part in _split(span, since)]


def _split(span: Span, at: float) -> list[Span]:
    if span.what not in _LOSES or span.end <= at:
        return [span]
    kept = [Span(span.what, span.start, at)] if span.start < at else []
    return [*kept, Span("lost", max(span.start, at), span.end)]


def _reached(step: int, time: AttemptTime, row: dict[str, Any], attempt: Attempt) -> float:
    """When an attempt had saved a step; without its line, by the share of steps that came before it."""
    saved = [event["time"] for event in attempt.checkpoints if event["step"] == step and event["kind"] != "final"]
    if saved:
        return float(saved[-1])
    working = [span for span in time.spans if span.what in _LOSES]
    if not working or step <= row["first_step"]:
        return working[0].start if working else time.end
    share = (step - row["first_step"]) / max(row["last_step"] - row["first_step"], 1)
    return working[0].start + float(share) * (working[-1].end - working[0].start)
