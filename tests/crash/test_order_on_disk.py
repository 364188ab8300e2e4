"""What a SIGKILL can't show and a power loss can: what one save flushes to disk, and in which order."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from .harness import Bases, FileEvent, Server
from .windows import log_window

pytestmark = pytest.mark.usefixtures("counting")

STAGING, TRASH = "checkpoints/.staging/", "checkpoints/.deleted/"
Log = list[FileEvent]


@pytest.fixture(scope="module")
def log_of(bases: Bases, server: Server, work: Path) -> Callable[[str, bool, int, int], Log]:
    made: dict[tuple[str, bool, int, int], Log] = {}

    def log(window: str, lora: bool, ranks: int, rank: int) -> Log:
        key = (window, lora, ranks, rank)
        if key not in made:
            directory = work / f"order-{'-'.join(map(str, key))}"
            made[key] = log_window(server, bases(lora, ranks), window, directory, rank)
        return made[key]

    return log


def numbers(log: Iterable[FileEvent], kinds: str, path: str) -> list[int]:
    return [e.number for e in log if e.kind in kinds.split() and path in (e.path, e.target)]


def publishing(log: Log) -> FileEvent:
    (found,) = [
        e for e in log if e.kind == "rename" and e.path.startswith(STAGING) and not e.target.startswith(STAGING)
    ]
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("window", ["periodic", "emergency", "final"])
def test_a_checkpoint_is_on_disk_before_it_is_published(
    window: str, lora: bool, ranks: int, log_of: Callable[[str, bool, int, int], Log]
) -> None:
    """Each rank flushes what it wrote: on a network file system nobody else can."""
    log = log_of(window, lora, ranks, 0)
    published = publishing(log)
    logs = [[e for e in log if e.number < published.number], *(log_of(window, lora, ranks, r) for r in range(1, ranks))]
    for own in logs:
        staged = [e for e in own if e.path.startswith(STAGING)]
        written = {e.path for e in staged if e.kind in ("create", "write", "truncate")}
        assert written or (window == "final" and own is not logs[0])
        for path in written:
            last = max(numbers(staged, "create write truncate", path))
            assert any(n > last for n in numbers(staged, "fsync", path)), f"{path} is not flushed after its last write"
            names = [e for e in staged if e.kind in ("create", "rename") and path in (e.path, e.target)]
            flushed = numbers(staged, "fsync", os.path.dirname(path))
            assert any(n > names[-1].number for n in flushed), f"the directory of {path} is not flushed"
    parent = os.path.dirname(published.target) or "."
    after = [n for n in numbers(log, "fsync", parent) if n > published.number]
    assert after, f"{parent} is not flushed after the rename"
    told = [n for n in numbers(log, "write", "ledger.jsonl") if n > published.number]
    assert after[0] < told[0], "the ledger says so before it is true"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("window", ["periodic", "emergency", "final"])
def test_the_manifest_is_written_last(window: str, ranks: int, log_of: Callable[[str, bool, int, int], Log]) -> None:
    log = log_of(window, True, ranks, 0)
    published = publishing(log)
    staged = [e for e in log if e.path.startswith(STAGING) and e.number < published.number]
    (sealing,) = [e for e in staged if e.kind == "rename" and e.target.endswith("/manifest.json")]
    writes = [e for e in staged if e.kind in ("write", "truncate", "create")]
    assert writes[-1].path == sealing.path
    others = [
        e for e in staged if e.kind == "fsync" and e.path.startswith(published.path + "/") and e.path != sealing.path
    ]
    first = min(numbers(staged, "create", sealing.path))
    assert others
    assert all(e.number < first for e in others), "a file is flushed only after the manifest that vouches for it"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("window", ["periodic", "emergency"])
def test_a_deletion_begins_with_the_manifest(
    window: str, ranks: int, log_of: Callable[[str, bool, int, int], Log]
) -> None:
    log, place = log_of(window, True, ranks, 0), "checkpoints/checkpoint-3"
    unsealed = min(numbers(log, "rename unlink", f"{place}/manifest.json"))
    touched = [e for e in log if e.path.startswith((place, TRASH + "checkpoint-3"))]
    assert touched[0].number == unsealed, "something else goes before the manifest"
    assert (touched[1].kind, touched[1].path) == ("fsync", place), "its going is not flushed at once"
    unlinked = [e.number for e in touched if e.kind in ("unlink", "rmdir")]
    assert len(unlinked) > 5
    (moved,) = numbers(log, "rename", place)
    assert any(moved < n < min(unlinked) for n in numbers(log, "fsync", "checkpoints"))
    if window == "periodic":
        published = publishing(log)
        flushed = [n for n in numbers(log, "fsync", "checkpoints") if n > published.number]
        assert flushed[0] < unsealed, "the old one goes before the new one is on disk"


def test_lightening_begins_with_the_manifest(log_of: Callable[[str, bool, int, int], Log]) -> None:
    log, place = log_of("lightening", True, 1, 0), "checkpoints/checkpoint-3"
    touched = [e for e in log if e.path.startswith(place)]
    (sealed,) = numbers(touched, "rename", f"{place}/manifest.json")
    unlinked = [e for e in touched if e.kind == "unlink"]
    assert {os.path.basename(e.path) for e in unlinked} >= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    written = next(e for e in touched if e.number == sealed).path
    assert any(max(numbers(touched, "write", written)) < n < sealed for n in numbers(touched, "fsync", written))
    assert any(sealed < n < unlinked[0].number for n in numbers(touched, "fsync", place))
