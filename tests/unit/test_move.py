"""`outlast move`: to another file system, killed at each change it makes, with links, and refused where it must be."""

import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint.manifest import Manifest, verify, write_manifest
from outlast.checkpoint.writer import adopt
from outlast.errors import ConfigError, RunBusyError
from outlast.launcher.commands import move as command
from outlast.launcher.execution import moving
from outlast.launcher.runs.find import runs_under
from outlast.launcher.runs.submissions import mark_cancelled
from outlast.rundir.directory import MOVED_FROM, RunDirectory
from outlast.rundir.lock import RunLock

from ..conftest import SMOKE, Command, RunProbe
from .runs import Make, end, save, start, submit, sweep_of

CHANGES = ("os.rename", "os.mkdir", "os.symlink", "os.link", "os.remove", "os.rmdir")
LOCKS = (".lock", ".submit.lock")


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A directory on another file system than the tests' own."""
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tempfile.gettempdir()).st_dev:
        pytest.skip("one file system only")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def run(make: Make) -> RunDirectory:
    """A run that was cancelled, with a checkpoint, links of both kinds, and a file that is read-only."""
    run = make("one")
    ledger = start(run)
    save(ledger, 40)
    end(ledger, "cancelled")
    mark_cancelled(run, None)
    checkpoint = run.checkpoints / "checkpoint-40"
    (checkpoint / "nested").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(os.urandom(5000))
    (checkpoint / "nested" / "optimizer.pt").write_bytes(os.urandom(3000))
    manifest = Manifest(step=40, kind="periodic", world_size=1, time=1.0)
    adopt(checkpoint, manifest.files)
    write_manifest(checkpoint, manifest)
    (run.path / "notes").write_text("mine")
    (run.path / "notes").chmod(0o440)
    os.link(run.path / "notes", run.path / "same")
    (run.path / "newest").symlink_to("checkpoints/checkpoint-40")
    (run.path / "dangling").symlink_to("/nowhere")
    return run


def tree(path: Path) -> dict[str, Any]:
    """Everything in it but the locks: contents, what a link says, and the mode."""
    found: dict[str, Any] = {}
    for one in sorted(path.rglob("*")):
        name = one.relative_to(path).as_posix()
        if name in (*LOCKS, MOVED_FROM):
            continue
        if one.is_symlink():
            found[name] = os.readlink(one)
        else:
            found[name] = (one.stat().st_mode, one.read_bytes() if one.is_file() else None)
    return found


def move(run: RunDirectory, target: Path) -> int:
    return command.main(run.path.name, target, run.path.parent)


def test_the_same_file_system_is_a_rename(run: RunDirectory, tmp_path: Path) -> None:
    before, inode = tree(run.path), run.path.stat().st_ino
    target = tmp_path / "new" / "two"
    assert move(run, target) == 0
    assert (target.stat().st_ino, tree(target), run.path.exists()) == (inode, before, False)


def test_another_file_system(run: RunDirectory, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run.path / "up").symlink_to("../beside")
    (run.path.parent / "beside").write_text("stays")
    before, target = tree(run.path), elsewhere / "two"
    times = (run.path / "notes").stat().st_mtime_ns
    assert move(run, target) == 0
    assert tree(target) == before
    assert (target / "notes").stat().st_ino == (target / "same").stat().st_ino
    assert (target / "notes").stat().st_mtime_ns == times
    verify(target / "checkpoints" / "checkpoint-40")
    assert [path.name for path in run.path.parent.iterdir()] == ["beside"]
    assert [path.name for path in elsewhere.iterdir()] == ["two"]
    assert not (target / MOVED_FROM).exists()
    said = capsys.readouterr().out
    assert f"outlast resume two --root {elsewhere}" in said
    assert "WARNING: the link up led to ../beside" in said
    assert "dangling" not in said


