import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from outlast.errors import Exit, RunBusyError
from outlast.files import write_atomically
from outlast.rundir.directory import RunDirectory
from outlast.rundir.lock import RunLock
from outlast.rundir.submission import submission_lock

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from outlast.rundir.directory import RunDirectory
from outlast.rundir.lock import RunLock
lock = RunLock(RunDirectory(Path(sys.argv[1])))
lock.acquire("a test")
if sys.argv[2] == "child":
    child = subprocess.Popen(["sleep", "60"], pass_fds=[lock.fd], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
elif sys.argv[2] == "helper":  # of a rank: forked, or started without closing what is open
    import os
    lock.keep_from_children()
    child = os.fork()
    if child:
        other = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
        print(child, other.pid, flush=True)
    else:
        os.close(1)  # whoever reads it would wait for the helper
else:
    print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def hold(run: RunDirectory, how: str) -> tuple["subprocess.Popen[str]", str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path), how], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    return holder, holder.stdout.readline().strip()


def kill(holder: "subprocess.Popen[str]") -> None:
    holder.kill()
    holder.communicate()


def test_paths_and_create(run: RunDirectory) -> None:
    run.create()
    run.create()
    assert run.checkpoints.is_dir()
    assert run.log(3, 1) == run.path / "logs" / "attempt-003.rank-1.log"


def test_a_helper_that_a_rank_has_started_holds_no_lock(run: RunDirectory) -> None:
    holder, helpers = hold(run, "helper")
    try:
        kill(holder)
        lock = RunLock(run)
        lock.acquire("the next attempt")
        lock.release()
    finally:
        for pid in map(int, helpers.split()):
            os.kill(pid, signal.SIGKILL)


def test_the_lock_is_refused_while_held_and_free_after_sigkill(run: RunDirectory) -> None:
    holder, _ = hold(run, "alone")
    try:
        with pytest.raises(RunBusyError, match=rf"a test \(pid {holder.pid} on ") as caught:
            RunLock(run).acquire("another")
        assert caught.value.exit_code == Exit.REFUSED
    finally:
        kill(holder)
    lock = RunLock(run)
    lock.acquire("another")
    lock.release()
    lock.release()


def test_a_child_that_inherited_the_lock_keeps_it(run: RunDirectory) -> None:
    holder, child = hold(run, "child")
    kill(holder)
    lock = RunLock(run)
    code = f"import sys; sys.argv[1:] = [{str(run.path)!r}, 'alone']\n" + HOLDER.replace("time.sleep(60)", "")
    # The holder's launcher is dead, so whoever comes waits for its ranks.
    waiting = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        time.sleep(1.5)
        assert waiting.poll() is None
    finally:
        os.kill(int(child), signal.SIGKILL)
    assert waiting.communicate(timeout=10)[0].strip() == "held"
    assert waiting.returncode == 0
    lock.acquire("the last")
    lock.release()


def test_the_lock_waits_for_a_holder_that_leaves(run: RunDirectory) -> None:
    holder, _ = hold(run, "alone")
    os.kill(holder.pid, signal.SIGSTOP)
    killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -KILL {holder.pid}"])
    lock = RunLock(run)
    lock.acquire("another", wait_s=20.0)
    lock.release()
    killer.wait()
    kill(holder)


def test_write_atomically_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_atomically(path, "old")
    write_atomically(path, "new", durable=False)
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    code = (
        "import sys; from pathlib import Path; from outlast.files import write_atomically\n"
        "for n in range(400): write_atomically(Path(sys.argv[1]), str(n % 10) * 100_000, durable=False)\n"
    )
    write_atomically(path, "0" * 100_000)
    with subprocess.Popen([sys.executable, "-c", code, str(path)]) as writer:
        while writer.poll() is None:
            text = path.read_text()
            assert len(text) == 100_000
            assert len(set(text)) == 1
    assert writer.returncode == 0


def test_a_failed_write_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_atomically(path, "old")

    def fails(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("remade", [False, True])
@pytest.mark.parametrize("kind", ["run", "submission"])
def test_who_has_waited_for_the_lock_of_a_directory_that_was_moved_is_refused(
    tmp_path: Path, kind: str, remade: bool
) -> None:
    """The holder moves the directory once the waiter's `flock` was tried, be another directory there then or not."""
    run = RunDirectory(tmp_path / "run")
    run.create()
    tried, said = threading.Event(), []
    really = fcntl.flock

    def flock(fd: int, how: int) -> None:
        if threading.current_thread() is waiter:
            tried.set()
        really(fd, how)

    def wait() -> None:
        try:
            if kind == "run":
                RunLock(run).acquire("the waiter", wait_s=30.0)
            else:
                with submission_lock(run.path):
                    said.append("had it")
        except RunBusyError as error:
            said.append(str(error))

    with ExitStack() as held, pytest.MonkeyPatch.context() as patch:
        held.enter_context(submission_lock(run.path))
        lock = RunLock(run)
        lock.acquire("a move")
        held.callback(lock.release)
        waiter = threading.Thread(target=wait)
        patch.setattr(fcntl, "flock", flock)
        waiter.start()
        assert tried.wait(20)
        os.rename(run.path, tmp_path / "elsewhere")
        if remade:
            run.create()
            run.lock.touch()
            (run.path / ".submit.lock").touch()
        held.close()
        waiter.join(20)
    assert len(said) == 1
    assert f"{run.path} was moved or deleted meanwhile, and nothing was begun in its place" in said[0]
    assert run.path.exists() == remade
