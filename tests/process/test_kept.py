"""`run.keep`: what a user names is in each checkpoint, and comes back with the value that it had."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from .. import forked
from ..conftest import RunProbe

SCRIPT = Path(__file__).with_name("kept_script.py")


def train(directory: Path, kind: str) -> int:
    return forked.run([sys.executable, SCRIPT, directory, kind], directory.parent).returncode


def values(directory: Path) -> dict[str, Any]:
    return dict(json.loads(Path(f"{directory}.json").read_text()))


@pytest.mark.parametrize("kind", ["loop", "trainer", "evaluation", "mid-step"])
def test_kept_objects_come_back(tmp_path: Path, kind: str) -> None:
    """An object with a `state_dict`, and two generators: also if an evaluation or a step was left half-way."""
    twin, struck = tmp_path / "twin", tmp_path / "struck"
    assert train(twin, kind) == 0
    assert train(struck, kind) == 75
    assert train(struck, kind) == 0
    assert [event["step"] for event in RunProbe(struck).events("resumed")] == [3]
    assert len(values(twin)["sums"]) == {"evaluation": 6 + 2 * 2, "mid-step": 6 * 2}.get(kind, 6)
    assert len(RunProbe(struck).events("step_cut")) == (kind == "mid-step")
    assert values(struck) == values(twin)
