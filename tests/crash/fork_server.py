"""Starts ranks fast: imports the training libraries once, then forks a process for each rank of each attempt.

`python -m tests.crash.fork_server SOCKET`. Each connection gets a process of its own, which runs one attempt at a time:
a request is a line of JSON (:func:`serve`), the answer the exit codes of its ranks. A forked rank is a process like any
other, with the environment that a launcher would give it; what it saves is start-up time.
"""

import contextlib
import ctypes
import faulthandler
import gc
import importlib.util
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any, NoReturn

from ..fork_server import remember_versions, warm_up

_PR_SET_PDEATHSIG = 1


def main(path: str) -> None:
    _die_with_parent()
    remember_versions()
    if importlib.util.find_spec("deepspeed"):
        import deepspeed  # noqa: F401  (accelerate imports it where it is installed)
    import jinja2  # noqa: F401  (for the model card of an adapter)
    import torch

    import outlast.checkpoint.store
    import outlast.huggingface.trainer
    import outlast.script  # noqa: F401

    from . import training

    torch.set_num_threads(1)
    warm_up()
    training.warm_up()
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                serve(connection)
            connection.close()


def serve(connection: socket.socket) -> NoReturn:
    """Answer requests until the other side is gone.

    A request has `attempt` (see `training.Attempt`), `ranks`, `log` (a path prefix), `linger_s` (how long the others
    may live when one rank has died; 0: they are killed with it, as `srun --kill-on-bad-exit` does) and `limit_s`.
    """
    _die_with_parent()
    with connection.makefile("rw") as lines:
        for line in lines:
            request = json.loads(line)
            store, environment = _serve_rendezvous() if request["ranks"] > 1 else (None, {})
            answer = _run(request, environment)
            if store is not None:
                os.kill(store, signal.SIGKILL)
                os.waitpid(store, 0)
            lines.write(json.dumps(answer) + "\n")
            lines.flush()
    os._exit(0)


def _run(request: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    ranks = range(request["ranks"])
    pids = [_fork_rank(rank, request, environment) for rank in ranks]
    watch = {os.pidfd_open(pid): rank for rank, pid in enumerate(pids)}
    codes: dict[int, int] = {}
    deadline, hung, hopeless = time.monotonic() + request["limit_s"], False, False
    while watch:
        poll = select.poll()
        for fd in watch:
            poll.register(fd, select.POLLIN)
        ready = poll.poll(None if hopeless else max(0, deadline - time.monotonic()) * 1000)
        if not ready:
            hung = hung or request["linger_s"] > 0 or min(codes.values(), default=0) >= 0
            _kill([pids[rank] for rank in watch.values()])
            hopeless = True
        for fd, _ in ready:
            os.close(fd)
            rank = watch.pop(fd)
            codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pids[rank], 0)[1])
            if codes[rank] < 0:
                deadline = min(deadline, time.monotonic() + request["linger_s"])
    return {"codes": [codes[rank] for rank in ranks], "hung": hung}


def _fork_rank(rank: int, request: dict[str, Any], environment: dict[str, str]) -> int:
    fd = os.open(f"{request['log']}.rank-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    pid = os.fork()
    if pid:
        os.close(fd)
        return pid
    code = 1
    try:
        _die_with_parent()
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        faulthandler.dump_traceback_later(request["limit_s"] * 0.9)
        if request["ranks"] > 1:
            size = str(request["ranks"])
            os.environ.update(environment, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, RANK=str(rank), LOCAL_RANK=str(rank))
        from .attempt import Arming, Attempt
        from .training import main

        values = request["attempt"]
        arming = values["arming"] and Arming(**values["arming"])
        main(Attempt(**{**values, "arming": arming}))
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve_rendezvous() -> tuple[int, dict[str, str]]:
    """A store on a free port, in a process of its own as `torchrun`'s agent has one, and what tells the ranks of it."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        _die_with_parent()
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writable, str(store.port).encode())
        os.close(writable)
        signal.pause()
        os._exit(0)
    os.close(writable)
    with open(readable) as pipe:
        port = pipe.read()
    # that no rank serves the store spares them to agree on a port that is free now and taken a moment later
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return pid, environment | {"GLOO_SOCKET_IFNAME": "lo"}


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
