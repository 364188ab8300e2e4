"""The library in a user's own script, without the launcher."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.rundir.lock import RunLock

from .. import forked
from ..conftest import OUTLAST, RunProbe, wait_for
from ..forked import Forked

Probe = Callable[[str], RunProbe]

SCRIPT = Path(__file__).with_name("user_script.py")
HERE = Path(__file__).parent
STOP_AT = """
import os, signal, sys
from transformers import TrainerCallback

class StopAt(TrainerCallback):
    # raises the signal inside the step, before the adapter's own on_step_end polls for it
    def on_optimizer_step(self, args, state, control, **_):
        if state.global_step + 1 in stops:
            os.kill(os.getpid(), signal.SIGUSR1)
"""


def run_script(
    cwd: Path, directory: Path, steps: int, stops: list[int] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the user's script; with `stops`, one that signals itself in the middle of those steps."""
    script = SCRIPT
    if stops:
        text = SCRIPT.read_text().replace("run.train(trainer)", "trainer.add_callback(StopAt())\nrun.train(trainer)")
        script = cwd / f"stops_{'_'.join(map(str, stops))}.py"
        script.write_text(f"stops = {stops}\n{STOP_AT}\n{text}")
    return forked.run([sys.executable, script, directory, str(steps)], cwd)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> RunProbe:
    directory = tmp_path_factory.mktemp("library")
    done = run_script(directory, directory / "twin", 50)
    assert done.returncode == 0, done.stdout
    return RunProbe(directory / "twin")


def losses(run: RunProbe) -> list[tuple[int, float]]:
    return [(e["step"], e["metrics"]["eval_loss"]) for e in run.events("evaluated")]


@pytest.mark.parametrize("stop", [1, 13, 19, 20, 21, 30, 40, 49, 50])
def test_signalled_in_one_step(tmp_path: Path, twin: RunProbe, stop: int) -> None:
    """20 and 40 end an epoch (its evaluation follows), 30 is a periodic save, 50 is the last step."""
    run = RunProbe(tmp_path / "r")
    first = run_script(tmp_path, run.path, 50, [stop])
    assert first.returncode == 75, first.stdout
    assert run.events("attempt_ended")[-1]["step"] == stop
    again = run_script(tmp_path, run.path, 50)
    assert again.returncode == 0, again.stdout
    assert "trained to step 50" in again.stdout
    assert run.steps_repeated() == 0
    assert losses(run) == losses(twin)
    assert run.weights() == twin.weights()
    assert len(list((run.path / "checkpoints").glob("checkpoint-*"))) >= 5


def test_a_finished_run_is_loaded_and_the_script_goes_on(twin: RunProbe, tmp_path: Path) -> None:
    ledger = (twin.path / "ledger.jsonl").read_text()
    done = run_script(tmp_path, twin.path, 50)
    assert done.returncode == 0
    assert "has finished already, at step 50" in done.stdout
    assert "trained to step 50" in done.stdout
    assert (twin.path / "ledger.jsonl").read_text() == ledger


def test_a_loss_that_is_no_number_is_said_at_once(tmp_path: Path) -> None:
    """Though the Trainer leaves it out of what it logs, and the run is to go on; and all that is written is JSON."""
    script, run = tmp_path / "script.py", RunProbe(tmp_path / "r")
    text = SCRIPT.read_text().replace('eval_strategy="epoch"', 'eval_strategy="steps",eval_steps=10')
    text = text.replace("outlast.start(sys.argv[1])", "outlast.start(sys.argv[1], guard_action='report')")
    script.write_text(text.replace("for _ in range(80)]", "for _ in range(80)]\ndata[0]['x'] /= 0"))
    done = forked.run([sys.executable, script, run.path, "20"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the loss is nan. What is trained and saved from here on is likely to be of no use") == 1
    (event,) = run.events("not_finite")
    assert 1 <= event["step"] <= 20
    assert event["time"] < run.events("checkpoint")[-1]["time"]
    evaluated = run.events("evaluated")[-1]["metrics"]["eval_loss"]
    assert evaluated is None
    written = [(run.path / name).read_text() + "\n" for name in ("progress.json", "ledger.jsonl")]
    runs = ["--json", "--root", tmp_path]
    for command in (["status", *runs], ["report", "r", *runs], ["checkpoints", "r", *runs]):
        written.append(json.dumps(json.loads(forked.run([OUTLAST, *command], tmp_path).stdout)) + "\n")
    for line in filter(None, "".join(written).splitlines()):
        json.loads(line, parse_constant=pytest.fail)
    report = forked.run([OUTLAST, "report", "r", *runs[1:]], tmp_path).stdout
    assert f"a loss was NaN or infinite at step {event['step']}" in " ".join(report.split())


def test_two_at_once(tmp_path: Path) -> None:
    run = RunProbe(tmp_path / "r")
    first = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(run.path), "100000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        run.reach(3)
        held = (run.path / ".lock").read_text()
        assert str(first.pid) in held
        first.send_signal(signal.SIGTERM)
        second = run_script(tmp_path, run.path, 20)
        assert first.wait(30) == 75
        # it waited for the first to save and leave, and found another number of steps done than it wants to make
        assert "resumed from" in second.stdout
    finally:
        first.kill()


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("outlast.start('')", 2, "outlast: outlast.start: '' is refused; valid: a path"),
        ("outlast.start('r', allow='dataset')", 2, "outlast: allow: 'dataset' is refused; valid: a list of names"),
        ("outlast.start('r').describe(sed=1)", 2, "outlast: run.describe: 'sed' is refused; did you mean seed? valid:"),
        ("run = outlast.start('r', budget_gb=-1)", 2, "outlast: storage.budget_gb: -1 is refused; valid: a positive"),
        ("outlast.start('r').keep('mine', object())", 2, "outlast: keep: 'mine (object)' is refused; valid: an object"),
        ("outlast.start('r'); raise outlast.CheckpointError('no room')", 1, "outlast: no room"),
        ("outlast.start('r'); raise KeyError('of the script')", 1, "their hook: KeyError"),
    ],
)
def test_an_error_that_nobody_catches_is_a_message(tmp_path: Path, line: str, code: int, said: str) -> None:
    """With the error's own exit code. The hook that was there gets every other error."""
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, sys\nimport outlast\natexit.register(print, 'clean up')\n"
        f"sys.excepthook = lambda kind, *_: print('their hook:', kind.__name__, file=sys.stderr)\n{line}\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
    assert done.stdout.endswith("clean up\n")


