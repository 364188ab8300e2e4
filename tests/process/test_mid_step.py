"""Leaving in the middle of a step that accumulates gradients; finishing it, or an evaluation, where there is time."""

import os
import sys
from pathlib import Path

import pytest

from .. import forked
from ..conftest import RunProbe

SCRIPT = Path(__file__).with_name("user_script.py")
STOP_AT = """
import os, signal
from transformers import TrainerCallback

class StopAt(TrainerCallback):
    # signals itself in one micro-batch of one step, or one batch of an evaluation, before outlast polls there
    def on_step_begin(self, *_, **__):
        self.micro = 0

    def on_substep_end(self, args, state, control, **_):
        self.micro += 1
        if [state.global_step + 1, self.micro] == STOP:
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_prediction_step(self, args, state, control, **_):
        if [state.global_step, "evaluation"] == STOP:
            os.kill(os.getpid(), signal.SIGUSR1)

"""


def train(directory: Path, stop: list[object] | None = None, fits: bool | None = None) -> tuple[int, str]:
    """Runs the user's script, of five steps an epoch and four micro-batches a step.

    Args:
        stop: [step, micro-batch], or [step, "evaluation"], in which it signals itself.
        fits: what the clock says of the time that is left; None: as it is without Slurm, not known.
    """
    text = SCRIPT.read_text().replace("    max_steps=", "    gradient_accumulation_steps=4,\n    max_steps=")
    run = "trainer.add_callback(StopAt())\n" if stop else ""
    if fits is not None:
        run += f"run.steps.time_for = lambda work, count: asked.append((work, count)) or {fits}\n"
    text = f"STOP, asked = {stop}, []\n{STOP_AT}\n{text.replace('run.train(', f'{run}run.train(')}"
    script = directory.with_suffix(".py")
    script.write_text(text)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = forked.run([sys.executable, script, directory, "12"], directory.parent, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> RunProbe:
    directory = tmp_path_factory.mktemp("mid-step") / "twin"
    code, output = train(directory)
    assert code == 0, output
    return RunProbe(directory)


def losses(run: RunProbe) -> list[tuple[int, float]]:
    return [(e["step"], e["metrics"]["eval_loss"]) for e in run.events("evaluated")]


def test_a_step_without_time_to_finish_it_is_left_and_made_again(tmp_path: Path, twin: RunProbe) -> None:
    """In the first step, in mid-epoch, in an epoch's first step, and in one whose predecessor is sealed already."""
    stops: list[list[object]] = [[1, 2], [3, 3], [6, 1], [11, 3]]
    run = RunProbe(tmp_path / "r")
    for step, micro in stops:
        code, output = train(run.path, [step, micro], fits=False)
        assert code == 75, output
        assert f"no time to finish step {step}: its {micro} micro-batches will be made again" in output
    code, output = train(run.path)
    assert code == 0, output
    assert [[e["step"], e["micro_batches"]] for e in run.events("step_cut")] == stops
    assert [e["step"] for e in run.events("resumed")] == [2, 5, 10]
    assert losses(run) == losses(twin)
    assert run.weights() == twin.weights()


@pytest.mark.parametrize("fits", [True, None], ids=["in time", "not known"])
def test_a_step_is_finished_first_where_nothing_speaks_against_it(
    tmp_path: Path, twin: RunProbe, fits: bool | None
) -> None:
    run = RunProbe(tmp_path / "r")
    code, output = train(run.path, [3, 1], fits)
    assert code == 75, output
    assert run.events("attempt_ended")[-1]["step"] == 3
    assert not run.events("step_cut")


def test_an_evaluation_is_finished_first_if_there_is_time(tmp_path: Path, twin: RunProbe) -> None:
    run = RunProbe(tmp_path / "r")
    code, output = train(run.path, [5, "evaluation"], fits=True)
    assert code == 75, output
    assert [e["step"] for e in run.events("evaluated")] == [5]
    code, output = train(run.path)
    assert code == 0, output
    assert "making up" not in output
    assert [e["step"] for e in run.events("resumed")] == [5]
    assert losses(run) == losses(twin)
    assert run.weights() == twin.weights()
