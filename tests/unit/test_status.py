import fcntl
import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from outlast.cells import Cell, Manifest
from outlast.config import build, dump
from outlast.errors import ConfigError
from outlast.launcher import slurm_queue, status, status_table
from outlast.launcher.runs import is_locked, run_named, runs_named, runs_under, settings_of, state_of
from outlast.launcher.slurm_queue import Answer, JobKey, JobState
from outlast.launcher.status import RunStatus, collect
from outlast.launcher.submissions import cancelled_at, mark_cancelled
from outlast.ledger import Ledger
from outlast.rundir import RunDirectory, RunLock
from outlast.submission import Submission

Make = Callable[..., RunDirectory]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run directory with a frozen configuration, under one root."""

    def make(name: str, config: str = "storage: {budget_gb: 1.0}\ntrainer: {max_steps: 100}\n") -> RunDirectory:
        run = RunDirectory(tmp_path / name)
        run.create()
        run.config.write_text(config)
        return run

    return make


def start(run: RunDirectory, attempt: int = 1, job_id: str | None = None) -> Ledger:
    ledger = Ledger(run.ledger)
    ledger.append("attempt_started", attempt, job_id=job_id, restart_count=0, hosts=["a"], world_size=1, versions={})
    return ledger


def save(ledger: Ledger, step: int, attempt: int = 1) -> None:
    ledger.append("checkpoint", attempt, step=step, kind="periodic", bytes=10, stall_s=0.1, sealed_s=0.1)


def end(ledger: Ledger, cause: str, step: int = 40, attempt: int = 1) -> None:
    ledger.append("attempt_ended", attempt, cause=cause, step=step)


def row(run: RunDirectory, ask: status.Ask | None = None) -> RunStatus:
    return collect([run], ask or nobody)[0]


def nobody(wanted: list[JobKey], users: set[int], clusters: set[str | None]) -> Answer:
    raise AssertionError(f"Slurm was asked for {wanted}")


def says(_reason: str | None = None, /, **states: str) -> status.Ask:
    """A Slurm that knows jobs, by `J<number>`."""
    jobs = {JobKey(None, job.removeprefix("J")): JobState(state, _reason) for job, state in states.items()}
    return lambda wanted, users, clusters: Answer(jobs)


def submit(run: RunDirectory, job_id: str | None, at: float | None = None, **values: Any) -> Submission:
    """As the launcher notes it."""
    at = time.time() if at is None else at
    submission = Submission(token="t0", job_id=job_id, cluster="slurm", slurm_conf=None, time=at, log="x", **values)
    (run.path / "submitted.json").write_text(json.dumps(asdict(submission)))
    return submission


def progress(run: RunDirectory, **values: Any) -> None:
    now = {"attempt": 1, "phase": "training", "step": 42, "total_steps": 100, "time": time.time()}
    run.progress.write_text(json.dumps(now | values))


def test_only_run_directories_are_shown(make: Make, tmp_path: Path) -> None:
    make("b")
    make("a")
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("")
    assert [row.name for row in collect(runs_under(tmp_path))] == ["a", "b"]
    assert runs_under(tmp_path / "nowhere") == []


def test_not_started(make: Make) -> None:
    now = row(make("a"))
    assert (now.state, now.attempts, now.step, now.total_steps, now.job_id) == ("not_started", 0, 0, 100, None)
    assert (now.budget_bytes, now.checkpoint_step, now.checkpoint_age_s) == (10**9, None, None)


def test_running_by_its_lock(make: Make) -> None:
    run = make("a")
    save(start(run), 40)
    progress(run, seconds_per_step=0.5, loss=1.5, time=time.time() - 3600)
    lock = RunLock(run)
    lock.acquire("a test")
    now = row(run)
    lock.release()
    assert (now.state, now.step, now.total_steps, now.loss, now.checkpoint_step) == ("running", 42, 100, 1.5, 40)
    assert now.eta_s == 0.0
    assert now.checkpoint_age_s is not None
    assert now.checkpoint_age_s < 5
    # The lock was taken on this host and is free: the attempt is dead, however fresh its progress.
    progress(run)
    assert row(run).state == "stopped_unexpectedly"


def test_running_on_another_host_by_its_progress(make: Make) -> None:
    run = make("a")
    start(run)
    run.lock.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    progress(run, seconds_per_step=0.5)
    now = row(run)
    assert now.state == "running"
    assert now.eta_s == pytest.approx(29.0, abs=1.5)
    progress(run, time=time.time() - 61)
    assert row(run).state == "stopped_unexpectedly"


def test_looking_at_the_lock_does_not_take_it(make: Make) -> None:
    run = make("a")
    assert is_locked(run) is None
    lock = RunLock(run)
    lock.acquire("a test")
    assert is_locked(run) is True
    lock.release()
    assert is_locked(run) is False
    # Another reader's look, which lasts an instant, hides no holder and stops no start.
    with open(run.lock) as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert is_locked(run) is False
    lock.acquire("a test")
    lock.release()


@pytest.mark.parametrize(
    ("cause", "state"),
    [
        ("preempted", "interrupted"),
        ("time_limit", "interrupted"),
        ("failed", "failed"),
        ("out_of_memory", "failed"),
        ("cancelled", "cancelled"),
    ],
)
def test_the_end_of_a_local_attempt(make: Make, cause: str, state: str) -> None:
    run = make("a")
    end(start(run), cause)
    assert (row(run).state, row(run).step) == (state, 40)


def test_finished(make: Make) -> None:
    run = make("a")
    ledger = start(run, job_id="7")
    ledger.append("evaluated", 1, step=50, metrics={"eval_loss": 1.25})
    end(ledger, "finished", 100)
    ledger.append("finished", 1, step=100, seconds=3.0)
    now = row(run)
    assert (now.state, now.step, now.best) == ("finished", 100, {"name": "eval_loss", "value": 1.25, "step": 50})


def test_gave_up_until_it_is_started_again(make: Make) -> None:
    run = make("a")
    ledger = start(run)
    end(ledger, "preempted")
    ledger.append("gave_up", 1, reason="no progress")
    assert row(run).state == "gave_up"
    end(start(run, 2), "cancelled", attempt=2)
    assert (row(run).state, row(run).attempts) == ("cancelled", 2)


def attempted(make: Make, ledger_says: str, name: str = "a") -> RunDirectory:
    """A run with job 7 whose ledger says one of the things that it can say."""
    run = make(name)
    if ledger_says == "submitted":
        submit(run, "7")
        return run
    ledger = start(run, job_id="7")
    if ledger_says in ("preempted", "requeued"):
        end(ledger, "preempted")
    elif ledger_says in ("failed", "cancelled"):
        end(ledger, ledger_says)
    if ledger_says == "requeued":
        ledger.append("requeued", 1, cause="preempted", job_id="7")
    return run


@pytest.mark.parametrize(
    ("ledger_says", "slurm_says", "state"),
    [
        ("submitted", "PENDING", "queued"),
        ("submitted", "CONFIGURING", "running"),
        ("submitted", "FAILED", "failed"),
        ("submitted", "CANCELLED", "cancelled"),
        ("submitted", None, "stopped_unexpectedly"),
        ("started", "RUNNING", "running"),
        ("started", "PENDING", "queued"),  # its node died: Slurm has requeued it, and that is no failure
        ("started", "OUT_OF_MEMORY", "failed"),
        ("started", "NODE_FAIL", "failed"),
        ("started", "COMPLETED", "stopped_unexpectedly"),
        ("started", None, "stopped_unexpectedly"),
        ("preempted", "RUNNING", "preempted"),
        ("preempted", "COMPLETING", "preempted"),
        ("preempted", "REQUEUED", "queued"),
        ("preempted", None, "interrupted"),
        ("requeued", "PENDING", "queued"),
        ("requeued", "REQUEUE_HOLD", "queued"),
        ("requeued", "COMPLETING", "queued"),
        ("requeued", "RUNNING", "running"),
        ("requeued", "CANCELLED", "cancelled"),
        ("requeued", "TIMEOUT", "failed"),
        ("requeued", "COMPLETED", "interrupted"),
        ("requeued", None, "interrupted"),
        ("failed", "PENDING", "queued"),  # a crash is retried: the line in the ledger comes a moment later
        ("failed", "RUNNING", "failed"),
        ("cancelled", "COMPLETING", "cancelled"),
        ("cancelled", "COMPLETED", "cancelled"),
    ],
)
def test_ledger_and_slurm(make: Make, ledger_says: str, slurm_says: str | None, state: str) -> None:
    run = attempted(make, ledger_says)
    assert row(run, says(**{"J7": slurm_says} if slurm_says else {})).state == state


def test_why_a_job_waits_is_shown(make: Make) -> None:
    run = attempted(make, "requeued")
    assert row(run, says("BeginTime", J7="PENDING")).reason == "BeginTime"
    assert row(run, says("held", J7="REQUEUE_HOLD")).reason == "requeue_hold"
    assert "queued (BeginTime)" in shown([row(run, says("BeginTime", J7="PENDING"))])


def test_why_it_failed_is_shown(make: Make) -> None:
    run = make("a")
    start(run).append("attempt_ended", 1, cause="failed", step=3, error="ValueError: no such file\nTraceback")
    assert row(run).reason == "ValueError: no such file"
    assert row(attempted(make, "started", "b"), says(J7="OUT_OF_MEMORY")).reason == "OUT_OF_MEMORY by Slurm's word"


def test_running_on_this_host_while_slurm_is_behind(make: Make) -> None:
    run = attempted(make, "started")
    lock = RunLock(run)
    lock.acquire("job 7")
    assert row(run, says()).state == "running"
    lock.release()
    assert row(run, says()).state == "stopped_unexpectedly"


def test_a_run_that_was_submitted_again(make: Make) -> None:
    run = make("a")
    end(start(run, job_id="7"), "failed")
    submit(run, "12", at=time.time() - 100)
    assert (row(run, says(J7="FAILED")).state, row(run, says()).job_id) == ("failed", "7")
    submit(run, "12", at=time.time() + 1)
    now = row(run, says(J12="PENDING"))
    assert (now.state, now.job_id) == ("queued", "12")


def test_a_job_whose_number_was_never_written_down(make: Make) -> None:
    run = make("a")
    comment = submit(run, None).comment
    answer = Answer({JobKey(None, "31"): JobState("PENDING")}, {(None, comment): "31"})
    now = row(run, lambda wanted, users, clusters: answer)
    assert (now.state, now.job_id) == ("queued", "31")
    assert row(run, says()).state == "stopped_unexpectedly"  # sbatch was killed before it reached Slurm


def test_cancelled_stays_cancelled(make: Make) -> None:
    run = attempted(make, "requeued")
    mark_cancelled(run, "7")
    assert cancelled_at(run) is not None
    assert row(run, says()).state == "cancelled"
    # What Slurm says goes before: a job that came back is told as it is.
    assert row(run, says(J7="PENDING")).state == "queued"
    submit(run, "8")
    assert state_of(run, Ledger(run.ledger).read()) == "queued"


def test_cancelled_while_it_saves(make: Make) -> None:
    run = make("a")
    ledger = start(run)
    mark_cancelled(run, None)
    end(ledger, "preempted")
    assert row(run).state == "cancelled"
    start(run, 2)
    assert row(run).state == "stopped_unexpectedly"
    end(ledger, "preempted", attempt=2)
    assert row(run).state == "interrupted"


def sweep_of(root: Path, jobs: list[tuple[str | None, list[int]]], cells: int = 3, offset: int = 0) -> Path:
    """A sweep's directory, with one submission for each of `jobs`."""
    path = root / "s"
    path.mkdir()
    manifest = Manifest(name="s")
    for index in range(cells):
        name = f"seed={index}"
        manifest.cells.append(Cell(index=index, name=name, directory=name, overrides=[name], config_digest="d"))
        run = RunDirectory(path / name)
        run.create()
        run.config.write_text("trainer: {max_steps: 5}\n")
    for number, (job_id, indices) in enumerate(jobs):
        log, at = str(path / "logs" / "%A_%a.log"), time.time() + number
        manifest.submissions.append(
            Submission(token=f"t{number}", job_id=job_id, cluster="slurm", slurm_conf=None, time=at, log=log,
                       indices=indices, offset=offset)
        )  # fmt: skip
    manifest.write(path)
    return path


