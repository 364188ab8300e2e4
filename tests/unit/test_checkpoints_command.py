"""`outlast checkpoints`: on the checkpoints of a small real run, by the real command, then on what may go wrong."""

import fcntl
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint import manifest as manifests
from outlast.checkpoint.manifest import MANIFEST, Sealed, read_manifest, write_manifest
from outlast.checkpoint.removal import Remover
from outlast.launcher.commands import checkpoints
from outlast.rundir.directory import RunDirectory

from ..conftest import OUTLAST, SMOKE, Command

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints at 20, 40 and 60 of 70 steps, that of the last deleted. Not to be changed."""
    directory = tmp_path_factory.mktemp("real")
    command = Command(directory, "train", *SMOKE, "run.name=real", "trainer.max_steps=70")
    assert command.wait() == 0, command.output
    shutil.rmtree(directory / "runs/real/checkpoints/checkpoint-70")
    return directory / "runs" / "real"


@pytest.fixture
def run(real: Path, tmp_path: Path) -> RunDirectory:
    """A copy of it, to be changed."""
    shutil.copytree(real, tmp_path / "runs" / "one")
    return RunDirectory(tmp_path / "runs" / "one")


def outlast(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([OUTLAST, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)


def rows_of(run: RunDirectory, *arguments: str, code: int = 0) -> dict[tuple[str, str], dict[str, Any]]:
    """What `--json` says, by name and state."""
    done = outlast(run.path.parent.parent, "checkpoints", run.path.name, "--json", *arguments)
    assert (done.returncode, done.stderr) == (code, "")
    return {(row["name"], row["state"]): row for row in json.loads(done.stdout)["checkpoints"]}


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def evaluate(run: RunDirectory, *values: tuple[int, float]) -> None:
    with open(run.ledger, "a") as ledger:
        for step, loss in values:
            line = {"time": 0.0, "attempt": 1, "event": "evaluated", "step": step, "metrics": {"eval_loss": loss}}
            ledger.write(json.dumps(line) + "\n")


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_one_line_a_checkpoint(real: Path) -> None:
    done = outlast(real.parent.parent, "checkpoints", "real")
    assert (done.returncode, done.stderr) == (0, "")
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["step", "kind", "state", "metric", "bytes", "age"]
    assert [line.split()[:3] for line in lines] == [
        ["20", "periodic", "sealed"],
        ["40", "periodic", "sealed"],
        ["60", "periodic", "sealed"],
        ["70", "final", "final"],
    ]
    assert all("kB" in line and line.rstrip().endswith(" s") for line in lines)


def test_a_path_does_as_well_as_a_name(real: Path, tmp_path: Path) -> None:
    by_name = outlast(tmp_path, "checkpoints", "real", "--root", str(real.parent), "--json")
    by_path = outlast(tmp_path, "checkpoints", str(real), "--json")
    steps = [[row["step"] for row in json.loads(done.stdout)["checkpoints"]] for done in (by_name, by_path)]
    assert steps == [[20, 40, 60, 70]] * 2


def test_an_unknown_run_is_refused_with_the_valid_names(real: Path) -> None:
    done = outlast(real.parent.parent, "checkpoints", "rael")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "outlast: RUN: 'rael' is refused; did you mean real? valid: real\n"


def test_help_has_an_example(tmp_path: Path) -> None:
    assert "example:\n  outlast checkpoints first --verify" in outlast(tmp_path, "checkpoints", "--help").stdout


def test_the_values(run: RunDirectory) -> None:
    directory = run.checkpoints / "checkpoint-40"
    row = rows_of(run)["checkpoint-40", "sealed"]
    age = row.pop("age_s")
    assert row == {
        "name": "checkpoint-40",
        "path": str(directory),
        "state": "sealed",
        "step": 40,
        "kind": "periodic",
        "best": False,
        "metric": None,
        "bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        "time": read_manifest(directory).time,
        "reason": None,
        "verified": None,
    }
    assert 0 < age < 600


def test_the_best_is_that_of_the_newest_manifest_and_has_its_metric(run: RunDirectory) -> None:
    evaluate(run, (20, 3.0), (40, 1.5), (60, 1.0), (40, 1.25), (70, 0.5))
    for step, best in ((20, 20), (40, 40), (60, 40)):
        directory = run.checkpoints / f"checkpoint-{step}"
        write_manifest(directory, replace(read_manifest(directory), best_step=best))
    shutil.copytree(run.checkpoints / "checkpoint-40", run.quarantine / "checkpoint-40")  # an earlier one of that step
    rows = rows_of(run)
    assert [key for key, row in rows.items() if row["best"]] == [("checkpoint-40", "sealed")]
    assert rows["checkpoint-40", "sealed"]["metric"] == {"name": "eval_loss", "value": 1.25}  # evaluated twice
    assert rows["checkpoint-20", "sealed"]["metric"] == {"name": "eval_loss", "value": 3.0}
    assert rows["final", "final"]["metric"] is None  # it may be the best model, not that of step 70
    text = outlast(run.path.parent.parent, "checkpoints", "one").stdout
    assert [line for line in text.splitlines() if line.startswith("40 *") and "eval_loss 1.25" in line]
    assert "* the best by its metric" in text


def test_every_state(run: RunDirectory) -> None:
    checkpoints_, aside = run.checkpoints, run.quarantine
    light = checkpoints_ / "checkpoint-20"
    manifest = read_manifest(light)
    manifest.files.pop("optimizer.bin")
    (light / "optimizer.bin").unlink()
    write_manifest(light, replace(manifest, light=True))
    (checkpoints_ / "checkpoint-40" / MANIFEST).unlink()
    shutil.copytree(checkpoints_ / "checkpoint-60", checkpoints_ / "checkpoint-50")
    (checkpoints_ / "checkpoint-50" / MANIFEST).write_text("{")
    shutil.copytree(checkpoints_ / "checkpoint-60", aside / "checkpoint-60")
    shutil.copytree(checkpoints_ / "checkpoint-40", aside / "checkpoint-40.1")
    (aside / "checkpoint-60.reason.txt").write_text("model.safetensors has 3 bytes\n")
    (aside / "checkpoint-99.reason.txt").write_text("written just before its checkpoint is moved\n")
    (checkpoints_ / "checkpoint-30").symlink_to(light)
    for other in (".staging", ".deleted", "checkpoint-x", "runs"):
        (checkpoints_ / other).mkdir(exist_ok=True)
    rows = rows_of(run, "--verify", code=1)
    unsealed = "it has no manifest: it was never sealed, or is being deleted"
    assert {key: (row["step"], row["kind"], row["verified"], row["reason"]) for key, row in rows.items()} == {
        ("checkpoint-20", "light"): (20, "periodic", True, None),
        ("checkpoint-40", "unsealed"): (40, None, None, unsealed),
        ("checkpoint-50", "unreadable"): (50, None, False, rows["checkpoint-50", "unreadable"]["reason"]),
        ("checkpoint-60", "sealed"): (60, "periodic", True, None),
        ("final", "final"): (70, "final", True, None),
        ("checkpoint-40.1", "quarantined"): (40, None, None, unsealed),
        ("checkpoint-60", "quarantined"): (60, "periodic", None, "model.safetensors has 3 bytes"),
    }
    assert rows["checkpoint-50", "unreadable"]["reason"].startswith("its manifest can't be read")
    assert all(row["bytes"] > 0 and row["age_s"] > 0 for row in rows.values())
    text = outlast(run.path.parent.parent, "checkpoints", "one").stdout
    assert "quarantined checkpoint-60: model.safetensors has 3 bytes\n" in text


def test_verify_says_ok_and_changes_nothing(run: RunDirectory) -> None:
    before = tree(run.path)
    done = outlast(run.path.parent.parent, "checkpoints", "one", "--verify")
    assert done.returncode == 0
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["verified", "ok", "ok", "ok", "ok"]
    assert done.stderr == ""
    assert tree(run.path) == before


@pytest.mark.parametrize("name", ["checkpoints/checkpoint-40", "final"])
def test_verify_finds_one_flipped_bit_and_puts_nothing_aside(run: RunDirectory, name: str) -> None:
    [weights] = (run.path / name).glob("*.safetensors")
    flip(weights)
    before = tree(run.path)
    done = outlast(run.path.parent.parent, "checkpoints", "one", "--verify")
    assert done.returncode == 1
    assert sum("FAILED" in line for line in done.stdout.splitlines()) == 1
    assert sum(line.rstrip().endswith(" ok") for line in done.stdout.splitlines()) == 3
    assert f"{Path(name).name}: {weights.name} differs from what was written (xxh3-128)" in done.stdout
    assert tree(run.path) == before
    assert outlast(run.path.parent.parent, "checkpoints", "one").returncode == 0  # not asked to look


def test_verify_names_what_is_missing_or_cut(run: RunDirectory) -> None:
    (run.checkpoints / "checkpoint-20" / "optimizer.bin").unlink()
    whole = (run.checkpoints / "checkpoint-60" / FILE).read_bytes()
    (run.checkpoints / "checkpoint-60" / FILE).write_bytes(whole[:-1])
    rows = rows_of(run, "--verify", code=1)
    assert rows["checkpoint-20", "sealed"]["reason"] == "optimizer.bin can't be read: No such file or directory"
    assert rows["checkpoint-60", "sealed"]["reason"] == (
        f"{FILE} has {len(whole) - 1} bytes, the manifest says {len(whole)}"
    )
    assert [row["verified"] for row in rows.values()] == [False, True, False, True]


def test_a_run_without_checkpoints(run: RunDirectory) -> None:
    shutil.rmtree(run.checkpoints)
    shutil.rmtree(run.final)
    done = outlast(run.path.parent.parent, "checkpoints", "one", "--verify")
    assert (done.returncode, done.stdout) == (0, "one has no checkpoint yet\n")


def test_what_goes_between_listing_and_reading_is_no_failure(run: RunDirectory) -> None:
    rows = checkpoints.look(run)
    (run.checkpoints / "checkpoint-20" / MANIFEST).unlink()  # how a deletion begins
    shutil.rmtree(run.checkpoints / "checkpoint-40")
    assert [row.name for row in rows if checkpoints._verified(row)] == ["checkpoint-60", "final"]
    assert [row.verified for row in rows] == [None, None, True, True]


@pytest.mark.parametrize("does", ["lighten", "delete"])
def test_what_is_lightened_or_deleted_in_the_middle_of_reading_is_no_failure(
    run: RunDirectory, does: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader stands still before its first file until the other side has done its part."""
    directory = run.checkpoints / "checkpoint-20"
    begun, go_on, read_entry = threading.Event(), threading.Event(), manifests.read_entry

    def read(path: Path, **options: bool) -> manifests.FileEntry:
        begun.set()
        assert go_on.wait(60)
        return read_entry(path, **options)

    monkeypatch.setattr(manifests, "read_entry", read)
    row, answers = next(row for row in checkpoints.look(run) if row.step == 20), []
    reader = threading.Thread(target=lambda: answers.append(checkpoints._verified(row)))
    reader.start()
    assert begun.wait(60)
    remover = Remover(run, lambda event, **values: None, print)
    getattr(remover, does)(Sealed(directory, read_manifest(directory)), "test")
    go_on.set()
    reader.join()
    assert answers == [does == "lighten"]
    assert row.verified is (True if does == "lighten" else None)


