"""Checkpoints that a Trainer made without outlast: a run would begin at step 0 beside them."""

from pathlib import Path

from outlast.errors import ResumeRefusedError
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger

from .manifest import MANIFEST
from .store import PREFIX

STATE = "trainer_state.json"
"""What a Trainer writes into each of its checkpoints."""


def made_by_a_trainer(directory: Path) -> list[tuple[int, Path]]:
    """The checkpoints in `directory` that a Trainer has written, each with its step."""
    numbered = ((path.name.removeprefix(PREFIX), path) for path in directory.glob(f"{PREFIX}*"))
    return [(int(step), path) for step, path in numbered if step.isdecimal() and (path / STATE).is_file()]


def refuse_strangers(run: RunDirectory) -> None:
    """Refuse to begin a run where a Trainer's own checkpoints lie.

    Raises:
        ResumeRefusedError: names the newest, and says what can be done with it.
    """
    if any(event["event"] in ("checkpoint", "restarted") for event in Ledger(run.ledger).read()):
        return  # it has begun, with checkpoints of its own
    found = made_by_a_trainer(run.path) + made_by_a_trainer(run.checkpoints)
    misplaced = [path for _, path in found if path.parent == run.path and (path / MANIFEST).is_file()]
    if misplaced:
        raise ResumeRefusedError(f"{misplaced[0]} is a run's: move it into {run.checkpoints} to go on from it")
    strange = [(step, path) for step, path in found if not (path / MANIFEST).is_file()]
    if strange:
        step, path = max(strange)
        raise ResumeRefusedError(
            f"{path} was made by a Trainer without outlast. A run can't go on from it: it does not say where in the "
            f"data step {step} was, so the rows that follow would be others. To begin with its weights, give the run a "
            f"directory of its own and load them into the model: from_pretrained({str(path)!r}). To begin at step "
            "0, move it away"
        )
