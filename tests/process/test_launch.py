"""Several ranks from a script: signals reach all of them, none trains on alone, and none is waited for in vain."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from .. import forked
from ..conftest import RunProbe, is_alive, wait_for
from ..forked import Forked

SCRIPT = Path(__file__).with_name("user_script.py")
SLOW = """
import time
from transformers import TrainerCallback

class Slow(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        time.sleep(0.1)
"""
TORCHRUN = "import sys\nfrom torch.distributed.run import main\nmain(sys.argv[1:])\n"
FORKING = """
import multiprocessing, sys, torch.distributed as dist
import outlast

def rank(number):
    dist.init_process_group("gloo", init_method="file://" + sys.argv[1] + ".store", rank=number, world_size=2)

run = outlast.start(sys.argv[1])
multiprocessing.get_context("fork").Process(target=rank, args=(1,), daemon=True).start()
rank(0)
run.resume_point()
"""
Start = Callable[..., Forked]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The user's script, with steps that take a tenth of a second."""
    path = tmp_path / "slow.py"
    text = SCRIPT.read_text().replace("run.train(trainer)", "trainer.add_callback(Slow())\nrun.train(trainer)")
    path.write_text(SLOW + text)
    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Forked] = []

    def run(*arguments: str | Path) -> Forked:
        with open(tmp_path / "log", "ab") as log:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            started.append(Forked([sys.executable, *arguments], cwd=tmp_path, stdout=log, env=env))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


def ranks_of(process: Forked) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if "slow.py" in " ".join(child.cmdline())]


def test_signals_reach_all_ranks_and_the_exit_code_is_theirs(tmp_path: Path, script: Path, start: Start) -> None:
    """USR1, then Ctrl-C; the weights are those of a run left alone."""
    run, twin = RunProbe(tmp_path / "r"), RunProbe(tmp_path / "twin")
    for number, attempt in ((signal.SIGUSR1, 1), (signal.SIGINT, 2)):
        process = start("-m", "outlast.launch", "--ranks", "2", script, run.path, "30")
        run.reach(8 * attempt, attempt)
        ranks = ranks_of(process)
        process.send_signal(number)
        assert process.wait(60) == 75, (tmp_path / "log").read_text()
        assert not any(map(is_alive, ranks))
    for path in (run.path, twin.path):
        assert start("-m", "outlast.launch", "--ranks", "2", script, path, "30").wait(60) == 0
    assert [event["name"] for event in run.events("signal")] == ["USR1", "INT"]
    assert run.steps_repeated() == 0
    assert run.weights() == twin.weights()
    text = (tmp_path / "log").read_text()
    assert "torchrun" not in text
    assert text.count("attempt 1 on ") == 2


def test_ranks_of_a_torchrun_that_is_gone_save_and_leave(tmp_path: Path, script: Path, start: Start) -> None:
    """USR1 ends it at once: it knows no such signal."""
    (tmp_path / "torchrun.py").write_text(TORCHRUN)
    run = RunProbe(tmp_path / "r")
    process = start(tmp_path / "torchrun.py", "--standalone", "--nproc-per-node=2", script, run.path, "100000")
    run.reach(5)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == -signal.SIGUSR1
    wait_for(lambda: not any(map(is_alive, ranks)), "the end of the ranks", 60)
    assert run.events("attempt_ended")[-1]["step"] == run.events("checkpoint")[-1]["step"] >= 5
    assert "`python -m outlast.launch --ranks N SCRIPT ...` ends with 75" in (tmp_path / "log").read_text()


def test_a_rank_that_a_framework_starts_by_itself_is_refused(tmp_path: Path) -> None:
    """As Fabric and Lightning do: the script once more, which is told how many ranks there are."""
    env = {**os.environ, "WORLD_SIZE": "2", "LOCAL_RANK": "1", "NODE_RANK": "0"}
    done = forked.run([sys.executable, SCRIPT, tmp_path / "r", "5"], tmp_path, env=env)
    assert done.returncode == 2
    assert done.stderr.startswith("outlast: RANK: None is refused; valid: ranks that are started before the script")
    assert "python -m outlast.launch --ranks 2 SCRIPT" in done.stderr
    assert not (tmp_path / "r").exists()


def test_ranks_that_come_after_the_run_has_begun_are_refused(tmp_path: Path) -> None:
    (tmp_path / "forking.py").write_text(FORKING)
    done = forked.run([sys.executable, tmp_path / "forking.py", tmp_path / "r"], tmp_path)
    assert done.returncode == 2, done.stderr
    assert "outlast: world size: 2 is refused; the run has begun with 1; valid: " in done.stderr