def test_the_cells_of_a_sweep(make: Make, tmp_path: Path) -> None:
    make("r")
    sweep_of(tmp_path, [("20", [0, 1, 2]), ("21", [2])])
    rows = collect(runs_under(tmp_path), says(J20_0="RUNNING", J20_1="PENDING", J20_2="CANCELLED", J21_2="PENDING"))
    assert [(row.name, row.sweep, row.state, row.job_id) for row in rows] == [
        ("r", None, "not_started", None),
        ("s/seed=0", "s", "running", "20_0"),
        ("s/seed=1", "s", "queued", "20_1"),
        ("s/seed=2", "s", "queued", "21_2"),
    ]
    assert "3 cells: 2 queued, 1 running" in shown(rows)


def test_tasks_of_a_large_sweep_are_numbered_from_an_offset(tmp_path: Path) -> None:
    path = sweep_of(tmp_path, [("20", [2])], offset=2)
    rows = collect(runs_named(["s"], tmp_path), says(J20_0="RUNNING"))
    assert [(row.state, row.job_id) for row in rows][2] == ("running", "20_0")
    assert status.submission_of(RunDirectory(path / "seed=2")).log == path / "logs" / "20_0.log"


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
    assert "10/?" in shown([now], width=80)


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


def shown(rows: list[RunStatus], width: int = 140) -> str:
    out = io.StringIO()
    status_table.show(rows, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["12"], ["12"]),
        (["12_4", "12_1", "12_2", "7"], ["7", "12_[1-2,4]"]),
        (["3_0", "12_5", "12_6", "12_7"], ["12_[5-7]", "3_[0]"]),
    ],
)
def test_exactly_these_jobs(ids: list[str], words: list[str]) -> None:
    assert slurm_queue.compressed(ids) == words


def test_a_cluster_that_is_gone(tmp_path: Path) -> None:
    conf = str(tmp_path / "slurm.conf")
    answer = slurm_queue.ask([JobKey(conf, "1")], {0})
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
    assert slurm_queue.expanded(words) == ids


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
