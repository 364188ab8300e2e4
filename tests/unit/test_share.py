"""The share of a cell in its sweep's budget."""

import json
import random
from pathlib import Path

import pytest

from outlast.config.storage import StorageSection
from outlast.files import bytes_used
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.rundir.sweep import Cell, SweepManifest
from outlast.storage.share import Share

GB = 1_000_000_000


def sweep_of(path: Path, count: int) -> list[RunDirectory]:
    cells = [Cell(index=i, name=f"c{i}", directory=f"c{i}", overrides=[], config_digest="") for i in range(count)]
    path.mkdir()
    SweepManifest(name=path.name, cells=cells).write(path)
    runs = [RunDirectory(path / cell.directory) for cell in cells]
    for run in runs:
        run.create()
    return runs


def use(run: RunDirectory, size: int) -> None:
    (run.path / "data").write_bytes(b"")
    with open(run.path / "data", "wb") as file:
        file.truncate(size)  # a sparse file: its size counts


def finish(run: RunDirectory) -> None:
    Ledger(run.ledger).append("finished", 1, step=1, seconds=1.0)


def test_outside_a_sweep_the_budget_is_the_runs_own(tmp_path: Path) -> None:
    assert Share(RunDirectory(tmp_path / "run"), StorageSection(budget_gb=3, sweep_budget_gb=1))() == 3 * GB
    (run, *_) = sweep_of(tmp_path / "sweep", 2)
    assert Share(run, StorageSection(budget_gb=3))() == 3 * GB


def test_an_even_share_at_first_and_what_finished_cells_leave_later(tmp_path: Path) -> None:
    runs = sweep_of(tmp_path / "sweep", 4)
    share = Share(runs[0], StorageSection(budget_gb=10, sweep_budget_gb=8))
    assert share() == pytest.approx(2 * GB, rel=1e-6)
    use(runs[3], GB // 2)
    assert share() == pytest.approx(2 * GB, rel=1e-6), "a cell that may go on keeps its share"
    finish(runs[3])
    assert share() == pytest.approx(2.5 * GB, rel=1e-6)
    for run in runs[1:3]:
        finish(run)
    assert share() == pytest.approx(7.5 * GB, rel=1e-6)
    assert Share(runs[0], StorageSection(budget_gb=3, sweep_budget_gb=8))() == 3 * GB


def test_what_the_cells_share_is_taken_off(tmp_path: Path) -> None:
    runs = sweep_of(tmp_path / "sweep", 2)
    code = tmp_path / "sweep" / "code"
    code.mkdir()
    (code / "big").write_bytes(bytes(1_000_000))
    assert Share(runs[0], StorageSection(sweep_budget_gb=0.003))() == pytest.approx(1_000_000, rel=0.001)


def test_the_sum_never_exceeds_the_budget_in_whatever_order_cells_look_and_finish(tmp_path: Path) -> None:
    seed = random.randrange(10_000)
    dice = random.Random(seed)
    runs = sweep_of(tmp_path / "sweep", 6)
    storage = StorageSection(budget_gb=100, sweep_budget_gb=6)
    shares = {run.path: Share(run, storage) for run in runs}
    going = list(runs)
    while going:
        run = dice.choice(going)
        allowed = shares[run.path]() if dice.random() < 0.5 else shares[run.path]._last or 0  # a look out of date
        use(run, int(allowed * dice.random()))
        if dice.random() < 0.3:
            finish(run)
            going.remove(run)
        assert bytes_used(tmp_path / "sweep") <= 6 * GB, f"seed {seed}"


def test_a_cell_that_was_left_with_more_than_its_share_keeps_it_and_the_sum_holds(tmp_path: Path) -> None:
    """The sweep has grown from two cells to five since the first ones were stopped."""
    storage = StorageSection(budget_gb=100, sweep_budget_gb=10)
    runs = sweep_of(tmp_path / "sweep", 5)
    for run, used in zip(runs, (5 * GB, 3 * GB), strict=False):
        run.progress.write_text(json.dumps({"attempt": 1, "bytes_used": used}))
    shares = [Share(run, storage)() for run in runs]
    assert shares[2:] == [pytest.approx(2 * GB / 3, rel=0.01)] * 3
    assert 8 * GB + sum(shares[2:]) <= 10 * GB
    assert shares[0] == pytest.approx(7 * GB / 4, rel=0.01), "once it runs, it comes down to what the others leave"
