"""Leaving, with and without an agent: nothing of a run stays behind, nothing is cut short, nothing holds it up."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import psutil
import pytest

from ..conftest import SMOKE, Command, RunProbe, wait_for

Start = Callable[..., Command]
Probe = Callable[[str], RunProbe]

TWO = [*SMOKE, "parallel.ranks_per_node=2", "trainer.max_steps=100", "trainer.step_s=0.05"]
AGENT = [*TWO, "parallel.launch=accelerate", "run.name=r"]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of the uninterrupted run of two ranks, started without an agent."""
    directory = tmp_path_factory.mktemp("twin")
    command = Command(directory, "train", *SMOKE, "parallel.ranks_per_node=2", "trainer.max_steps=100", "run.name=twin")
    assert command.wait() == 0, command.output
    return RunProbe(directory / "runs" / "twin").weights()


def ranks_of(agent: psutil.Process) -> list[psutil.Process]:
    return sorted(agent.children(), key=lambda child: int(child.environ()["RANK"]))


def agent_log(run: RunProbe, attempt: int = 1) -> str:
    return (run.path / "logs" / f"attempt-{attempt:03d}.agent.log").read_text()


def test_an_agent_passes_every_signal_on_and_waits_for_the_save(outlast: Start, probe: Probe, twin: str) -> None:
    """torch's agent would end the ranks after the time given here, and leave them alone at the second signal."""
    command, run = outlast("train", *AGENT, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="0"), probe("r")
    run.reach(20)
    agent = command.ranks()[0]
    ranks = ranks_of(agent)
    for _ in range(10):
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2):
            if agent.is_running():
                agent.send_signal(number)
    run.reach(35, attempt=2)
    assert not any(process.is_running() for process in [agent, *ranks])
    ranks_of(command.ranks()[0])[1].send_signal(signal.SIGUSR1)  # one rank alone
    assert command.wait() == 0, command.output
    assert run.causes() == ["preempted", "preempted", "finished"]
    assert run.steps_repeated() == 0
    assert run.weights() == twin
    assert [f"rank {rank} ended with exit code 75" in agent_log(run) for rank in (0, 1)] == [True, True]


def test_a_signal_before_the_agent_of_a_single_rank_has_started_it_is_not_lost(outlast: Start, probe: Probe) -> None:
    arguments = [*SMOKE, "parallel.launch=accelerate", "run.name=r", "trainer.max_steps=20"]
    command, run = outlast("train", *arguments, forked=False), probe("r")
    wait_for(lambda: command.ranks(), "the agent's process")[0].send_signal(signal.SIGUSR1)
    assert command.wait() == 0, command.output
    assert run.causes() == ["preempted", "finished"]
    assert "rank 0 ended with exit code 75" in agent_log(run)


@pytest.mark.parametrize("killed", ["agent", "rank"])
def test_a_killed_agent_or_rank_ends_the_attempt_and_leaves_nothing_behind(
    outlast: Start, probe: Probe, twin: str, killed: str
) -> None:
    command, run = outlast("train", *AGENT), probe("r")
    run.reach(25)
    agent = command.ranks()[0]
    ranks = ranks_of(agent)
    (agent if killed == "agent" else ranks[1]).kill()
    wait_for(lambda: not any(process.is_running() for process in ranks), "the end of the ranks", 20)
    assert command.wait(60) == 1, command.output
    told = "the agent was killed by signal 9" if killed == "agent" else "rank 1 was killed by SIGKILL"
    assert told in command.output
    assert run.causes() == ["failed"]
    assert not agent.is_running()
    if killed == "agent":
        assert outlast("train", *AGENT).wait() == 0
        assert run.events("resumed")[0]["step"] == run.saved()
        assert run.weights() == twin


def test_ranks_of_a_killed_command_save_through_their_agent(outlast: Start, probe: Probe) -> None:
    command, run = outlast("train", *AGENT, forked=False), probe("r")
    run.reach(25)
    agent = command.ranks()[0]
    processes = [agent, *ranks_of(agent)]
    command.signal(signal.SIGKILL)
    command.wait()
    wait_for(lambda: not any(process.is_running() for process in processes), "the end of agent and ranks", 20)
    assert [e["kind"] for e in run.events("checkpoint")][-1] == "emergency"


LEAVES_ALONE = """
import os, sys, time
import torch
import torch.distributed as dist
from outlast.ranks.collectives import Collectives

dist.init_process_group("gloo")
collectives = Collectives()
collectives.barrier()
if collectives.rank == 1:
    sys.stdin.read()  # until the test has seen rank 0 leave
    os._exit(0)
dist.all_reduce(torch.zeros(1), group=collectives._side_group(), async_op=True)  # which rank 1 never joins
collectives.close()
os._exit(75)
"""


def test_leaving_is_not_held_up_by_a_peer_that_does_not_take_part() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", LEAVES_ALONE], env=env | {"RANK": str(rank)}, stdin=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        assert ranks[0].wait(60) == 75
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            assert rank.stdin is not None
            rank.stdin.close()
