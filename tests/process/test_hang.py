"""Ranks that are killed, or stopped, in training and while the run leaves; and ranks that run unlike each other."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..conftest import SMOKE, Command, RunProbe, wait_for
from ..forked import Forked

pytestmark = pytest.mark.alone

Start = Callable[..., Command]
Probe = Callable[[str], RunProbe]

SCRIPT = Path(__file__).with_name("user_script.py")
LONG = ["run.name=r", "trainer.max_steps=150", "trainer.step_s=0.05", "parallel.ranks_per_node=2"]


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_rank_stopped_in_the_grace_window_is_left_behind(outlast: Start, probe: Probe, stuck: int) -> None:
    command, run = outlast("train", *SMOKE, *LONG, "preemption.lead_s=6"), probe("r")
    run.reach(25)
    ranks = command.ranks()
    ranks[stuck].suspend()
    began = time.time()
    ranks[1 - stuck].send_signal(signal.SIGTERM)
    run.reach(45, attempt=2)
    assert not any(rank.is_running() for rank in ranks)
    command.signal(signal.SIGTERM)
    assert command.wait(60) == 75, command.output
    assert run.causes() == ["preempted", "preempted"]
    assert [e["name"] for e in run.events("signal")] == ["TERM", "TERM"]
    (straggler,) = run.events("straggler")
    assert (straggler["rank"], straggler["host"], straggler["how"]) == (stuck, socket.gethostname(), "silent")
    assert straggler["seconds"] >= 3
    first = run.events("attempt_ended")[0]
    assert f"rank {stuck} on {socket.gethostname()} has given no sign of life for" in first["detail"]
    assert first["time"] - began < 6
    assert run.events("resumed")[0]["step"] == run.saved()
    assert not (run.path / "checkpoints" / ".staging").exists()


def test_one_rank_signalled_in_start_up_is_enough(outlast: Start, probe: Probe) -> None:
    """Rank 0 would leave by itself; another can't yet tell the others, and must not wait for an answer."""
    command, run = outlast("train", *SMOKE, *LONG, forked=False), probe("r")
    wait_for(lambda: run.events("attempt_started"), "the start")
    command.ranks()[1].send_signal(signal.SIGUSR1)
    assert command.wait(90) == 0, command.output
    assert run.causes() == ["preempted", "finished"]


def test_a_rank_stopped_in_training_ends_the_attempt(outlast: Start, probe: Probe) -> None:
    command, run = outlast("train", *SMOKE, *LONG, "preemption.hang_s=3"), probe("r")
    run.reach(25)
    command.ranks()[1].suspend()
    assert command.wait(60) == 1, command.output
    (ended,) = run.events("attempt_ended")
    assert (ended["cause"], ended["rank"]) == ("failed", 1)
    assert "has given no sign of life for 3 s" in ended["detail"]
    assert [e["rank"] for e in run.events("straggler")] == [1]
    assert "rank 1" in command.output


def test_a_job_that_was_suspended_goes_on(outlast: Start, probe: Probe) -> None:
    command, run = outlast("train", *SMOKE, *LONG, "preemption.hang_s=2"), probe("r")
    run.reach(25)
    ranks = command.ranks()
    for rank in ranks:
        rank.suspend()
    stopped = time.monotonic()
    wait_for(lambda: time.monotonic() - stopped > 3, "longer than preemption.hang_s")
    for rank in ranks:
        rank.resume()
    assert command.wait(60) == 0, command.output
    assert run.causes() == ["finished"]


@contextmanager
def started(script: Path, world_size: int, *arguments: str) -> Iterator[list[Forked]]:
    """A script's ranks, under no launcher; ended with the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks: list[Forked] = []
    try:
        for number in range(world_size):
            env = {**os.environ, **address, "WORLD_SIZE": str(world_size), "RANK": str(number)}
            ranks.append(Forked([sys.executable, script, *arguments], env=env))
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_under_no_launcher_is_noticed_by_the_others(probe: Probe, killed: int) -> None:
    run = probe("r")
    run.path.parent.mkdir()
    with started(SCRIPT, 2, str(run.path), "100000") as ranks:
        run.reach(15)
        ranks[killed].kill()
        began = time.monotonic()
        assert ranks[1 - killed].wait(30) == 1
        print("killed to left, s:", time.monotonic() - began)
        assert time.monotonic() - began < 10
    (ended,) = run.events("attempt_ended")
    assert (ended["attempt"], ended["cause"], ended["rank"]) == (1, "failed", killed)
    assert ended["detail"] == f"rank {killed} on {socket.gethostname()} is gone"
    assert [(e["attempt"], e["rank"], e["how"]) for e in run.events("straggler")] == [(1, killed, "gone")]


def test_a_rank_that_is_late_in_a_save_is_named(probe: Probe, tmp_path: Path) -> None:
    run, script = probe("r"), tmp_path / "late.py"
    run.path.parent.mkdir()
    script.write_text(LATE)
    with started(script, 3, str(run.path)) as ranks:
        assert [rank.wait(60) for rank in ranks] == [0, 0, 0]
    (straggler,) = run.events("straggler")
    assert (straggler["rank"], straggler["how"]) == (2, "late")
    assert 2 <= straggler["seconds"] < 10
    assert run.causes() == ["finished"]


LATE = """
import sys, time
import torch.distributed as dist
import outlast

run = outlast.start(sys.argv[1], every=3)
dist.init_process_group("gloo")
run.resume_point()
run.begin(0)

def save(directory):
    (directory / f"rank-{run.rank}").write_text("x")
    if run.rank == 2:
        time.sleep(4)

for step in range(1, 5):
    run.step_end(step, save)
run.finish(4)
"""


def test_ranks_that_are_far_apart_stop_at_the_same_poll(tmp_path: Path) -> None:
    """Nothing keeps the ranks of an evaluation together: here one polls twenty times as often as another."""
    script = tmp_path / "apart.py"
    script.write_text(APART)
    with started(script, 3, str(tmp_path)) as ranks:
        assert [rank.wait(60) for rank in ranks] == [0, 0, 0]
    said = [(tmp_path / f"rank-{rank}").read_text().split() for rank in range(3)]
    assert said[0] == said[1] == said[2]
    assert said[0][0] == "save"
    assert said[0][2] in ("TERM", "USR1")
    assert len(said[0]) == 4


APART = """
import os, sys, time
import torch.distributed as dist
from outlast.ranks.agreement import StepAgreement
from outlast.ranks.channel import ControlChannel
from outlast.ranks.collectives import Collectives

sys.stdout = open(f"{sys.argv[1]}/rank-{os.environ['RANK']}", "w")
dist.init_process_group("gloo")
collectives = Collectives()
channel = ControlChannel(collectives.rank, collectives.world_size)
agreement = StepAgreement(channel, lambda name: None)
channel.connect(collectives, agreement.receive, lambda seconds: None)
saved_at = 1_000_000
pause = (0.001, 0.005, 0.02)[collectives.rank]
while True:
    time.sleep(pause)
    if collectives.rank == 0 and agreement.polls == 20:
        agreement.ask("save")
    if collectives.rank == 1 and agreement.polls == saved_at + 10:
        agreement.ask("TERM")
    if collectives.rank == 2 and agreement.polls == saved_at + 2:
        agreement.ask("USR1")
    found = agreement.poll(0)
    if found == "save":
        saved_at = agreement.polls
    if found:
        print(found, agreement.polls, flush=True)
    if found not in ("", "save"):
        break
collectives.barrier()
channel.close()
os._exit(0)
"""
