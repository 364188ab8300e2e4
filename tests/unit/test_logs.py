import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from outlast.errors import ConfigError
from outlast.launcher.commands import logs
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.rundir.submission import Submission

from ..conftest import Command, wait_for


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "runs" / "r")
    run.create()
    run.config.write_text("trainer: {max_steps: 5}\n")
    return run


def attempt(run: RunDirectory, number: int, ranks: int = 2, lines: int = 300) -> Ledger:
    ledger = Ledger(run.ledger)
    ledger.append("attempt_started", number, job_id=None, restart_count=0, hosts=["a"], world_size=ranks, versions={})
    for rank in range(ranks):
        run.log(number, rank).write_text("".join(f"{number}.{rank} line {line}\n" for line in range(lines)))
    return ledger


def submit(run: RunDirectory, job_id: str | None) -> Path:
    log = run.logs / "%j.log"
    submission = Submission(token="t", job_id=job_id, cluster="slurm", slurm_conf=None, log=str(log))
    (run.path / "submitted.json").write_text(json.dumps(asdict(submission)))
    return run.logs / f"{job_id}.log"


def test_the_newest_attempt_and_the_rank_that_failed(run: RunDirectory) -> None:
    attempt(run, 1)
    ledger = attempt(run, 2)
    assert logs.choose(run).path == run.log(2, 0)
    assert logs.choose(run, attempt=1, rank=1).path == run.log(1, 1)
    ledger.append("attempt_ended", 2, cause="failed", step=3, rank=1, error="x")
    assert logs.choose(run).path == run.log(2, 1)
    assert logs.choose(run, rank=0).path == run.log(2, 0)


def test_a_scripts_run_has_no_log_of_its_own(run: RunDirectory) -> None:
    run.config.unlink()
    attempt(run, 1)
    run.log(1, 0).unlink()
    with pytest.raises(ConfigError, match="it is a script's run, which prints where it was started"):
        logs.choose(run)


def test_what_is_not_there_is_refused(run: RunDirectory) -> None:
    with pytest.raises(ConfigError, match="no attempt of it has started, and no job"):
        logs.choose(run)
    attempt(run, 1)
    with pytest.raises(ConfigError, match=r"--attempt: 2 is refused; .*valid: 1"):
        logs.choose(run, attempt=2)
    with pytest.raises(ConfigError, match=r"--rank: 7 is refused; .*valid: 0, 1"):
        logs.choose(run, rank=7)
    with pytest.raises(ConfigError, match="no job of it was submitted"):
        logs.choose(run, job=True)


def test_the_batch_jobs_own_log_where_no_attempt_has_started(run: RunDirectory) -> None:
    log = submit(run, "12")
    source = logs.choose(run)
    assert source.path == log
    assert "no attempt has started since job 12 was submitted" in source.title
    attempt(run, 1)
    assert logs.choose(run).path == run.log(1, 0)
    assert logs.choose(run, job=True).path == log
    submit(run, "13")
    assert logs.choose(run).path == run.logs / "13.log"
    submit(run, None)
    with pytest.raises(ConfigError, match="no log that is known of"):
        logs.choose(run)


@pytest.mark.parametrize("lines", [1, 3, 299, 300, 1000, 0])
def test_tail(tmp_path: Path, lines: int) -> None:
    written = [f"{number} {'x' * 1000}\n" for number in range(300)]
    file = tmp_path / "log"
    file.write_text("".join(written) + "torn")
    text, end = logs.tail(file, lines)
    assert text.decode().splitlines(keepends=True) == [*written, "torn"][-lines if lines else 0 :]
    assert end == file.stat().st_size
    assert logs.tail(tmp_path / "nothing", lines) == (b"", 0)


def test_the_command(run: RunDirectory, outlast: Callable[..., Command]) -> None:
    attempt(run, 1)
    command = outlast("logs", "r", "-n", "2", "--rank", "1")
    assert command.wait() == 0
    assert command.output.splitlines() == [f"==> attempt 1, rank 1: {run.log(1, 1)}", "1.1 line 298", "1.1 line 299"]
    assert outlast("logs", "nothing").wait() == 2


def test_follow_goes_on_into_the_next_attempt_and_ends_with_the_run(
    run: RunDirectory, outlast: Callable[..., Command]
) -> None:
    log = submit(run, "12")
    command = outlast("logs", "r", "--follow", "-n", "1")
    wait_for(lambda: "nothing there yet" in command.output, "the waiting log")
    log.write_text("srun: launching\n")
    wait_for(lambda: "srun: launching" in command.output, "the job's log")
    ledger = attempt(run, 1)
    wait_for(lambda: "1.0 line 299" in command.output, "attempt 1")
    with open(run.log(1, 0), "a") as file:
        file.write("preempted\n")
    ledger.append("attempt_ended", 1, cause="preempted", step=3)
    ledger.append("requeued", 1, cause="preempted", job_id="12")
    wait_for(lambda: "preempted" in command.output, "what was added")
    attempt(run, 2, lines=600)
    ledger.append("attempt_ended", 2, cause="finished", step=5)
    ledger.append("finished", 2, step=5, seconds=1.0)
    assert command.wait() == 0
    lines = command.output.splitlines()
    assert lines.count("preempted") == 1
    assert [lines.count(f"2.0 line {line}") for line in (0, 299, 599)] == [1, 1, 1]
    assert [line for line in lines if line.startswith("==> attempt")] == [
        f"==> attempt 1, rank 0: {run.log(1, 0)}",
        f"==> attempt 2, rank 0: {run.log(2, 0)}",
    ]


def test_follow_of_one_attempt_ends_with_it(run: RunDirectory, outlast: Callable[..., Command]) -> None:
    ledger = attempt(run, 1)
    command = outlast("logs", "r", "--follow", "--attempt", "1", "-n", "1")
    wait_for(lambda: "1.0 line 299" in command.output, "the log")
    ledger.append("attempt_ended", 1, cause="preempted", step=3)
    began = time.monotonic()
    assert command.wait() == 0
    assert time.monotonic() - began < 5
