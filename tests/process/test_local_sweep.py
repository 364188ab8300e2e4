"""Sweeps on this machine: cells one after the other or several at a time, stopped and resumed, one of them failing."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.launcher.commands.train import run_sweep

from .. import forked
from ..conftest import SMOKE, Command, RunProbe


@pytest.fixture
def outlast(outlast: Callable[..., Command]) -> Callable[..., Command]:
    return lambda *arguments: outlast("train", "-m", *SMOKE, "run.name=s", *arguments)


def test_two_at_a_time_and_again_nothing(outlast: Callable[..., Command], tmp_path: Path) -> None:
    arguments = ["seed=1,2,3", "trainer.max_steps=30", "trainer.step_s=0.05", "cluster.parallel_cells=2"]
    first = outlast(*arguments)
    assert first.wait() == 0, first.output
    cells = [RunProbe(tmp_path / "runs" / "s" / f"seed={seed}") for seed in (1, 2, 3)]
    spans = [(cell.events()[0]["time"], cell.events("finished")[0]["time"]) for cell in cells]
    assert max(spans[0][0], spans[1][0]) < min(spans[0][1], spans[1][1])  # the first two overlap
    assert spans[2][0] > min(spans[0][1], spans[1][1])  # the third waited for one of them
    again = outlast(*arguments)
    assert again.wait() == 0, again.output
    assert "3 cells, 3 left as they are" in again.output
    assert all(len(cell.events("attempt_started")) == 1 for cell in cells)


def test_ctrl_c_saves_and_leaves_all_and_the_same_command_resumes(
    outlast: Callable[..., Command], tmp_path: Path
) -> None:
    arguments = ["seed=1,2,3", "trainer.max_steps=40", "trainer.step_s=0.1", "cluster.parallel_cells=2"]
    first = outlast(*arguments)
    cells = [RunProbe(tmp_path / "runs" / "s" / f"seed={seed}") for seed in (1, 2, 3)]
    for cell in cells[:2]:
        cell.reach(5)
    first.signal(signal.SIGINT)
    assert first.wait(60) == 75, first.output
    assert [cell.causes() for cell in cells] == [["preempted"], ["preempted"], []]
    again = outlast(*arguments)
    assert again.wait() == 0, again.output
    assert all(cell.events("finished") for cell in cells)
    assert [cell.steps_repeated() for cell in cells] == [0, 0, 0]


def test_one_bad_cell_does_not_stop_the_others(outlast: Callable[..., Command], tmp_path: Path) -> None:
    command = outlast("trainer.dataset_size=10000000000000,64", "trainer.max_steps=5")
    assert command.wait() == 1, command.output
    assert "dataset_size=10000000000000: rank 0 ended with exit code 1" in command.output
    cells = [RunProbe(tmp_path / "runs" / "s" / f"dataset_size={size}") for size in (10**13, 64)]
    assert [cell.causes() for cell in cells] == [["failed"], ["finished"]]


def test_a_program_gets_the_metric_of_each_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import json\n"
        "from outlast.launcher.commands.train import run_sweep\n"
        f"results = run_sweep({[*SMOKE, 'run.name=s', 'trainer.max_steps=20', 'trainer.learning_rate=0.1,0.01']!r})\n"
        "print(json.dumps([one.as_dict() for one in results]))\n"
    )
    program = tmp_path / "program.py"
    program.write_text(code)
    done = forked.run([sys.executable, program], tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [(one["overrides"], one["state"]) for one in results] == [
        (["trainer.learning_rate=0.1"], "finished"),
        (["trainer.learning_rate=0.01"], "finished"),
    ]
    assert all(one["metric"]["name"] == "loss" and one["metric"]["step"] == 20 for one in results)
    assert results[0]["metric"]["value"] != results[1]["metric"]["value"]
    monkeypatch.chdir(tmp_path)  # again, in this process: nothing is left to run, so no rank is started
    assert [
        one.metric
        for one in run_sweep([*SMOKE, "run.name=s", "trainer.max_steps=20", "trainer.learning_rate=0.1,0.01"])
    ] == [one["metric"] for one in results]