def test_asked_again_and_again_while_checkpoints_come_and_go(run: RunDirectory) -> None:
    """Another thread publishes a checkpoint by a rename, then lightens and deletes it as the store does."""
    source, target = run.checkpoints / "checkpoint-60", run.checkpoints / "checkpoint-80"
    remover, seen = Remover(run, lambda event, **values: None, print), set()

    def churn() -> None:
        for _ in range(30):
            shutil.copytree(source, run.staging / target.name)
            write_manifest(run.staging / target.name, replace(read_manifest(source), step=80))
            (run.staging / target.name).rename(target)
            assert remover.lighten(Sealed(target, read_manifest(target)), "test")
            assert remover.delete(Sealed(target, read_manifest(target)), "test")

    thread = threading.Thread(target=churn)
    thread.start()
    while thread.is_alive():
        rows = [row for row in checkpoints.look(run) if checkpoints._verified(row)]
        assert {row.name for row in rows} >= {"checkpoint-20", "checkpoint-40", "checkpoint-60", "final"}
        assert not [row for row in rows if row.verified is False]
        seen |= {row.state for row in rows if row.name == target.name}
    thread.join()
    assert seen <= {"sealed", "light", "unsealed"}
    assert not target.exists()


def test_a_terminal_gets_a_bar_on_stderr_and_the_table_on_stdout(run: RunDirectory) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x18\x00\x50\x00\x00\x00\x00\x00")  # 24 lines of 80
    with open(ours, "rb", buffering=0) as screen:
        done = subprocess.run(
            [OUTLAST, "checkpoints", "one", "--verify"],
            cwd=run.path.parent.parent,
            stdout=subprocess.PIPE,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm"},
            timeout=60,
        )
        os.close(theirs)
        shown = screen.read(1 << 16)
    assert done.returncode == 0
    assert b"verifying" in shown
    assert b"verifying" not in done.stdout
    assert done.stdout.count(b" ok") == 4


@pytest.mark.parametrize("arguments", [[], ["--verify", "--json"]])
def test_it_imports_no_training_library(real: Path, arguments: list[str]) -> None:
    code = (
        "import sys; from outlast.launcher.cli import main; sys.argv = ['outlast', 'checkpoints', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'hydra'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(real), *arguments], check=True, timeout=60, stdout=subprocess.DEVNULL
    )