@pytest.mark.parametrize("far", [True, False])
def test_the_way_to_the_copy_is_on_the_disk_before_the_source_goes(
    run: RunDirectory, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, far: bool
) -> None:
    base = elsewhere if far else tmp_path
    target, really, flushed = base / "a" / "b" / "two", os.fsync, []

    def fsync(fd: int) -> None:
        flushed.append((os.readlink(f"/proc/self/fd/{fd}"), run.path.exists()))
        really(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    assert move(run, target) == 0
    for directory in (base, base / "a"):
        assert (str(directory), True) in flushed  # while the source is still there
    assert (str(target.parent), far) in flushed


def killed_at(number: int, act: Callable[[], int]) -> int:
    """Do `act` in a forked process that is gone just before its change of this number; its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left = [number]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)

    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        sys.addaudithook(hook)
        os._exit(act())
    finally:
        os._exit(99)


def test_killed_at_any_change_one_of_the_two_is_whole_and_the_same_command_goes_on(
    run: RunDirectory, elsewhere: Path, tmp_path: Path
) -> None:
    before, target, original = tree(run.path), elsewhere / "two", tmp_path / "original"
    shutil.copytree(run.path, original, symlinks=True)
    code, number, published = 9, 0, 0
    while code == 9:
        number += 1
        code = killed_at(number, lambda: move(run, target))
        assert code in (0, 9)
        there = run.path.exists()
        published += target.exists()
        if there:
            assert tree(run.path) == before, number
        if target.exists():
            assert tree(target) == before, number
        assert there or target.exists(), number
        if code == 9:
            assert move(run, target) == 0, number
        assert tree(target) == before, number
        assert sorted(path.name for path in tmp_path.iterdir()) == ["original"], number
        assert [path.name for path in elsewhere.iterdir()] == ["two"], number
        shutil.rmtree(target)
        shutil.copytree(original, run.path, symlinks=True)
        (run.path / "same").unlink()
        os.link(run.path / "notes", run.path / "same")
    assert number > 30
    assert published > 10  # the source was being removed


def test_a_source_that_went_on_is_not_removed(run: RunDirectory, elsewhere: Path) -> None:
    target = elsewhere / "two"
    moving.copy(run.path, target, print)
    save(start(run, 2), 50, 2)
    with pytest.raises(ConfigError, match="it exists as the copy of a run that has changed since"):
        move(run, target)
    assert run.path.exists()


def test_a_copy_does_not_train_while_its_source_is_whole(run: RunDirectory, elsewhere: Path) -> None:
    target = RunDirectory(elsewhere / "two")
    moving.copy(run.path, target.path, print)
    with pytest.raises(ConfigError, match=f"{run.path} is whole too: a move was interrupted"):
        target.create()
    run.create()  # the source may go on, and is then not removed
    assert move(run, target.path) == 0
    target.create()


def test_what_an_earlier_move_has_left_is_in_the_way(run: RunDirectory, elsewhere: Path) -> None:
    left = run.path.with_name(".one.moved")
    shutil.copytree(run.path, left, symlinks=True)
    before = tree(left)
    with pytest.raises(ConfigError, match=f"{left} is in the way, left of an earlier move from there"):
        move(run, elsewhere / "two")
    assert (list(elsewhere.iterdir()), tree(run.path), tree(left)) == ([], before, before)


def test_a_run_that_came_back_while_a_move_was_being_ended_stays(run: RunDirectory, elsewhere: Path) -> None:
    """The move was cut short while it deleted; a new run gets the name just before the second command's deletion."""
    target, before = elsewhere / "two", tree(run.path)
    moving.copy(run.path, target, print)
    os.rename(run.path, moving.leftover_of(run.path))
    really = command._interrupted

    def interrupted(*args: Any) -> Path | None:
        found = really(*args)
        run.create()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_interrupted", interrupted)
        assert move(run, target) == 0
    assert run.checkpoints.is_dir()
    assert not moving.leftover_of(run.path).exists()
    assert tree(target) == before


@pytest.mark.parametrize("when", ["while it is copied", "once it is published", "between two commands"])
def test_what_is_written_to_the_source_is_not_deleted_with_it(
    run: RunDirectory, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """As `outlast evaluate` does, which holds no lock of the run, and whoever writes a file by hand."""
    scores, target = run.path / "evaluations" / "a.jsonl", elsewhere / "two"
    scores.parent.mkdir()
    scores.write_text("1\n")

    def write() -> None:
        with open(scores, "a") as file:
            file.write("2\n")

    if when == "between two commands":
        moving.copy(run.path, target, print)
        write()
        with pytest.raises(ConfigError, match="it exists as the copy of a run that has changed since"):
            move(run, target)
    else:
        name = "_verify_sealed" if when == "while it is copied" else "flush_directory"
        really = getattr(moving, name)

        def act(*args: Any) -> None:
            really(*args)
            if when == "while it is copied" or target.exists():
                write()

        with monkeypatch.context() as patch:
            patch.setattr(moving, name, act)
            with pytest.raises(moving.CopyError, match=r"one was written to (while|since) it was copied, and stays"):
                move(run, target)
    assert scores.read_text() == "1\n2\n"
    assert target.exists() == (when != "while it is copied")
    if target.exists():
        shutil.rmtree(target)
    assert move(run, target) == 0
    assert (target / "evaluations" / "a.jsonl").read_text() == "1\n2\n"


def test_a_copy_that_differs_is_not_published(
    run: RunDirectory, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses a bit: the file is changed between being written and being read back."""
    really = moving.flush_tree

    def flush(staged: Path) -> None:
        weights = staged / "checkpoints" / "checkpoint-40" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
        really(staged)

    before = tree(run.path)
    monkeypatch.setattr(moving, "flush_tree", flush)
    with pytest.raises(moving.CopyError, match=r"model.safetensors is not what was read"):
        move(run, elsewhere / "two")
    assert tree(run.path) == before
    assert not (elsewhere / "two").exists()


def test_a_checkpoint_damaged_before_is_named_and_moved(
    run: RunDirectory, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.checkpoints / "checkpoint-40" / "model.safetensors").write_bytes(b"short")
    assert move(run, elsewhere / "two") == 0
    assert "checkpoint-40 does not verify, neither here nor where it comes from" in capsys.readouterr().out


def test_two_moves_to_one_destination_at_once(run: RunDirectory, make: Make, elsewhere: Path) -> None:
    """The second one begins, and publishes its copy, while the first one is between its copy and publishing it."""
    other, target = make("other"), elsewhere / "two"
    end(start(other), "cancelled")
    before, others = tree(run.path), tree(other.path)
    really, calls = moving.flush_tree, []

    def flush(staged: Path) -> None:
        calls.append(staged)
        if len(calls) == 1:
            assert runs_under(elsewhere) == []
            assert move(other, target) == 0
        really(staged)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving, "flush_tree", flush)
        assert move(run, target) == 1
    assert calls[0] != calls[1]
    assert (tree(target), tree(run.path), other.path.exists()) == (others, before, False)
    with pytest.raises(ConfigError, match="it exists; valid: a directory that is not there yet"):
        move(run, target)
    assert move(run, elsewhere / "three") == 0
    assert tree(elsewhere / "three") == before


def test_what_is_half_moved_is_no_run(run: RunDirectory) -> None:
    named = [run.path.with_name(".one.moved"), run.path.with_name(".one.0123abcd.moving")]
    for path in named:
        shutil.copytree(run.path, path, symlinks=True)
    shutil.copytree(run.path, run.path.with_name(".mine"), symlinks=True)
    assert [found.path.name for found in runs_under(run.path.parent)] == [".mine", "one"]


def test_no_room(run: RunDirectory, elsewhere: Path) -> None:
    with open(run.path / "sparse", "wb") as file:
        file.truncate(shutil.disk_usage(elsewhere).free + 1_000_000)
    with pytest.raises(ConfigError, match=r"the run takes .* more there, and free space is"):
        move(run, elsewhere / "two")
    assert list(elsewhere.iterdir()) == []


def test_refused_destinations(run: RunDirectory, make: Make, tmp_path: Path) -> None:
    make("other")
    (tmp_path / "there").mkdir()
    sweep = sweep_of(tmp_path, [])
    for target, why in (
        (tmp_path / "other", "it exists; valid: a directory that is not there yet$"),
        (tmp_path / "there", "not there yet, such as .*/there/one"),
        (run.path, "it is one itself, or inside of it"),
        (run.checkpoints / "x", "it is one itself, or inside of it"),
        (tmp_path / "a:b", "whose name is a directory name"),
        (sweep / "one", "is a sweep, which lists its cells"),
    ):
        with pytest.raises(ConfigError, match=why):
            move(run, target)
    link = tmp_path / "link"
    link.symlink_to(run.path)
    with pytest.raises(ConfigError, match="is a symbolic link; valid: what it leads to"):
        move(RunDirectory(link), tmp_path / "new")
    assert run.path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_a_source_that_only_its_owner_may_rename(run: RunDirectory, elsewhere: Path) -> None:
    shared = elsewhere / "shared"  # as /tmp: whoever may write there can rename what is theirs
    shutil.copytree(run.path, shared / "one", symlinks=True)
    for directory, mode in ((elsewhere, 0o777), (shared, 0o1777), (shared / "one", 0o777)):
        directory.chmod(mode)
    for file in shared.rglob("*"):
        if not file.is_symlink():
            file.chmod(file.stat().st_mode | 0o666)
    os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match="only its owner may rename it in"):
            move(RunDirectory(shared / "one"), elsewhere / "two")
    finally:
        os.seteuid(0)
    assert move(RunDirectory(shared / "one"), elsewhere / "two") == 0


def test_a_run_that_is_alive_or_waits_is_refused(
    run: RunDirectory, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = RunLock(run)
    lock.acquire("a test")
    try:
        with pytest.raises(ConfigError, match="it is running; stop it first: outlast cancel one"):
            move(run, tmp_path / "new")
    finally:
        lock.release()
    really = command.collect

    def submitted_meanwhile(runs: Any, ask: Any) -> Any:
        rows = really(runs, ask=ask)
        submit(run, "7")
        return rows

    monkeypatch.setattr(command, "collect", submitted_meanwhile)
    with pytest.raises(RunBusyError, match="was submitted, meanwhile: nothing was moved"):
        move(run, tmp_path / "new")
    assert run.path.exists()


def test_a_cell_leaves_its_sweep(tmp_path: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = RunDirectory(sweep_of(tmp_path, []) / "seed=0")
    end(start(cell), "cancelled")
    assert command.main("s/seed=0", elsewhere / "best", tmp_path) == 0
    assert "s still lists this cell" in capsys.readouterr().out
    assert (elsewhere / "best" / "ledger.jsonl").exists()
    with pytest.raises(ConfigError, match="it has not begun"):
        command.main("s/seed=0", elsewhere / "second", tmp_path)


def test_a_moved_run_resumes_and_ends_as_if_it_had_stayed(
    elsewhere: Path, tmp_path: Path, outlast: Callable[..., Command]
) -> None:
    train = ["train", *SMOKE, "trainer.max_steps=60"]
    twin = outlast(*train, "run.name=twin")
    assert twin.wait() == 0, twin.output
    first, probe = outlast(*train, "run.name=one", "trainer.step_s=0.1"), RunProbe(tmp_path / "runs/one")
    probe.reach(12)
    assert outlast("cancel", "one").wait() == 0
    assert first.wait() == 75
    moved = outlast("move", "one", str(elsewhere / "one"))
    assert moved.wait() == 0, moved.output
    there = RunProbe(elsewhere / "one")
    again = outlast(*train, "run.name=one", "trainer.step_s=0.1", f"run.root={elsewhere}")
    assert again.wait() == 0, again.output
    assert there.events("resumed")[0]["step"] == there.saved(1)
    assert there.weights() == RunProbe(tmp_path / "runs/twin").weights()
