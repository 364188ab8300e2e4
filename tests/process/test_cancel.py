"""`outlast cancel` and `outlast resume` of runs on this machine: real processes, real signals."""

import json
from collections.abc import Callable

from ..conftest import SMOKE, Command, RunProbe, wait_for

Start = Callable[..., Command]
Probe = Callable[[str], RunProbe]
STEPS = ["trainer.max_steps=200", "trainer.step_s=0.05"]  # longer than a few commands take to start


def state(outlast: Start, name: str) -> str:
    command = outlast("status", "--json", name)
    assert command.wait() == 0, command.output
    return str(json.loads(command.output)[0]["state"])


def test_a_run_is_cancelled_and_resumed(outlast: Start, probe: Probe) -> None:
    command, run = outlast("train", *SMOKE, *STEPS, "run.name=r"), probe("r")
    run.reach(7)
    cancel = outlast("cancel", "r")
    assert cancel.wait() == 0, cancel.output
    assert f"r has stopped (pid {command.process.pid})" in cancel.output
    assert command.wait() == 75, command.output
    assert state(outlast, "r") == "cancelled"
    assert not run.events("requeued")
    again = outlast("cancel", "r")
    assert again.wait() == 0
    assert "r was cancelled before" in again.output

    resume = outlast("resume", "r", "checkpoint.every=100")
    assert resume.wait() == 0, resume.output
    assert run.steps_repeated() == 0
    assert [e["step"] for e in run.events("checkpoint") if e["attempt"] == 2 and e["kind"] == "periodic"] == [100, 200]
    assert state(outlast, "r") == "finished"
    late = outlast("cancel", "r")
    assert late.wait() == 0
    assert "r has finished already" in late.output


def test_all_is_not_by_accident(outlast: Start, probe: Probe) -> None:
    command, run = outlast("train", *SMOKE, *STEPS, "run.name=r"), probe("r")
    run.reach(3)
    nothing = outlast("cancel")
    assert nothing.wait() == 2
    assert "--all for every run" in nothing.output
    asked = outlast("cancel", "--all")
    assert asked.wait() == 2
    assert "nobody is there to be asked; valid: --all --yes" in asked.output
    run.reach(run.progress()["step"] + 1)
    every = outlast("cancel", "--all", "--yes")
    assert every.wait() == 0, every.output
    assert command.wait() == 75
    assert "nothing to cancel" in (over := outlast("cancel", "--all", "--yes")).output or over.wait() == 0


def test_one_cell_of_a_local_sweep(outlast: Start, probe: Probe) -> None:
    command = outlast(
        "train",
        "-m",
        *SMOKE,
        *STEPS,
        "trainer.max_steps=100",
        "run.name=s",
        "seed=1,2,3",
        "cluster.parallel_cells=2",
    )
    first = probe("s/seed=1")
    first.reach(5)
    cancel = outlast("cancel", "s/seed=1", "s/seed=3")
    assert cancel.wait() == 0, cancel.output
    wait_for(lambda: first.events("attempt_ended"), "the cell's end")
    command.wait()
    assert [state(outlast, f"s/seed={seed}") for seed in (1, 2, 3)] == ["cancelled", "finished", "cancelled"]
    resume = outlast("resume", "s")
    assert resume.wait() == 0, resume.output
    assert {state(outlast, f"s/seed={seed}") for seed in (1, 2, 3)} == {"finished"}
    assert first.steps_repeated() == 0
