"""What the crash tests share: attempts started through the fork server, and run directories judged from outside."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from .attempt import Arming, Attempt

HERE = Path(__file__).parent
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    codes: list[int]
    """Exit code of each rank; a negative one is the signal that killed it."""
    hung: bool
    """Whether a rank had to be killed that should have left by itself."""
    output: str


class Server:
    """The fork server, and one connection to it for each attempt that may run at the same time."""

    def __init__(self, directory: Path, library: Path | None) -> None:
        self._path = str(directory / "socket")
        self._log = open(directory / "server.log", "wb")  # noqa: SIM115  (the server writes to it until it ends)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        if library is not None:
            environment["LD_PRELOAD"] = str(library)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.fork_server", self._path],
            cwd=HERE.parents[1],
            env=environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 300
        while not (connection := self._connect()):
            assert self._process.poll() is None, f"the fork server ended: see {self._log.name}"
            assert time.monotonic() < deadline, "the fork server does not answer"
            time.sleep(0.05)
        self._idle = [connection]

    def _connect(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(self._path)
        except OSError:
            connection.close()
            return None
        return connection

    def run(
        self, attempt: Attempt, log: Path, *, ranks: int = 1, linger_s: float = 0.0, limit_s: float = 120.0
    ) -> Outcome:
        """Run one attempt to its end. Thread-safe.

        Args:
            log: where its output goes, `.rank-<n>` added.
            linger_s: how long the other ranks may live on when one was killed; 0: they are killed with it.
        """
        connection = self._idle.pop() if self._idle else self._connect()
        assert connection is not None
        request = {"attempt": asdict(attempt), "ranks": ranks, "log": str(log), "linger_s": linger_s}
        connection.sendall((json.dumps(request | {"limit_s": limit_s}) + "\n").encode())
        answer = b""
        while not answer.endswith(b"\n"):
            received = connection.recv(4096)
            if not received:
                connection.close()
                raise AssertionError(f"the fork server went away: see {self._log.name}")
            answer += received
        self._idle.append(connection)
        output = "".join(Path(f"{log}.rank-{rank}").read_text(errors="replace") for rank in range(ranks))
        return Outcome(**json.loads(answer), output=output)

    @property
    def pid(self) -> int:
        return self._process.pid

    def hang_up(self) -> None:
        """Let go of the idle connections: the next attempt starts from a new fork of the server itself."""
        while self._idle:
            self._idle.pop().close()

    def close(self) -> None:
        self.hang_up()
        self._process.terminate()
        self._process.wait()
        self._log.close()


def in_parallel(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`work` on each item, as many at a time as there are cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(work, items))


# Run directories, judged by what is on disk alone: none of this uses the code under test -----------------------------


def events(run: Path, name: str | None = None) -> list[dict[str, Any]]:
    """The ledger's whole lines."""
    lines = (run / "ledger.jsonl").read_bytes().split(b"\n") if (run / "ledger.jsonl").exists() else []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if name in (None, event["event"]):
            found.append(event)
    return found


def manifest(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / "manifest.json").read_bytes()))


def fault(checkpoint: Path) -> str | None:
    """Why a directory is not a sealed checkpoint, or None if it is one."""
    try:
        for name, entry in manifest(checkpoint)["files"].items():
            data = (checkpoint / name).read_bytes()
            if len(data) != entry["bytes"]:
                return f"{name} has {len(data)} bytes, not {entry['bytes']}"
            if xxhash.xxh3_128(data).hexdigest() != entry["xxh3_128"]:
                return f"{name} has another digest"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def resumable_steps(run: Path) -> list[int]:
    """Steps of the sealed checkpoints that a resume can start from, in order."""
    found = []
    for path in (run / "checkpoints").glob("checkpoint-*"):
        if not path.is_symlink() and fault(path) is None and not manifest(path)["light"]:
            found.append(int(path.name.split("-")[1]))
    return sorted(found)


