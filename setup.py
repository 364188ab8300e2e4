"""Which packages are installed; all else stands in pyproject.toml.

`launcher`, `jobs`, `conf` and `slurm` are rooms of the repository with generic names: they install inside the package,
so that nothing generic lands in site-packages.
"""

from setuptools import find_packages, setup

ROOMS = {
    "outlast": "src/outlast",
    "outlast.conf": "conf",
    "outlast.jobs": "jobs",
    "outlast.launcher": "launcher",
    "outlast.shell": "slurm",
}

setup(
    packages=[name for room, place in ROOMS.items() for name in (room, *(f"{room}.{p}" for p in find_packages(place)))],
    package_dir=ROOMS,
)
