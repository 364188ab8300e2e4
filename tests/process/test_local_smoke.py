"""`cluster=local` with the smoke job: real processes, real signals, one and two ranks."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ..conftest import SMOKE, Command, RunProbe, is_alive, wait_for

Start = Callable[..., Command]
Probe = Callable[[str], RunProbe]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Weights of the uninterrupted run of 80 steps, by world size."""
    directory = tmp_path_factory.mktemp("twins")
    weights = {}
    for ranks in (1, 2):
        command = Command(
            directory,
            "train",
            *SMOKE,
            f"run.name=twin{ranks}",
            f"parallel.ranks_per_node={ranks}",
            "trainer.max_steps=80",
        )
        assert command.wait() == 0, command.output
        weights[ranks] = RunProbe(directory / "runs" / f"twin{ranks}").weights()
    return weights


def steps(ranks: int) -> list[str]:
    # step_s makes the run long enough to be met in mid-step; it is the one difference from the twins
    return ["trainer.max_steps=80", "trainer.step_s=0.05", f"parallel.ranks_per_node={ranks}"]


def test_usr1_to_the_command_is_a_preemption(outlast: Start, probe: Probe, twins: dict[int, str]) -> None:
    command, run = outlast("train", *SMOKE, *steps(1), "run.name=r", forked=False), probe("r")
    run.reach(7)
    command.signal(signal.SIGUSR1)
    run.reach(30, attempt=2)
    command.signal(signal.SIGUSR1)
    assert command.wait() == 0, command.output
    assert run.weights() == twins[1]
    assert run.causes() == ["preempted", "preempted", "finished"]
    assert len(run.events("requeued")) == 2
    assert run.steps_repeated() == 0
    assert [e["kind"] for e in run.events("checkpoint")].count("emergency") == 2


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGTERM"])
def test_one_rank_alone_is_signalled(outlast: Start, probe: Probe, twins: dict[int, str], name: str) -> None:
    command, run = outlast("train", *SMOKE, *steps(2), "run.name=r"), probe("r")
    run.reach(25)
    command.ranks()[1].send_signal(signal.Signals[name])
    assert command.wait() == 0, command.output
    assert run.weights() == twins[2]
    assert run.causes() == ["preempted", "finished"]
    assert run.events("signal")[0]["name"] == name.removeprefix("SIG")
    emergency = next(e for e in run.events("checkpoint") if e["kind"] == "emergency")
    assert emergency["step"] == run.events("resumed")[0]["step"]
    manifest = (run.path / "checkpoints" / f"checkpoint-{emergency['step']}" / "manifest.json").read_text()
    assert "random_states_0.pkl" in manifest
    assert "random_states_1.pkl" in manifest


def test_more_signals_change_nothing(outlast: Start, probe: Probe, twins: dict[int, str]) -> None:
    command, run = outlast("train", *SMOKE, *steps(2), "run.name=r"), probe("r")
    run.reach(10)
    ranks = command.ranks()
    for _ in range(20):
        for rank in ranks:
            if rank.is_running():
                rank.send_signal(signal.SIGUSR1)
    assert command.wait() == 0, command.output
    assert len(run.events("signal")) == 1
    assert len(run.events("requeued")) == 1
    assert run.weights() == twins[2]


def test_a_signal_in_start_up_requeues_without_a_save(outlast: Start, probe: Probe, twins: dict[int, str]) -> None:
    command, run = outlast("train", *SMOKE, *steps(2), "run.name=r", forked=False), probe("r")
    wait_for(lambda: run.events("attempt_started"), "the first attempt")
    began = time.monotonic()
    command.signal(signal.SIGUSR1)
    wait_for(lambda: run.events("requeued"), "the requeue", 20)
    assert time.monotonic() - began < 20
    assert command.wait() == 0, command.output
    assert run.causes() == ["preempted", "finished"]
    assert not [e for e in run.events("checkpoint") if e["kind"] == "emergency"]
    assert run.weights() == twins[2]