def test_a_run_that_finishes_while_its_lock_is_waited_for_is_left_as_it_is(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r")
    run.create()
    Ledger(run.ledger).append("data", 1, rows=1, notes=[])
    lock = RunLock(run)
    lock.acquire("another attempt")
    script = tmp_path / "script.py"
    script.write_text("import outlast\noutlast.start('r')\n")
    run.logs.rmdir()
    second = subprocess.Popen([sys.executable, script], cwd=tmp_path)
    wait_for(run.logs.is_dir, "the second one, which makes this before it waits for the lock")
    Ledger(run.ledger).append("finished", 1, step=5, seconds=1.0)
    before = run.ledger.read_bytes()
    lock.release()
    assert second.wait(60) == 0
    assert run.ledger.read_bytes() == before


def test_an_error_can_be_caught(tmp_path: Path) -> None:
    """As a notebook or a test runner does: it is an exception as any other, under a name of `outlast`."""
    script = tmp_path / "script.py"
    script.write_text(
        "import outlast\n"
        "try: outlast.start('r', budget_gb=-1)\n"
        "except outlast.ConfigError as error: print(error.key, isinstance(error, outlast.OutlastError))\n"
        "print(issubclass(outlast.ResumeRefusedError, outlast.CheckpointError), outlast.AlreadyFinished(3).code)\n"
        "assert all(getattr(outlast, name) for name in outlast.__all__)\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "storage.budget_gb True\nTrue 0\n"), done.stderr


def test_ctrl_c_saves_and_leaves(tmp_path: Path) -> None:
    run = RunProbe(tmp_path / "r")
    script = Forked([sys.executable, SCRIPT, run.path, "100000"])
    try:
        run.reach(3)
        script.send_signal(signal.SIGINT)
        assert script.wait(30) == 75
    finally:
        script.kill()
    assert [e["name"] for e in run.events("signal")] == ["INT"]
    assert run.events("checkpoint")[-1]["kind"] == "emergency"
    assert run.events("attempt_ended")[-1]["step"] == run.events("checkpoint")[-1]["step"]


def test_a_terminal_that_is_gone_loses_no_step(tmp_path: Path) -> None:
    """The kernel sends HUP, and whatever is printed from then on fails."""
    run = RunProbe(tmp_path / "r")
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it may be ignored, if the tests run under `nohup`
        os.execv(sys.executable, [sys.executable, str(SCRIPT), str(run.path), "100000"])
    run.reach(3)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert [e["name"] for e in run.events("signal")] == ["HUP"]
    assert run.events("attempt_ended")[-1]["step"] == run.events("checkpoint")[-1]["step"]


def test_output_that_cannot_be_written_ends_no_run(tmp_path: Path, twin: RunProbe) -> None:
    text = SCRIPT.read_text()
    script = tmp_path / "script.py"
    script.write_text(f"import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n{text}\nsys.stdout.flush()\n")
    run = RunProbe(tmp_path / "r")
    done = forked.run([sys.executable, script, run.path, "50"], tmp_path)
    assert done.returncode == 0, done.stdout
    assert run.weights() == twin.weights()


def test_the_readme_shows_these_three_lines() -> None:
    readme = (HERE.parents[1] / "README.md").read_text()
    lines = [
        line
        for line in SCRIPT.read_text().splitlines()
        if re.search(r"\b(outlast|run\.train)\b", line) and "import" not in line
    ]
    code = lines[-2:]
    assert "import outlast" in readme
    assert code[1] in readme
    assert wait_for(lambda: "outlast.start(" in readme, "README", 1)
