import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from outlast.checkpoint.interval import optimum
from outlast.errors import ConfigError
from outlast.launcher.commands import report
from outlast.launcher.commands.report import render, summarize
from outlast.launcher.display.progress import duration
from outlast.rundir.directory import RunDirectory

T0 = 1_700_000_000.0
STARTED = {"job_id": "7", "restart_count": 0, "hosts": ["n0", "n1"], "world_size": 2, "versions": {}}


def write(run: RunDirectory, *lines: tuple[float, int, str, dict[str, Any]]) -> None:
    """A ledger with times of one's own: (seconds after T0, attempt, event, fields)."""
    run.path.mkdir(parents=True, exist_ok=True)
    with open(run.ledger, "a") as file:
        for time, attempt, event, fields in lines:
            file.write(json.dumps({"time": T0 + time, "attempt": attempt, "event": event, **fields}) + "\n")


def saved(step: int, kind: str, sealed_s: float | None = 0.5) -> dict[str, Any]:
    return {"step": step, "kind": kind, "bytes": 1000, "stall_s": 0.25, "sealed_s": sealed_s}


def show(summary: dict[str, Any], width: int = 160) -> str:
    out = io.StringIO()
    render(summary, Console(file=out, width=width))
    return out.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "one")


def test_a_ledger_without_any_one_of_its_fields_can_be_reported(run: RunDirectory) -> None:
    write(run, *PREEMPTED)
    lines = [json.loads(line) for line in run.ledger.read_text().splitlines()]
    for number, line in enumerate(lines):
        for field in line:
            damaged = [
                *lines[:number],
                {("x" if key == field else key): line[key] for key in line},
                *lines[number + 1 :],
            ]
            run.ledger.write_text("".join(json.dumps(one) + "\n" for one in damaged))
            assert "attempts" in show(summarize(run))


PREEMPTED = [
    (0.0, 1, "attempt_started", STARTED),
    (50.0, 1, "checkpoint", saved(50, "periodic")),
    (60.0, 1, "evaluated", {"step": 50, "metrics": {"eval_loss": 2.0, "eval_runtime": 1.0}}),
    (80.0, 1, "signal", {"name": "TERM", "step": 80, "deadline_s": 30.0}),
    (81.0, 1, "checkpoint", saved(80, "emergency", 1.25)),
    (82.0, 1, "attempt_ended", {"cause": "preempted", "step": 80}),
    (82.5, 1, "requeued", {"cause": "preempted", "job_id": "7"}),
    (90.0, 2, "attempt_started", STARTED | {"restart_count": 1}),
    (100.0, 2, "resumed", {"step": 80, "checkpoint": "checkpoint-80", "seconds": 10.0}),
    (110.0, 2, "deleted", {"checkpoint": "checkpoint-50", "reason": "retention"}),
    (120.0, 2, "evaluated", {"step": 100, "metrics": {"eval_loss": 1.5}}),
    (121.0, 2, "checkpoint", saved(100, "final")),
    (122.0, 2, "attempt_ended", {"cause": "finished", "step": 100}),
    (122.0, 2, "finished", {"step": 100, "seconds": 122.0}),
]


