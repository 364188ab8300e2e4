"""The report of a real run: where its time went, and its curve over all attempts."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.launcher.runs.summary import summarize
from outlast.rundir.directory import RunDirectory

from ..conftest import SMOKE, Command, RunProbe, wait_for


def test_four_attempts_account_for_their_wall_time(
    outlast: Callable[..., Command], probe: Callable[[str], RunProbe], tmp_path: Path
) -> None:
    """Two preemptions, and a kill of everything, after which the run stops until somebody starts it again."""
    arguments = ["train", *SMOKE, "checkpoint.every=50", "run.name=r", "trainer.max_steps=100", "trainer.step_s=0.1"]
    command, run = outlast(*arguments), probe("r")
    wait_for(command.ranks, "the first rank")
    began = time.time()
    run.reach(7)
    command.ranks()[0].send_signal(signal.SIGUSR1)
    run.reach(57, attempt=2)
    killed = [*command.ranks(), command.process]
    for process in killed:
        process.kill()
    command.wait()
    stopped = time.time()
    command = outlast(*arguments)
    wait_for(command.ranks, "the third rank")
    third = time.time()
    run.reach(75, attempt=3)
    command.ranks()[0].send_signal(signal.SIGUSR1)
    wait_for(lambda: run.events("finished"), "the end")
    ended = time.time()
    assert command.wait() == 0, command.output

    report = json.loads(json.dumps(summarize(RunDirectory(run.path))))
    accounting, rows = report["accounting"], report["attempts"]
    parts, goodput = accounting["parts"], accounting["goodput"]
    assert [row["cause"] for row in rows] == ["preempted", "failed", "preempted", "finished"]
    assert accounting["wall_s"] == pytest.approx(ended - began, abs=1.0)
    assert sum(parts.values()) == pytest.approx(accounting["wall_s"], abs=1e-3)
    assert accounting["allocated_s"] == pytest.approx(accounting["wall_s"] - parts["queued"] - parts["stopped"])
    assert rows[2]["stopped_s"] == pytest.approx(third - stopped, abs=1.0)
    # Each part is what it should be: steps take 0.1 s and a little.
    kept = sum(row["steps_done"] - row["steps_lost"] for row in rows)
    assert kept == 100
    assert report["steps_lost"] == rows[1]["steps_lost"] == rows[1]["last_step"] - 50 > 0
    assert parts["training"] >= 0.1 * (kept - 2)
    assert rows[1]["parts"]["lost"] >= 0.1 * (rows[1]["steps_lost"] - 1)
    assert [row["parts"]["lost"] > 0 for row in rows] == [False, True, False, False]
    assert [row["parts"]["stopping"] > 0 for row in rows] == [True, False, True, False]
    assert all(row["parts"]["starting"] > 0 for row in rows)
    assert goodput["wall"] == report["goodput"] == pytest.approx(parts["training"] / accounting["wall_s"])
    assert goodput["allocated"] == pytest.approx(parts["training"] / accounting["allocated_s"])
    costs = accounting["cost"]
    assert costs.keys() == {"first start", "saving", "preempted", "failed"} | ({"finished"} & costs.keys())
    hours = sum(cost["accelerator_hours"] for cost in costs.values()) + parts["training"] / 3600
    assert hours == pytest.approx(accounting["accelerator_hours"]) == pytest.approx(accounting["allocated_s"] / 3600)

    # The curve: each step once, whatever was made twice, and where the run was stopped.
    losses = report["curves"]["losses"]
    assert [step for step, _ in losses] == list(range(1, 101))
    assert [stop["cause"] for stop in report["curves"]["stops"]] == ["preempted", "failed", "preempted"]
    assert [stop["step"] for stop in report["curves"]["stops"]] == [row["last_step"] for row in rows[:3]]
    there = [run.path / "final", *(run.path / "checkpoints").glob("checkpoint-*")]
    size = sum(file.stat().st_size for path in there for file in path.rglob("*") if file.name != "manifest.json")
    assert report["disk"][-1][1] == pytest.approx(size, rel=0.05)
