"""A run with several attempts is one run in each tracker: each step once, with the values of a run left alone."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .. import forked
from ..conftest import Command, RunProbe

SCRIPT = Path(__file__).with_name("tracked_script.py")
PACKAGES = {name: name for name in ("tensorboard", "wandb", "mlflow", "trackio")}
INSTALLED = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]
STRIKES = (
    "on_log:9:KILL",
    "on_step_end:11:USR1",
    "on_evaluate:15:KILL",
    "on_step_begin:17:TERM",
    "on_train_end:20:KILL",
)
CODES = (-9, 75, -9, 75, -9, 0)
Values = dict[str, list[tuple[int, float]]]
"""Of each name, the steps and values, in the order in which they were written."""


def attempt(run: Path, *, trackers: str = ",".join(INSTALLED), strikes: str = "", **env: str) -> tuple[int, str]:
    """Exit code and output of one attempt."""
    done = forked.run([sys.executable, SCRIPT, run, trackers, strikes], run.parent, env=environment(**env))
    return done.returncode, done.stdout + done.stderr


def environment(**more: str) -> dict[str, str]:
    import os

    return {**os.environ, **more}


def comparable(values: Values) -> Values:
    """What does not depend on the clock."""
    times = ("runtime", "per_second")
    return {name: sorted(found) for name, found in values.items() if not any(time in name for time in times)}


def of_tensorboard(run: Path) -> tuple[set[str], Values]:
    """The places of a run's values, and the values as its files hold them, whatever a reader would leave out."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    values: Values = {}
    files = sorted(run.rglob("events.out.tfevents.*"))
    for file in files:
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                number = value.tensor.float_val[0] if value.tensor.float_val else 0.0
                values.setdefault(value.tag, []).append((event.step, number))
    return {str(file.parent.relative_to(run)) for file in files}, values


def of_wandb(run: Path) -> tuple[set[str], Values]:
    """The ids of a run, and the values of all transaction logs."""
    from outlast.huggingface.tracking.wandb import rows

    values: Values = {}
    files = sorted(run.rglob("*.wandb"))
    for file in files:
        for row in rows(file):
            assert row["train/global_step"] == int(row["train/global_step"])
            for name in row.keys() - {"_timestamp"}:
                values.setdefault(name, []).append((row["train/global_step"], row[name]))
    return {file.stem for file in files}, values


def of_mlflow(run: Path) -> tuple[set[str], Values]:
    """The ids of the runs in the store, and the values."""
    import sqlite3

    values: Values = {}
    with sqlite3.connect(run / "tracking/mlflow/mlflow.db") as store:
        for key, step, value in store.execute("select key, step, value from metrics order by timestamp"):
            values.setdefault(key, []).append((step, value))
        names = {str(number) for (number,) in store.execute("select run_uuid from runs")}
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]
    store.close()
    return names, values


