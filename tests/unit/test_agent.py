"""What `accelerate launch` is told."""

import sys

import pytest
from accelerate.commands.launch import launch_command_parser

from outlast.agent import launch_arguments
from outlast.config.configuration import Config
from outlast.errors import ConfigError
from outlast.launcher.planning.compose import compose
from outlast.processes import python_module_command
from outlast.slurm.environment import Step

SECOND_OF_THREE = Step(task=1, tasks=3, local_task=0, local_tasks=1, address="10.0.0.1", port=12_345)


def config(*overrides: str) -> Config:
    return compose(["job=smoke", "parallel.launch=accelerate", "parallel.ranks_per_node=4", *overrides])


def told(arguments: list[str]) -> dict[str, object]:
    return vars(
        launch_command_parser().parse_args([*arguments, "--no_python", *python_module_command("outlast.rank", "RUN")])
    )


def test_of_several_nodes() -> None:
    """How many there are is up to Slurm, as it is without an agent."""
    arguments = told(launch_arguments(config("parallel.nodes=2"), SECOND_OF_THREE))
    assert (
        arguments
        | {
            "num_machines": 3,
            "machine_rank": 1,
            "num_processes": 12,
            "main_process_ip": "10.0.0.1",
            "main_process_port": 0,
            "multi_gpu": True,
            "use_deepspeed": False,
            "max_restarts": 0,
            "training_script": sys.executable,
            "training_script_args": ["-P", "-u", "-m", "outlast.rank", "RUN"],
        }
        == arguments
    )


def test_on_a_single_machine_all_ranks_have_one_agent() -> None:
    arguments = told(launch_arguments(config("parallel.nodes=2"), None))
    assert arguments | {"num_machines": 1, "num_processes": 8, "main_process_port": 0, "multi_gpu": True} == arguments


def test_a_single_rank() -> None:
    arguments = told(launch_arguments(config("parallel.ranks_per_node=1"), None))
    assert arguments | {"num_processes": 1, "multi_gpu": False} == arguments


def test_two_agents_on_a_node_are_refused() -> None:
    second = Step(task=1, tasks=2, local_task=1, local_tasks=2, address="10.0.0.1", port=12_345)
    with pytest.raises(ConfigError, match=r"parallel\.launch: 'accelerate' is refused; valid with one task per node"):
        launch_arguments(config(), second)


def test_the_launcher_decides_nothing_that_a_checkpoint_depends_on() -> None:
    assert config().digest == config("parallel.launch=srun").digest


def test_another_launcher_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.launch: 'torchrun' is refused; valid: accelerate, srun"):
        config("parallel.launch=torchrun")
