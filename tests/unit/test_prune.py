"""`outlast prune`: on the checkpoints of small real runs, with links, protected files, others' runs and live ones."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint.manifest import MANIFEST, Sealed, read_manifest, verify, write_manifest
from outlast.checkpoint.removal import UNSEALED, Remover
from outlast.errors import ConfigError
from outlast.files import bytes_used
from outlast.launcher.commands import prune as command
from outlast.launcher.runs.attempts import attempt_rows
from outlast.launcher.runs.prunable import Rule, ended_at
from outlast.launcher.runs.since import summarize_since
from outlast.launcher.runs.state import started_attempts
from outlast.launcher.runs.submissions import mark_cancelled
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import KILLED, Ledger
from outlast.rundir.progress import read

from ..conftest import OUTLAST, SMOKE, Command, RunProbe
from .runs import Make
from .test_shared_root import as_nobody

Start = Callable[..., Command]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints at 20, 40, 60 and 70 of 70 steps. Not to be changed."""
    directory = tmp_path_factory.mktemp("real")
    train = Command(directory, "train", *SMOKE, "run.name=real", "trainer.max_steps=70")
    assert train.wait() == 0, train.output
    return directory / "runs" / "real"


@pytest.fixture
def run(real: Path, tmp_path: Path) -> RunDirectory:
    """A copy of it, to be changed."""
    shutil.copytree(real, tmp_path / "runs" / "one")
    return RunDirectory(tmp_path / "runs" / "one")


def unfinished(run: RunDirectory) -> None:
    """Make it a run that was cancelled after step 70."""
    lines = [line for line in run.ledger.read_text().splitlines() if json.loads(line)["event"] != "finished"]
    run.ledger.write_text("".join(f"{line}\n" for line in lines if json.loads(line).get("kind") != "final"))
    mark_cancelled(run, None)
    shutil.rmtree(run.final)


def prune(root: Path, *names: str, code: int = 0, **options: Any) -> dict[str, Any]:
    """What `--json` says, by a real call of the command; it must end with `code`."""
    given = {"older": None, "keep": "final,best,newest", "unfinished": False, "dry_run": False, "sure": True} | options
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert command.main(names, root, **given, as_json=True) == code, out.getvalue()
    return dict(json.loads(out.getvalue()))


def steps(run: RunDirectory) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in run.checkpoints.glob("checkpoint-*"))


def deleted(run: RunDirectory) -> list[tuple[str, str]]:
    return [(e["checkpoint"], e["reason"]) for e in Ledger(run.ledger).read() if e["event"] == "deleted"]


def test_it_shows_asks_deletes_and_what_stays_works(run: RunDirectory, outlast: Start, tmp_path: Path) -> None:
    (run.quarantine / "checkpoint-30").mkdir(parents=True)
    (run.quarantine / "checkpoint-30" / "x").write_bytes(b"x" * 1000)
    run.reserve.write_bytes(b"x" * 500)
    before = bytes_used(run.path)
    for arguments, code in (["--dry-run"], 0), ([], 2):  # nobody is there to be asked
        process = outlast("prune", *arguments)
        assert process.wait() == code, process.output
        assert "checkpoints 20, 40, 60, quarantine, .reserve" in process.output
        assert "final" in process.output
    assert "nobody is there to be asked; valid: --yes, or --dry-run" in process.output
    assert (steps(run), bytes_used(run.path), deleted(run)) == ([20, 40, 60, 70], before, [])
    wanted = prune(run.path.parent, dry_run=True)["bytes"]
    process = outlast("prune", "one", "--yes")
    assert process.wait() == 0, process.output
    assert steps(run) == [70]
    assert not run.quarantine.exists()
    assert not run.reserve.exists()
    assert deleted(run) == [(f"checkpoint-{s}", "prune") for s in (20, 40, 60)] + [
        ("quarantine", "prune"),
        (".reserve", "prune"),
    ]
    ledger_and_lock = bytes_used(run.path) - (before - wanted)
    assert 0 < ledger_and_lock < 2000
    for kept in (run.checkpoints / "checkpoint-70", run.final):
        verify(kept)
    status = outlast("status", "--json")
    assert status.wait() == 0
    [row] = json.loads(status.output)
    assert (row["state"], row["attempts"]) == ("finished", 1)
    assert abs(row["bytes_used"] - bytes_used(run.path)) < 100
    for arguments in ["checkpoints", "one", "--verify"], ["report", "one"], ["resume", "one"], ["prune", "--yes"]:
        process = outlast(*arguments)
        assert process.wait() == 0, process.output
    assert "nothing to prune" in process.output


