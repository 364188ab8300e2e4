"""Trainings of the kinds that people have, struck at random: exact in weights, evaluations and steps, or refused."""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from .. import forked
from ..conftest import RunProbe
from .scenarios import SCENARIOS

SCRIPT = Path(__file__).with_name("scenarios.py")
SEED = os.environ.get("OUTLAST_SEED") or str(random.SystemRandom().randrange(10**6))
"""Where the strikes are drawn from; set it to repeat a run of this test."""


def attempt(name: str, run: RunProbe, strike: str = "") -> tuple[int, str]:
    """Exit code and output of one attempt."""
    result = run.path.with_suffix(".json")
    done = forked.run([sys.executable, SCRIPT, name, run.path, result, strike], run.path.parent)
    return done.returncode, done.stdout + done.stderr


def found(run: RunProbe) -> dict[str, Any]:
    return dict(json.loads(run.path.with_suffix(".json").read_text()))


@pytest.mark.parametrize("name", [name for name in SCENARIOS if not name.startswith("refused")])
def test_struck_at_random_it_comes_back_exactly(tmp_path: Path, name: str) -> None:
    alone, struck = RunProbe(tmp_path / "alone"), RunProbe(tmp_path / "struck")
    code, output = attempt(name, alone)
    assert code == 0, output
    right = found(alone)
    numbers, left, strikes = random.Random(f"{SEED} {name}"), right.pop("events"), []
    for signal in ("USR1", numbers.choice(["TERM", "KILL"]), ""):
        strike = f"{numbers.randint(1, max(1, left * 2 // 3))}:{signal}" if signal else ""
        strikes.append(strike)
        print(f"OUTLAST_SEED={SEED} {name}: {strike or 'left alone'}")
        code, output = attempt(name, struck, strike)
        if code == 0:
            break
        assert code == {"KILL": -9}.get(signal, 75), output
    assert code == 0, output
    got = found(struck)
    got.pop("events")
    assert got == right, strikes
    assert struck.weights() == alone.weights(), strikes


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("refused")])
def test_what_can_not_come_back_exactly_is_refused_at_the_start(tmp_path: Path, name: str) -> None:
    run = RunProbe(tmp_path / "r")
    code, output = attempt(name, run)
    assert code != 0
    assert "is refused; valid: " in output
    assert run.events("attempt_ended")[-1]["refused"]
    assert not run.events("checkpoint")
