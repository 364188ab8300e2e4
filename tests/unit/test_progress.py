import io
import json
import math
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from outlast.files import bytes_used
from outlast.launcher.display import progress as display_progress
from outlast.launcher.display.progress import ProgressBar, duration, size
from outlast.launcher.runs.standing import seconds_left
from outlast.rundir import losses, progress
from outlast.rundir.directory import RunDirectory
from outlast.rundir.progress import Progress, ProgressWriter


def looks(**values: object) -> Progress:
    return Progress(**{"attempt": 2, "phase": "training", "step": 40, "total_steps": 100, "time": time.time()} | values)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert progress.read(run) is None
    writer = ProgressWriter(run)
    writer.update(force=True, attempt=3, phase="training", step=7, loss=1.5)
    now = progress.read(run)
    assert now is not None
    assert (now.attempt, now.phase, now.step, now.loss) == (3, "training", 7, 1.5)


def test_it_is_not_written_at_each_step(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    writer = ProgressWriter(run)
    for step in range(50):
        writer.update(step=step)
    now = progress.read(run)
    assert now is not None
    assert now.step < 49
    assert writer.now.step == 49
    assert writer.now.seconds_per_step is not None


@pytest.mark.parametrize("text", ["", "{", "null", '{"step": "3"}', '{"step": 3, "from_a_newer_version": 1}'])
def test_reading_what_was_not_written_here(tmp_path: Path, text: str) -> None:
    run = RunDirectory(tmp_path)
    run.progress.write_text(text)
    now = progress.read(run)
    assert now is None or now.step == 3


def test_eta() -> None:
    assert looks(seconds_per_step=0.5).eta_s == 30.0
    assert looks(seconds_per_step=0.5, step=120).eta_s == 0.0
    assert looks().eta_s is None
    assert looks(total_steps=None, seconds_per_step=0.5).eta_s is None
    late = looks(seconds_per_step=0.5, time=time.time() - 10)
    assert seconds_left(late) == pytest.approx(20.0, abs=1.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (100000, "1 d 03 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_size() -> None:
    assert size(1_310_000_000, 10**10) == "1.3 GB of 10.0 GB"
    assert size(None) == "?"


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(display_progress.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with ProgressBar("a[run]", Console(file=out, width=40)) as bar:
        bar.update(None)
        bar.update(None, "waiting for ranks")
        for step in range(40, 60):
            bar.update(looks(step=step, loss=1.25, budget_bytes=10**9, bytes_used=10**8))
        clock[0] += 10.0
        bar.update(looks(step=60))
        bar.update(looks(step=61, phase="saving"))
        bar.update(looks(step=61, checkpoint_step=61, checkpoint_time=time.time()))
        bar.note("saved. The same command again resumes. [not markup]")
    assert out.getvalue().splitlines() == [
        "a[run] · waiting for ranks",
        "a[run] · attempt 2 · training · step 40/100 · loss 1.25 · 100.0 MB of 1.0 GB",
        "a[run] · attempt 2 · training · step 60/100",
        "a[run] · attempt 2 · saving · step 61/100",
        "a[run] · attempt 2 · training · step 61/100 · checkpoint at step 61, 0.0 s ago",
        "saved. The same command again resumes. [not markup]",
    ]


def test_the_bar_on_a_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None, _environ={"TERM": "xterm"})
    with ProgressBar("a[run]", console) as bar:
        bar.update(None)
        bar.note("resuming")
        bar.update(looks(seconds_per_step=2.0, loss=1.25, checkpoint_step=30, checkpoint_time=time.time() - 12))
    text = out.getvalue()
    assert "resuming" in text
    last = [line for line in text.splitlines() if "a[run]" in line or "loss" in line][-2:]
    assert "a[run]" in last[0]
    assert "attempt 2 · training · step 40/100" in last[0]
    assert "left" in last[0]
    assert "loss 1.25 · checkpoint at step 30, 12 s ago" in last[1]


def test_bytes_used(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert bytes_used(run) == 0
    (run / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (run / "ledger.jsonl").write_bytes(b"x" * 10)
    (run / "checkpoints" / "checkpoint-1" / "model").write_bytes(b"x" * 1000)
    big = tmp_path / "big"
    big.mkdir()
    (big / "file").write_bytes(b"x" * 5000)
    (run / "link").symlink_to(big)
    (run / "file-link").symlink_to(big / "file")
    assert bytes_used(run) == 1010


def test_bytes_used_of_files_that_vanish(tmp_path: Path) -> None:
    code = (
        "import sys, json, shutil; from pathlib import Path; root = Path(sys.argv[1])\n"
        "for n in range(300):\n"
        "    sub = root / f'd{n % 7}' / 'sub'; sub.mkdir(parents=True); (sub / 'f').write_bytes(b'x' * 9)\n"
        "    shutil.rmtree(sub.parent)\n"
    )
    (tmp_path / "stays").write_text(json.dumps(1))
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) as writer:
        while writer.poll() is None:
            assert 1 <= bytes_used(tmp_path) <= 10
    assert writer.returncode == 0


def test_losses_of_all_attempts_are_kept_each_step_once(tmp_path: Path) -> None:
    """The next attempt goes on from a checkpoint: what was logged after it, it forgets."""
    run = RunDirectory(tmp_path)
    first = ProgressWriter(run)
    for step in range(1, 31):
        first.update(force=True, step=step, loss=float(step))
    first.update(step=30, loss=99.0)  # logged again at the same step, as at the end of an epoch
    first.update(step=31, loss=31.0)
    assert len(losses.read(run)) == 30  # the file waits for a save, or 10 s
    second = ProgressWriter(run)
    second.go_on_from(20)
    second.update(step=21, loss=math.nan)
    second.update(step=22)
    second.update(step=22, loss=None)
    second.update(force=True, step=23, loss=1 / 3)
    assert losses.read(run) == [(step, float(step)) for step in range(1, 21)] + [(21, None), (23, 0.33333)]


@pytest.mark.parametrize("every", [1, 10, 500])
def test_losses_of_a_long_run_take_little_room(tmp_path: Path, every: int) -> None:
    run = RunDirectory(tmp_path)
    writer = ProgressWriter(run)
    for step in range(every, 300_000, every):
        writer.losses.add(step, 1 / step)
    points = writer.losses.points
    assert losses.MOST * 0.9 < len(points) <= 2 * losses.MOST
    steps = [step for step, _ in points]
    assert steps == sorted(set(steps))
    assert steps[-1] > 290_000
    assert max(b - a for a, b in pairwise(steps)) <= 300_000 / losses.MOST * 2 + every
    writer.update(force=True, step=steps[-1])
    assert run.losses.stat().st_size < 32_000
    assert run.progress.stat().st_size < 1_000  # it is written twice a second, between steps
    assert losses.read(run) == points


def test_an_earlier_versions_losses_are_taken_over(tmp_path: Path) -> None:
    """They were in `progress.json`, which the first update replaces."""
    run = RunDirectory(tmp_path)
    run.progress.write_text(json.dumps({"attempt": 1, "step": 3, "losses": [[1, 2.0], [2, None], [3, 1.5]]}))
    assert losses.read(run) == [(1, 2.0), (2, None), (3, 1.5)]
    ProgressWriter(run).update(attempt=2, phase="starting")
    assert "losses" not in json.loads(run.progress.read_text())
    assert ProgressWriter(run).losses.points == [(1, 2.0), (2, None), (3, 1.5)]


@pytest.mark.parametrize(
    "damaged",
    ["3", "[1, 2]", "[[1]]", '[["a", 2.0]]', '[[1, "x"]]', "[[1.5, 2.0]]", "[[1, 1e999]]", "[[1, NaN]]",
     f"[[1, 1{'0' * 400}]]", f"[[1{'0' * 400}, 1.0]]"],
)  # fmt: skip
def test_damaged_losses_are_left_out(tmp_path: Path, damaged: str) -> None:
    run = RunDirectory(tmp_path)
    for path in (run.progress, run.losses):
        path.write_text(f'{{"step": 3, "losses": {damaged}}}')
        assert losses.read(run) == ProgressWriter(run).losses.points == []
