import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from outlast import clock
from outlast.checkpoint.interval import LOWER_S, SaveInterval
from outlast.config.checkpoint import CheckpointSection
from outlast.rundir.attempts import attempts, finished, next_attempt
from outlast.rundir.ledger import EVENTS, AttemptNumber, Ledger, Recorder


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


def started(ledger: Ledger, attempt: int) -> None:
    ledger.append("attempt_started", attempt, job_id=None, restart_count=0, hosts=["a"], world_size=2, versions={})


def test_a_ledger_that_does_not_exist_is_empty(ledger: Ledger) -> None:
    assert ledger.read() == []
    assert next_attempt([]) == 1
    assert finished([]) is None


VALUES = {"job_id": "7", "hosts": ["a"], "versions": {}, "checkpoint": "c", "name": "TERM", "metrics": {}, "kind": "k",
          "reason": "r", "cause": "failed", "how": "late", "notes": [], "objects": {}}  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
def test_a_line_that_lacks_a_field_or_has_it_of_another_type_is_left_out(ledger: Ledger, event: str) -> None:
    """What reads the ledger relies on its fields: one flipped bit must not take `report` away."""
    fields = {name: VALUES.get(name, 1) for name in EVENTS[event]}
    ledger.append(event, 1, **fields)
    whole = json.loads(ledger.path.read_text())
    lines = [{key: value for key, value in whole.items() if key != name} for name in ("time", "attempt", *fields)]
    lines += [whole | {"attempt": "1"}, whole | {"time": None}, whole | {"event": 1}]
    lines += [
        whole | {name: 1.5 if name in VALUES else "x"} for name in {"step", "bytes", "metrics", "hosts"} & fields.keys()
    ]
    for line in lines:
        with ledger.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    assert [line for line in ledger.read() if line != whole] == []
    ledger.append("gave_up", 2, reason="r")
    assert [line["event"] for line in ledger.read()][-1] == "gave_up"


def test_append_refuses_unknown_events_and_missing_fields(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match=r"'exploded': unknown"):
        ledger.append("exploded", 1)
    with pytest.raises(ValueError, match=r"missing \['deadline_s'\]"):
        ledger.append("signal", 1, name="USR1", step=3)
    assert not ledger.path.exists()


def test_further_fields_are_kept(ledger: Ledger) -> None:
    ledger.append("attempt_ended", 1, cause="failed", step=3, error="x\ny")
    [event] = ledger.read()
    assert event["error"] == "x\ny"
    assert {"time", "attempt", "event"} <= event.keys()


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_torn_line_is_left_out_and_closed_by_the_next(ledger: Ledger, kept: int) -> None:
    started(ledger, 1)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + whole[:kept])
    # Torn just before its newline, the line is all there.
    assert len(ledger.read()) == (2 if kept == -1 else 1)
    ledger.append("finished", 1, step=4, seconds=1.0)
    assert [event["event"] for event in ledger.read()][-1] == "finished"
    assert len(ledger.read()) == (3 if kept == -1 else 2)


def test_lines_that_are_not_events_are_left_out(ledger: Ledger) -> None:
    ledger.path.write_bytes(b'\xff\xfe\n[1]\n{"event": "finished"}\n\n7\n')
    assert ledger.read() == []
    started(ledger, 1)
    assert attempts(ledger.read())[0].number == 1


