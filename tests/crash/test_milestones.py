"""Milestones where the Trainer decides when else to save, and never does."""

from pathlib import Path

from .attempt import Attempt
from .harness import Bases, Server, events, resumable_steps, weights


def test_milestones_are_saved_without_every(bases: Bases, server: Server, work: Path) -> None:
    base = bases(True, 1)
    run = work / "milestones"
    first = Attempt(directory=str(run), every=None, milestone_every=3, limit=None)
    done = server.run(first, work / "milestones.log")
    assert done.codes == [0], done.output
    saved = [e["step"] for e in events(run, "checkpoint") if e["kind"] == "periodic"]
    assert saved == [3, 6, 8], "the last step has one, too"
    assert resumable_steps(run) == [3, 6, 8]
    assert weights(run) == base.twin