def test_what_a_resume_does_not_restore_is_shown(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    """In both forms; and of a run of which all is restored, neither says anything."""

    def printed(*, as_json: bool = False) -> str:
        report.main(run.path.name, run.path.parent, as_json=as_json)
        return capsys.readouterr().out

    write(run, *PREEMPTED)
    exact = json.loads(printed(as_json=True))
    assert (exact["not_saved"], exact["batches_differ"], exact["batches_unknown"]) == ({}, [], False)
    said = printed()
    assert not any(label in said for label in ("not saved", "data differs", "data unknown"))
    why = "the position of an iterator (cycle) can't be saved"
    write(
        run,
        (91.0, 2, "not_saved", {"objects": {"data_collator.turns": why}}),
        (92.0, 2, "not_saved", {"objects": {"trainer.pool": "it holds Pool, which can't be saved"}}),
        (101.0, 2, "batch_differs", {"step": 80}),
        (102.0, 2, "batch_differs", {"step": 81}),
        (103.0, 2, "batches_unknown", {}),
    )
    inexact = json.loads(printed(as_json=True))
    assert inexact["not_saved"] == {
        "data_collator.turns": why,
        "trainer.pool": "it holds Pool, which can't be saved",
    }
    assert (inexact["batches_differ"], inexact["batches_unknown"]) == ([80, 81], True)
    lines = [line.rstrip() for line in printed().splitlines()]
    assert f"not saved     data_collator.turns: {why}; trainer.pool: it holds Pool, which can't be saved" in lines
    assert "data differs  after a resume at step 80, 81" in lines
    assert (
        "data unknown  the loop reads a DataLoader by itself, without run.epochs: a resume begins its epoch anew"
        in lines
    )


def test_a_preempted_run_loses_no_step(run: RunDirectory) -> None:
    write(run, *PREEMPTED)
    run.config.write_text("storage: {budget_gb: 2.5}\ntrainer: {max_steps: 100}\n")
    summary = summarize(run)
    first, second = summary["attempts"]
    assert (summary["state"], summary["finished"], summary["final_step"]) == ("finished", True, 100)
    assert (summary["steps_done"], summary["steps_lost"], summary["total_steps"]) == (100, 0, 100)
    assert (summary["preemptions"], summary["requeues"], summary["deleted"]) == (1, 1, 1)
    assert summary["seconds"] == {"total": 122.0, "training": 104.0, "resuming": 10.0, "between_attempts": 8.0}
    parts = summary["accounting"]["parts"]
    assert parts == {
        "starting": 10.0,
        "training": pytest.approx(80 - 0.25 - 1 + 22 - 1 - 0.25 + 1),  # to the signal, and after the resume
        "evaluating": 1.0,
        "saving": 0.5,
        "stopping": 2.0,
        "lost": 0.0,
        "queued": 8.0,
        "stopped": 0.0,
    }
    assert sum(parts.values()) == pytest.approx(summary["accounting"]["wall_s"]) == pytest.approx(122.0)
    assert summary["goodput"] == pytest.approx((parts["training"] + parts["evaluating"]) / 122)
    assert summary["accounting"]["goodput"]["allocated"] == pytest.approx(101.5 / 114)
    assert summary["accounting"]["accelerator_hours"] == pytest.approx(114 * 2 / 3600)
    assert summary["accounting"]["cost"] == {
        "saving": {"accelerator_hours": pytest.approx(0.5 * 2 / 3600), "seconds": 0.5},
        "preempted": {"accelerator_hours": pytest.approx(12 * 2 / 3600), "seconds": 20.0},
    }
    assert (first["cause"], first["signal"], first["signal_to_sealed_s"], first["bytes"]) == (
        "preempted",
        "TERM",
        1.25,
        2000,
    )
    assert (first["job_id"], first["hosts"], first["world_size"], first["killed"]) == ("7", ["n0", "n1"], 2, False)
    assert (second["first_step"], second["last_step"], second["steps_done"]) == (80, 100, 20)
    assert summary["checkpoints"] == {
        "count": 3,
        "periodic": 1,
        "emergency": 1,
        "final": 1,
        "failed": 0,
        "mean_stall_s": 0.25,
        "max_sealed_s": 1.25,
        "bytes": 3000,
    }
    assert summary["best"] == {"name": "eval_loss", "value": 1.5, "step": 100}
    assert summary["budget_bytes"] == 2_500_000_000
    assert summary["bytes_used"] == run.ledger.stat().st_size + run.config.stat().st_size
    json.dumps(summary)
    text = show(summary)
    assert "one: finished" in text
    assert "100/100, 0 lost" in text
    assert "80 to 100" in text


def test_a_sealed_time_that_is_missing_is_the_time_between_the_lines(run: RunDirectory) -> None:
    write(run, *PREEMPTED[:4], (83.5, 1, "checkpoint", saved(80, "emergency", None)))
    [attempt] = summarize(run)["attempts"]
    assert attempt["signal_to_sealed_s"] == 3.5


def test_a_step_that_was_safe_before_the_signal(run: RunDirectory) -> None:
    write(run, *PREEMPTED[:2], (51.0, 1, "signal", {"name": "USR1", "step": 50, "deadline_s": None}))
    assert summarize(run)["attempts"][0]["signal_to_sealed_s"] == 0.0


def test_a_killed_attempt_loses_the_steps_after_its_last_checkpoint(run: RunDirectory) -> None:
    """`kill -9` at step 75; the next attempt writes the end of the first when it starts, 100 s later."""
    write(
        run,
        *PREEMPTED[:3],
        (160.0, 1, "attempt_ended", {"cause": "node_failure", "step": 75, "detail": "killed"}),
        (160.0, 2, "attempt_started", STARTED),
        (170.0, 2, "quarantined", {"checkpoint": "checkpoint-70", "reason": "no manifest"}),
        (170.0, 2, "resumed", {"step": 50, "checkpoint": "checkpoint-50", "seconds": 10.0}),
        (220.0, 2, "attempt_ended", {"cause": "finished", "step": 100}),
        (220.0, 2, "finished", {"step": 100, "seconds": 220.0}),
    )
    summary = summarize(run)
    first, second = summary["attempts"]
    assert (summary["steps_done"], summary["steps_lost"]) == (125, 25)
    assert (first["steps_lost"], second["steps_lost"], first["killed"]) == (25, 0, True)
    assert first["seconds"] == 60.0  # its last line, not the one written for it
    assert summary["seconds"]["between_attempts"] == 100.0
    assert first["parts"]["lost"] == 10.0  # since the checkpoint of step 50
    assert summary["goodput"] == pytest.approx((49.75 + 50) / 220)
    assert summary["quarantined"] == [{"checkpoint": "checkpoint-70", "reason": "no manifest"}]
    assert "node_failure, killed" in show(summary)


def test_a_run_that_goes_back_past_an_earlier_attempts_start(run: RunDirectory) -> None:
    """The checkpoint of step 90 is damaged when the third attempt starts: steps of both before it do not count."""
    ready = {"checkpoint": "checkpoint-90", "seconds": 5.0}
    write(
        run,
        (0.0, 1, "attempt_started", STARTED | {"process_started": T0}),
        (0.0, 1, "began", {"step": 0, "seconds": 0.0}),
        (50.0, 1, "checkpoint", saved(50, "periodic") | {"stall_s": 0.0}),
        (90.0, 1, "checkpoint", saved(90, "periodic") | {"stall_s": 0.0}),
        (100.0, 1, "attempt_ended", {"cause": "failed", "step": 100}),
        (100.0, 2, "attempt_started", STARTED),
        (100.0, 2, "resumed", ready | {"step": 90}),
        (105.0, 2, "attempt_ended", {"cause": "failed", "step": 95}),
        (105.0, 3, "attempt_started", STARTED),
        (105.0, 3, "quarantined", {"checkpoint": "checkpoint-90", "reason": "damaged"}),
        (105.0, 3, "resumed", ready | {"step": 50, "checkpoint": "checkpoint-50"}),
        (155.0, 3, "attempt_ended", {"cause": "finished", "step": 100}),
        (155.0, 3, "finished", {"step": 100, "seconds": 155.0}),
    )
    summary = summarize(run)
    assert [row["steps_lost"] for row in summary["attempts"]] == [50, 5, 0]
    assert [row["parts"]["lost"] for row in summary["attempts"]] == [50.0, 5.0, 0.0]
    assert (summary["steps_done"] - summary["steps_lost"], summary["steps_lost"]) == (100, 55)
    assert summary["goodput"] == pytest.approx(100 / 155)


@pytest.mark.parametrize(("earlier", "counted"), [(300.0, 300.0), (3000.0, 20.0)])
def test_what_a_job_did_long_before_is_not_this_runs(run: RunDirectory, earlier: float, counted: float) -> None:
    """A batch script may run two programs one after the other: the time of the first is counted in its own run."""
    write(
        run,
        (0.0, 1, "attempt_started", STARTED | {"process_started": T0 - 20}),
        (10.0, 1, "began", {"step": 0, "seconds": 10.0, "job_submitted": T0 - 9000, "job_started": T0 - earlier}),
        (60.0, 1, "attempt_ended", {"cause": "finished", "step": 50}),
        (60.0, 1, "finished", {"step": 50, "seconds": 60.0}),
    )
    accounting = summarize(run)["accounting"]
    assert (accounting["allocated_s"], accounting["parts"]["starting"]) == (60 + counted, 10 + counted)
    assert accounting["first_wait_s"] == 9000 - earlier
    assert f"rank time    {duration(2 * (60 + counted))}" in show(summarize(run))


def test_an_attempt_without_an_end_is_measured_by_its_progress(run: RunDirectory) -> None:
    write(run, *PREEMPTED[:2])
    now = {"attempt": 1, "phase": "training", "step": 63, "total_steps": 100, "time": T0 + 64}
    run.progress.write_text(json.dumps(now))
    summary = summarize(run)
    [attempt] = summary["attempts"]
    assert (attempt["last_step"], attempt["end"], attempt["cause"], attempt["killed"]) == (63, T0 + 64, None, True)
    assert (summary["state"], summary["finished"], summary["final_step"]) == ("stopped_unexpectedly", False, None)
    assert summary["total_steps"] == 100
    assert "killed" in show(summary)


def test_an_attempt_stopped_while_it_loads_loses_nothing(run: RunDirectory) -> None:
    """It names the step it would have resumed from; it made none."""
    write(
        run,
        *PREEMPTED[:7],
        (90.0, 2, "attempt_started", STARTED),
        (93.0, 2, "signal", {"name": "TERM", "step": 80, "deadline_s": 30.0}),
        (93.0, 2, "attempt_ended", {"cause": "preempted", "step": 80}),
        (93.0, 2, "requeued", {"cause": "preempted", "job_id": "7"}),
        (99.0, 3, "attempt_started", STARTED),
        (109.0, 3, "resumed", {"step": 80, "checkpoint": "checkpoint-80", "seconds": 10.0}),
        (129.0, 3, "attempt_ended", {"cause": "finished", "step": 100}),
        (129.0, 3, "finished", {"step": 100, "seconds": 129.0}),
    )
    summary = summarize(run)
    assert [row["steps_done"] for row in summary["attempts"]] == [80, 0, 20]
    assert summary["steps_lost"] == 0
    assert summary["preemptions"] == 2


def test_a_run_killed_before_its_first_checkpoint_starts_over(run: RunDirectory) -> None:
    write(
        run,
        (0.0, 1, "attempt_started", STARTED),
        (30.0, 1, "attempt_ended", {"cause": "failed", "step": 20, "detail": "killed"}),
        (30.0, 2, "attempt_started", STARTED),
        (80.0, 2, "attempt_ended", {"cause": "finished", "step": 50}),
        (80.0, 2, "finished", {"step": 50, "seconds": 80.0}),
    )
    summary = summarize(run)
    assert (summary["steps_done"], summary["steps_lost"]) == (70, 20)


def test_a_checkpoint_whose_line_was_torn_away_still_counts(run: RunDirectory) -> None:
    write(run, *PREEMPTED[:3])
    with open(run.ledger, "a") as file:
        file.write('{"time": 1700000070.0, "attempt": 1, "event": "checkp\n')
    write(
        run,
        (90.0, 2, "attempt_started", STARTED),
        (100.0, 2, "resumed", {"step": 70, "checkpoint": "checkpoint-70", "seconds": 10.0}),
        (120.0, 2, "attempt_ended", {"cause": "failed", "step": 90}),
    )
    summary = summarize(run)
    assert [row["last_step"] for row in summary["attempts"]] == [70, 90]
    assert (summary["steps_done"], summary["steps_lost"], summary["state"]) == (90, 0, "failed")


def test_the_first_line_was_lost(run: RunDirectory) -> None:
    write(run, *PREEMPTED[1:6])
    summary = summarize(run)
    assert summary["attempts"][0]["job_id"] is None
    assert summary["attempts"][0]["start"] == T0 + 50
    show(summary)


def test_a_run_that_has_just_started(run: RunDirectory) -> None:
    write(run, PREEMPTED[0])
    summary = summarize(run)
    assert (summary["goodput"], summary["steps_done"], summary["checkpoints"]["mean_stall_s"]) == (None, 0, None)
    show(summary, width=60)


def test_the_metric_the_trainer_was_told_to_watch(run: RunDirectory) -> None:
    write(
        run,
        PREEMPTED[0],
        (1.0, 1, "evaluated", {"step": 10, "metrics": {"eval_accuracy": 0.5, "eval_loss": 1.0}}),
        (2.0, 1, "evaluated", {"step": 20, "metrics": {"eval_accuracy": 0.75, "eval_loss": 2.0}}),
        (3.0, 1, "evaluated", {"step": 30, "metrics": {"eval_accuracy": float("nan")}}),
    )
    run.config.write_text("trainer: {metric_for_best_model: accuracy}\n")
    assert summarize(run)["best"] == {"name": "eval_accuracy", "value": 0.75, "step": 20}
    run.config.write_text("trainer: {metric_for_best_model: eval_accuracy, greater_is_better: false}\n")
    assert summarize(run)["best"]["step"] == 10


def test_the_interval_of_checkpoints_is_explained(run: RunDirectory) -> None:
    write(run, *PREEMPTED[:2])
    assert summarize(run)["interval"] is None
    assert "interval" not in show(summarize(run))
    early = {"seconds": 60.0, "cost_s": 0.01, "mtbf_s": 86400.0}
    late = {"seconds": optimum(30.0, 86400.0), "cost_s": 30.0, "mtbf_s": 86400.0}
    write(run, (51.0, 1, "interval", early), *PREEMPTED[2:9], (101.0, 2, "interval", late))
    summary = summarize(run)
    words = "every 38 min: a save takes 30 s, and a failure without notice is expected every 24 h"
    assert summary["interval"] == {**late, "explanation": words}
    assert [line.rstrip().split(maxsplit=1) for line in show(summary).splitlines() if words in line] == [
        ["interval", words]
    ]


def test_a_run_that_is_not_there(run: RunDirectory) -> None:
    root = run.path.parent
    with pytest.raises(ConfigError, match=r"RUN: 'one' is refused; valid: a run under .*runs, which holds none"):
        report.main("one", root, as_json=True)
    write(run, PREEMPTED[0])
    with pytest.raises(ConfigError, match=r"RUN: 'onee' is refused; did you mean one\? valid: one"):
        report.main("onee", root, as_json=True)
    with pytest.raises(ConfigError, match=r"valid: one"):
        report.main(str(root), root, as_json=True)  # a directory, but not a run's
    waiting = RunDirectory(root / "waiting")
    waiting.path.mkdir()
    waiting.config.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="'waiting' is refused; it has not started yet"):
        report.main("waiting", root, as_json=True)


@pytest.mark.parametrize("name", ["one", "runs/one"])
def test_the_command(
    run: RunDirectory, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run, *PREEMPTED)
    monkeypatch.chdir(run.path.parent.parent)
    assert report.main(name, Path("runs"), as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["final_step"] == 100
    assert report.main(name, Path("runs"), as_json=False) == 0
    assert "finished" in capsys.readouterr().out