def test_appends_of_two_processes_do_not_mix(ledger: Ledger) -> None:
    code = (
        "import sys; from pathlib import Path; from outlast.rundir.ledger import Ledger\n"
        "for step in range(100):\n"
        "    Ledger(Path(sys.argv[1])).append('deleted', int(sys.argv[2]), checkpoint=str(step), reason='x' * 5000)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(ledger.path), str(n)]) for n in (1, 2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    lines = [line for line in ledger.path.read_text().splitlines() if line]
    assert len([json.loads(line) for line in lines]) == 200
    for n in (1, 2):
        assert [int(e["checkpoint"]) for e in ledger.read() if e["attempt"] == n] == list(range(100))


def test_a_disk_that_fills_up_raises(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel writes what fits and says so; only the next write fails."""
    write = os.write
    room = [10]

    def full(fd: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        count = write(fd, data[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        started(ledger, 1)
    room[0] = 10**6
    started(ledger, 1)
    assert len(ledger.read()) == 1


def test_lines_are_grouped_by_attempt(ledger: Ledger) -> None:
    started(ledger, 1)
    ledger.append("checkpoint", 1, step=10, kind="periodic", bytes=1, stall_s=0.1, sealed_s=0.1)
    ledger.append("signal", 1, name="TERM", step=13, deadline_s=None)
    ledger.append("checkpoint", 1, step=13, kind="emergency", bytes=1, stall_s=0.1, sealed_s=0.1)
    ledger.append("attempt_ended", 1, cause="preempted", step=13)
    ledger.append("requeued", 1, cause="preempted", job_id="7")
    started(ledger, 2)
    ledger.append("resumed", 2, step=13, checkpoint="checkpoint-13", seconds=2.0)
    first, second = attempts(ledger.read())
    assert (first.number, first.last_step, len(first.checkpoints), len(first.signals)) == (1, 13, 2, 1)
    assert first.requeued is not None
    assert first.ended is not None
    assert (second.last_step, second.ended) == (13, None)
    assert next_attempt(ledger.read()) == 3


def test_lines_that_a_full_disk_refuses_wait_and_keep_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    ledger = Ledger(tmp_path / "ledger.jsonl")
    record = Recorder(ledger, AttemptNumber(1), said.append)

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("outlast.rundir.ledger.os.write", full)
        record("deleted", checkpoint="checkpoint-1", reason="budget")
        record("deleted", checkpoint="checkpoint-2", reason="budget")
        assert len(record.waiting) == 2
    before = clock.now()
    record("deleted", checkpoint="checkpoint-3", reason="budget")
    assert [e["checkpoint"] for e in ledger.read()] == [f"checkpoint-{i}" for i in (1, 2, 3)]
    assert ledger.read()[0]["time"] < before <= ledger.read()[2]["time"]
    assert not record.waiting
    assert "No space left on device" in said[0]


def test_of_ranks_that_fail_at_once_one_says_so(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    code = (
        "import sys, time; from pathlib import Path; from outlast.rundir.ledger import Ledger; "
        "time.sleep(max(float(sys.argv[2]) - time.time(), 0)); "
        "Ledger(Path(sys.argv[1])).append_first('attempt_ended', 1, cause='failed', step=1)"
    )
    at = str(time.time() + 1.0)
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(path), at]) for _ in range(8)]
    assert [rank.wait(30) for rank in ranks] == [0] * 8
    assert len(Ledger(path).read()) == 1


def test_durations_that_a_set_clock_has_spoilt_are_read_as_none_at_all(tmp_path: Path) -> None:
    """As earlier versions wrote them: such a run could not be started again."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    start = {"job_id": None, "restart_count": 0, "hosts": ["a"], "world_size": 1, "versions": {}}
    ledger.append("attempt_started", 1, at=2000.0, **start)
    saved = {"step": 4, "kind": "periodic", "bytes": 1, "stall_s": -60.0, "sealed_s": float("nan")}
    resumed = {"step": 4, "checkpoint": "checkpoint-4", "seconds": float("inf")}
    with ledger.path.open("a") as file:  # by hand: what is appended now is JSON, which has no such numbers
        for at, event, values in ((1000.0, "checkpoint", saved), (900.0, "resumed", resumed)):
            file.write(json.dumps({"time": at, "attempt": 1, "event": event, **values}) + "\n")
    found = [event for event in ledger.read() if event["event"] != "attempt_started"]
    assert [(event.get("stall_s"), event.get("sealed_s"), event.get("seconds")) for event in found] == [
        (0.0, 0.0, None),
        (None, None, 0.0),
    ]
    interval = SaveInterval(CheckpointSection(), ledger.read(), 0.0)
    assert interval.seconds == LOWER_S
    assert interval.mtbf_s == CheckpointSection().mtbf_hours * 3600
