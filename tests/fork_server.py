"""Starts Python programs fast: imports the training libraries once, then forks a process for each program.

`python -m tests.fork_server SOCKET`. A request has the arguments, directory and environment of a process, as `Popen`
takes them; the answer is its pid and then its exit code. What such a process starts by `Popen` and is Python as well,
such as the ranks of `outlast train`, is forked from it in the same way. All are real processes: with parents, signals,
sessions, open files and a line of their own in `ps`. What differs from a start by `exec` is that modules are imported
already, and that the processes hash strings alike. For each way to start ranks there are tests that start them by
`exec`, and so are all those of early signals (`Command(..., forked=False)`).
"""

import atexit
import concurrent.futures.thread
import contextlib
import ctypes
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

OUTLAST = str(Path(sys.executable).with_name("outlast"))
PROGRAMS = ("outlast.rank", "outlast.results.program", "outlast.jobs.evaluation.program")
"""What the launcher starts as programs of their own."""
PADDING = "FORK_SERVER_PADDING"
"""A variable that is there to make room: a forked process writes its own environment over that of the server."""
MODULES = (
    *(
        "outlast.results.program",
        "outlast.rank",
        "outlast.agent",
        "outlast.script",
        "outlast.launcher.cli",
        "outlast.jobs.sft",
    ),
    *("torch.distributed", "transformers.trainer", "trl.trainer.sft_trainer", "peft", "datasets", "accelerate"),
    *("accelerate.commands.launch", "outlast.huggingface.trainer"),
)
OF_DEEPSPEED = ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer")
"""The second, which an engine imports to look at its optimizer, imports all of torch's compiler."""
_PR_SET_PDEATHSIG = 1


def main(path: str) -> None:
    _die_with_parent()
    remember_versions()
    for name in (*MODULES, *(OF_DEEPSPEED if importlib.util.find_spec("deepspeed") else ())):
        importlib.import_module(name)
    subprocess.Popen._execute_child = _start_child  # type: ignore[attr-defined]
    warm_up()
    _remember_data()
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen()
        os.rename(f"{path}.new", path)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _serve(connection)
            connection.close()


def remember_versions() -> None:
    """Have each installed package's metadata parsed once: the libraries and a manifest ask for its version often."""
    importlib.metadata.version = functools.cache(importlib.metadata.version)


def warm_up() -> None:
    """Compute what each process of a Trainer would compute for itself: what is known of models and methods."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from outlast.checkpoint.manifest import versions
    from outlast.huggingface.own_state import _attributes_of_trainer

    get_checkpoint_conversion_mapping("")
    _attributes_of_trainer()
    versions()


def _remember_data() -> None:
    """Read the embedded data, which the standard library's documentation is, once."""
    from outlast.jobs.training import python_docs

    found = functools.cache(lambda root, read=python_docs._docstrings: tuple(read(root)))
    python_docs._docstrings = found  # type: ignore[assignment]
    python_docs.pairs(1)


def _serve(connection: socket.socket) -> NoReturn:
    """Start one process, say its pid, wait for it, and say its exit code."""
    _die_with_parent()
    size = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
    text, fds, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(text + connection.recv(size - 1, socket.MSG_WAITALL))
    pid = os.fork()
    if pid == 0:
        _become(request["argv"], request["env"], dict(enumerate(fds)), cwd=request["cwd"], session=request["session"])
    for fd in fds:
        os.close(fd)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.sendall(f"{code}\n".encode())
    os._exit(0)


