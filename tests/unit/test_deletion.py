"""What is deleted, and that nothing behind a symbolic link is."""

import errno
from pathlib import Path

import pytest

from outlast.deletion import delete
from outlast.errors import ConfigError
from outlast.files import staged_directory
from outlast.jobs.training import source
from outlast.rundir.directory import RunDirectory


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Somebody else's directory, with one file below it."""
    path = tmp_path / "outside"
    (path / "data").mkdir(parents=True)
    (path / "data" / "rows").write_text("theirs")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def test_files_and_whole_directories_go(run: Path) -> None:
    (run / "a" / "b").mkdir(parents=True)
    (run / "a" / "b" / "file").write_text("")
    (run / "a" / "file").write_text("")
    assert delete(run / "a" / "file", inside=run)
    assert delete(run / "a", inside=run)
    assert not delete(run / "a", inside=run)
    assert not delete(run / "a" / "b" / "file", inside=run)
    assert not list(run.iterdir())


def test_a_link_goes_and_its_target_stays(run: Path, outside: Path) -> None:
    (run / "link").symlink_to(outside)
    (run / "dangling").symlink_to("nowhere")
    (run / "tree").mkdir()
    (run / "tree" / "inner").symlink_to(outside / "data")
    (run / "tree" / "file").symlink_to(outside / "data" / "rows")
    for name in ("link", "dangling", "tree"):
        assert delete(run / name, inside=run)
    assert not list(run.iterdir())
    assert (outside / "data" / "rows").read_text() == "theirs"


def test_a_link_on_the_way_is_refused_by_name(run: Path, outside: Path) -> None:
    (run / "prepared").symlink_to(outside)
    with pytest.raises(OSError, match=r"is a symbolic link.*run/prepared") as raised:
        delete(run / "prepared" / "data", inside=run)
    assert raised.value.errno == errno.ELOOP
    assert (outside / "data" / "rows").exists()


def test_the_directory_itself_may_be_a_link(run: Path, outside: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(outside)
    assert delete(tmp_path / "elsewhere" / "data", inside=tmp_path / "elsewhere")
    assert outside.is_dir()


@pytest.mark.parametrize("path", [".", "..", "a/..", "../outside", "a/../../outside"])
def test_nothing_but_what_is_below(path: str, run: Path, outside: Path) -> None:
    (run / "a").mkdir()
    with pytest.raises(ValueError, match="below"):
        delete(run / path, inside=run)
    with pytest.raises(ValueError, match="below"):
        delete(outside, inside=run)
    assert (outside / "data" / "rows").exists()


def test_prepared_data_behind_a_link(run: Path, outside: Path) -> None:
    (run / "prepared").symlink_to(outside)
    with pytest.raises(ConfigError, match=r"prepared.* nothing outside the run directory is ever deleted"):
        RunDirectory(run).create()
    (run / "prepared").unlink()
    (run / "prepared").mkdir()
    (run / "prepared" / source.RECORD).write_text('{"data.train": "0"}')
    (run / "prepared" / "data").symlink_to(outside / "data")
    assert source.clear_changed(RunDirectory(run), {"data.train": "1"})
    assert (outside / "data" / "rows").exists()


def test_a_staged_directory_replaces_a_link(run: Path, outside: Path) -> None:
    for name in ("code", ".code.staging", ".code.old"):
        (run / name).symlink_to(outside)
    with staged_directory(run / "code") as staging:
        (staging / "mine").write_text("mine")
    assert (run / "code" / "mine").read_text() == "mine"
    assert [path.name for path in run.iterdir()] == ["code"]
    assert (outside / "data" / "rows").exists()
    assert not (outside / "mine").exists()
