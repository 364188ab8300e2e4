"""A line from each rank to rank 0, beside the process groups. A thread keeps it, so it answers while the main thread
computes, and also while it hangs in a collective.

A rank that dies closes its line at once; one that is stopped, or whose node is unreachable, falls silent.
"""

import json
import os
import secrets
import selectors
import socket
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from outlast.slurm.environment import current_node

from .collectives import Collectives

Message = dict[str, Any]

TICK_S = 0.25
CONNECT_S = 30.0
STRANGER_S = 1.0
"""How long a connection may be silent before it has said which rank it is."""
LONGEST = 4096
"""Bytes of a message; what is longer was not sent by a rank."""

_open: list[socket.socket] = []


class ControlChannel:
    """One rank's end: rank 0 has a line to every other rank, each of these one to rank 0.

    Sending never blocks: what a peer that reads nothing has no room for is dropped.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.others = [] if world_size == 1 else list(range(1, world_size)) if rank == 0 else [0]
        """The ranks that this one has a line to."""
        self.hosts: list[str] = [""] * world_size
        self.connected = self._closed = False
        self._sockets: dict[int, socket.socket] = {}
        self._sending = threading.Lock()

    def connect(
        self, collectives: Collectives, receive: Callable[[int, Message], None], tick: Callable[[float], None]
    ) -> None:
        """Open the lines; all ranks call it together, once. The callbacks run in the thread.

        Args:
            receive: called with the sender's rank and what it has sent, or `{"gone": True}` at the end of its line.
            tick: called about four times a second, with the seconds since the last time. A process that was itself
                stopped in between (a job that is suspended) is told of one tick, not of the time it has slept.

        Raises:
            ConnectionError: a rank can't be reached.
        """
        if self.world_size == 1 or self.connected:
            return
        server = _listen(self.world_size + 16) if self.rank == 0 else None
        secret = (server.getsockname()[1], secrets.token_hex(16)) if server is not None else (0, "")
        port, token = collectives.from_rank_0(secret)
        problem = None
        try:
            if server is not None:
                with server:
                    self._accept(server, token)
            else:
                self._sockets[0] = self._call(port, token)
        except OSError as error:
            problem = f"rank {self.rank} on {current_node()}: no connection between it and rank 0: {error}"
        found = collectives.from_all((current_node(), problem))
        for _, problem in found:
            if problem is not None:
                raise ConnectionError(f"{problem}. Ranks need TCP between their nodes, as gloo does")
        self.hosts = [host for host, _ in found]
        self.connected = True
        _open.extend(self._sockets.values())
        threading.Thread(target=self._keep, args=(receive, tick), name="outlast-peers", daemon=True).start()

    def send(self, rank: int, **message: Any) -> None:
        """Send to one rank, from any thread."""
        line = self._sockets.get(rank)
        if line is not None:
            with self._sending, suppress(OSError):
                line.send(json.dumps(message).encode() + b"\n", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def send_all(self, **message: Any) -> None:
        """Send to every rank that this one has a line to."""
        for rank in self.others:
            self.send(rank, **message)

    def close(self) -> None:
        """Close the lines, after a word that this is no accident."""
        if self.connected and not self._closed:
            self.send_all(bye=True)
            self._closed = True

    def _accept(self, server: socket.socket, token: str) -> None:
        deadline = time.monotonic() + CONNECT_S
        while len(self._sockets) < self.world_size - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            line, _ = server.accept()
            line.settimeout(STRANGER_S)
            with suppress(OSError, ValueError, KeyError, TypeError):  # a stranger's
                hello = json.loads(line.recv(LONGEST))
                if secrets.compare_digest(str(hello["token"]), token):
                    self._sockets[int(hello["rank"])] = _ready(line)
                    continue
            line.close()

    def _call(self, port: int, token: str) -> socket.socket:
        line = socket.create_connection((os.environ.get("MASTER_ADDR", "127.0.0.1"), port), CONNECT_S)
        line.sendall(json.dumps({"rank": self.rank, "token": token}).encode())
        return _ready(line)

    def _keep(self, receive: Callable[[int, Message], None], tick: Callable[[float], None]) -> None:
        try:
            self._loop(receive, tick)
        except Exception:  # nobody else would hear of it, and the ranks depend on it
            traceback.print_exc()
            os._exit(1)

    def _loop(self, receive: Callable[[int, Message], None], tick: Callable[[float], None]) -> None:
        selector = selectors.DefaultSelector()
        unread: dict[int, bytes] = {}
        for rank, line in self._sockets.items():
            selector.register(line, selectors.EVENT_READ, rank)
            unread[rank] = b""
        last = time.monotonic()
        while not self._closed:
            for key, _ in selector.select(TICK_S):
                rank, data = key.data, b""
                with suppress(OSError):
                    data = self._sockets[rank].recv(65536)
                *lines, unread[rank] = (unread[rank] + data).split(b"\n")
                for text in lines:
                    receive(rank, json.loads(text))
                if not data or len(unread[rank]) > LONGEST:
                    selector.unregister(self._sockets[rank])
                    receive(rank, {"gone": True})
            now = time.monotonic()
            if now - last >= TICK_S:
                tick(min(now - last, 2 * TICK_S))
                last = now


def _listen(backlog: int) -> socket.socket:
    """A port of rank 0's. Where all ranks are on this machine, by the address they were given, nobody else sees it.

    Not on what a host's name resolves to: on its own machine that may be a loopback address, elsewhere another.
    """
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    here = address if address in ("127.0.0.1", "localhost") else ""
    return socket.create_server((here, 0), backlog=backlog)


def _ready(line: socket.socket) -> socket.socket:
    line.settimeout(None)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return line


def _after_fork_in_child() -> None:
    # A DataLoader's worker outlives its killed parent for seconds; it must not keep the parent's line open.
    for line in _open:
        line.close()
    _open.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
