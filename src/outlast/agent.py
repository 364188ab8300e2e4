"""Starts a node's ranks with torch's agent: `accelerate launch` (`parallel.launch=accelerate`), or `launch.py`.

The agent starts as a rank does, with the three signals blocked, and keeps them so: torch's elastic agent, which it
runs, would answer a signal by ending its ranks within a time limit, and a second signal by leaving them alone in the
middle of a save. One thread takes the signals instead and passes them on; the agent only notices that its ranks have
left. The ranks inherit the blocked signals, so that an early one waits until they can handle it.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import psutil

from .config.configuration import Config
from .errors import ConfigError, Exit
from .processes import SIGNALS, ignore_output_errors, python_module_command
from .ranks.meeting import store_of
from .slurm.environment import MEETING_ENV, Step, current_step

AGENT_ENV = "OUTLAST_AGENT"
"""Tells a rank the pid of the agent that has started it."""
START_S = 20.0
"""How long a signal waits for ranks that have not started: less than `KillWait`, after which Slurm kills."""


def main(config: Config, run: Path, arguments: list[str]) -> NoReturn:
    """Start this node's ranks, wait until the last has gone, and end this process.

    As with `srun`, its exit code is the highest of its ranks'; that of a killed rank is 128 plus the signal's number.

    Args:
        run: the run directory.
        arguments: what the ranks are told, as `outlast.rank` takes it.

    Raises:
        ConfigError: the step has more than one task on a node.
        SlurmError: the first node has no address that resolves.
    """
    step = current_step()
    command = [*launch_arguments(config, step), "--no_python", *python_module_command("outlast.rank", *arguments)]
    ranks = config.parallel.ranks_per_node if step else config.parallel.world_size
    _meet(run, step)
    run_ranks(lambda: _launch(command), ranks, "outlast.rank")


def run_ranks(launch: Callable[[], None], ranks: int, word: str, signals: Sequence[int] = SIGNALS) -> NoReturn:
    """Start ranks with torch's agent in this process, pass signals on to them, and end as they do.

    Args:
        launch: starts them, waits until the last has gone, and raises torch's error if one has failed.
        ranks: how many it starts.
        word: stands in the command line of each, and of no other process that is started here.
        signals: those that are passed on.
    """
    ignore_output_errors()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    os.environ[AGENT_ENV] = str(os.getpid())
    threading.Thread(target=_pass_on_signals, args=(ranks, word, signals), daemon=True).start()
    codes: dict[int, int] = {}
    try:
        launch()
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    except subprocess.CalledProcessError as error:
        codes = {0: error.returncode}
    for rank, code in sorted(codes.items()):
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        print(f"[outlast] rank {rank} {how}", flush=True)
    sys.stderr.flush()
    os._exit(max((128 - code if code < 0 else code for code in codes.values()), default=Exit.DONE))


def launch_arguments(config: Config, step: Step | None) -> list[str]:
    """The arguments of `accelerate launch`, without the program.

    Args:
        step: the `srun` step around the agent, one task per node; None on a single machine.

    Raises:
        ConfigError: the step has more than one task on a node.
    """
    ranks = config.parallel.ranks_per_node
    if step is not None and step.local_task > 0:
        valid = f"valid with one task per node (--ntasks-per-node=1), which starts all {ranks} ranks of it"
        raise ConfigError("parallel.launch", config.parallel.launch, valid)
    world_size = step.tasks * ranks if step else config.parallel.world_size
    return [
        f"--num_machines={step.tasks if step else 1}",
        f"--machine_rank={step.task if step else 0}",
        f"--num_processes={world_size}",
        f"--main_process_ip={step.address if step else '127.0.0.1'}",
        "--main_process_port=0",  # it names one, as it must; nobody listens there (see `ranks/meeting.py`)
        *(["--multi_gpu"] if world_size > 1 else []),  # which means several processes, also without GPUs
        "--max_restarts=0",
        # The training sets these itself; here they only keep `accelerate launch` from guessing.
        "--mixed_precision=no",
        "--dynamo_backend=no",
    ]


def _meet(run: Path, step: Step | None) -> None:
    """Have torch's agents find each other as the ranks do, by a private store."""
    if step is not None:
        os.environ[MEETING_ENV] = step.key
    static: Any = importlib.import_module("torch.distributed.elastic.rendezvous.static_tcp_rendezvous")

    def store(address: str, port: int, count: int, serves: bool, timeout: timedelta, **_: Any) -> Any:
        return store_of(run, "agents", step.task if step else 0, count, timeout)

    static.TCPStore = store


def _launch(arguments: list[str]) -> None:
    """Run `accelerate launch`."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        # This replaces the user's own `accelerate config`, which is not part of the run.
        json.dump({"distributed_type": "NO", "parallelism_config": {}}, file)
        file.flush()
        launch_command(launch_command_parser().parse_args([f"--config_file={file.name}", *arguments]))


def _pass_on_signals(ranks: int, word: str, signals: Sequence[int]) -> None:
    """Send every signal that this process gets to all of its ranks, also to those that it has yet to start."""
    while True:
        number = signal.sigwait(signals)
        told: set[int] = set()
        deadline = time.monotonic() + START_S
        while len(told) < ranks and time.monotonic() < deadline:
            for child in psutil.Process().children():
                if child.pid not in told and _send(child, number, word):
                    told.add(child.pid)
            time.sleep(0.05)
        if not told:
            print(f"[outlast] {signal.Signals(number).name}: there is no rank to save, leaving", flush=True)
            os._exit(Exit.FAILED)


def _send(child: psutil.Process, number: int, word: str) -> bool:
    try:
        if word not in child.cmdline():
            return False
        child.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True
