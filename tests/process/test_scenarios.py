"""Trainings of the kinds that people have, struck at random: exact in weights, evaluations and steps, or refused."""

import functools
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .. import forked
from ..conftest import RunProbe
from .scenarios import SCENARIOS

Right = Callable[[str], tuple[dict[str, Any], str]]

SCRIPT = Path(__file__).with_name("scenarios.py")
SEED = os.environ.get("OUTLAST_SEED") or str(random.SystemRandom().randrange(10**6))
"""Where the strikes are drawn from; set it to repeat a run of this test."""


def attempt(name: str, run: RunProbe, strike: str = "") -> tuple[int, str]:
    """Exit code and output of one attempt."""
    result = run.path.with_suffix(".json")
    done = forked.run([sys.executable, SCRIPT, name, run.path, result, strike], run.path.parent)
    return done.returncode, done.stdout + done.stderr


def found(run: RunProbe) -> dict[str, Any]:
    """What the script says, and the losses that the run has kept for its curve."""
    curve = json.loads((run.path / "losses.json").read_text())["losses"]
    return {**json.loads(run.path.with_suffix(".json").read_text()), "losses": curve}


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Right:
    """What comes of a scenario that is left alone, and its weights."""

    @functools.cache
    def left_alone(name: str) -> tuple[dict[str, Any], str]:
        run = RunProbe(tmp_path_factory.mktemp(name) / "alone")
        code, output = attempt(name, run)
        assert code == 0, output
        return found(run), run.weights()

    return left_alone


def check(run: RunProbe, right: tuple[dict[str, Any], str]) -> None:
    """Compare steps, evaluations, the best and weights."""
    got, wanted = found(run), dict(right[0])
    assert got | {"events": 0} == wanted | {"events": 0}
    assert run.weights() == right[1]


@pytest.mark.parametrize("name", [name for name in SCENARIOS if not name.startswith(("refused", "unsaved"))])
def test_struck_at_random_it_comes_back_exactly(tmp_path: Path, name: str, right: Right) -> None:
    if name.startswith("needs_"):  # `pip install galore-torch apollo-torch` runs them; they ask for a GPU's library
        pytest.importorskip(name.removeprefix("needs_"))
    run = RunProbe(tmp_path / "r")
    numbers, last = random.Random(f"{SEED} {name}"), right(name)[0]["events"] * 2 // 3
    for signal in ("USR1", numbers.choice(["TERM", "KILL"]), ""):
        strike = f"any:{numbers.randint(1, last)}:{signal}" if signal else ""
        print(f"OUTLAST_SEED={SEED} {name}: {strike or 'left alone'}")
        code, output = attempt(name, run, strike)
        if code == 0:
            break
        assert code == {"KILL": -9}.get(signal, 75), output
    assert code == 0, output
    check(run, right(name))


START, ASKS = "early_stopping_on_one_of_two_from_the_start", "a_callback_asks_for_everything"


@pytest.mark.parametrize(
    ("name", "strikes"),
    [
        pytest.param(START, ["on_train_end:1:KILL"], id="killed between the decision to stop and the end"),
        pytest.param(
            START, ["on_prediction_step:2:USR1", "on_prediction_step:4:TERM"], id="in the evaluation on start"
        ),
        pytest.param(START, ["on_prediction_step:9:USR1", "on_prediction_step:2:USR1"], id="in one made up for"),
        pytest.param(START, ["on_prediction_step:14:USR1"], id="after the first of two datasets"),
        pytest.param(ASKS, ["on_step_end:4:USR1", "on_step_end:1:USR1"], id="a step that ends its epoch early"),
        pytest.param(ASKS, ["on_prediction_step:7:USR1", "on_step_end:8:KILL"], id="evaluating after such a step"),
        pytest.param(ASKS, ["on_step_end:13:USR1"], id="a step with which a callback stops training"),
        pytest.param("grpo_buffered", ["on_step_end:5:USR1"], id="between two uses of what was generated"),
        pytest.param("a_subclass_with_state", ["on_save:1:KILL"], id="with the model in evaluation mode"),
        pytest.param("schedule_free_best", ["on_step_end:9:USR1"], id="a best whose evaluation came after its save"),
        pytest.param("rloo_buffered", ["on_substep_end:2:USR1:short"], id="in a step that is left"),
    ],
)
def test_decisions_do_not_die_with_the_process(tmp_path: Path, name: str, strikes: list[str], right: Right) -> None:
    run = RunProbe(tmp_path / "r")
    for strike in strikes:
        code, output = attempt(name, run, strike)
        assert code == (-9 if "KILL" in strike else 75), output
    code, output = attempt(name, run)
    assert code == 0, output
    check(run, right(name))


