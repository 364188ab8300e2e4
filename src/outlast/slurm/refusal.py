"""What a submission that Slurm refuses was refused for: the key of the configuration, and what would be valid."""

import re

from outlast.errors import ConfigError, SlurmError

from .commands import run_slurm

_KEYS = (
    (r"wckey", "cluster.sbatch.wckey"),
    (r"\bqos\b", "cluster.qos"),
    (r"account", "cluster.account"),
    (r"partition", "cluster.partition"),
    (r"unrecognized option|invalid option|ambiguous", "cluster.sbatch"),
    (r"reservation", "cluster.sbatch.reservation"),
    (r"time limit|--time", "cluster.time_min"),
    (r"gres|gpu", "parallel.gpus_per_rank"),
    (r"feature|constraint", "cluster.constraint"),
    (r"node name", "cluster.nodelist"),
    (r"memory", "cluster.mem_gb"),
    (r"processors|cpu count", "parallel.cpus_per_rank"),
    (r"node count|node configuration", "parallel.nodes"),
)
"""Words of a refusal, and the key whose value it is about."""

_PASSING = r"contact|timed out|did not answer|communicat|connect|bytes were|try again|temporarily|not installed"
"""Words of an error that says nothing of the job."""


def refusal_of(error: SlurmError, values: dict[str, object]) -> ConfigError | None:
    """Tell why Slurm refused a job; None if it did not answer, so that the job may have been accepted.

    Args:
        values: those of the configuration, by dotted key.
    """
    text = str(error)
    if re.search(_PASSING, text, re.IGNORECASE):
        return None
    key = next((key for words, key in _KEYS if re.search(words, text, re.IGNORECASE)), "cluster")
    valid = f"valid here: {', '.join(partitions)}" if (partitions := _partitions(key)) else "nothing was submitted"
    return ConfigError(key, values.get(key), f"Slurm refuses the job: {text.partition(': ')[2] or text}; {valid}")


def _partitions(key: str) -> list[str]:
    if key != "cluster.partition":
        return []
    try:
        return sorted(set(run_slurm("sinfo", "-h", "-o", "%R").split()))
    except SlurmError:
        return []