def test_on_a_terminal_it_asks(run: RunDirectory) -> None:
    for answer, code, left in (b"no\n", 2, [20, 40, 60, 70]), (b"yes\n", 0, [70]):
        ours, theirs = os.openpty()
        os.write(ours, answer)
        with open(ours, "wb"), open(theirs, "rb") as terminal:
            done = subprocess.run(
                [OUTLAST, "prune", "one"], cwd=run.path.parents[1], stdin=terminal, capture_output=True, timeout=60
            )
        assert (done.returncode, steps(run)) == (code, left)
        assert b"delete? [yes/no]" in done.stdout


def test_final_alone_and_a_final_that_is_damaged(run: RunDirectory) -> None:
    [weights] = run.final.glob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    [found] = prune(run.path.parent, keep="final", code=1)["runs"]
    assert found["problem"].startswith("final does not verify: model.safetensors has")
    assert steps(run) == [20, 40, 60, 70]
    weights.write_bytes(whole)
    assert prune(run.path.parent, keep="final")["runs"][0]["stays"] == ["final"]
    assert steps(run) == []
    verify(run.final)
    assert [one["goes"] for one in prune(run.path.parent, keep="final")["runs"]] == [[]]


def test_a_finished_run_without_a_model_keeps_its_newest(run: RunDirectory) -> None:
    shutil.rmtree(run.final)
    prune(run.path.parent, keep="final")
    assert steps(run) == [70]


def test_what_is_put_aside_stays_if_nothing_else_has_the_model(run: RunDirectory) -> None:
    """One in quarantine may be whole; only a model that verifies makes it dispensable."""
    (run.quarantine / "checkpoint-30.kept").mkdir(parents=True)
    (run.quarantine / "checkpoint-30.kept" / "weights").write_text("whole")
    shutil.rmtree(run.checkpoints)
    run.checkpoints.mkdir()
    [weights] = run.final.glob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[::-1])
    assert prune(run.path.parent, code=1)["runs"][0]["problem"].startswith("final does not verify")
    assert run.quarantine.exists()
    weights.write_bytes(whole)
    assert prune(run.path.parent)["runs"][0]["deleted"] == ["quarantine"]


def test_with_light_checkpoints_alone_the_newest_stays(run: RunDirectory) -> None:
    unfinished(run)
    for step in (20, 40, 60, 70):
        directory = run.checkpoints / f"checkpoint-{step}"
        write_manifest(directory, replace(read_manifest(directory), light=True))
    (run.checkpoints / "checkpoint-80").mkdir()
    [found] = prune(run.path.parent, "one", keep="final", code=1)["runs"]
    assert "something in it can't be read" in found["skipped"]
    (run.checkpoints / "checkpoint-80").rmdir()
    prune(run.path.parent, "one", keep="final")
    assert steps(run) == [70]


def test_the_best_stays(run: RunDirectory) -> None:
    for step in (40, 60, 70):
        directory = run.checkpoints / f"checkpoint-{step}"
        write_manifest(directory, replace(read_manifest(directory), best_step=40))
    prune(run.path.parent, keep="best")
    assert steps(run) == [40]


