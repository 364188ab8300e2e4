"""How ranks meet: by a store that listens on one address, and serves none who does not know the secret."""

import json
import pickle
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from outlast.ranks import meeting
from outlast.ranks.private_store import RemoteStore, Server

SECRET = b"s" * 32
SHORT = timedelta(seconds=5)


@pytest.fixture
def all_here() -> threading.Event:
    return threading.Event()


@pytest.fixture
def server(all_here: threading.Event) -> Iterator[Server]:
    serving = Server("127.0.0.1", SECRET, 1, all_here.set)
    yield serving
    serving._socket.close()


def test_it_stores(server: Server, all_here: threading.Event) -> None:
    store: Any = RemoteStore("127.0.0.1", server.port, SECRET, SHORT)
    assert all_here.wait(5)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))
    everything = bytes(range(256))
    prefixed = dist.PrefixStore("group", store)
    prefixed.set("key", everything)
    assert prefixed.get("key") == everything
    assert server.store.get("group/key") == everything
    assert (store.add("count", 2), store.add("count", 3), server.store.add("count", 0)) == (2, 5, 5)
    assert store.check(["group/key"])
    assert not store.check(["group/key", "nothing"])
    assert store.compare_set("other", "", "first") == b"first"
    assert store.compare_set("other", "first", "second") == b"second"
    assert store.delete_key("other")
    assert store.num_keys() == 2
    threading.Timer(0.1, lambda: server.store.set("late", "here")).start()
    assert store.get("late") == b"here"
    with pytest.raises(dist.DistStoreError, match="timeout"):
        store.wait(["never"], timedelta(milliseconds=20))


def test_a_stranger_is_turned_away_and_holds_up_nobody(server: Server, all_here: threading.Event) -> None:
    silent = socket.create_connection(("127.0.0.1", server.port))
    with socket.create_connection(("127.0.0.1", server.port)) as rude:
        rude.sendall(pickle.dumps({"default_pg/0": "mine"}) * 100)
    with pytest.raises(AuthenticationError):
        Client(("127.0.0.1", server.port), authkey=b"guessed")
    with pytest.raises(Exception, match=r"."):
        dist.TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=1)).set("key", "theirs")
    assert not all_here.is_set()
    store = RemoteStore("127.0.0.1", server.port, SECRET, SHORT)
    assert store.num_keys() == 0
    silent.close()


def test_only_operations_of_a_store_are_carried_out(server: Server) -> None:
    store = RemoteStore("127.0.0.1", server.port, SECRET, SHORT)
    for request in ("__class__", "wait", "list_keys"):
        with pytest.raises(dist.DistStoreError, match="no operation of a store"):
            store._ask(request, "x")


def test_it_listens_on_one_address_at_a_port_of_the_kernels(server: Server) -> None:
    found = [c.laddr for c in psutil.Process().net_connections() if c.status == "LISTEN"]
    assert ("127.0.0.1", server.port) in found
    assert not [address for address in found if address[0] in ("0.0.0.0", "::")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory in which one process takes the parts of two."""
    for name, value in {"MEETING": "name", "LOCK_FD": None}.items():
        monkeypatch.setenv(f"OUTLAST_{name}", value) if value else None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(meeting, "_met", {})
    return tmp_path


def meet(directory: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(meeting, "_met", {})  # as in a process of its own
    return meeting.store_of(directory, "ranks", number, 2, SHORT)


def test_they_meet_by_a_note_that_goes_when_all_have_come(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = here / ".meeting-ranks-1-name"
    stale.write_text(json.dumps({"address": "127.0.0.1", "port": 1, "secret": "00"}))
    first = meet(here, 0, monkeypatch)
    [note] = here.iterdir()
    assert note == stale
    assert note.stat().st_mode & 0o777 == 0o600
    told = json.loads(note.read_text())
    assert (told["address"], len(told["secret"])) == ("127.0.0.1", 64)
    second = meet(here, 1, monkeypatch)
    second.set("key", "value")
    assert first.get("key") == b"value"
    for _ in range(100):
        if not note.exists():
            break
        threading.Event().wait(0.05)
    assert not list(here.iterdir())


def test_who_is_not_met_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / ".meeting-ranks-1-name").write_text(json.dumps({"address": "127.0.0.1", "port": 1, "secret": "00"}))
    monkeypatch.setattr(meeting, "_met", {})
    with pytest.raises(dist.DistStoreError, match=r"rank 0 was not met by .*refused.*do all nodes share"):
        meeting.store_of(here, "ranks", 1, 2, timedelta(seconds=0.3))


def test_one_rank_needs_no_port(here: Path) -> None:
    store: Any = meeting.store_of(here, "ranks", 0, 1)
    store.set("key", "value")
    assert store.get("key") == b"value"
    assert not list(here.iterdir())
