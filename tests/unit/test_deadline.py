"""The account of what a stop takes, and what fits into the notice that a cluster gives."""

import os
import signal
import time
from typing import Any

import pytest

from outlast.preemption import stopped
from outlast.preemption.deadline import MARGIN_S, SLACK, Planner
from outlast.preemption.stopped import note_stops
from outlast.slurm.view import Notice

NOTICE = Notice(30.0, "GraceTime of partition low", 30.0)


def event(name: str, **values: Any) -> dict[str, Any]:
    return {"time": 1.0, "attempt": 1, "event": name, **values}


def planner(*saves: float) -> Planner:
    made = Planner(90.0)
    for seconds in saves:
        made.saved(seconds)
    return made


def test_nothing_is_claimed_before_anything_was_measured() -> None:
    made = planner()
    assert made.time_for(8.0, 10.0, 0.0) is False, "not even without a save"
    assert (made.needed_s, made.save_s, made.lead_s) == (None, None, 90.0)
    assert made.time_for(1.0, 1e12, 0.0) is None
    assert made.shortfall(NOTICE) is None


def test_what_saves_have_cost_is_taken_from_earlier_attempts_without_the_finished_model() -> None:
    made = planner()
    made.begin(
        [
            event("checkpoint", kind="periodic", stall_s=2.0),
            event("checkpoint", kind="emergency", stall_s=4.0),
            event("checkpoint", kind="final", stall_s=50.0),
        ]
    )
    assert made.save_s == 4.0


def test_before_the_first_save_its_size_counts() -> None:
    made = Planner(90.0, checkpoint_bytes=40_000_000_000)
    assert made.save_s == 200.0
    said = made.shortfall(NOTICE)
    assert said is not None
    assert "200 s to save (by its size, at 0.2 GB a second)" in said[0]
    made.saved(1.0)
    assert made.save_s == 1.0


def test_only_the_last_measurements_count() -> None:
    made = planner(100.0, *[1.0] * 9)
    assert made.save_s == 1.0


def test_a_stretch_runs_from_one_point_to_the_next_without_the_saves_between(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    made = planner()
    made.reached("step")  # nothing began: no stretch
    assert made.each_s("step") is None
    now = 2.0
    made.reached("step")
    now = 10.0
    made.saved(8.0)
    now = 11.0
    made.reached("step")
    now = 14.0
    made.reached("evaluation")
    assert (made.each_s("step"), made.each_s("evaluation")) == (2.0, 3.0)
    assert made.reaction_s == 3.0
    assert made.needed_s == SLACK * (3.0 + 8.0) + MARGIN_S


def test_time_in_which_the_process_was_stopped_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopped, "_went_on_at", stopped._went_on_at)
    before = signal.getsignal(signal.SIGCONT)
    note_stops()
    try:
        made = planner()
        made.mark()
        os.kill(os.getpid(), signal.SIGCONT)  # as after a SIGSTOP, of which a process is not told
        made.reached("step")
        made.saved(100.0)
        assert (made.each_s("step"), made.save_s) == (None, None)
        made.reached("step")
        assert made.each_s("step") is not None
    finally:
        signal.signal(signal.SIGCONT, before)


def test_who_handles_sigcont_goes_on_to() -> None:
    before = signal.signal(signal.SIGCONT, signal.SIG_IGN)
    try:
        note_stops()
        assert signal.getsignal(signal.SIGCONT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGCONT, before)


def test_work_is_finished_first_only_if_the_save_still_fits_after_it() -> None:
    made, now = planner(4.0), 1000.0
    deadline = now + SLACK * (2.0 + 4.0) + MARGIN_S
    assert made.time_for(2.0, deadline, now) is True
    assert made.time_for(2.1, deadline, now) is False
    assert made.time_for(None, deadline, now) is None
    assert made.time_for(2.0, None, now) is None


def test_the_own_clock_acts_as_early_as_it_must() -> None:
    assert planner(10.0).lead_s == 90.0
    assert planner(100.0).lead_s == SLACK * 100.0 + MARGIN_S


@pytest.mark.parametrize("notice", [NOTICE, None, Notice(None, "jobs are not preempted here", 30.0)])
def test_no_warning_where_it_fits(notice: Notice | None) -> None:
    assert planner(10.0).shortfall(notice) is None


def test_a_notice_that_is_too_short_is_said_once_with_what_would_help() -> None:
    made = planner(40.0)
    said = made.shortfall(NOTICE)
    assert said is not None
    text, fields = said
    assert "up to 65 s" in text
    assert "gives 30 s (GraceTime of partition low)" in text
    assert "checkpoint.every=17min" in text  # sqrt(2 * 40 * 14400) s, less the save: a preemption every four hours
    assert "lead_s" not in text
    assert fields == {"needed_s": 65.0, "save_s": 40.0, "reaction_s": 0.0, "notice_s": 30.0, "lead_s": 90.0}
    assert made.shortfall(NOTICE) is None


def test_a_lead_that_is_too_short_is_said_with_one_that_would_do() -> None:
    said = planner(100.0).shortfall(Notice(None, "jobs are not preempted here", 30.0))
    assert said is not None
    assert "preemption.lead_s is 90" in said[0]
    assert "preemption.lead_s=160" in said[0]
    assert "checkpoint.every" not in said[0]
