"""One devcluster for all tests of this directory, skipped with the reason where there can be none."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast.errors import OutlastError
from outlast.launcher.devcluster import cluster as launcher_devcluster

from .cluster import Cluster

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def devcluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster all Slurm tests share: 4 nodes of 4 CPUs, `low` with 30 s of grace, `high` that preempts it."""
    try:
        launcher_devcluster.require()
    except OutlastError as error:
        pytest.skip(str(error))
    directory = tmp_path_factory.mktemp("devcluster")
    launcher_devcluster.up(directory, grace_s=30)
    cluster = Cluster(directory)
    try:
        yield cluster
    finally:
        cluster.cancel_all()
        launcher_devcluster.down(directory)
