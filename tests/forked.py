"""Processes that the fork server (`fork_server.py`) starts, handled as those of `subprocess` are."""

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from .fork_server import PADDING


@functools.cache
def _server() -> str:
    """The socket of this test process's server, which ends with it."""
    directory = tempfile.TemporaryDirectory(prefix="outlast-fork-")
    path = str(Path(directory.name) / "socket")
    log = open(Path(directory.name) / "log", "w+b")  # noqa: SIM115  (the server writes to it until it ends)
    server = subprocess.Popen(
        ["/" * 4000 + sys.executable, "-m", "tests.fork_server", path],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", PADDING: "x" * 16_000},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
    )

    def end() -> None:
        server.kill()
        server.wait()
        log.close()
        directory.cleanup()

    atexit.register(end)
    deadline = time.monotonic() + 300
    while not os.path.exists(path):
        if server.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            raise AssertionError(f"the fork server does not answer:\n{log.read().decode()}")
        time.sleep(0.05)
    return path


class Forked:
    """A process, with the part of the interface of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: IO[Any] | int = subprocess.DEVNULL,
        stderr: IO[Any] | int = subprocess.STDOUT,
        start_new_session: bool = False,
    ) -> None:
        self.args = [str(argument) for argument in argv]
        self.returncode: int | None = None
        request = {
            "argv": self.args,
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "session": start_new_session,
        }
        text = json.dumps(request).encode()
        with open(os.devnull, "r+b") as null:
            out = null if stdout == subprocess.DEVNULL else stdout
            err = out if stderr == subprocess.STDOUT else stderr
            fds = [stream if isinstance(stream, int) else stream.fileno() for stream in (null, out, err)]
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(_server())
                connection.sendall(len(text).to_bytes(4, "big"))
                sent = socket.send_fds(connection, [text], fds)
                connection.sendall(text[sent:])
                self._answers = connection.makefile("rb", buffering=0)
        weakref.finalize(self, self._answers.close)
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.returncode = int(self._answers.readline())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code.

        Raises:
            TimeoutExpired: it runs on.
        """
        if self.returncode is None and not select.select([self._answers], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    argv: Sequence[str | Path], cwd: Path, *, env: Mapping[str, str] | None = None, limit_s: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, its output captured, as `subprocess.run` does."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = Forked(argv, cwd=cwd, env=env, stdout=out, stderr=err)
        try:
            process.wait(limit_s)
        finally:
            process.kill()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(process.args, process.wait(), out.read(), err.read())
