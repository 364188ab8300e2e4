"""The lock where the file system has none: `flock` fails as on Lustre, by a library loaded before the C library."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outlast.errors import RunBusyError
from outlast.rundir import lease as lease_module
from outlast.rundir import lock as lock_module
from outlast.rundir.directory import RunDirectory
from outlast.rundir.lease import Lease
from outlast.rundir.lock import RunLock

from ..conftest import wait_for

NO_FLOCK = """
#include <errno.h>
#include <stdlib.h>
int flock(int fd, int operation) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }
"""
HOLDER = """
import sys, time
from pathlib import Path
from outlast.errors import RunBusyError
from outlast.rundir import lease
from outlast.rundir.directory import RunDirectory
from outlast.rundir.lock import RunLock
lease.BEAT_S, lease.STALE_S = 0.2, 2.0
lock = RunLock(RunDirectory(Path(sys.argv[1])))
try:
    lock.acquire(sys.argv[2])
except RunBusyError as error:
    print(error)
    sys.exit(2)
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no compiler")
    source = tmp_path_factory.mktemp("no-flock") / "flock.c"
    source.write_text(NO_FLOCK)
    built = source.with_suffix(".so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(built), str(source)], check=True)
    return built


@pytest.fixture
def start(tmp_path: Path, library: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts a process that takes the run's lock and keeps it until its input ends."""
    started: list[subprocess.Popen[str]] = []

    def start(owner: str, errno: int) -> "subprocess.Popen[str]":
        env = {**os.environ, "LD_PRELOAD": str(library), "FLOCK_ERRNO": str(errno)}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), owner], env=env, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("errno", [37, 38, 95], ids=["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_two_attempts_are_kept_apart_without_flock(
    start: Callable[..., "subprocess.Popen[str]"], tmp_path: Path, errno: int
) -> None:
    first = start("the first", errno)
    assert line(first) == "held"
    second = start("the second", errno)
    assert "is in use by the first" in line(second)
    assert second.wait(10) == 2
    first.communicate("", timeout=10)
    third = start("the third", errno)
    assert line(third) == "held", "given back"
    third.kill()
    fourth = start("the fourth", errno)
    assert line(fourth) == "held", "its holder was killed"
    assert not list(tmp_path.glob(".lease.*"))


def test_who_was_stopped_for_long_does_not_go_on_beside_its_successor(
    start: Callable[..., "subprocess.Popen[str]"],
) -> None:
    first = start("the first", 38)
    assert line(first) == "held"
    first.send_signal(signal.SIGSTOP)
    second = start("the second", 38)
    assert line(second) == "held"
    first.send_signal(signal.SIGCONT)
    assert first.wait(10) == 1
    assert "another process has taken" in line(first)
    second.communicate("", timeout=10)


def test_who_shares_a_lease_keeps_it_when_its_launcher_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_S", 0.1)
    monkeypatch.setattr(lease_module, "STALE_S", 1.0)
    launcher, rank, other = Lease(tmp_path / "lease"), None, Lease(tmp_path / "lease")
    assert launcher.take()
    rank = Lease(tmp_path / "lease", launcher.token)
    rank.keep()
    launcher._over.set()  # its thread is gone with its process
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        assert not other.take()
        time.sleep(0.05)
    assert other.seen_alive
    rank._over.set()
    wait_for(other.take, "the lease of those that are gone", 10)


def test_locks_that_hold_on_this_node_alone_get_a_lease_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lease_module.locks_reach_other_nodes(tmp_path)
    run = RunDirectory(tmp_path)
    monkeypatch.setattr(lock_module, "locks_reach_other_nodes", lambda path: False)
    lock = RunLock(run)
    lock.acquire("a test")
    assert set(lock.environment) == {"OUTLAST_LOCK_FD", "OUTLAST_LEASE"}
    with pytest.raises(RunBusyError):
        RunLock(run).acquire("another")
    lock.release()
    assert not run.lease.exists()