def _become(
    argv: list[str], env: dict[str, str], streams: dict[int, int], kept: Any = (), *, cwd: Any, session: bool
) -> NoReturn:
    """Turn this forked process into the one that `argv` asks for, as `exec` would; and run it to its end."""
    code: Any = 1
    try:
        if session:
            os.setsid()
        _close_files(streams, set(kept))
        if cwd is not None:
            os.chdir(cwd)
        os.environ.clear()
        _show(argv if argv[0] == sys.executable else [sys.executable, *argv], env)
        os.environ.update(env)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if argv[0] != OUTLAST:  # the launcher knows nothing of either
            _set_up_libraries()
        gc.freeze()
        concurrent.futures.thread._threads_queues.clear()  # of threads that were not forked with this one
        sys.orig_argv = list(argv)
        _run(argv, env)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    except BaseException as error:
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as leaving:  # the script's own hook
            code = leaving.code
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _run(argv: list[str], env: dict[str, str]) -> None:
    safe = "PYTHONSAFEPATH" in env
    arguments = argv if argv[0] == OUTLAST else argv[1:]
    while arguments[0] in ("-u", "-P"):
        safe |= arguments[0] == "-P"
        arguments = arguments[1:]
    first, *rest = arguments
    here = os.getcwd() if first == "-m" else str(Path(first).parent)
    there = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = ([] if safe else [here]) + there
    for path in there:
        if os.path.exists(customize := os.path.join(path, "sitecustomize.py")):
            runpy.run_path(customize)
    if first == "-m":
        sys.argv = rest
        sys.exit(importlib.import_module(rest[0])._command())
    sys.argv = arguments
    if first == OUTLAST:
        sys.exit(importlib.import_module("outlast.launcher.cli").main())
    runpy.run_path(first, run_name="__main__")


def _start_child(
    self: Any, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, pass_fds: Any, cwd: Any, env: Any,
    startupinfo: Any, creationflags: int, shell: bool, *rest: Any,
) -> None:  # fmt: skip
    """What `Popen` calls to start a process; `rest` begins with its pipes and says further how to."""
    argv = [args] if isinstance(args, str) else [os.fspath(arg) for arg in args]
    flags = [arg for arg in argv[1:] if arg not in ("-u", "-P")]
    ours = (flags[:1] == ["-m"] and flags[1] in PROGRAMS) or (flags[:1] and flags[0].endswith(".py"))
    if shell or executable or preexec_fn or argv[0] not in (sys.executable, OUTLAST) or not ours:
        _by_exec(
            self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *rest
        )
        return
    (p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite), session = rest[:6], rest[11]
    streams = {0: p2cread, 1: c2pwrite, 2: errwrite}
    sys.stdout.flush()
    sys.stderr.flush()
    self.pid = os.fork()
    if self.pid == 0:
        used = {number: fd if fd != -1 else number for number, fd in streams.items()}
        _become(argv, dict(os.environ if env is None else env), used, pass_fds, cwd=cwd, session=session)
    self._child_created = True
    self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


_by_exec = subprocess.Popen._execute_child  # type: ignore[attr-defined]


def _close_files(streams: dict[int, int], kept: set[int]) -> None:
    """Leave open the three standard streams and `kept` alone."""
    copies = {number: os.dup(fd) for number, fd in streams.items()}
    for number, fd in copies.items():
        os.dup2(fd, number)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):  # the one that the list was read from
                os.close(int(name))
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__ = tuple(
        os.fdopen(fd, mode, buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
        for fd, mode in enumerate("rww")
    )


def _set_up_libraries() -> None:
    """Give the libraries what they would have set up on import, from the process's own surroundings."""
    import numpy
    import torch

    numpy.random.seed()
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
    if threads != torch.get_num_threads():  # a call that changes nothing would start a thread
        torch.set_num_threads(threads)


def _show(argv: list[str], env: dict[str, str]) -> None:
    """Write arguments and environment where `/proc` and `ps` look for them: over those of the server, padded with
    slashes, which change no path, and NULs."""
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    argument, arguments_end, variable, variables_end = (int(field) for field in fields[45:49])
    size = arguments_end - argument
    text = b"".join(os.fsencode(arg) + b"\0" for arg in argv)
    ctypes.memmove(argument, text[:size].rjust(size, b"/"), size)
    size = variables_end - variable
    text = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in env.items())
    ctypes.memmove(variable, text[:size].ljust(size, b"\0"), size)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
