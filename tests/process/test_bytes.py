"""The bytes of real runs: a budget that is used up, a disk that is smaller, other writers."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .. import forked
from ..conftest import RunProbe

SCRIPT = Path(__file__).with_name("plain_loop.py")


def train(directory: Path, *, env: dict[str, str] | None = None, **options: Any) -> tuple[int, str]:
    """Run the script once; its exit code and what it printed."""
    done = forked.run([sys.executable, SCRIPT, directory, json.dumps(options)], directory.parent, env=env)
    return done.returncode, done.stdout + done.stderr


def state(directory: Path) -> int:
    """What the finished run has computed."""
    return int(np.load(directory / "final" / "state.npy")[0])


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The result of 12 steps left alone."""
    directory = tmp_path_factory.mktemp("right") / "run"
    code, output = train(directory, steps=12)
    assert code == 0, output
    return state(directory)


def test_a_budget_that_others_have_used_up_is_refused_when_training_begins(tmp_path: Path, right: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "corpus.bin").write_bytes(bytes(1_000_000))
    code, output = train(run, steps=12, start={"budget_gb": 0.001})
    assert code == 2, output
    assert "storage.budget_gb is too small by what was measured: of 1 MB for this run, other files 1 MB" in output
    assert "Traceback" not in output
    assert not RunProbe(run).events("checkpoint")
    code, output = train(run, steps=12, start={"budget_gb": 0.01})
    assert code == 0, output
    assert state(run) == right


@pytest.mark.parametrize("signal_at", [None, 3])
def test_a_first_save_that_the_budget_cannot_hold_ends_the_attempt(
    tmp_path: Path, right: int, signal_at: int | None
) -> None:
    """Periodic or emergency: nobody is told that something was saved."""
    run, options = tmp_path / "run", {"steps": 12, "bytes": 2_000_000, "signal_at": signal_at}
    code, output = train(run, **options, start={"budget_gb": 0.001, "every": 4})
    assert code == 2, output
    step = signal_at or 4
    assert f"this attempt's first checkpoint, of step {step}, does not fit" in output
    assert "Traceback" not in output
    assert not RunProbe(run).events("checkpoint")
    assert not RunProbe(run).events("requeued")
    code, output = train(run, **(options | {"signal_at": None}), start={"budget_gb": 0.1, "every": 4})
    assert code == 0, output
    assert state(run) == right


def test_a_second_save_that_the_budget_cannot_hold_is_known_after_the_first(tmp_path: Path, right: int) -> None:
    run, options = tmp_path / "run", {"steps": 12, "bytes": 2_000_000}
    code, output = train(run, **options, start={"budget_gb": 0.003, "every": 4})
    assert code == 2, output
    assert re.search(r"the run needs 2 checkpoints of 2[.\d]* MB \(the newest and one in flight\)", output), output
    assert [e["step"] for e in RunProbe(run).events("checkpoint")] == [4], "not trained on unsaved"
    code, output = train(run, **options, start={"budget_gb": 0.1, "every": 4})
    assert code == 0, output
    assert RunProbe(run).events("resumed")[-1]["step"] == 4
    assert state(run) == right


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_a_clock_that_is_set_during_a_save_changes_nothing(tmp_path: Path, right: int, seconds: int) -> None:
    run = tmp_path / "run"
    code, output = train(run, steps=12, start={"every": 4}, clock=[4, seconds], signal_at=6)
    assert code == 75, output
    events = RunProbe(run).events()
    assert all(0 <= e[name] < 60 for e in events for name in ("stall_s", "sealed_s", "seconds") if name in e)
    assert [e["time"] for e in events] == sorted(e["time"] for e in events)
    code, output = train(run, steps=12, start={"every": "auto"})
    assert code == 0, output
    assert RunProbe(run).events("resumed")[-1]["step"] == 6
    assert state(run) == right
