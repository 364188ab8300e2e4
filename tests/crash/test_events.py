"""That `file_events.c` sees every call that changes a file of the run: the kernel's list, from strace, is the same."""

import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..conftest import wait_for
from .harness import Bases, Server
from .windows import WINDOWS, log_window

pytestmark = pytest.mark.usefixtures("counting")

KINDS = {
    "create": "open openat creat",
    "write": "write pwrite64 writev pwritev pwritev2 sendfile copy_file_range splice",
    "truncate": "truncate ftruncate fallocate",
    "fsync": "fsync fdatasync",
    "rename": "rename renameat renameat2",
    "unlink": "unlink unlinkat",
    "rmdir": "rmdir",
    "mkdir": "mkdir mkdirat",
    "link": "link linkat symlink symlinkat",
    "mmap": "mmap",
    "ring": "io_uring_enter io_submit",
}
KIND_OF = {call: kind for kind, calls in KINDS.items() for call in calls.split()}


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("window", WINDOWS)
def test_nothing_escapes(window: str, lora: bool, bases: Bases, server: Server, work: Path) -> None:
    base, directory = bases(lora, 1), work / f"strace-{window}-{lora}"
    trace = Path(f"{directory}.strace")
    server.hang_up()
    with strace(server.pid, trace):
        log = log_window(server, base, window, directory, 0)
    seen = Counter(event.kind for event in log)
    assert seen["write"] > 3
    assert kernel_events(trace.read_text(), directory) == seen


def test_each_rank_flushes_what_no_writer_reported_when_all_have_written(
    bases: Bases, server: Server, work: Path
) -> None:
    """Rank 1 writes no file of the finished model: it must not meet those of rank 0 while they are being written."""
    directory = work / "flushed-by-rank-1"
    log = log_window(server, bases(False, 2), "final", directory, 1)
    names = {path.name for path in (directory / "final").glob("*.json")} - {"manifest.json"}
    assert names
    staged = "checkpoints/.staging/final"
    assert sorted((e.kind, e.path) for e in log) == sorted(
        ("fsync", path) for path in [staged, *(f"{staged}/{name}" for name in names)]
    )


@contextmanager
def strace(pid: int, output: Path) -> Iterator[None]:
    """Traces a process, and what it forks meanwhile."""
    if shutil.which("strace") is None:
        pytest.skip("no strace: file events can't be compared with the kernel's")
    command = ["strace", "-f", "-y", "-s", "0", "-e", "signal=none", "-e", f"trace={','.join([*KIND_OF, 'close'])}"]
    process = subprocess.Popen(
        [*command, "-o", str(output), "-p", str(pid)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        first = process.stderr.readline()
        if "attached" not in first:
            pytest.skip(f"strace may not attach: {first}")
        yield
        # what the forked rank did is in the file when its end is
        wait_for(lambda: "+++ exited" in output.read_text(), "the trace of the rank", 20)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
        process.stderr.close()


def kernel_events(trace: str, run: Path) -> "Counter[str]":
    """Kinds of the system calls on the run's files between the arming and the disarming."""
    found: Counter[str] = Counter()
    armed = False
    for line in trace.splitlines():
        match = re.match(r"\d+ +(\w+)\((.*)", line)
        if match is None:
            continue  # the end of a call that was interrupted in the trace, or of a process
        call, arguments = match.groups()
        if f"{run}.log.events-0" in arguments:
            armed = call != "close"
            continue  # the library's own log
        if not armed or call == "close" or not touches(run, arguments):
            continue
        kind = KIND_OF[call]
        if kind == "create" and not re.search(r"O_CREAT|O_TRUNC", arguments):
            continue
        if kind == "mmap" and not ("PROT_WRITE" in arguments and "MAP_SHARED" in arguments):
            continue
        found["rmdir" if "AT_REMOVEDIR" in arguments else kind] += 1
    return found


def touches(run: Path, arguments: str) -> bool:
    """Whether a path, or a descriptor's path, lies in the run directory."""
    return re.search(rf"{re.escape(str(run))}[/\"> ]", arguments) is not None
