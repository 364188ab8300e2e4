"""The bytes of real runs: a budget that is used up, a disk that is smaller, other writers."""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlast.files import bytes_used
from outlast.launcher import cli
from outlast.rundir.directory import RunDirectory
from outlast.rundir.logs import bound

from .. import forked
from ..conftest import OUTLAST, SMOKE, RunProbe
from ..forked import Forked

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
    (run / "corpus.bin").unlink()
    (run / "logs" / "attempt-000.rank-0.log").write_bytes(bytes(1_000_000))  # is cut, and no reason to refuse
    code, output = train(run, steps=12, start={"budget_gb": 0.001}, coming=1_000_000)
    assert code == 2, output
    assert "prepared data 1 MB" in output
    code, output = train(run, steps=12, start={"budget_gb": 0.01}, coming=1_000_000)
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


def test_modes_are_those_of_the_umask_and_denied_access_is_a_message(
    tmp_path: Path, right: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    run.chmod(0o2775)
    code, output = train(run, steps=12, start={"every": 4}, umask=0o002, signal_at=6)
    assert code == 75, output
    modes = {path: oct(path.stat().st_mode & 0o777) for path in run.rglob("*") if path.is_file()}
    assert set(modes.values()) == {"0o664"}, modes
    if os.geteuid() != 0:
        pytest.skip("only root becomes another user")
    for path in (tmp_path, *(above for above in tmp_path.parents if above.is_relative_to(tempfile.gettempdir())))[:-1]:
        path.chmod(0o755)
    before = RunProbe(run).events()
    code, output = train(run, steps=12, uid=65534)
    assert code == 2, output
    assert f"{run} belongs to root (drwxrwsr-x), and this is nobody" in output
    assert "Traceback" not in output
    code, output = train(tmp_path / "other", steps=12, uid=65534)
    assert code == 2, output
    assert f"{tmp_path} belongs to root" in output
    assert "Traceback" not in output
    assert RunProbe(run).events() == before
    monkeypatch.setattr(sys, "argv", ["outlast", "report", "run", "--root", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()  # root can: and Python has imported what the other user can't reach
    assert ended.value.code == 0
    (run / "ledger.jsonl").chmod(0o600)
    os.seteuid(65534)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        os.seteuid(0)
    assert ended.value.code == 2
    assert f"you may not read {run}, which is root's" in capsys.readouterr().err
    code, output = train(run, steps=12)
    assert code == 0, output
    assert state(run) == right


def test_what_others_write_into_the_run_is_noticed_said_and_made_up_for(tmp_path: Path, right: int) -> None:
    run = tmp_path / "run"
    writes = [[7, "cache.bin", 2_500_000]]
    start = {"budget_gb": 0.0045, "every": 2}
    code, output = train(run, steps=12, bytes=800_000, beside=writes, until="over_budget", start=start)
    assert code == 0, output
    (over,) = RunProbe(run).events("over_budget")
    assert over["bytes"] > over["budget_bytes"] == 4_500_000
    assert over["parts"]["other files"] == 2_500_000
    assert "WARNING: the run directory takes 4.9" in output
    gone = [e for e in RunProbe(run).events("deleted") if e["reason"] == "budget" and e["time"] >= over["time"]]
    assert gone, "the next step's end makes up for it"
    assert bytes_used(run) <= 4_500_000
    assert state(run) == right


def test_the_logs_are_kept_within_bounds_and_the_newest_lines_stay(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    old, now = run.log(1, 0), run.log(2, 0)
    old.write_bytes(b"old\n" * 100_000)
    with open(now, "ab", buffering=0) as writer:  # as the launcher opens it
        for number in range(100_000):
            writer.write(b"line %d\n" % number)
        assert bound(run, 1_000_000, 2) > 0
        assert not old.exists()
        for number in range(100_000, 200_000):
            writer.write(b"line %d\n" % number)
        assert bound(run, 1_000_000, 2) > 0
        writer.write(b"the last\n")
    lines = now.read_bytes().splitlines()
    assert lines[0].startswith(b"[outlast] what was here before is cut")
    assert lines[-2:] == [b"line 199999", b"the last"]
    assert now.stat().st_size < 600_000
    assert bound(run, 1_000_000, 2) == 0


def test_a_command_whose_output_goes_to_a_full_disk_trains_to_the_end(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        command = Forked([OUTLAST, "train", *SMOKE, "trainer.max_steps=30", "run.name=r"], cwd=tmp_path, stdout=full)
        try:
            assert command.wait(120) == 0
        finally:
            command.kill()
    assert RunProbe(tmp_path / "runs" / "r").events("finished")
