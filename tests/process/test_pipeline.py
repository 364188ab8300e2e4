"""State that is in no checkpoint of the Trainer, and places in the data that the step does not tell."""

import os
import sys
from pathlib import Path

import pytest

from outlast.checkpoint.manifest import read_manifest

from .. import forked
from ..conftest import RunProbe

SCRIPT = Path(__file__).with_name("pipeline_script.py")
KINDS = (
    *(
        "own,model,closure,parts",
        "own,workers,accumulate",
        "weighted,workers",
        "loader",
        "sized,own",
        "stream,own,workers",
    ),
    "stream,accumulate,own",
)


def train(directory: Path, kind: str, stops: str = "") -> tuple[RunProbe, list[int], str]:
    """Run the script until it doesn't ask to be resumed: the run, its exit codes, and its output."""
    codes, output = [75], ""
    while codes[-1] == 75:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = forked.run([sys.executable, SCRIPT, directory, kind, stops], directory.parent, env=environment)
        codes.append(done.returncode)
        output += done.stdout + done.stderr
    return RunProbe(directory), codes[1:], output


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_is_the_undisturbed_one(tmp_path: Path, kind: str) -> None:
    """Struck in mid-epoch, at an epoch's end (10 steps, or 5 with accumulation), and soon after a resume."""
    twin, codes, output = train(tmp_path / "twin", kind)
    assert codes == [0], output
    run, codes, output = train(tmp_path / "run", kind, "3,10,11,17")
    assert codes == [75, 75, 75, 75, 0], output
    assert run.weights() == twin.weights()
    assert not run.events("batch_differs")
    assert not run.events("not_saved")
    for step in (3, 17):  # emergency checkpoints: what a callback writes is sealed in them
        sealed = read_manifest(run.path / "checkpoints" / f"checkpoint-{step}")
        assert "notes.txt" in sealed.files
        assert (run.path / "checkpoints" / f"checkpoint-{step}" / "notes.txt").read_text() == str(step)


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    """Once each, when training begins or after the step that made it; and the batch that came back as another one."""
    run, codes, output = train(tmp_path / "run", "iterator", "3")
    assert codes == [75, 0], output
    named = [(event["attempt"], event["objects"]) for event in run.events("not_saved")]
    turns = "the position of an iterator (cycle) can't be saved"
    at_start = {"data_collator.turns": turns, "trainer.turns": turns}
    after_a_step = {
        "data_collator.late": "the position of an iterator (generator) can't be saved",
        "trainer.pool": "it holds Scale, which can't be saved",
    }
    assert named == [(1, at_start), (1, after_a_step), (2, at_start), (2, after_a_step)]
    for path, why in (at_start | after_a_step).items():
        assert output.count(f"WARNING: {path}: {why}. After a resume the weights may differ") == 2
    assert [event["step"] for event in run.events("batch_differs")] == [3]