def test_a_stop_decided_while_leaving_holds(tmp_path: Path, right: Right) -> None:
    """The evaluation under way is finished, because there is time; it makes early stopping decide to stop."""
    run, batches = RunProbe(tmp_path / "r"), 5
    last = right(START)[0]["steps"] // 2 * batches + 1
    code, output = attempt(START, run, f"on_prediction_step:{last}:USR1:fits")
    assert code == 75, output
    assert run.events("attempt_ended")[-1]["step"] == right(START)[0]["steps"]
    code, output = attempt(START, run)
    assert code == 0, output
    check(run, right(START))


@pytest.mark.parametrize("name", ["sft_packed_lora", "schedule_free_best", "a_subclass_with_state"])
def test_of_a_finished_run_a_script_gets_what_it_got_then(tmp_path: Path, name: str) -> None:
    """The Trainer's state, what training returned, and the model: its evaluation is that of the best, or the last."""
    run = RunProbe(tmp_path / "r")
    code, output = attempt(name, run)
    assert code == 0, output
    then = found(run)
    code, output = attempt(name, run)
    assert code == 0, output
    assert found(run) | {"events": 0} == then | {"events": 0}


def test_a_schedule_free_optimizers_model_is_the_one_to_be_used(tmp_path: Path) -> None:
    """Not that of the last step, which lies between the average and the optimizer's own point."""
    run = RunProbe(tmp_path / "r")
    code, output = attempt("schedule_free", run)
    assert code == 0, output
    last = run.path / "checkpoints" / "checkpoint-9"
    state = torch.load(last / "optimizer.pt", weights_only=True)
    assert state["param_groups"][0]["train_mode"]
    trained, used = (load_file(path / "model.safetensors") for path in (last, run.path / "final"))
    average = trained["transformer.wte.weight"].lerp(state["state"][0]["z"], 1 - 1 / 0.9)
    assert torch.equal(used["transformer.wte.weight"], average)
    assert not torch.equal(used["transformer.wte.weight"], trained["transformer.wte.weight"])


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("refused")])
def test_what_can_not_come_back_exactly_is_refused_before_anything_is_saved(tmp_path: Path, name: str) -> None:
    run = RunProbe(tmp_path / "r")
    code, output = attempt(name, run)
    assert code != 0
    assert "is refused; valid: " in output, output
    assert run.events("attempt_ended")[-1]["refused"]
    assert not run.events("checkpoint")


def test_what_no_resume_could_read_is_refused_at_the_first_save(tmp_path: Path) -> None:
    run = RunProbe(tmp_path / "r")
    code, output = attempt("unsaved_objects_of_an_optimizer", run)
    assert code == 1
    assert "optimizer.pt: '__main__.Moments' is refused; a resume reads no code from a checkpoint" in output
    assert not run.events("checkpoint")


def test_a_save_that_would_always_fail_ends_the_run_at_the_first(tmp_path: Path) -> None:
    run = RunProbe(tmp_path / "r")
    code, output = attempt("unsaved_model", run)
    assert code == 1
    reason = "rank 0: the model is missing: the Trainer has written none of *.safetensors"
    assert f"this attempt's first checkpoint, of step 3, can't be written, nor could those after it: {reason}" in output
    assert [event["step"] for event in run.events("checkpoint_failed")] == [3]
    assert run.events("attempt_ended")[-1]["refused"]
