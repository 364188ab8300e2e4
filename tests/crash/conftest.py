"""Fixtures of the crash tests, and the numbers that they print whatever the verbosity."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .harness import HERE, Bases, Server

NOTES: list[str] = []


@pytest.fixture(scope="session")
def note() -> Callable[[str], None]:
    """Adds a line to the summary at the end of the test session."""
    return NOTES.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if NOTES:
        terminalreporter.section("crash tests")
        for line in NOTES:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """What is built from `file_events.c`; None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    built = tmp_path_factory.mktemp("file_events") / "file_events.so"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, "-o", str(built), str(HERE / "file_events.c"), "-ldl"], check=True)
    return built


@pytest.fixture(scope="session")
def counting(library: Path | None) -> None:
    if library is None:
        pytest.skip("no C compiler (cc): file events can't be counted")


@pytest.fixture(scope="session")
def server(library: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("fork-server"), library)
    yield running
    running.close()


@pytest.fixture(scope="session")
def bases(server: Server, work: Path) -> Bases:
    return Bases(server, work)


@pytest.fixture(scope="session")
def work() -> Iterator[Path]:
    """A directory, in memory if that can be: a SIGKILL spares what was written, flushed or not."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="outlast-crash-", dir=memory if memory.is_dir() else None) as path:
        yield Path(path)
