"""When saves are made: the formula against its model, the bounds, the costs and failures of the ledger, the clock."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint.interval import (
    LARGEST_SHARE,
    LOWER_S,
    UPPER_S,
    SaveInterval,
    explain,
    failures,
    interval,
    optimum,
)
from outlast.config.checkpoint import CheckpointSection
from outlast.errors import ConfigError
from outlast.launcher.planning.compose import compose
from outlast.launcher.planning.plan import check_run_directory, plan_run
from outlast.rundir.attempts import attempts
from outlast.rundir.ledger import EVENTS, Event

from ..conftest import OUTLAST

HOUR, DAY = 3600.0, 86400.0
COSTS = [0.0, 0.001, 0.02, 0.3, 1.0, 7.0, 30.0, 90.0, 200.0, 1000.0, 1e5]
MTBFS = [10.0, 300.0, HOUR, 6 * HOUR, DAY, 30 * DAY]


def event(time: float, attempt: int, name: str, **fields: Any) -> Event:
    return dict.fromkeys(EVENTS[name]) | {"time": time, "attempt": attempt, "event": name, **fields}


def saved(time: float, attempt: int, step: int, stall_s: float = 2.0, kind: str = "periodic") -> Event:
    return event(time, attempt, "checkpoint", step=step, kind=kind, stall_s=stall_s)


def ended(time: float, attempt: int, step: int, cause: str, **fields: Any) -> Event:
    return event(time, attempt, "attempt_ended", step=step, cause=cause, **fields)


def time_spent(w: float, cost: float, mtbf: float) -> float:
    """Daly's complete model, without restart: expected time for one second of training, saving every w seconds."""
    return mtbf * math.expm1((w + cost) / mtbf) / w


def test_the_optimum_by_hand() -> None:
    # sqrt(2 * 30 * 86400) = 2276.840; x = 30 / 172800, sqrt(x) = 0.0131762; bracket 1.00441136; minus 30
    assert optimum(30.0, DAY) == pytest.approx(2256.88, abs=0.01)
    assert optimum(200.0, 100.0) == 100.0  # C = 2M
    assert optimum(500.0, 100.0) == 100.0
    assert optimum(199.999, 100.0) == pytest.approx(2 * 100 * (1 + 1 / 3 + 1 / 9) - 200, rel=1e-4)
    assert optimum(0.0, DAY) == 0.0


@pytest.mark.parametrize("mtbf", MTBFS)
@pytest.mark.parametrize("share", [1e-5, 1e-3, 0.01, 0.1, 0.5, 1.0])
def test_no_other_interval_spends_noticeably_less(mtbf: float, share: float) -> None:
    """Searched over the whole model, of which the formula is an approximation."""
    cost = share * mtbf
    least = min(time_spent(optimum(cost, mtbf) * 1.02**i, cost, mtbf) for i in range(-150, 151))
    assert time_spent(optimum(cost, mtbf), cost, mtbf) <= least * 1.001


def test_young_is_its_first_order() -> None:
    for cost in (0.01, 1.0, 30.0):
        assert optimum(cost, 30 * DAY) == pytest.approx(math.sqrt(2 * cost * 30 * DAY) - cost, rel=2e-3)


@pytest.mark.parametrize("mtbf", MTBFS)
def test_the_bounds(mtbf: float) -> None:
    """Never below a minute, never above an hour, never more than a twentieth of the time, unless that took an hour."""
    previous = 0.0
    for cost in COSTS:
        seconds = interval(cost, mtbf)
        assert LOWER_S <= seconds <= UPPER_S
        assert cost / (seconds + cost) <= LARGEST_SHARE or seconds == UPPER_S
        assert seconds >= previous  # a dearer save is never made more often
        previous = seconds
        if LOWER_S <= optimum(cost, mtbf) <= UPPER_S and optimum(cost, mtbf) * LARGEST_SHARE >= cost:
            assert seconds == optimum(cost, mtbf)
    assert interval(None, mtbf) == LOWER_S
    assert (LOWER_S, LARGEST_SHARE, UPPER_S) == (60.0, 0.05, 3600.0)


