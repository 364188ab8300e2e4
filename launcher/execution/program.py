"""Runs a program of outlast's that needs the training libraries, in a Python of its own."""

import os
import subprocess
from collections.abc import Sequence
from typing import IO

from outlast.errors import Exit
from outlast.processes import PARENT_ENV, python_module_command
from outlast.slurm.environment import environment_without_job

from .signals import passing_on_signals


def run(module: str, *arguments: str, stdout: IO[str] | None = None, kept: Sequence[int] = ()) -> int:
    """Run a module as a program, pass signals on, and return its exit code.

    Args:
        stdout: where its output goes; None: where this process's does.
        kept: open files that it inherits, by number.
    """
    environment = environment_without_job() | {PARENT_ENV: str(os.getpid()), "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        python_module_command(module, *arguments),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        pass_fds=kept,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes on what it means
    )

    with passing_on_signals(process.terminate, process.send_signal):
        code = process.wait()
    return Exit.FAILED if code < 0 else code
