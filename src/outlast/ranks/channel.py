"""A connection from each rank to rank 0, beside the process groups.

A thread serves it, so a rank answers while its main thread computes, and also while that hangs in a collective. A rank
that dies closes its connection at once; one that is stopped, or whose node is unreachable, falls silent.
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
from .meeting import job_address

Message = dict[str, Any]

TICK_S = 0.25
CONNECT_S = 30.0
STRANGER_S = 1.0
"""Seconds that a new connection may take to say which rank it is."""
LONGEST = 4096
"""Largest message in bytes; a longer one was not sent by a rank."""

_open: list[socket.socket] = []


class ControlChannel:
    """One rank's end: rank 0 is connected to every other rank, and each of these to rank 0.

    Sending never blocks: what a rank that reads nothing has no buffer for is dropped.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.others = [] if world_size == 1 else list(range(1, world_size)) if rank == 0 else [0]
        """The ranks that this one is connected to."""
        self.hosts: list[str] = [""] * world_size
        self.connected = self._closed = False
        self._sockets: dict[int, socket.socket] = {}
        self._sending = threading.Lock()

    def connect(
        self, collectives: Collectives, receive: Callable[[int, Message], None], tick: Callable[[float], None]
    ) -> None:
        """Connect the ranks; all call it together, once. The callbacks run in the channel's thread.

        Args:
            receive: called with the sender's rank and what it has sent, or `{"gone": True}` when it has closed.
            tick: called about four times a second, with the seconds since the last time. A process that was itself
                stopped in between (a job that is suspended) is told of one tick, not of the time it has slept.

        Raises:
            ConnectionError: a rank can't be reached.
        """
        if self.world_size == 1 or self.connected:
            return
        server, secret = None, ("", 0, "")
        if self.rank == 0:
            listen, tell = job_address()
            family = socket.AF_INET6 if ":" in listen else socket.AF_INET
            server = socket.create_server((listen, 0), family=family, backlog=self.world_size + 16)
            secret = (tell, server.getsockname()[1], secrets.token_hex(16))
        address, port, token = collectives.from_rank_0(secret)
        problem = None
        try:
            if server is not None:
                with server:
                    self._accept(server, token)
            else:
                self._sockets[0] = self._call(address, port, token)
        except OSError as error:
            problem = f"rank {self.rank} on {current_node()}: no connection between it and rank 0: {error}"
        found = collectives.from_all((current_node(), problem))
        for _, problem in found:
            if problem is not None:
                raise ConnectionError(f"{problem}. Ranks need TCP between their nodes, as gloo does")
        self.hosts = [host for host, _ in found]
        self.connected = True
        _open.extend(self._sockets.values())
        threading.Thread(target=self._keep, args=(receive, tick), name="outlast-control-channel", daemon=True).start()

    def send(self, rank: int, **message: Any) -> None:
        """Send to one rank, from any thread."""
        connection = self._sockets.get(rank)
        if connection is not None:
            with self._sending, suppress(OSError):
                connection.send(json.dumps(message).encode() + b"\n", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def send_all(self, **message: Any) -> None:
        """Send to every rank that this one is connected to."""
        for rank in self.others:
            self.send(rank, **message)

    def close(self) -> None:
        """Close the connections, after telling the others that this is no accident."""
        if self.connected and not self._closed:
            self.send_all(bye=True)
            self._closed = True

    def _accept(self, server: socket.socket, token: str) -> None:
        deadline = time.monotonic() + CONNECT_S
        while len(self._sockets) < self.world_size - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            connection, _ = server.accept()
            connection.settimeout(STRANGER_S)
            with suppress(OSError, ValueError, KeyError, TypeError):  # a stranger's
                hello = json.loads(connection.recv(LONGEST))
                if secrets.compare_digest(str(hello["token"]), token):
                    self._sockets[int(hello["rank"])] = _ready(connection)
                    continue
            connection.close()

    def _call(self, address: str, port: int, token: str) -> socket.socket:
        connection = socket.create_connection((address, port), CONNECT_S)
        connection.sendall(json.dumps({"rank": self.rank, "token": token}).encode())
        return _ready(connection)

    def _keep(self, receive: Callable[[int, Message], None], tick: Callable[[float], None]) -> None:
        try:
            self._loop(receive, tick)
        except Exception:  # nobody else would hear of it, and the ranks depend on it
            traceback.print_exc()
            os._exit(1)

    def _loop(self, receive: Callable[[int, Message], None], tick: Callable[[float], None]) -> None:
        selector = selectors.DefaultSelector()
        unread: dict[int, bytes] = {}
        for rank, connection in self._sockets.items():
            selector.register(connection, selectors.EVENT_READ, rank)
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


def _ready(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _after_fork_in_child() -> None:
    # A DataLoader's worker outlives its killed parent for seconds; it must not keep the parent's connection open.
    for connection in _open:
        connection.close()
    _open.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