def test_rarer_failures_never_make_saves_more_frequent() -> None:
    for cost in COSTS:
        intervals = [interval(cost, mtbf) for mtbf in MTBFS]
        assert intervals == sorted(intervals)


@pytest.mark.parametrize(
    ("cost", "mtbf", "words"),
    [
        (30.0, DAY, "every 38 min: a save takes 30 s, and a failure without notice is expected every 24 h"),
        (0.01, DAY, "every 60 s: a save takes 0.01 s, and a failure without notice is expected every 24 h; "
         "42 s would lose least, but no interval is below 60 s"),
        (60.0, HOUR, "every 20 min: a save takes 60 s, and a failure without notice is expected every 60 min; "
         "10 min would lose least, but saving may take 5% of the time at most"),
        (200.0, DAY, "every 60 min: a save takes 3 min, and a failure without notice is expected every 24 h; "
         "96 min would lose least, but no more than 60 min of steps is ever at risk"),
        (None, DAY, "first after 60 s, then by what that save costs, at least every 60 min; "
         "a failure without notice is expected every 24 h"),
    ],
)  # fmt: skip
def test_the_explanation(cost: float | None, mtbf: float, words: str) -> None:
    assert explain(interval(cost, mtbf), cost, mtbf) == words


def test_steps() -> None:
    interval = SaveInterval(CheckpointSection(every=20, milestone_every=50), [], now=0.0)
    assert [step for step in range(1, 121) if interval.due(step, 0.0)] == [20, 40, 50, 60, 80, 100, 120]
    interval.saved(20, 5.0, 1.0)
    assert (interval.mode, interval.seconds, interval.changed()) == ("steps", None, None)
    assert interval.explanation == "every 20 steps, as configured; and a milestone every 50 steps"


def test_a_time_counts_from_the_end_of_the_last_save_whatever_its_kind() -> None:
    interval = SaveInterval(CheckpointSection(every="90s", milestone_every=50), [], now=1000.0)
    assert not interval.due(1, 1089.9)
    assert interval.due(50, 1001.0)
    interval.saved(50, 2.0, 1003.0)
    assert not interval.due(51, 1090.0)
    assert interval.due(52, 1093.0)
    interval.saved(52, 30.0, 1123.0)
    assert not interval.due(53, 1212.9)
    assert interval.due(54, 1213.0)
    assert (interval.mode, interval.seconds, interval.changed()) == ("time", 90.0, None)
    assert interval.explanation == "every 90 s, as configured; and a milestone every 50 steps"


def test_auto_saves_early_to_learn_the_cost_then_by_the_rule() -> None:
    interval = SaveInterval(CheckpointSection(), [], now=0.0)
    assert interval.explanation.startswith("first after 60 s")
    assert interval.changed() is None  # nothing is known yet
    assert not interval.due(1, 59.9)
    assert interval.due(2, 60.0)
    interval.saved(2, 30.0, 90.0)
    assert interval.seconds == optimum(30.0, DAY + 90.0)
    assert not interval.due(3, 90.0 + optimum(30.0, DAY + 90.0) - 0.1)
    assert interval.due(3, 90.0 + optimum(30.0, DAY + 90.0))


def test_a_save_that_failed_is_due_again_after_the_lower_bound_not_at_each_step() -> None:
    interval = SaveInterval(CheckpointSection(every="30min"), [], now=0.0)
    due = [step for step in range(1, 3000) if interval.due(step, float(step))]
    assert due == [*range(1800, 3000, 60)]
    assert interval.due(due[-1], 2999.5)  # the same step: asked again before it is saved at the end of an epoch
    interval.saved(due[-1], 1.0, 3001.0)
    assert not interval.due(3002, 3002.0)
    short = SaveInterval(CheckpointSection(every="10s"), [], now=0.0)
    assert [step for step in range(1, 41) if short.due(step, float(step))] == [10, 20, 30, 40]
    costly = SaveInterval(CheckpointSection(every="30min"), [saved(0.0, 1, 5, stall_s=20.0)], now=0.0)
    assert [step for step in range(1, 3000) if costly.due(step, float(step))] == [1800, 2200, 2600]