def of_trackio(run: Path) -> tuple[set[str], Values]:
    """The names of the runs in the database, and the values."""
    import sqlite3

    values: Values = {}
    (file,) = (run / "tracking/trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        found = database.execute("select run_id, metrics from metrics order by id").fetchall()
    database.close()
    for _, text in found:
        row = json.loads(text)
        for name in row:
            values.setdefault(name, []).append((row["train/global_step"], row[name]))
    return {name for name, _ in found}, values


READERS: dict[str, Callable[[Path], tuple[set[str], Values]]] = {
    "tensorboard": of_tensorboard,
    "wandb": of_wandb,
    "mlflow": of_mlflow,
    "trackio": of_trackio,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunProbe, RunProbe]:
    """A run left alone, and one that was killed three times, preempted twice, and moved."""
    directory = tmp_path_factory.mktemp("tracked")
    twin, struck = RunProbe(directory / "twin"), RunProbe(directory / "struck")
    code, output = attempt(twin.path)
    assert code == 0, output
    for number, code in enumerate(CODES):
        found, output = attempt(struck.path, strikes=",".join(STRIKES))
        assert found == code, output
        assert "WARNING" not in output
        assert len(list(struck.path.glob("tracking/wandb/wandb/*run-*-*"))) <= 2  # each holds what the older ones do
        if number == 1:
            moved = directory / "elsewhere"
            struck.path.rename(moved)
            struck = RunProbe(moved)
    return twin, struck


@pytest.mark.parametrize("tracker", PACKAGES)
def test_one_run_each_step_once(tracker: str, runs: tuple[RunProbe, RunProbe]) -> None:
    if tracker not in INSTALLED:
        pytest.skip(f"{tracker} is not installed: pip install outlast[{tracker}]")
    twin, struck = runs
    assert [event["step"] for event in struck.events("resumed")] == [6, 11, 12, 18, 20]
    (names, expected), (found_names, found) = READERS[tracker](twin.path), READERS[tracker](struck.path)
    assert len(names) == len(found_names) == 1
    if tracker == "mlflow":  # which keeps one of several equal values of a step that come in the same millisecond
        found, expected = ({name: list(set(values)) for name, values in one.items()} for one in (found, expected))
    assert comparable(found) == comparable(expected)
    assert found.keys() == expected.keys()
    losses = next(values for name, values in found.items() if name.endswith(("train/loss", "/loss")) or name == "loss")
    assert sorted(step for step, _ in losses) == list(range(1, 21))


def test_the_clock_goes_on(runs: tuple[RunProbe, RunProbe]) -> None:
    """Time and tokens a second are the run's: they don't begin anew with an attempt."""
    history = json.loads((runs[1].path / "checkpoints/checkpoint-20/trainer_state.json").read_text())["log_history"]
    logs: list[dict[str, Any]] = [entry for entry in history if "train_tokens_per_second" in entry]
    times = [entry["train_runtime"] for entry in logs]
    assert times == sorted(times)
    for entry in logs:
        tokens = entry["train_tokens_per_second"] * entry["train_runtime"]
        assert tokens == pytest.approx(entry["num_input_tokens_seen"], rel=0.05)


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    if "tensorboard" not in INSTALLED:
        pytest.skip("tensorboard is not installed: pip install outlast[tensorboard]")
    run = RunProbe(tmp_path / "run")
    (run.path / "tracking").mkdir(parents=True)
    (run.path / "tracking/tensorboard").write_text("in the way")
    code, output = attempt(run.path, trackers="tensorboard")
    assert code == 0, output
    assert "tensorboard fails, training goes on without it: FileExistsError" in output
    assert [event["tracker"] for event in run.events("tracking_failed")] == ["tensorboard"]


def test_runs_of_mlflow_in_one_process(tmp_path: Path) -> None:
    """Each in its own store; a run that is given or open is that which is logged to, with its parameters."""
    if "mlflow" not in INSTALLED:
        pytest.skip("mlflow is not installed: pip install outlast[mlflow]")
    done = forked.run([sys.executable, Path(__file__).with_name("mlflow_script.py"), tmp_path], tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.partition("FOUND ")[2])
    for name in ("first", "other"):
        assert f"/{name}/tracking/mlflow/mlflow.db" in found[name]["uri"]
        assert f"/{name}/tracking/mlflow/artifacts" in found[name]["artifacts"]
    assert found["again"] == found["other"]
    assert found["nested"][0] == found["nested"][1]
    for run, logged_to in (found["given"], found["script's"]):
        assert logged_to["id"] == run
        assert logged_to["parameters"] == found["first"]["parameters"] > 0
    experiment, logged_to = found["chosen"]
    assert "server.db" in logged_to["uri"]
    assert logged_to["experiment"] == experiment


def test_cells_of_a_sweep_stand_side_by_side(outlast: Callable[..., Command], tmp_path: Path) -> None:
    trackers = [name for name in ("tensorboard", "wandb") if name in INSTALLED]
    if not trackers:
        pytest.skip("no tracker is installed: pip install outlast[tensorboard]")
    sft = [
        "model.vocab_size=300",
        "model.hidden_size=16",
        "model.layers=1",
        "data.max_pairs=40",
        "trainer.max_length=64",
    ]
    chosen = [f"tracking=[{','.join(trackers)}]", "trainer.max_steps=2", "trainer.logging_steps=1"]
    without = ["trainer.eval_strategy=no", "trainer.load_best_model_at_end=false", "parallel.cpus_per_rank=1"]
    command = outlast("train", "-m", "job=sft", *sft, *chosen, *without, "seed=1,2", "run.name=s")
    assert command.wait() == 0, command.output
    cells = sorted(path.parent for path in (tmp_path / "runs/s").glob("*/tracking"))
    assert len(cells) == 2
    for cell in cells:
        places, values = of_tensorboard(cell)
        assert places == {"tracking/tensorboard"}
        assert [step for step, _ in values["train/loss"]] == [1, 2]
    if "wandb" in trackers:
        from wandb.proto.wandb_internal_pb2 import Record

        from outlast.huggingface.tracking.wandb import records_of

        records = [
            Record.FromString(one) for cell in cells for file in cell.rglob("*.wandb") for one in records_of(file)
        ]
        started = [record.run for record in records if record.HasField("run")]
        assert {run.run_group for run in started} == {"s"}
        assert {run.display_name for run in started} == {cell.name for cell in cells}
