"""Jobs submitted where `git clone` leaves you: in the directory that holds a checkout called `outlast`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import SMOKE, Command, RunProbe
from .cluster import Cluster
from .test_runs import REPOSITORY, sbatch

SMALL = [*SMOKE, "run.name=r", "parallel.nodes=2", "trainer.max_steps=3"]


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    (tmp_path / "outlast").symlink_to(REPOSITORY)
    return tmp_path


@pytest.mark.parametrize("launch", ["srun", "accelerate"])
def test_by_the_launcher(
    outlast: Callable[..., Command],
    devcluster: Cluster,
    probe: Callable[[str], RunProbe],
    parent: Path,
    launch: str,
) -> None:
    place = {"OUTLAST_DEVCLUSTER": str(devcluster.directory)}
    command = outlast("train", *SMALL, "cluster=devcluster", f"parallel.launch={launch}", "--wait", **place)
    assert command.wait(120) == 0, command.output
    assert probe("r").causes() == ["finished"]


@pytest.mark.parametrize("launch", ["srun", "accelerate"])
def test_by_plain_sbatch(devcluster: Cluster, parent: Path, launch: str) -> None:
    flags, work = ["--nodes=2", "--cpus-per-task=1"], parent
    if launch == "srun":
        work = parent / "a directory of its own"
        work.mkdir()
        (work / "outlast").symlink_to(REPOSITORY)
        flags.append(f"--chdir={work}")
    job = sbatch(devcluster, parent, flags, *SMALL, f"parallel.launch={launch}")
    devcluster.wait_for_state(job, "COMPLETED", 120)
    assert RunProbe(work / "runs" / "r").causes() == ["finished"]
