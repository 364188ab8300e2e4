"""A loss that says that training is lost stops the run before that is saved; the newest checkpoint is from before."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from outlast.checkpoint.manifest import verify

from .. import forked
from ..conftest import OUTLAST, RunProbe

SCRIPT = Path(__file__).with_name("diverging_script.py")


def train(run: RunProbe, how: str, kind: str) -> "subprocess.CompletedProcess[str]":
    return forked.run([sys.executable, SCRIPT, run.path, how, kind], run.path.parent)


def newest(run: RunProbe) -> Path:
    return max((run.path / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("nan", "trainer"),
        ("nan", "loop"),
        ("spike", "trainer"),
        ("last", "trainer"),
        ("signalled", "trainer"),
    ],
)
def test_a_lost_run_stops_within_the_step(tmp_path: Path, how: str, kind: str) -> None:
    """At step 30, at which a checkpoint is due: none of it is sealed, and the run is not tried again."""
    run = RunProbe(tmp_path / "r")
    done = train(run, how, kind)
    assert done.returncode == 1, done.stderr
    shown = "1" if how == "spike" else "nan"
    assert f"outlast: at step 30 the loss is {shown}" in done.stderr
    assert "Traceback" not in done.stderr
    (ended,) = run.events("attempt_ended")
    assert (ended["cause"], ended["step"], ended["refused"]) == ("failed", 30, True)
    assert "DivergedError: at step 30 the loss is" in ended["error"]
    assert newest(run).name == "checkpoint-24"
    verify(newest(run))
    weights = (
        load_file(newest(run) / "model.safetensors") if kind == "trainer" else torch.load(newest(run) / "model.pt")
    )
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert not (run.path / "final").exists()
    report = forked.run([OUTLAST, "report", "r", "--root", tmp_path], tmp_path).stdout
    assert f"at step 30 the loss is {shown}" in " ".join(report.split())
    again = train(run, how, kind)  # it resumes from the good one, and ends alike
    assert again.returncode == 1
    assert [event["step"] for event in run.events("resumed")] == [24]
    assert newest(run).name == "checkpoint-24"


@pytest.mark.parametrize(
    ("how", "kind", "warned"),
    [
        ("reported", "trainer", True),
        ("mild", "trainer", False),
        ("eval", "trainer", True),
        ("unlabelled", "trainer", True),
        ("unlabelled", "loop", True),
    ],
)
def test_what_is_no_reason_to_stop(tmp_path: Path, how: str, kind: str, warned: bool) -> None:
    """`guard.action=report`, a loss below the spike, an evaluation's loss, a batch without a label."""
    run = RunProbe(tmp_path / "r")
    done = train(run, how, kind)
    assert done.returncode == 0, done.stderr
    assert bool(run.events("not_finite")) == warned
    assert not run.events("spike")
    assert ("weights are finite numbers, so training goes on" in done.stdout) == (how == "unlabelled")


@pytest.mark.parametrize("how", ["nan", "late"])
def test_all_ranks_agree(tmp_path: Path, how: str) -> None:
    """One of two sees it: the other stops with it, says why, and the checkpoint of that step is none."""
    run = RunProbe(tmp_path / "r")
    command = [sys.executable, "-m", "outlast.launch", "--ranks", "2", SCRIPT, run.path, how, "trainer"]
    done = forked.run(command, tmp_path, limit_s=150)
    assert done.returncode == 1, done.stdout + done.stderr
    (ended,) = run.events("attempt_ended")
    assert (ended["cause"], ended["refused"]) == ("failed", True)
    assert ended["step"] in (30, 31)
    assert "DivergedError: at step 30 the loss is nan, and so are weights, on rank 1: training" in ended["error"]
    assert newest(run).name == "checkpoint-24"
