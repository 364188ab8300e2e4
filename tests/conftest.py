"""What tests of every room share: the `outlast` command as a real process, and conditions awaited with a limit."""

import contextlib
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from xdist.scheduler import LoadFileScheduling

from .forked import Forked

OUTLAST = str(Path(sys.executable).with_name("outlast"))
SMOKE = ["job=smoke", "parallel.cpus_per_rank=1", "checkpoint.every=20"]


ON_THE_SECOND_CLUSTER = ("test_launchers", "test_policy", "test_runs", "test_working_directory")
"""Files of Slurm's tests: about half of them, by time."""


class SlurmOnTwoWorkers(LoadFileScheduling):  # type: ignore[misc]
    """Gives a worker one file after the other; Slurm's tests, which share a devcluster each, to two."""

    def _split_scope(self, nodeid: str) -> str:
        if not nodeid.startswith("tests/slurm/"):
            return str(super()._split_scope(nodeid))
        return f"slurm {Path(nodeid.partition('::')[0]).stem in ON_THE_SECOND_CLUSTER}"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SlurmOnTwoWorkers:
    return SlurmOnTwoWorkers(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have Slurm's tests begin at once: they take the longest."""
    items.sort(key=lambda item: item.path.parent.name != "slurm")


def wait_for(condition: Callable[[], Any], what: str, limit_s: float = 90.0) -> Any:
    """Poll until `condition` gives something true, and return that."""
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {limit_s:g} s"
        time.sleep(0.02)
    return found


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs: it has not ended, waited for or not."""
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # between the two
        return False


class RunProbe:
    """Reads a run directory from outside, as a user's script would."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        ledger = self.path / "ledger.jsonl"
        text = ledger.read_text() if ledger.exists() else ""
        events = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [event for event in events if name in (None, event["event"])]

    def causes(self) -> list[str]:
        return [event["cause"] for event in self.events("attempt_ended")]

    def progress(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / "progress.json").read_text()))
        except (OSError, ValueError):
            return {}

    def reach(self, step: int, attempt: int | None = None, limit_s: float = 120.0) -> None:
        """Wait until the run is in training and past `step`."""

        def reached() -> bool:
            now = self.progress()
            here = now.get("step", -1) >= step and now.get("phase") == "training"
            return here and attempt in (None, now["attempt"])

        wait_for(reached, f"step {step} of {self.path.name}", limit_s)

    def weights(self) -> str:
        """Digest of the finished model's weights."""
        files = sorted((self.path / "final").glob("*.safetensors"))
        assert files, f"no weights in {self.path / 'final'}"
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def saved(self, attempt: int = 1) -> int:
        """The last step that an attempt has sealed a checkpoint of."""
        kept = [e for e in self.events("checkpoint") if e["attempt"] == attempt and e["kind"] != "final"]
        return int(kept[-1]["step"])

    def steps_repeated(self) -> int:
        """Steps that were made more than once, over all attempts."""
        ended = {e["attempt"]: e["step"] for e in self.events("attempt_ended")}
        resumed = {e["attempt"]: e["step"] for e in self.events("resumed")}
        return sum(ended[number] - resumed.get(number + 1, 0) for number in ended if number + 1 in set(ended))


class Command:
    """One `outlast` process, ended with everything it started.

    It and its ranks are forked from one that has imported the training libraries, unless `forked` is false.
    """

    def __init__(self, cwd: Path, *arguments: str, forked: bool = True, **env: str) -> None:
        self.log = cwd / f"command-{time.monotonic_ns()}.log"
        start: Callable[..., Any] = Forked if forked else functools.partial(subprocess.Popen, stdin=subprocess.DEVNULL)
        with open(self.log, "wb") as log:
            self.process: Forked = start(
                [OUTLAST, *arguments],
                cwd=cwd,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ranks(self) -> list[psutil.Process]:
        """Its rank processes, by rank."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # a command of Slurm's that has just ended
                if "outlast.rank" in child.cmdline():
                    found[int(child.environ().get("RANK", "0"))] = child
        return [found[rank] for rank in sorted(found)]

    def wait(self, limit_s: float = 240.0) -> int:
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {limit_s:g} s:\n{self.output}") from None

    def end(self) -> None:
        try:
            tree = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        except psutil.NoSuchProcess:
            return
        for process in tree:
            if process.is_running():
                process.kill()
        self.process.wait()


@pytest.fixture
def outlast(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts `outlast …` in a directory of the test's own."""
    commands: list[Command] = []

    def start(*arguments: str, forked: bool = True, **env: str) -> Command:
        commands.append(Command(tmp_path, *arguments, forked=forked, **env))
        return commands[-1]

    yield start
    for command in commands:
        command.end()


@pytest.fixture
def probe(tmp_path: Path) -> Callable[[str], RunProbe]:
    """Looks at a run of this test by its name."""
    return lambda name: RunProbe(tmp_path / "runs" / name)
