"""Where a run listens while it trains, and that its preempted attempts meet again."""

import signal
from collections.abc import Callable

import psutil
import pytest

from ..conftest import SMOKE, Command, RunProbe

Start = Callable[..., Command]
Probe = Callable[[str], RunProbe]


@pytest.mark.parametrize("launch", ["srun", "accelerate"])
def test_a_run_on_one_machine_is_open_to_no_other(outlast: Start, probe: Probe, launch: str) -> None:
    """It listens on loopback alone, its note is gone when all have come, and the next attempt meets by a new one."""
    command, run = outlast("train", *SMOKE, f"parallel.launch={launch}", "parallel.ranks_per_node=2", "run.name=r",
                           "trainer.max_steps=400", "trainer.step_s=0.01"), probe("r")  # fmt: skip
    run.reach(25)
    processes = [psutil.Process(command.process.pid), *psutil.Process(command.process.pid).children(recursive=True)]
    listening = {c.laddr.ip for process in processes for c in process.net_connections() if c.status == "LISTEN"}
    assert listening == {"127.0.0.1"}
    assert len(processes) > 2
    assert not list(run.path.glob(".meeting*"))
    next(process for process in processes if process.environ().get("RANK") == "1").send_signal(signal.SIGUSR1)
    assert command.wait() == 0, command.output
    assert run.causes() == ["preempted", "finished"]
    assert run.steps_repeated() == 0
