"""This program starts the ranks of a training script: `python -m outlast.launch --ranks 2 train.py ...`.

It is `torchrun` with the signals right: TERM, USR1, USR2, Ctrl-C and HUP are passed on to all ranks, which save and
leave in their own time, and its exit code is theirs. In an `srun` step it is one task per node, for that node's ranks.
"""

import argparse
import signal
import sys
from typing import Any

from . import agent
from .errors import ConfigError, OutlastError
from .processes import SIGNALS
from .slurm.environment import Step, current_step


def torchrun_arguments(ranks: int, script: list[str], step: Step | None) -> list[str]:
    """What torch's agent is told.

    Args:
        ranks: on each node.
        script: its path and arguments.
        step: the `srun` step around this process; None on a single machine.

    Raises:
        ConfigError: the step has more than one task on this node.
    """
    here = [f"--nproc-per-node={ranks}", "--max-restarts=0"]
    if step is None or step.tasks == 1:
        return ["--standalone", "--local-addr=127.0.0.1", *here, *script]
    if step.local_task > 0 or step.local_tasks > 1:
        valid = f"valid: one task per node (--ntasks-per-node=1), which starts all {ranks} ranks of it"
        raise ConfigError("--ntasks-per-node", step.local_tasks, valid)
    nodes = [f"--nnodes={step.tasks}", f"--node-rank={step.task}"]
    return [*nodes, f"--master-addr={step.address}", f"--master-port={step.port}", *here, *script]


def _command() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m outlast.launch",
        description="Start the ranks of a training script. Signals reach all of them, and the exit code is theirs.",
        epilog="example: python -m outlast.launch --ranks 2 train.py --lr 1e-3",
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="ranks on this node")
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT ...", help="the script and its arguments")
    arguments = parser.parse_args()
    if not arguments.script or arguments.ranks < 1:
        parser.error("valid: --ranks N, from 1, and a script")
    hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    signals = (*SIGNALS, signal.SIGINT, *hangup)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        told = torchrun_arguments(arguments.ranks, arguments.script, current_step())
    except OutlastError as error:
        print(f"outlast: {error}", file=sys.stderr)
        return error.exit_code

    def launch() -> None:
        from torch.distributed import run

        torchrun: Any = run
        torchrun.run(torchrun.parse_args(told))

    agent.run_ranks(launch, arguments.ranks, arguments.script[0], signals)


if __name__ == "__main__":
    sys.exit(_command())