def test_the_cost_is_that_of_the_last_saves_and_one_that_hung_counts_little() -> None:
    before = [saved(float(i), 1, i, stall_s=50.0) for i in range(20)]
    interval = SaveInterval(CheckpointSection(), before, now=0.0)
    assert interval.cost_s == 50.0
    final = saved(21.0, 1, 21, stall_s=9.0, kind="final")  # the model alone, which takes less
    assert SaveInterval(CheckpointSection(), [before[0], final], now=0.0).cost_s == 50.0
    for step in range(9):
        interval.saved(step, 600.0 if step == 4 else 10.0, 0.0)
    assert interval.cost_s == 10.0
    assert interval.seconds == optimum(10.0, interval.mtbf_s)


def test_a_change_is_told_once_and_only_if_it_is_noticeable() -> None:
    interval = SaveInterval(CheckpointSection(), [], now=0.0)
    interval.saved(1, 30.0, 0.0)
    first = interval.changed()
    assert first == {"seconds": optimum(30.0, DAY), "cost_s": 30.0, "mtbf_s": DAY}
    assert interval.changed() is None
    interval.saved(2, 40.0, 0.0)  # median 35 s: 8 % longer
    assert interval.changed() is None
    for step in range(3, 8):
        interval.saved(step, 60.0, 0.0)
    second = interval.changed()
    assert second is not None
    assert second["seconds"] > 1.2 * first["seconds"]
    ledger = [saved(0.0, 1, 1, stall_s=30.0), event(0.0, 1, "interval", **first)]
    assert (
        SaveInterval(CheckpointSection(), ledger, now=0.0).changed() is None
    )  # a later attempt has nothing new to tell
    ledger[1]["seconds"] *= 2
    assert SaveInterval(CheckpointSection(), ledger, now=0.0).changed() == first


KILLED = [
    event(0.0, 1, "attempt_started", world_size=1),
    saved(1000.0, 1, 50),
    saved(2000.0, 1, 100),
    ended(90000.0, 1, 130, "node_failure", detail="killed"),
    event(90000.0, 2, "attempt_started", world_size=1),
    event(90100.0, 2, "resumed", step=100),
]
"""Killed at step 130, found dead a day later."""

NOTICED = [
    ended(91100.0, 2, 150, "preempted"),
    event(91101.0, 2, "requeued"),
    event(91110.0, 3, "attempt_started"),
    ended(91115.0, 3, 150, "preempted"),  # again, while it loaded
    event(91120.0, 4, "attempt_started"),
    event(91130.0, 4, "resumed", step=150),
]


@pytest.mark.parametrize(
    ("events", "count"),
    [
        ([], 0),
        (KILLED, 1),
        ([*KILLED, saved(91099.0, 2, 150, kind="emergency"), *NOTICED], 1),
        ([*KILLED, *NOTICED[:2]], 2),  # the notice came, but its save did not
        ([*KILLED, ended(91100.0, 2, 140, "failed")], 2),
        ([*KILLED, ended(91100.0, 2, 140, "cancelled")], 1),
        ([*KILLED, ended(91100.0, 2, 140, "finished")], 1),
        ([event(0.0, 1, "attempt_started"), ended(5.0, 1, 0, "failed")], 0),  # before its first step
        ([event(0.0, 1, "attempt_started"), ended(5.0, 1, 3, "failed")], 1),  # before its first save
        ([event(0.0, 1, "attempt_started"), saved(4.0, 1, 3), ended(5.0, 1, 3, "failed")], 0),  # nothing was lost
    ],
)
def test_failures_are_attempts_that_lost_steps(events: list[Event], count: int) -> None:
    assert failures(attempts(events)) == count


def test_failures_and_hours_trained_change_the_rate() -> None:
    # 2000 s in the first attempt, up to its last own line; the second is the present one and has just begun
    section = CheckpointSection(mtbf_hours=10)
    interval = SaveInterval(section, KILLED, now=5.0)
    assert interval.mtbf_s == pytest.approx((10 * HOUR + 2000) / 2)
    interval.saved(105, 2.0, 1005.0)
    assert interval.mtbf_s == pytest.approx((10 * HOUR + 3000) / 2)
    untouched = SaveInterval(section, [], now=0.0)
    assert untouched.mtbf_s == 10 * HOUR
    untouched.saved(1, 2.0, 40 * HOUR)
    assert untouched.mtbf_s == 50 * HOUR  # forty hours without a failure
    last = [*KILLED, saved(91099.0, 2, 150, kind="emergency"), *NOTICED]
    assert SaveInterval(section, last, now=0.0).mtbf_s == pytest.approx((10 * HOUR + 2000 + 1001 + 5) / 2)


