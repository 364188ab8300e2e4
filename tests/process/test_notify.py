"""Somebody is told how a run ended: a real apprise, a real HTTP server on this machine, and services that fail."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from outlast import notification
from outlast.config.configuration import build, dump
from outlast.epilogue import tell_end
from outlast.errors import ConfigError
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger

from ..conftest import SMOKE, Command, RunProbe

SECRET = "s3cr3t-part-of-the-path"
VARIABLE = "OUTLAST_NOTIFY_URL"


class Hook:
    """A webhook: what it was sent, and the URL by which apprise reaches it."""

    def __init__(self, port: int) -> None:
        self.got: list[dict[str, Any]] = []
        self.url = f"json://127.0.0.1:{port}/{SECRET}"


@pytest.fixture
def hook() -> Iterator[Hook]:
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))) | {"path": self.path})
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hook = Hook(server.server_port)
        hook.got = got
        yield hook
        server.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "runs" / "one")
    run.create()
    run.config.write_text(dump(build({"run": {"name": "one", "root": str(tmp_path / "runs")}})))
    return run


def events(run: RunDirectory, *names: str, attempt: int = 1, cause: str = "failed") -> None:
    values: dict[str, dict[str, Any]] = {
        "attempt_started": {"job_id": "7", "restart_count": attempt - 1, "hosts": ["n0"], "world_size": 1,
                            "versions": {}},
        "attempt_ended": {"cause": cause, "step": 5, "error": "ValueError: no\nmore"},
        "gave_up": {"reason": "three restarts saved nothing"},
        "requeued": {"cause": cause, "job_id": "7"},
        "finished": {"step": 9, "seconds": 1.0},
    }  # fmt: skip
    for name in names:
        Ledger(run.ledger).append(name, attempt, **values[name])


@pytest.mark.parametrize(
    ("names", "cause", "told"),
    [
        (["attempt_ended", "finished"], "finished", ("finished", "at step 9, in 1 attempt")),
        (["attempt_ended"], "failed", ("failed", "ValueError: no")),
        (["attempt_ended"], "out_of_memory", ("failed", "ValueError: no")),
        (["attempt_ended", "gave_up"], "failed", ("gave_up", "three restarts saved nothing")),
        (["attempt_ended", "requeued"], "failed", None),
        (["attempt_ended", "requeued"], "preempted", None),
        (["attempt_ended"], "preempted", None),
        (["attempt_ended"], "cancelled", None),
        ([], "failed", None),
    ],
)
def test_what_is_told_of_an_end(run: RunDirectory, names: list[str], cause: str, told: tuple[str, str] | None) -> None:
    events(run, "attempt_started", *names, cause=cause)
    assert notification.end_of(Ledger(run.ledger).read(), 1) == told


def test_a_local_run_that_finishes_and_one_that_fails(
    hook: Hook, outlast: Callable[..., Command], tmp_path: Path
) -> None:
    train = ["train", *SMOKE, "trainer.max_steps=5"]
    done = outlast(*train, "run.name=good", **{VARIABLE: hook.url})
    bad = outlast(*train, "run.name=bad", "trainer.max_steps=500", "trainer.step_s=0.1", **{VARIABLE: hook.url})
    RunProbe(tmp_path / "runs" / "bad").reach(1)
    bad.ranks()[0].kill()
    codes = done.wait(), bad.wait()
    stopped = outlast(*train, "run.name=quiet", "notify.when=[failed]", **{VARIABLE: hook.url})
    assert (*codes, stopped.wait()) == (0, 1, 0), bad.output
    told = sorted((one["title"], one["message"], one["path"]) for one in hook.got)
    assert [title for title, _, _ in told] == ["outlast: bad failed", "outlast: good finished"]
    assert told[1][1] == f"at step 5, in 1 attempt\n{tmp_path / 'runs' / 'good'}"
    assert {path for _, _, path in told} == {f"/{SECRET}"}
    again = outlast(*train, "run.name=good", **{VARIABLE: hook.url})
    assert (again.wait(), len(hook.got)) == (0, 2)  # it had finished before
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


def test_the_epilogue_tells_what_its_own_job_has_ended(
    hook: Hook, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, hook.url)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    events(run, "attempt_started", "attempt_ended", "requeued")
    tell_end(run)
    assert hook.got == []
    events(run, "attempt_started", "attempt_ended", attempt=2)
    tell_end(run)  # of attempt 1 still
    assert hook.got == []
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    tell_end(run)
    assert [one["title"] for one in hook.got] == ["outlast: one failed"]


def test_a_rank_tells_in_a_thread(hook: Hook, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, hook.url)
    said: list[str] = []
    notification.tell_meanwhile(run, "notice_short", "a save takes 9 s, the notice is 5 s", said.append)
    [thread] = [one for one in threading.enumerate() if one.name == "outlast-notify"]
    thread.join(30)
    assert ([one["title"] for one in hook.got], said) == (["outlast: one has too short a notice"], [])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("refuses", "the service did not take it"),
        ("hangs", "the service did not answer in time"),
        ("nonsense", "apprise knows no such URL"),
        ("missing", "apprise is not installed (pip install 'outlast[notify]')"),
    ],
)
def test_a_failure_is_one_line_and_costs_seconds(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, said: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        if kind == "refuses":
            silent.close()
        url = "nonsense" if kind == "nonsense" else f"json://127.0.0.1:{port}/{SECRET}?rto=60"
        if kind == "missing":
            (tmp_path / "apprise.py").write_text("raise ImportError\n")
            monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv(VARIABLE, url)
        monkeypatch.setattr(notification, "LIMIT_S", 2)
        lines: list[str] = []
        began = time.monotonic()
        notification.tell(run, "failed", "why", lines.append)
        assert time.monotonic() - began < notification.LIMIT_S + notification.SPARE_S + 5.0
    assert lines == [f"nobody was told that the run failed: {said}"]


def test_a_variable_that_is_named_and_not_set_is_said(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    lines: list[str] = []
    notification.tell(run, "failed", "why", lines.append)
    assert lines == []
    run.config.write_text(dump(build({"notify": {"env": "MY_URL"}})))
    notification.tell(run, "failed", "why", lines.append)
    assert lines == ["nobody is told: the environment has no MY_URL (notify.env)"]


@pytest.mark.parametrize("key", ["url", "env"])
def test_a_url_in_the_configuration_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build({"notify": {key: f"json://host/{SECRET}"}})
    assert "name of an environment variable" in str(refused.value)
    assert SECRET not in str(refused.value)
