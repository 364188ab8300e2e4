"""What `outlast status` asks for, reads and shows."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outlast.config.configuration import build, dump
from outlast.errors import ConfigError
from outlast.launcher.commands import status
from outlast.launcher.display import status_table
from outlast.launcher.runs import queue
from outlast.launcher.runs.find import run_named, runs_named, runs_under
from outlast.launcher.runs.queue import Answer, JobKey, JobState
from outlast.launcher.runs.settings import settings_of
from outlast.launcher.runs.standing import collect
from outlast.rundir.directory import RunDirectory

from .runs import Make, end, progress, row, save, says, shown, start, sweep_of


def test_names(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("r")
    path = sweep_of(tmp_path, [])
    assert [run.path.name for run in runs_named(["s/seed=1", "r", "s"], tmp_path)] == [
        "seed=1",
        "r",
        "seed=0",
        "seed=2",
    ]
    assert run_named(str(path / "seed=2"), Path("elsewhere")).path == path / "seed=2"
    with pytest.raises(ConfigError, match=r"did you mean s/seed=1\?"):
        run_named("s/seed=11", tmp_path)
    with pytest.raises(ConfigError, match="valid: s/seed=0, s/seed=1"):
        run_named("s", tmp_path)


def test_slurm_is_asked_once(make: Make, tmp_path: Path) -> None:
    for name, job in (("a", "7"), ("b", "8"), ("c", None)):
        ledger = start(make(name), job_id=job)
        if job:
            ledger.append("requeued", 1, cause="preempted", job_id=job)
    done = start(make("d"), job_id="9")
    done.append("finished", 1, step=1, seconds=1.0)
    asked = []

    def ask(wanted: list[JobKey], users: set[int], clusters: set[str | None]) -> Answer:
        asked.append(wanted)
        return Answer({JobKey(None, "7"): JobState("PENDING"), JobKey(None, "8"): JobState("RUNNING")})

    states = [row.state for row in collect(runs_under(tmp_path), ask)]
    assert states == ["queued", "running", "stopped_unexpectedly", "finished"]
    assert asked == [[JobKey(None, "7"), JobKey(None, "8")]]


def test_slurm_does_not_answer(make: Make, tmp_path: Path) -> None:
    ledger = start(make("a"), job_id="7")
    ledger.append("requeued", 1, cause="preempted", job_id="7")
    end(start(make("b")), "preempted")
    silent = Answer(silent={None: "squeue did not answer within 5 s"})
    rows = collect(runs_under(tmp_path), lambda wanted, users, clusters: silent)
    assert [(row.state, row.note is None) for row in rows] == [("queued", False), ("interrupted", True)]
    out = shown(rows)
    assert out.count("Slurm does not answer (squeue did not answer within 5 s); states are from the ledgers alone") == 1
    assert "interrupted: saved; `outlast resume`, or what started it, goes on" in out


def test_what_is_damaged_is_shown_as_far_as_it_goes(make: Make) -> None:
    run = make("a", "{[")
    save(start(run), 10)
    with open(run.ledger, "a") as file:
        file.write('{"time": 1, "att')
    run.progress.write_text("{")
    (run.path / "submitted.json").write_text("[")
    (run.path / "cancelled.json").write_text("")
    now = row(run)
    assert (now.state, now.step, now.total_steps, now.budget_bytes) == ("stopped_unexpectedly", 10, None, None)
    assert "10/?" in shown([now], terminal=80)


def test_two_sections_are_read_as_they_were_written(make: Make) -> None:
    config = build({"run": {"name": "x"}, "trainer": {"max_steps": 3, "a": {"b": ["- c", "d: e\n\nf"]}, "z": "x\n\ny"}})
    settings = settings_of(make("a", dump(config)))
    assert settings == {"storage": config.as_dict()["storage"], "trainer": config.trainer}


def test_bytes_are_not_walked_where_an_attempt_has_counted_them(make: Make) -> None:
    run = make("a")
    start(run)
    progress(run, bytes_used=12345)
    (run.checkpoints / "big").write_bytes(b"0" * 5000)
    assert row(run).bytes_used == 12345
    progress(run)
    assert 5000 < (row(run).bytes_used or 0) < 12345


def test_the_command(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common: dict[str, Any] = {"watch_s": None}
    assert status.main([], tmp_path, states=None, as_json=False, **common) == 0
    assert "no runs here" in capsys.readouterr().out
    make("a")
    end(start(make("b")), "failed")
    assert status.main([], tmp_path, states=None, as_json=True, **common) == 0
    assert [(row["name"], row["state"]) for row in json.loads(capsys.readouterr().out)] == [
        ("a", "not_started"),
        ("b", "failed"),
    ]
    states = status.states_named("failed,gave up")
    assert status.main([], tmp_path, states=states, as_json=True, **common) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["b"]
    assert status.main(["a"], tmp_path, states=None, as_json=True, **common) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["a"]
    with pytest.raises(ConfigError, match="did you mean failed"):
        status.states_named("faild")


def test_a_terminal_of_80_columns_shows_the_metric_on_one_line(make: Make) -> None:
    name = "sft-tiny-python_docs-1a2b3c4d"
    run = make(name)
    ledger = start(run)
    save(ledger, 40)
    ledger.append("evaluated", 1, step=40, metrics={"eval_loss": 1.25})
    progress(run, bytes_used=10**8, bytes_peak=2 * 10**8)
    wide, narrow = shown([row(run)]).splitlines(), shown([row(run)], terminal=80).splitlines()
    assert wide[0].split()[:5] == ["run", "state", "metric", "step", "left"]
    assert [line.split()[0] for line in narrow[:2]] == ["run", name]
    assert "eval_loss 1.25 at 40" in narrow[1]
    assert max(map(len, narrow)) <= 80 < max(map(len, wide))


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["12"], ["12"]),
        (["12_4", "12_1", "12_2", "7"], ["7", "12_[1-2,4]"]),
        (["3_0", "12_5", "12_6", "12_7"], ["12_[5-7]", "3_[0]"]),
    ],
)
def test_exactly_these_jobs(ids: list[str], words: list[str]) -> None:
    assert queue.compressed(ids) == words


def test_a_cluster_that_is_gone(tmp_path: Path) -> None:
    conf = str(tmp_path / "slurm.conf")
    answer = queue.ask([JobKey(conf, "1")], {0})
    assert answer.silent == {conf: f"its configuration {conf} is gone"}


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        ("12", ["12"]),
        ("12_3", ["12_3"]),
        ("12_[1-2,4]", ["12_1", "12_2", "12_4"]),
        ("12_[0-1%1]", ["12_0", "12_1"]),
        ("12_[0-4:2,7]", ["12_0", "12_2", "12_4", "12_7"]),
    ],
)
def test_tasks_that_accounting_shows_in_one_line(words: str, ids: list[str]) -> None:
    assert queue.expanded(words) == ids


@pytest.mark.alone
def test_a_thousand_runs_cost_seconds_of_neither_cpu_nor_reading(make: Make, tmp_path: Path) -> None:
    first = make("r0", dump(build({"run": {"name": "x"}})))
    ledger = start(first, job_id="7")
    for step in range(40):
        save(ledger, step)
    end(ledger, "preempted")
    progress(first, bytes_used=10)
    for number in range(1, 1000):
        run = RunDirectory(tmp_path / f"r{number}")
        run.path.mkdir()
        for source in (first.config, first.ledger, first.progress):
            (run.path / source.name).hardlink_to(source)
    began = time.process_time()
    rows = collect(runs_under(tmp_path), says(J7="PENDING"))
    out = shown(rows)
    assert time.process_time() - began < 1.5
    assert len(out.splitlines()) == 1001
    assert {row.state for row in rows} == {"queued"}


@pytest.fixture
def shared_root() -> Iterator[Path]:
    """A root that anybody may read, with a directory that only its owner may; root looks at it as nobody."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for directory in ("closed", "open"):
            (root / directory).mkdir()
            (root / directory / "config.yaml").write_text("job: {name: smoke}\n")
        (root / "closed").chmod(0)
        root.chmod(0o755)
        me = os.geteuid()
        if me == 0:
            os.seteuid(65534)
        try:
            yield root
        finally:
            os.seteuid(me)
            (root / "closed").chmod(0o700)


def test_a_colleagues_closed_directory_is_left_out_and_said(
    shared_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status.main([], shared_root, states=None, watch_s=None, as_json=True) == 0
    printed = capsys.readouterr()
    assert [one["name"] for one in json.loads(printed.out)] == ["open"]
    assert printed.err == "left out, for want of permission to read: closed\n"


def test_a_root_that_is_not_there_is_no_empty_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--root: '.*/typo' is refused; valid: a directory that holds runs"):
        status.main([], tmp_path / "typo", states=None, watch_s=None, as_json=False)


def test_a_reason_is_whole_where_there_is_room(make: Make) -> None:
    reason = "ConfigError: data.train: 'train.jsonl, line 4' is refused; the template refuses it"
    start(make("r")).append("attempt_ended", 1, cause="failed", step=0, error=reason)
    [found] = collect([make("r")], ask=lambda wanted, users, clusters: Answer())
    assert reason in "\n".join(line.plain for line in status_table.lines([found], None))
    assert "…)" in "\n".join(line.plain for line in status_table.lines([found], 80))
    assert f"r: {reason}" in [line.plain for line in status_table._below([found])]
