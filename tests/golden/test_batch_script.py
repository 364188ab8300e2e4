"""The batch script, to the letter."""

import shutil
import sys
from pathlib import Path

import pytest

from outlast.errors import ConfigError
from outlast.launcher.compose import compose
from outlast.launcher.plan import shell_file
from outlast.launcher.submit import batch_script

EXPECTED = """#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=3
#SBATCH --job-name='my run'
#SBATCH --mem=8000M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output={logs}/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --reservation=maintenance
#SBATCH --signal=USR2@120
#SBATCH --time=600
#SBATCH --wckey=submitit

# setup
module load cuda
export OMP_NUM_THREADS=3
. {prologue}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output {logs}/%j_%t_log.out --kill-on-bad-exit=1 "${{OUTLAST_HOLD[@]}}" {python} -u -m \
submitit.core._submit {logs}
"""


@pytest.fixture(autouse=True)
def srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit asks only whether there is an `srun`."""
    if shutil.which("srun") is None:
        (tmp_path / "srun").touch(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_the_script(tmp_path: Path) -> None:
    config = compose(
        [
            "job=smoke",
            "run.name='my run'",
            f"run.root={tmp_path}",
            "cluster=slurm",
            "cluster.partition=gpu",
            "cluster.time_min=600",
            "cluster.mem_gb=8",
            "cluster.setup=[module load cuda]",
            "cluster.sbatch.reservation=maintenance",
            "parallel.nodes=2",
            "parallel.ranks_per_node=4",
            "parallel.cpus_per_rank=3",
            "preemption.signal=USR2",
            "preemption.lead_s=120",
        ]
    )
    logs = f"'{tmp_path}/my run/logs"
    expected = EXPECTED.format(logs="@", prologue=shell_file("prologue.sh"), python=sys.executable)
    script = batch_script(config).replace(f"{logs}/", "@/").replace("%j_0_log.out'", "%j_0_log.out")
    script = script.replace("%j_%t_log.out'", "%j_%t_log.out").replace(f"{logs}'", "@")
    assert script == expected


def test_a_flag_that_outlast_sets_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster.sbatch.requeue: .* outlast sets this flag itself"):
        batch_script(compose(["job=smoke", "cluster=slurm", "cluster.sbatch.requeue=false", f"run.root={tmp_path}"]))