def test_an_unfinished_run_can_be_resumed_until_it_is_said_otherwise(run: RunDirectory, outlast: Start) -> None:
    unfinished(run)
    (run.quarantine / "checkpoint-30").mkdir(parents=True)  # it may be what a person saves the run with
    newest = run.checkpoints / "checkpoint-70"
    [weights] = newest.glob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[::-1])
    [found] = prune(run.path.parent, "one", keep="final", code=1)["runs"]
    assert "checkpoint-70 does not verify" in found["problem"]  # a resume would fall back to those before it
    weights.write_bytes(whole)
    shutil.rmtree(newest)
    prune(run.path.parent, keep="final")
    assert steps(run) == [60]
    assert (run.quarantine / "checkpoint-30").exists()
    assert prune(run.path.parent, "one", older="1h", unfinished=True, code=1)["runs"][0]["skipped"] == (
        "ended later than --older says"
    )
    process = outlast("resume", "one")
    assert process.wait() == 0, process.output
    assert [e["step"] for e in Ledger(run.ledger).read() if e["event"] == "resumed"] == [60]


def test_unfinished_deletes_what_it_would_resume_from(run: RunDirectory) -> None:
    unfinished(run)
    prune(run.path.parent, "one", older="0min", unfinished=True)
    assert steps(run) == []


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        ([], {"unfinished": True, "older": "1d"}, "valid with RUN and --older only"),
        (["one"], {"unfinished": True}, "valid with RUN and --older only"),
        ([], {"older": "soon"}, "valid: a time such as"),
        ([], {"keep": "bets"}, "did you mean best?"),
        ([], {"sure": False}, "valid: --json --dry-run, or --json --yes"),
        (["two"], {}, "valid: one"),
    ],
)
def test_refusals(run: RunDirectory, names: list[str], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        prune(run.path.parent, *names, **options)
    assert said in str(refused.value)
    assert steps(run) == [20, 40, 60, 70]


def test_links_and_what_is_protected(run: RunDirectory, tmp_path: Path) -> None:
    """Nothing behind a symbolic link goes, a hard link frees nothing, and what is read-only stays whole."""
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copytree(run.checkpoints / "checkpoint-20", outside / "checkpoint-10")
    (run.checkpoints / "checkpoint-10").symlink_to(outside / "checkpoint-10")
    (run.checkpoints / "checkpoint-40" / "beside").symlink_to(outside)
    linked = next((run.checkpoints / "checkpoint-40").glob("*.safetensors"))
    os.link(linked, outside / "model")
    os.link(run.checkpoints / "checkpoint-20" / MANIFEST, run.checkpoints / "checkpoint-20" / "same")
    linked_bytes, same = linked.stat().st_size, (run.checkpoints / "checkpoint-20" / MANIFEST).stat().st_size
    (run.checkpoints / "checkpoint-60" / MANIFEST).chmod(0o444)
    wanted = sum(bytes_used(run.checkpoints / f"checkpoint-{s}") for s in (20, 40)) - linked_bytes - same
    found = prune(run.path.parent, code=1)
    assert (found["bytes"], found["freed_bytes"]) == (wanted, wanted)
    assert found["runs"][0]["notes"] == [
        "checkpoint-10 is a symbolic link, and is left where it is",
        "checkpoints/checkpoint-60/manifest.json is write-protected: checkpoint-60 stays (chmod u+w)",
    ]
    assert steps(run) == [10, 60, 70]
    assert (outside / "model").stat().st_size == linked_bytes
    assert (outside / "checkpoint-10" / MANIFEST).exists()
    verify(run.checkpoints / "checkpoint-60")
    shutil.move(run.checkpoints, outside / "checkpoints")
    run.checkpoints.symlink_to(outside / "checkpoints")
    assert "checkpoints is a symbolic link" in prune(run.path.parent, keep="final", code=1)["runs"][0]["skipped"]
    assert (outside / "checkpoints" / "checkpoint-70" / MANIFEST).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")
def test_others_runs_are_named_and_left(run: RunDirectory, tmp_path: Path) -> None:
    for directory in (run.path, *tmp_path.parents, tmp_path, run.path.parent):
        if directory.stat().st_uid == 0 and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o055)
    shutil.copytree(run.path, run.path.with_name("closed"))
    run.path.with_name("closed").chmod(0o700)
    with as_nobody():
        found = prune(run.path.parent, code=1)
    assert [one["skipped"] for one in found["runs"]] == ["is root's, and you may not write there"]
    assert found["unreadable"] == [str(run.path.with_name("closed"))]
    assert steps(run) == [20, 40, 60, 70]