def test_the_estimate_finds_the_rate_that_failures_really_have() -> None:
    """Ten failures, an hour of training apart; configured is a day."""
    events: list[Event] = []
    for number in range(1, 11):
        begun, step = 10_000.0 * number, 10 * number
        events += [event(begun - 50, number, "attempt_started"), event(begun, number, "resumed", step=step - 10)]
        events += [saved(begun + 3000, number, step), ended(begun + HOUR, number, step + 5, "failed")]
    found = SaveInterval(CheckpointSection(mtbf_hours=24), events, now=0.0).mtbf_s
    assert found == pytest.approx((24 + 10) / 11 * HOUR)


def test_a_simulated_night_saves_as_often_as_the_rule_says() -> None:
    """Ten hours of steps of 7 s and saves of 12 s: the time from one save's end to the next's start is the interval,
    and the few seconds to the end of a step."""
    interval, now, gaps, last = SaveInterval(CheckpointSection(), [], now=0.0), 0.0, [], 0.0
    for step in range(1, 5000):
        now += 7.0
        if interval.due(step, now):
            gaps.append((now - last, interval.seconds))
            now += 12.0
            interval.saved(step, 12.0, now)
            last = now
    assert len(gaps) > 20
    for gap, seconds in gaps:
        assert seconds is not None
        assert seconds <= gap < seconds + 7.0
    assert gaps[0][1] == LOWER_S
    assert gaps[1][1] == pytest.approx(math.sqrt(2 * 12 * DAY), rel=0.02)


def test_the_plan_explains_it(tmp_path: Path) -> None:
    def planned(*overrides: str) -> dict[str, Any]:
        made = plan_run(compose(["job=smoke", f"run.root={tmp_path}", "run.name=r", *overrides]))
        return dict(json.loads(json.dumps(made.as_dict()))["checkpoint"])

    assert planned("checkpoint.mtbf_hours=12", "checkpoint.milestone_every=100") == {
        "every": "auto",
        "mode": "auto",
        "milestone_every": 100,
        "mtbf_hours": 12.0,
        "bounds": {"lower_s": LOWER_S, "largest_share": LARGEST_SHARE, "upper_s": UPPER_S},
        "explanation": explain(LOWER_S, None, 12 * HOUR) + "; and a milestone every 100 steps",
    }
    assert (planned("checkpoint.every=20")["every"], planned("checkpoint.every=20")["mode"]) == (20, "steps")
    timed = planned("checkpoint.every=30min")
    assert (timed["every"], timed["mode"], timed["bounds"]) == ("1800s", "time", None)
    assert timed["explanation"] == "every 30 min, as configured"
    # a run that has begun: by its own saves and failures
    (tmp_path / "r").mkdir()
    other = {"restart_count": 0, "hosts": ["n0"], "world_size": 1, "versions": {}, "checkpoint": "", "seconds": 1.0}
    other |= {"bytes": 1, "sealed_s": 2.0}
    whole = [line | {key: value for key, value in other.items() if line.get(key, 0) is None} for line in KILLED]
    (tmp_path / "r" / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in whole))
    assert planned()["explanation"] == explain(interval(2.0, (DAY + 2000) / 2), 2.0, (DAY + 2000) / 2)


def test_the_command_prints_the_plan_in_words(tmp_path: Path) -> None:
    done = subprocess.run(
        [OUTLAST, "plan", "job=smoke", "checkpoint.every=2h"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert "\ncheckpoint every 2 h, as configured\n" in done.stdout


def test_a_run_root_that_is_a_file_is_left_to_the_check_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    made = plan_run(compose(["job=smoke", f"run.root={tmp_path / 'file'}"]))
    with pytest.raises(ConfigError, match=r"run\.root"):
        check_run_directory(made)


def test_it_imports_no_torch() -> None:
    code = "import sys, outlast.checkpoint.interval; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