def litter(run: Path) -> list[str]:
    """What should not be left when a run has finished: staging, trash, temporary files, what no manifest lists."""
    found = {p for p in run.rglob("*") if (p.name.startswith(".") and p != run / ".lock") or p.name.endswith(".tmp")}
    left = {str(p.relative_to(run)) for p in found}
    for path in [*(run / "checkpoints").iterdir(), run / "final"]:
        name = str(path.relative_to(run))
        if reason := fault(path):
            left.add(f"{name} ({reason})")
        else:
            listed = {path / file for file in (*manifest(path)["files"], "manifest.json")}
            left |= {
                f"{p.relative_to(run)} (in no manifest)" for p in path.rglob("*") if p.is_file() and p not in listed
            }
    return sorted(left)


def weights(run: Path) -> str:
    """Digest of the finished model's weights."""
    files = sorted((run / "final").glob("*.safetensors"))
    assert files, f"no weights in {run / 'final'}"
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@dataclass(frozen=True)
class FileEvent:
    """One line of `file_events.c`'s log."""

    number: int
    kind: str
    """create, write, truncate, fsync, rename, unlink, mkdir, rmdir, link."""
    bytes: int
    path: str
    """Relative to the run directory."""
    target: str
    """Likewise; of a rename or link."""
    rank: int = 0


def read_log(log: Path, run: Path, rank: int = 0) -> list[FileEvent]:
    """The events in their order; threads may have noted them in another."""
    found = []
    for line in log.read_text().splitlines():
        number, kind, size, path, target = line.split("\t")
        relative = [os.path.relpath(p, run.resolve()) if p else "" for p in (path, target)]
        found.append(FileEvent(int(number), kind, int(size), *relative, rank))
    assert sorted(e.number for e in found) == list(range(1, len(found) + 1))
    return sorted(found, key=lambda e: e.number)


def logged(
    server: Server, attempt: Attempt, arming: Arming, log: Path, *, ranks: int = 1
) -> tuple[Outcome, list[FileEvent]]:
    """Run an attempt and log the file events of one rank in the window of `arming`."""
    record = Path(f"{log}.events-{arming.rank}")
    arming.what, arming.log = "log", str(record)
    attempt.arming = arming
    outcome = server.run(attempt, log, ranks=ranks)
    return outcome, read_log(record, Path(attempt.directory), arming.rank)


@dataclass(frozen=True)
class Base:
    """A run that was preempted at step 4, with checkpoints 3 and 4, and the weights of its twin that never was."""

    run: Path
    lora: bool
    ranks: int
    hidden: int
    twin: str

    def attempt(self, **values: Any) -> Attempt:
        """An attempt of the same training."""
        return Attempt(**{"lora": self.lora, "hidden": self.hidden, **values})

    def copy(self, directory: Path) -> Path:
        """To be damaged, killed, or filled up."""
        return Path(shutil.copytree(self.run, directory, symlinks=True))


class Bases:
    """Makes each base once."""

    def __init__(self, server: Server, work: Path) -> None:
        self._server, self._work = server, work
        self._made: dict[tuple[bool, int, int], Base] = {}

    def __call__(self, lora: bool, ranks: int, hidden: int = 16) -> Base:
        key = (lora, ranks, hidden)
        if key not in self._made:
            run, twin = (self._work / f"{name}-{lora}-{ranks}-{hidden}" for name in ("base", "twin"))
            alone = Attempt(directory=str(twin), lora=lora, hidden=hidden)
            for attempt, code in ((replace(alone, directory=str(run), stop_at=4), 75), (alone, 0)):
                outcome = self._server.run(attempt, Path(f"{attempt.directory}.log"), ranks=ranks)
                assert outcome.codes == [code] * ranks, outcome.output
            assert resumable_steps(run) == [3, 4]
            self._made[key] = Base(run, lora, ranks, hidden, weights(twin))
        return self._made[key]
