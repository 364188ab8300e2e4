"""A store for `torch.distributed` that serves none but the run's own ranks.

torch's TCPStore listens on all interfaces, and anybody who reaches it reads and writes its keys. This one listens on
one address. Both ends prove with `multiprocessing.connection` that they know the secret before anything else is said,
and what is said is JSON. Process groups use a store only while they are made, so it need not be fast.
"""

import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError, HashStore, Store  # type: ignore[attr-defined]

STRANGER_S = 5
"""Seconds that the other end may take for each part of its proof."""
POLL_S = (0.002, 0.05)
"""Seconds between two looks for a key that is waited for: at first, and at most."""
LONGEST = 1 << 24
"""Bytes of the longest message."""
_OPERATIONS = ("set", "get", "add", "check", "compare_set", "delete_key", "num_keys")

_open: list[Connection | socket.socket] = []


class Server:
    """Serves a store from threads of this process, which lasts as long as it does.

    Args:
        address: an address of this machine; nothing else is listened on, and it no longer once all clients have come.
        clients: how many there will be.
        all_here: called when so many have proved that they know the secret.
    """

    def __init__(self, address: str, secret: bytes, clients: int, all_here: Callable[[], None]) -> None:
        self.store = HashStore()
        self._secret, self._missing, self._all_here = secret, clients, all_here
        self._counting = threading.Lock()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family, backlog=clients + 16)
        self.port = int(self._socket.getsockname()[1])
        _open.append(self._socket)
        threading.Thread(target=self._accept, name="outlast-store", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(accepted,), name="outlast-store", daemon=True).start()

    def _close(self) -> None:
        """Listen no longer: whoever was to come is here."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # which ends the waiting for another, as closing alone does not
        self._socket.close()

    def _serve(self, accepted: socket.socket) -> None:
        with contextlib.suppress(Exception), _connection(accepted) as connection:
            deliver_challenge(connection, self._secret)
            answer_challenge(connection, self._secret)
            _without_limit(connection)
            _open.append(connection)
            with self._counting:
                self._missing -= 1
                if self._missing == 0:
                    self._close()
                    self._all_here()
            while True:
                connection.send_bytes(self._answer(connection.recv_bytes(LONGEST)))

    def _answer(self, request: bytes) -> bytes:
        try:
            operation, *arguments = json.loads(request)
            if operation not in _OPERATIONS:
                raise ValueError(f"no operation of a store: {operation}")
            if operation == "get" and not self.store.check(arguments):
                return b'{"missing": true}'
            if operation in ("set", "compare_set"):  # values are bytes, which JSON has not
                arguments[1:] = [value.encode("latin-1") for value in arguments[1:]]
            answer = getattr(self.store, operation)(*arguments)
            return json.dumps({"answer": answer.decode("latin-1") if isinstance(answer, bytes) else answer}).encode()
        except Exception as error:
            return json.dumps({"error": str(error)}).encode()


class RemoteStore(Store):
    """The store that another process serves.

    Raises:
        OSError: nobody serves it there.
        AuthenticationError: whoever does, does not know the secret.
    """

    def __init__(self, address: str, port: int, secret: bytes, timeout: timedelta) -> None:
        super().__init__()
        self.set_timeout(timeout)
        self._lock = threading.Lock()
        self._connection = _connection(socket.create_connection((address, port), STRANGER_S))
        answer_challenge(self._connection, secret)
        deliver_challenge(self._connection, secret)
        _without_limit(self._connection)
        _open.append(self._connection)

    def set(self, key: str, value: bytes | str) -> None:
        self._ask("set", key, _text(value))

    def get(self, key: str) -> bytes:
        self.wait([key])
        found: str = self._ask("get", key)
        return found.encode("latin-1")

    def add(self, key: str, amount: int) -> int:
        return int(self._ask("add", key, amount))

    def check(self, keys: list[str]) -> bool:
        return bool(self._ask("check", keys))

    def compare_set(self, key: str, expected: bytes | str, desired: bytes | str) -> bytes:
        found: str = self._ask("compare_set", key, _text(expected), _text(desired))
        return found.encode("latin-1")

    def delete_key(self, key: str) -> bool:
        return bool(self._ask("delete_key", key))

    def num_keys(self) -> int:
        return int(self._ask("num_keys"))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait for keys.

        Raises:
            DistStoreError: they have not come in time.
        """
        limit, pause = timeout or self.timeout, POLL_S[0]  # type: ignore[attr-defined]
        deadline = time.monotonic() + limit.total_seconds()
        while not self.check(keys):
            if time.monotonic() > deadline:
                raise DistStoreError(f"wait timeout after {limit.total_seconds():g} s for keys: {', '.join(keys)}")
            time.sleep(pause)
            pause = min(2 * pause, POLL_S[1])

    def _ask(self, *request: Any) -> Any:
        try:
            with self._lock:
                self._connection.send_bytes(json.dumps(request).encode())
                reply = json.loads(self._connection.recv_bytes(LONGEST))
        except (OSError, EOFError) as error:
            raise DistNetworkError(f"the store on rank 0 is gone: {error or 'its connection was closed'}") from None
        if "answer" not in reply:
            raise DistStoreError(f"{request[0]} {request[1:2]}: {reply.get('error', 'no such key')}")
        return reply["answer"]


def _text(value: bytes | str) -> str:
    return (value.encode() if isinstance(value, str) else value).decode("latin-1")


def _connection(connected: socket.socket) -> Connection:
    """Wrap a socket, on which each read and write may take :data:`STRANGER_S` for now."""
    connected.settimeout(None)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _limit(connected, STRANGER_S)
    return Connection(connected.detach())


def _without_limit(connection: Connection) -> None:
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        _limit(same, 0)


def _limit(connected: socket.socket, seconds: int) -> None:
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connected.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, 0))


def _after_fork_in_child() -> None:
    for opened in _open:  # a DataLoader's worker outlives its killed parent for seconds
        with contextlib.suppress(OSError):
            opened.close()
    _open.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
