"""What is prepared once has a list of its files, which is compared when an attempt starts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.checkpoint.listing import LISTING, check_listing, write_listing
from outlast.errors import CheckpointError, ResumeRefusedError
from outlast.jobs.training import prepared
from outlast.rundir.directory import RunDirectory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "prepared" / "data"
    (directory / "train").mkdir(parents=True)
    (directory / "train" / "rows.arrow").write_bytes(bytes(100))
    (directory / "prepared.json").write_text('{"train": 4}')
    write_listing(directory)
    return directory


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: flip(path / "train/rows.arrow"), "train/rows.arrow differs from what was written"),
        (lambda path: (path / "train/rows.arrow").unlink(), "train/rows.arrow can't be read: No such file"),
        (lambda path: (path / "prepared.json").write_text("{}"), "prepared.json has 2 bytes, the manifest says 12"),
        (lambda path: flip(path / LISTING), "files.json differs from what was written"),
        (lambda path: (path / LISTING).write_text("["), "files.json differs from what was written"),
    ],
)
def test_what_differs_is_refused_by_name(directory: Path, damage: Callable[[Path], None], reason: str) -> None:
    run = RunDirectory(directory.parent.parent)
    prepared.verify(run)
    damage(directory)
    with pytest.raises(CheckpointError, match=reason):
        check_listing(directory)
    with pytest.raises(
        ResumeRefusedError, match=f"data is not what was prepared: {reason}.*; remove .*prepared/data, and"
    ):
        prepared.verify(run)


def test_nothing_prepared_and_nothing_listed_are_no_damage(directory: Path) -> None:
    prepared.verify(RunDirectory(directory / "not there"))
    (directory / LISTING).unlink()
    prepared.verify(RunDirectory(directory.parent.parent))