def test_a_signal_before_the_guard_is_in_place_is_not_lost(outlast: Start, probe: Probe) -> None:
    command, run = outlast("train", *SMOKE, *steps(1), "run.name=r", forked=False), probe("r")
    rank = wait_for(lambda: command.ranks(), "the rank's process")[0]
    rank.send_signal(signal.SIGUSR1)
    assert command.wait() == 0, command.output
    assert run.causes() == ["preempted", "finished"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_stopping_the_command_saves_and_the_same_command_resumes(
    outlast: Start, probe: Probe, twins: dict[int, str], name: str
) -> None:
    command, run = outlast("train", *SMOKE, *steps(1), "run.name=r"), probe("r")
    run.reach(33)
    command.signal(signal.Signals[name])
    assert command.wait() == 75, command.output
    assert "The same command again resumes" in command.output
    assert not run.events("requeued")
    again = outlast("train", *SMOKE, *steps(1), "run.name=r")
    assert again.wait() == 0, again.output
    assert run.events("resumed")[0]["step"] == run.events("attempt_ended")[0]["step"] >= 33
    assert run.weights() == twins[1]


def test_a_run_that_is_moved_in_mid_run_is_not_called_saved(
    outlast: Start, probe: Probe, twins: dict[int, str]
) -> None:
    command, run = outlast("train", *SMOKE, *steps(1), "run.name=r"), probe("r")
    run.reach(23)
    moved = run.path.rename(run.path.with_name("moved"))
    command.signal(signal.SIGTERM)
    assert command.wait() == 1, command.output
    assert f"{run.path} was moved or deleted meanwhile: nothing more was saved in it" in command.output
    assert not run.path.exists()
    moved.rename(run.path)
    again = outlast("train", *SMOKE, *steps(1), "run.name=r")
    assert again.wait() == 0, again.output
    assert run.events("resumed")[0]["step"] == 20
    assert run.weights() == twins[1]


def test_deleted_checkpoints_cost_only_what_was_in_them(outlast: Start, probe: Probe, twins: dict[int, str]) -> None:
    command, run = outlast("train", *SMOKE, *steps(1), "run.name=r"), probe("r")
    run.reach(23)
    shutil.rmtree(run.path / "checkpoints")  # as a scratch file system's cleaner does
    wait_for(lambda: run.events("checkpoint")[-1]["step"] == 40, "the next periodic save")
    command.signal(signal.SIGTERM)
    assert command.wait() == 75, command.output
    shutil.rmtree(run.path / "checkpoints")
    again = outlast("train", *SMOKE, *steps(1), "run.name=r")
    assert again.wait() == 1, again.output
    assert "checkpoint.allow=[restart]" in run.path.joinpath("logs", "attempt-002.rank-0.log").read_text()
    assert "resumes from step" not in again.output, "there is nothing to resume from"
    again = outlast("train", *SMOKE, *steps(1), "run.name=r", "checkpoint.allow=[restart]")
    assert again.wait() == 0, again.output
    assert run.weights() == twins[1]


def test_sigkill_of_everything_resumes_from_the_newest_sealed_checkpoint(
    outlast: Start, probe: Probe, twins: dict[int, str]
) -> None:
    command, run = outlast("train", *SMOKE, *steps(2), "run.name=r"), probe("r")
    run.reach(45)
    for process in [*command.ranks(), psutil.Process(command.process.pid)]:
        process.kill()
    command.wait()
    assert outlast("train", *SMOKE, *steps(2), "run.name=r").wait() == 0
    assert run.events("resumed")[0]["step"] == run.saved() >= 40
    assert run.causes() == ["failed", "finished"]
    assert run.weights() == twins[2]


def test_ranks_of_a_killed_command_save_and_the_next_command_waits_for_them(
    outlast: Start, probe: Probe, twins: dict[int, str]
) -> None:
    command, run = outlast("train", *SMOKE, *steps(2), "run.name=r"), probe("r")
    run.reach(45)
    ranks = command.ranks()
    command.signal(signal.SIGKILL)
    command.wait()
    again = outlast("train", *SMOKE, *steps(2), "run.name=r")
    assert again.wait() == 0, again.output
    assert not any(is_alive(rank) for rank in ranks)
    assert run.steps_repeated() == 0
    assert run.weights() == twins[2]


def test_a_killed_rank_ends_the_attempt_and_leaves_nothing_behind(outlast: Start, probe: Probe) -> None:
    command, run = outlast("train", *SMOKE, *steps(2), "run.name=r"), probe("r")
    run.reach(25)
    ranks = command.ranks()
    ranks[1].kill()
    assert command.wait(60) == 1, command.output
    assert "rank 1 was killed by signal 9" in command.output
    assert run.causes() == ["failed"]
    assert not any(rank.is_running() for rank in ranks)


def test_two_at_once_on_one_run_directory(outlast: Start, probe: Probe) -> None:
    arguments = [*SMOKE, *steps(1), "trainer.max_steps=400", "run.name=r"]
    first, run = outlast("train", *arguments), probe("r")
    run.reach(1)
    second = outlast("train", *arguments)
    assert second.wait(60) == 2
    assert "in use by outlast train" in second.output
    assert "Traceback" not in second.output
    first.signal(signal.SIGTERM)
    assert first.wait() == 75


def test_a_finished_run_says_so(outlast: Start, probe: Probe) -> None:
    arguments = ("train", *SMOKE, "run.name=r", "trainer.max_steps=5")
    assert outlast(*arguments).wait() == 0
    again = outlast(*arguments)
    assert again.wait() == 0
    assert "has finished already, at step 5" in again.output
    assert len(probe("r").events("attempt_started")) == 1


def test_another_configuration_is_refused_for_the_same_run(outlast: Start) -> None:
    assert outlast("train", *SMOKE, "run.name=r", "trainer.max_steps=5").wait() == 0
    other = outlast("train", *SMOKE, "run.name=r", "trainer.max_steps=6")
    assert other.wait() == 2
    assert "trainer.max_steps is 6, the run was made with 5" in other.output


def test_too_many_preemptions_give_up(outlast: Start, probe: Probe) -> None:
    arguments = [*SMOKE, "trainer.max_steps=2000", "trainer.step_s=0.05", "preemption.max_requeues=2", "run.name=r"]
    command, run = outlast("train", *arguments), probe("r")
    for attempt in range(1, 4):
        wait_for(lambda a=attempt: len(run.events("attempt_started")) >= a, f"attempt {attempt}")
        command.signal(signal.SIGUSR1)
    assert command.wait() == 93, command.output
    assert run.events("gave_up")[0]["reason"] == "2 requeues; preemption.max_requeues is 2"


def test_the_run_directory_is_what_the_contract_says(outlast: Start, probe: Probe, tmp_path: Path) -> None:
    assert outlast("train", *SMOKE, "run.name=r", "trainer.max_steps=25").wait() == 0
    run = probe("r").path
    assert {p.name for p in run.iterdir() if not p.name.startswith(".")} == {
        "config.yaml", "plan.json", "ledger.jsonl", "progress.json", "losses.json", "checkpoints", "final", "logs",
    }  # fmt: skip
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["checkpoint-20", "checkpoint-25"]
    assert (run / "logs" / "attempt-001.rank-0.log").is_file()
