"""Sweeps as job arrays on a real Slurm: preempted, crashing, cancelled, the launcher killed in mid-submission."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..conftest import SMOKE, Command, RunProbe, wait_for
from .cluster import Cluster

Start = Callable[..., Command]
Probe = Callable[[str], RunProbe]

BASE = [*SMOKE, "cluster=devcluster"]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def cluster(devcluster: Cluster) -> Iterator[Cluster]:
    """The shared cluster, empty again afterwards."""
    yield devcluster
    devcluster.cancel_all()


@pytest.fixture
def sweep(outlast: Start, cluster: Cluster) -> Start:
    """Starts `outlast train -m …` for the cluster."""
    return lambda *arguments, **env: outlast(
        "train", "-m", *BASE, *arguments, OUTLAST_DEVCLUSTER=str(cluster.directory), **env
    )


def sbatch_that(directory: Path, *lines: str) -> str:
    """A PATH on which `sbatch` does something besides: `$sbatch` is the real one, `$PPID` the launcher."""
    script = directory / "bin" / "sbatch"
    script.parent.mkdir()
    script.write_text("\n".join(["#!/bin/bash", f"sbatch={shutil.which('sbatch')}", *lines, ""]))
    script.chmod(0o755)
    return f"{script.parent}:{os.environ['PATH']}"


def arrays(cluster: Cluster) -> list[str]:
    """Ids of the job arrays that are in the queue."""
    return sorted(set(cluster.run("squeue", "-h", "-o", "%F").split()))


def manifest(tmp_path: Path, name: str = "s") -> dict[str, Any]:
    return dict(json.loads((tmp_path / "runs" / name / "sweep.json").read_text()))


def assert_one_attempt_at_a_time(cell: RunProbe) -> None:
    """By the ledger: an attempt begins after the one before it has ended."""
    order = [(e["event"], e["attempt"]) for e in cell.events() if e["event"] in ("attempt_started", "attempt_ended")]
    numbers = [number for event, number in order if event == "attempt_started"]
    assert order == [(event, n) for n in numbers for event in ("attempt_started", "attempt_ended")], order
    assert numbers == list(range(1, len(numbers) + 1))


HUGE = 10**13
"""Rows that take more memory than any machine has: the program of such a cell fails."""


def test_twelve_cells_with_everything_that_happens_to_them(
    sweep: Start, outlast: Start, cluster: Cluster, tmp_path: Path
) -> None:
    good = list(range(64, 74))
    sizes = ",".join(str(size) for size in [*good, 74, HUGE])
    arguments = ["run.name=s", f"trainer.dataset_size={sizes}", "trainer.max_steps=100", "trainer.step_s=0.1"]
    arguments += ["cluster.array_parallelism=6", "preemption.max_crashes=0"]

    path = sbatch_that(tmp_path, '"$sbatch" "$@" > /dev/null', "kill -9 $PPID")
    killed = sweep(*arguments, PATH=path)
    assert killed.wait(60) == -9
    (array,) = arrays(cluster)
    assert [entry["job_id"] for entry in manifest(tmp_path)["submissions"]] == [None]
    again = sweep(*arguments)
    assert again.wait(60) == 0, again.output
    assert "nothing to submit\n  12 in the queue already" in again.output

    cells = {size: RunProbe(tmp_path / "runs" / "s" / f"dataset_size={size}") for size in [*good, 74, HUGE]}
    for size in good[:4]:
        cells[size].reach(5)
    cluster.run("sbatch", "-p", "high", "-N", "4", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    cells[74].reach(5, limit_s=180)
    cluster.run("scancel", f"{array}_10")

    waiting = sweep(*arguments, "--json")
    assert waiting.wait(240) == 1, waiting.output
    results = json.loads(waiting.output[waiting.output.index("[\n") :])
    states = {one["name"].removeprefix("dataset_size="): one["state"] for one in results}
    assert states == {**{str(size): "finished" for size in good}, "74": "cancelled", str(HUGE): "failed"}
    assert f"dataset_size={HUGE}: failed, step 0 (" in waiting.output
    assert cells[74].causes()[-1] == "cancelled"
    assert "allocate memory" in cells[HUGE].events("attempt_ended")[-1]["error"]
    assert sum("preempted" in cell.causes() for cell in cells.values()) >= 4
    for cell in cells.values():
        assert_one_attempt_at_a_time(cell)
        assert cell.steps_repeated() == 0

    last = sweep(*arguments)
    assert last.wait(60) == 0, last.output
    assert "nothing to submit\n  10 finished already" in last.output
    assert "outlast resume s" in last.output
    assert arrays(cluster) == []
    assert len(manifest(tmp_path)["submissions"]) == 1

    widths = ",".join(map(str, good))
    twins = ["run.name=twins", f"trainer.dataset_size={widths}", "trainer.max_steps=100", "cluster.parallel_cells=2"]
    command = outlast("train", "-m", *SMOKE, *twins)
    assert command.wait() == 0, command.output
    for size in good:
        assert cells[size].weights() == RunProbe(tmp_path / "runs" / "twins" / f"dataset_size={size}").weights()


def test_an_sbatch_that_outlives_its_launcher_is_waited_for(sweep: Start, cluster: Cluster, tmp_path: Path) -> None:
    path = sbatch_that(tmp_path, "kill -9 $PPID", "sleep 3", 'exec "$sbatch" "$@"')
    arguments = ["run.name=s", "seed=1,2", "cluster.sbatch.hold=true"]
    assert sweep(*arguments, PATH=path).wait(60) == -9
    assert arrays(cluster) == []  # still on its way
    again = sweep(*arguments)
    assert again.wait(60) == 0, again.output
    assert "2 in the queue already" in again.output
    assert len(arrays(cluster)) == 1


def test_a_launcher_killed_before_sbatch_loses_nothing(sweep: Start, cluster: Cluster, tmp_path: Path) -> None:
    path = sbatch_that(tmp_path, "kill -9 $PPID")
    arguments = ["run.name=s", "seed=1,2", "cluster.sbatch.hold=true"]
    assert sweep(*arguments, PATH=path).wait(60) == -9
    again = sweep(*arguments)
    assert again.wait(60) == 0, again.output
    assert "submitted job array" in again.output
    assert len(arrays(cluster)) == 1


def test_a_single_run_is_found_again_too(outlast: Start, cluster: Cluster, tmp_path: Path) -> None:
    path, env = sbatch_that(tmp_path, '"$sbatch" "$@" > /dev/null', "kill -9 $PPID"), str(cluster.directory)
    arguments = ["train", *BASE, "run.name=r", "cluster.sbatch.hold=true"]
    assert outlast(*arguments, PATH=path, OUTLAST_DEVCLUSTER=env).wait(60) == -9
    again = outlast(*arguments, OUTLAST_DEVCLUSTER=env)
    assert again.wait(60) == 0, again.output
    assert f"job {arrays(cluster)[0]} is in the queue already" in again.output
    assert len(arrays(cluster)) == 1


def test_two_commands_at_once_submit_one_array(sweep: Start, cluster: Cluster, tmp_path: Path) -> None:
    arguments = ["run.name=s", "seed=range(0,20)", "cluster.sbatch.hold=true"]
    both = [sweep(*arguments), sweep(*arguments)]
    assert [command.wait(60) for command in both] == [0, 0]
    assert len(arrays(cluster)) == 1
    assert sorted("nothing to submit" in command.output for command in both) == [False, True]


def test_a_sweep_grows_while_it_waits_and_what_waits_keeps_its_code(
    sweep: Start, cluster: Cluster, tmp_path: Path
) -> None:
    assert sweep("run.name=s", "seed=1,2", "cluster.sbatch.hold=true").wait(60) == 0
    first = (tmp_path / "runs" / "s" / "code" / "code.json").stat().st_ino
    grown = sweep("run.name=s", "seed=3,1,2", "cluster.sbatch.hold=true")
    assert grown.wait(60) == 0, grown.output
    assert "1 cells\n  2 in the queue already" in grown.output
    assert [entry["indices"] for entry in manifest(tmp_path)["submissions"]] == [[0, 1], [2]]
    assert (tmp_path / "runs" / "s" / "code" / "code.json").stat().st_ino == first
    script = (tmp_path / "runs" / "s" / "seed=3" / "job.sbatch").read_text()
    assert f"PYTHONPATH={tmp_path}/runs/s/code-2" in script
    assert len(arrays(cluster)) == 2


def test_cells_beyond_the_largest_array(sweep: Start, cluster: Cluster, tmp_path: Path) -> None:
    command = sweep("run.name=s", "seed=range(0,1003)", "trainer.max_steps=3", "cluster.sbatch.hold=true")
    assert command.wait(120) == 0, command.output
    entries = manifest(tmp_path)["submissions"]
    assert [(len(entry["indices"]), entry["offset"]) for entry in entries] == [(1001, 0), (2, 1001)]
    cluster.run("scontrol", "release", f"{entries[1]['job_id']}_1")
    wait_for(lambda: RunProbe(tmp_path / "runs" / "s" / "seed=1002").events("finished"), "cell 1002")
    cluster.run("scancel", *(entry["job_id"] for entry in entries))
    assert [path.parent.name for path in (tmp_path / "runs" / "s").glob("*/ledger.jsonl")] == ["seed=1002"]


def test_a_name_that_is_hard_to_quote(sweep: Start, cluster: Cluster, tmp_path: Path) -> None:
    name = "it's $(touch x) `touch y` \u00e4 ;&"
    command = sweep(f'run.name="{name}"', "seed=1,2", "trainer.max_steps=3", "--wait")
    assert command.wait(120) == 0, command.output
    assert len(list((tmp_path / "runs" / name / "logs").iterdir())) == 2
    assert not [path for path in tmp_path.rglob("*") if path.name in ("x", "y")]


def test_plain_sbatch(cluster: Cluster, tmp_path: Path) -> None:
    env = {**cluster.env, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(*flags: str) -> str:
        script = str(REPOSITORY / "slurm" / "sweep.sbatch")
        overrides = [*SMOKE, "run.name=s", "seed=1,2", "trainer.max_steps=3"]
        command = ["sbatch", "--parsable", "--wait", "-c", "1", *flags, script, *overrides]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True).stdout.strip()

    job = run("--array=0-2")
    for seed in (1, 2):
        cell = RunProbe(tmp_path / "runs" / "s" / f"seed={seed}")
        assert cell.events("finished"), list(tmp_path.glob("slurm-*"))
    assert "the sweep has 2 cells; valid: 0 to 1" in (tmp_path / f"slurm-{job}_2.out").read_text()
    job = run()
    assert "submit with --array=0-N" in (tmp_path / f"slurm-{job}.out").read_text()
