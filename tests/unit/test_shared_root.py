"""A root that several people share: others' runs are shown with their owner, and left alone."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outlast.errors import ConfigError
from outlast.launcher.commands import cancel, resume
from outlast.launcher.commands.status import main as status
from outlast.launcher.runs.find import runs_under
from outlast.launcher.runs.standing import collect
from outlast.rundir.directory import RunDirectory

from .runs import end, shown, start

NOBODY = 65534


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory that all may look into, with three runs of one user: one open, two closed in different ways."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as two users")
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    for name in ("open", "closed", "file"):
        run = RunDirectory(root / name)
        run.create()
        run.config.write_text("trainer: {max_steps: 5}\n")
        end(start(run), "preempted")
    (root / "closed").chmod(0o700)
    (root / "file" / "ledger.jsonl").chmod(0o600)
    yield root
    shutil.rmtree(root)


@contextmanager
def as_nobody() -> Iterator[None]:
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_status(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with as_nobody():
        rows = collect(runs_under(root))
        text = shown(rows)
        assert status([], root, states=None, watch_s=None, as_json=False) == 0
    assert [(row.name, row.owner) for row in rows] == [("open", "root")]
    header, line, *_ = text.splitlines()
    assert line[header.index("owner") :].startswith("root")
    assert "left out, for want of permission to read: closed, file" in capsys.readouterr().err
    assert "owner" not in shown(collect(runs_under(root)))  # where all are one's own


def test_cancel_and_resume(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with as_nobody():
        assert cancel.main(["open"], root, everything=False, sure=False) == 1
        with pytest.raises(ConfigError, match=r"RUN: 'open' is refused; it is root's, and you may not write there"):
            resume.main(["open"], root)
        for name in ("closed", "file"):
            for command in (
                lambda n: cancel.main([n], root, everything=False, sure=False),
                lambda n: resume.main([n], root),
            ):
                with pytest.raises(ConfigError, match=f"you may not read {root / name}, which is root's"):
                    command(name)
    assert "open is root's, and not cancelled: you may not write there" in capsys.readouterr().out
    assert not (root / "open" / "cancelled.json").exists()
