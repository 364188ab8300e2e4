"""Why an attempt ended, on a real Slurm: what an operator does to jobs, and what a user does to one that saves."""

import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from ..conftest import RunProbe, wait_for
from .cluster import Cluster

SCRIPT = """
import pathlib, sys, time
import outlast

def save(directory):
    (directory / "state").write_bytes(b"x")
    while run.stopping and not pathlib.Path(sys.argv[1], "go").exists():
        time.sleep(0.05)

run = outlast.start(sys.argv[1], requeue=True, lead_s=100)
checkpoint = run.resume_point()
step = checkpoint.step if checkpoint else 0
run.begin(step)
while run.attempt == 1:
    step += 1
    time.sleep(0.1)
    run.step_end(step, save)
run.finish(step, save)
"""
"""Trains in its first attempt; a save on the way out waits for the file `go`."""


def in_the_hour_that_comes_twice() -> str:
    """A time zone in which summer time has ended half an hour ago: what its clock shows, it has shown before."""
    now = datetime.fromtimestamp(time.time(), UTC)
    ended = datetime.fromtimestamp(time.time() + 1800, UTC)  # by the clock of summer time, an hour ahead
    first = (now.timetuple().tm_yday + 180) % 365 + 1
    return f"AAA0BBB,J{first}/0,J{ended.timetuple().tm_yday}/{ended:%H:%M:%S}"


def test_causes_and_what_follows(devcluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    start = ["sbatch", "--parsable", "--requeue", "-N1", "-c1", "-p", "low", "--chdir", str(tmp_path)]

    def submit(name: str, *flags: str, **env: str) -> tuple[str, RunProbe]:
        said = " ".join(f"{key}={value}" for key, value in env.items())
        command = f"exec env {said} srun {sys.executable} run.py {name}"
        job = devcluster.run(*start, *flags, "-o", f"{name}.log", "--wrap", command).strip()
        return job, RunProbe(tmp_path / name)

    jobs = {
        "requeued": submit("requeued", TZ=in_the_hour_that_comes_twice()),
        "held": submit("held"),
        "cancelled": submit("cancelled", "-t", "1", "--signal=USR1@50"),
    }
    for name in ("requeued", "held"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "go").touch()
    try:
        _seen(devcluster, jobs)
    finally:
        devcluster.cancel_all()


def _seen(devcluster: Cluster, jobs: dict[str, tuple[str, RunProbe]]) -> None:
    job, run = jobs["cancelled"]
    wait_for(lambda: run.events("signal"), "the signal before the time limit")
    devcluster.run("scancel", job)
    (run.path / "go").touch()
    wait_for(lambda: run.events("attempt_ended"), "the end of the save")
    assert run.causes() == ["cancelled"]

    held_job, held = jobs["held"]
    held.reach(2)
    devcluster.run("scontrol", "requeuehold", held_job)
    back_job, back = jobs["requeued"]
    back.reach(2)
    devcluster.run("scontrol", "requeue", back_job)
    for one in (held, back):
        wait_for(lambda one=one: one.events("requeued"), "the requeue")
        assert one.causes() == ["requeued"]
        assert one.events("requeued")[0]["by"] == "slurm"
        assert one.events("checkpoint")
    assert not held.events("requeued")[0]["hold_lifted"]

    wait_for(lambda: back.events("finished"), "the end")
    began = {e["attempt"]: e["time"] for e in back.events("attempt_started")}
    assert began[2] - back.events("requeued")[0]["time"] < 60  # by local time it would be an hour
    assert back.steps_repeated() == 0
    assert devcluster.job(held_job)["Reason"] == "job_requeued_in_held_state"
    devcluster.wait_for_state(job, "CANCELLED", 40)
    assert not run.events("requeued")


def test_what_stands_in_the_way_of_the_wrong_hour(devcluster: Cluster, tmp_path: Path) -> None:
    """The clock of the test above is indeed one by which local times are an hour off."""
    zone = in_the_hour_that_comes_twice()
    local = devcluster.run("env", f"TZ={zone}", "date", "+%Y-%m-%dT%H:%M:%S").strip()
    code = f"import datetime as d; print(d.datetime.fromisoformat('{local}').timestamp())"
    read = float(devcluster.run("env", f"TZ={zone}", sys.executable, "-c", code))
    assert abs(time.time() - read - 3600) < 30
