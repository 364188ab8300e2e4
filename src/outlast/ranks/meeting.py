"""The ranks of an attempt, and the agents of its nodes, meet by a note in the run directory.

Rank 0 serves a private store on a port of the kernel's choice, at the address by which the job's nodes reach it.
Address, port and a secret, made anew each time, stand in a file that its owner alone may read; it goes when all have
come. So nothing about it can be guessed, and two jobs on one machine can't collide. Ranks that another launcher has
started (`torchrun`) meet as that launcher says.
"""

import importlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast.deletion import delete
from outlast.files import read_json
from outlast.slurm.environment import MEETING_ENV, address_of, current_step, export_ranks, other_nodes

from .collectives import rank, world_size

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

NOTE = ".meeting"
"""How the name of a note begins."""
POLL_S = 0.1
_LIMIT = timedelta(minutes=30)
"""As torch's own."""
_directory: list[Path] = []
"""Where this process's ranks meet; empty: as another launcher says."""
_met: dict[str, int] = {}
"""How often this process has met the others, by whom."""


def meet_in(directory: Path) -> None:
    """Have ranks that outlast has started meet in a run directory, and tell torch which rank this is.

    Raises:
        SlurmError: the first node has no address that resolves.
    """
    export_ranks()
    if "RANK" in os.environ and MEETING_ENV not in os.environ:  # by `torchrun`, say
        return
    here = world_size() == int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if here and "lo" in dict(socket.if_nameindex()).values():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are here: nothing of gloo needs to be open to others
    _directory[:] = [directory]
    if rank() == 0:
        for stale in directory.glob(f"{NOTE}-*"):  # of an attempt that was killed before all had come
            if time.time() - stale.stat().st_mtime > _LIMIT.total_seconds():  # else it may be a living attempt's
                delete(stale, inside=directory)
    if world_size() > 1 or "torch" in sys.modules:
        use_private_store()


def use_private_store() -> None:
    """Have `torch.distributed` make its process group by a private store, if outlast has started the ranks."""
    if _directory:
        handlers = importlib.import_module("torch.distributed.rendezvous")._rendezvous_handlers
        handlers["env"] = _by_note


def _by_note(url: str, timeout: timedelta = _LIMIT, **_: Any) -> "Iterator[tuple[Store, int, int]]":
    """What `init_process_group` calls to find the others; `url` may say which rank this is."""
    from urllib.parse import parse_qs, urlparse

    said = {name: int(values[0]) for name, values in parse_qs(urlparse(url).query).items() if name != "use_libuv"}
    own, ranks = said.get("rank", rank()), said.get("world_size", world_size())
    yield store_of(_directory[0], "ranks", own, ranks, timeout), own, ranks
    raise RuntimeError("ranks that have lost each other do not meet again in one attempt")


def store_of(directory: Path, who: str, number: int, count: int, timeout: timedelta = _LIMIT) -> "Store":
    """The store by which `count` processes meet; each calls it.

    Args:
        directory: the run's, which all share.
        who: `ranks` or `agents`.
        number: this one's; 0 serves.

    Raises:
        DistStoreError: 0 has not come in time.
    """
    if count == 1:
        from torch.distributed import HashStore  # type: ignore[attr-defined]

        return HashStore()
    _met[who] = _met.get(who, 0) + 1
    step = current_step()
    name = os.environ.get(MEETING_ENV) or (step.key if step else "")
    note = directory / f"{NOTE}-{who}-{_met[who]}-{name}"
    return _serve(note, count) if number == 0 else _find(note, timeout)


def _serve(note: Path, count: int) -> "Store":
    from .private_store import Server

    secret, (listen, tell) = secrets.token_bytes(32), job_address()

    def forget() -> None:
        with suppress(OSError):
            delete(note, inside=note.parent)

    server = Server(listen, secret, count - 1, forget)
    new = note.with_name(f"{note.name}.new")
    delete(new, inside=new.parent)
    with open(new, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        json.dump({"address": tell, "port": server.port, "secret": secret.hex()}, file)
    os.replace(new, note)
    return server.store


def _find(note: Path, timeout: timedelta) -> "Store":
    from torch.distributed import DistStoreError

    from .private_store import RemoteStore

    deadline, problem = time.monotonic() + timeout.total_seconds(), "it is not there"
    while time.monotonic() < deadline:
        os.listdir(note.parent)  # on NFS this makes a new file seen at once
        if isinstance(told := read_json(note), dict):
            try:
                return _keep(RemoteStore(told["address"], told["port"], bytes.fromhex(told["secret"]), timeout))
            except (OSError, EOFError, AuthenticationError, KeyError, TypeError, ValueError) as error:
                problem = repr(error)  # of an attempt that was killed, or its port is another's by now
        time.sleep(POLL_S)
    raise DistStoreError(
        f"timeout: rank 0 was not met by {note} after {timeout.total_seconds():g} s ({problem}): do all nodes share "
        "this directory, and is there TCP between them?"
    )


def _keep(store: "Store") -> "Store":
    """Keep a store alive as long as the process: torch holds it from C++ alone."""
    _stores.append(store)
    return store


_stores: list[Any] = []


def job_address() -> tuple[str, str]:
    """Where rank 0 listens, and where others reach it: the address of its routes to the job's nodes.

    That is loopback if all ranks are on this machine. Not what a host's name resolves to: on its own machine that may
    be a loopback address, elsewhere another.
    """
    others = other_nodes()
    if not others:
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == world_size() or address in ("127.0.0.1", "localhost")
        return ("127.0.0.1", "127.0.0.1") if here else ("", address)
    family, kind, _, _, place = socket.getaddrinfo(address_of(others[0]), 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # sends nothing
        own = str(probe.getsockname()[0])
    return own, own
