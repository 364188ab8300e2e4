"""What torch's agent is told by `python -m outlast.launch`."""

import pytest
from torch.distributed.run import parse_args

from outlast.errors import ConfigError
from outlast.launch import torchrun_arguments
from outlast.slurm.environment import Step


def test_of_several_nodes() -> None:
    second = Step(task=1, tasks=3, local_task=0, local_tasks=1, address="10.0.0.1", port=12_345)
    told = vars(parse_args(torchrun_arguments(4, ["train.py", "--lr", "1"], second)))
    wanted = {"nnodes": "3", "node_rank": 1, "nproc_per_node": "4", "master_addr": "10.0.0.1", "master_port": 12_345}
    assert told | wanted | {"training_script": "train.py", "training_script_args": ["--lr", "1"]} == told


def test_two_tasks_on_a_node_are_refused() -> None:
    second = Step(task=1, tasks=2, local_task=1, local_tasks=2, address="10.0.0.1", port=12_345)
    with pytest.raises(ConfigError, match=r"--ntasks-per-node: 2 is refused; valid: one task per node"):
        torchrun_arguments(4, ["train.py"], second)