def test_what_an_interrupted_deletion_left_is_finished(run: RunDirectory) -> None:
    os.rename(run.checkpoints / "checkpoint-20" / MANIFEST, run.checkpoints / "checkpoint-20" / UNSEALED)
    run.trash.mkdir(exist_ok=True)
    os.rename(run.checkpoints / "checkpoint-40", run.trash / "checkpoint-40")
    shutil.copytree(run.checkpoints / "checkpoint-60", run.staging / "checkpoint-60")
    found = prune(run.path.parent)
    assert found["freed_bytes"] == found["bytes"]
    assert steps(run) == [70]
    assert not run.trash.exists()
    assert not run.staging.exists()


def test_a_run_that_starts_while_prune_works(tmp_path: Path, outlast: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has the lock first goes on; the other one leaves everything as it is."""
    train = ["train", *SMOKE, "run.name=one", "trainer.max_steps=200", "trainer.step_s=0.02", "checkpoint.every=5"]
    first, run, probe = outlast(*train), RunDirectory(tmp_path / "runs/one"), RunProbe(tmp_path / "runs/one")
    probe.reach(21)
    cancel = outlast("cancel", "one")
    assert (cancel.wait(), first.wait()) == (0, 75)
    before = steps(run)
    [early] = command.look([run], Rule())
    assert [item.path.name for item in early.items] == [f"checkpoint-{step}" for step in before[:-1]]

    inside, go_on, really = threading.Event(), threading.Event(), Remover.delete

    def delete(self: Remover, checkpoint: Sealed, reason: str) -> bool:
        inside.set()
        assert go_on.wait(60)
        return really(self, checkpoint, reason)

    monkeypatch.setattr(Remover, "delete", delete)
    done: list[command.Pruned] = []
    # The lock is this process's: only another process can be kept out by it.
    thread = threading.Thread(target=lambda: done.append(command.prune(early)))
    thread.start()
    assert inside.wait(60)
    second = outlast(*train)
    assert second.wait() == 2
    assert "in use by outlast prune" in second.output
    go_on.set()
    thread.join(60)
    assert done[0].problem is None
    assert steps(run) == before[-1:]

    [late] = command.look([run], Rule(keep=("final",), older_s=0.0, unfinished=True))
    assert [item.path.name for item in late.items] == [f"checkpoint-{before[-1]}"]
    third = outlast(*train)
    probe.reach(before[-1] + 6, attempt=2)
    assert "is in use by" in str(command.prune(late).problem)
    assert third.wait() == 0, third.output
    assert command.prune(late).problem == "it has started, or was submitted, meanwhile: nothing was deleted"
    assert probe.events("resumed")[0]["step"] == before[-1]


def test_a_deletion_long_after_is_not_a_part_of_the_last_attempt(make: Make) -> None:
    run = make("one")
    ledger = Ledger(run.ledger)
    started = {"job_id": None, "restart_count": 0, "hosts": ["a"], "world_size": 1, "versions": {}}
    ledger.append("attempt_started", 1, at=1000.0, **started)
    ledger.append("checkpoint", 1, at=1060.0, step=4, kind="periodic", bytes=1, stall_s=0.1, sealed_s=0.1)
    ledger.append("attempt_ended", 1, at=1100.0, cause="failed", step=4, detail=KILLED)
    ledger.append("deleted", 1, at=9000.0, checkpoint="checkpoint-2", reason="prune")
    events = ledger.read()
    [row] = attempt_rows(started_attempts(events), events, read(run))
    assert row["seconds"] == 60.0
    assert ended_at(run) == 1100.0
    assert summarize_since([run], 2000.0)["users"] == {}
