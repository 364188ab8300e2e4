"""A script goes on after training: what follows is done, also when it was interrupted, and with the same numbers."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .. import forked
from ..conftest import RunProbe

SCRIPT = Path(__file__).with_name("phases_script.py")


def attempt(runs: Path, strike: str = "", variant: str = "") -> tuple[int, str]:
    done = forked.run([sys.executable, SCRIPT, runs, strike, variant], runs.parent)
    return done.returncode, done.stdout + done.stderr


def found(runs: Path) -> dict[str, Any]:
    return {**json.loads((runs / "found.json").read_text()), "run": None}


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("twin") / "runs"
    code, output = attempt(runs)
    assert code == 0, output
    return runs


@pytest.mark.parametrize("strikes", [["a:3", "between", "b:5", "after"], ["b:12"]], ids=["everywhere", "last step"])
def test_interrupted_anywhere_it_ends_alike(tmp_path: Path, twin: Path, strikes: list[str]) -> None:
    """In the first run, between the two, in the second, and after it."""
    runs = tmp_path / "runs"
    for strike in strikes:
        code, output = attempt(runs, strike)
        assert code == 75, output
    code, output = attempt(runs)
    assert code == 0, output
    assert found(runs) == found(twin)
    assert RunProbe(runs / "a").weights() == RunProbe(twin / "a").weights()
    assert RunProbe(runs / "a").causes()[-1] == RunProbe(runs / "b").causes()[-1] == "finished"


def test_again_it_trains_nothing_and_does_what_follows(twin: Path) -> None:
    before, ledgers = found(twin), [(twin / name / "ledger.jsonl").read_text() for name in "ab"]
    (twin / "found.json").unlink()
    code, output = attempt(twin)
    assert code == 0, output
    assert found(twin) == before
    assert [(twin / name / "ledger.jsonl").read_text() for name in "ab"] == ledgers
    assert "a has finished already, at step 5" in output


@pytest.mark.parametrize(
    ("variant", "code", "said"),
    [
        ("again", 1, "a has been trained by this script already"),
        ("same directory", 2, "valid: a directory of its own for each run of a script"),
        ("other data", 2, "as another run than this: dataset is "),
        ("longer", 2, "it is to train 8 steps, it has trained 5 steps. To train on, give it a directory of its own"),
        ("more epochs", 2, "run.epochs: '3 epochs' is refused; valid: 2 epochs"),
    ],
)
def test_a_phase_that_would_be_left_out_is_refused(twin: Path, variant: str, code: int, said: str) -> None:
    got, output = attempt(twin, variant=variant)
    assert got == code, output
    assert said in output
    assert "Traceback" not in output


FINISHED = """
import os, signal, sys, torch, outlast
run = outlast.start(sys.argv[1])
assert run.finished == 5
run.check_budget("a cache", 1)
try:
    torch.load(run.final / "planted.bin", weights_only=False)
except Exception as error:
    print("not read:", type(error).__name__)
os.kill(os.getpid(), signal.SIGTERM)
print("went on")
"""


def test_a_script_that_only_asks_whether_it_has_finished(tmp_path: Path, twin: Path) -> None:
    """It is ended by a signal, as any process that has nothing to save; what is loaded executes nothing there, too."""
    runs, script = tmp_path / "runs", tmp_path / "asks.py"
    shutil.copytree(twin, runs)
    torch.save({"a": Path("/")}, runs / "a/final/planted.bin")
    script.write_text(FINISHED)
    done = forked.run([sys.executable, script, runs / "a"], tmp_path)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "not read: UnpicklingError" in done.stdout
    assert "went on" not in done.stdout


def test_a_damaged_model_is_not_handed_on(tmp_path: Path, twin: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(twin, runs)
    (model,) = (runs / "a" / "final").glob("*.safetensors")
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    code, output = attempt(runs)
    assert code == 1, output
    assert f"{runs / 'a' / 'final'} is not what was saved: {model.name} differs from what was written" in output


def test_a_loop_that_ended_early_trains_no_further(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for _ in range(2):
        code, output = attempt(runs, variant="ends early")
        assert code == 0, output
    assert json.loads((runs / "found.json").read_text())["run"] == 6
    assert RunProbe(runs / "b").events("finished")[0]["step"] == 6


def test_without_the_last_checkpoint_a_loop_says_so_and_leaves(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert attempt(runs)[0] == 0
    (runs / "found.json").unlink()
    for path in (runs / "b" / "checkpoints").glob("checkpoint-12/*"):
        path.unlink()
    code, output = attempt(runs)
    assert code == 0, output
    assert "checkpoint-12 is not there, so that this loop has nothing to go on with" in output
    assert not (runs / "found.json").exists()
