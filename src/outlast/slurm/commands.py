"""Runs Slurm's commands, and parses what they print."""

import os
import re
import subprocess
from datetime import datetime

from outlast.errors import SlurmError
from outlast.processes import signals_blocked


def run_slurm(
    *command: str, timeout_s: float = 20.0, pass_fds: tuple[int, ...] = (), env: dict[str, str] | None = None
) -> str:
    """Run one of Slurm's commands and return its output; formats and filters in the environment do not apply.

    Args:
        env: its environment; None: this process's.

    Raises:
        SlurmError: it is not installed, failed, or did not answer within `timeout_s`; one line that says which.
    """
    env = {name: value for name, value in (env or os.environ).items() if not name.startswith("SQUEUE_")}
    env["SLURM_TIME_FORMAT"] = "%s"  # Unix seconds: local time is ambiguous in the hour that comes twice
    env["SLURM_BITSTR_LEN"] = "0"  # the tasks of an array in full: by default the list ends after 64 characters
    try:
        with signals_blocked():
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout_s, check=False, pass_fds=pass_fds, env=env
            )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not installed on this machine") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within {timeout_s:g} s") from None
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).strip().splitlines() if not line.startswith("Try ")]
        told = re.sub(rf"^{command[0]}: ((error|fatal): )?", "", lines[-1]) if lines else f"exit code {done.returncode}"
        raise SlurmError(f"{command[0]}: {told}")
    return done.stdout


def pairs(line: str) -> dict[str, str]:
    """Parse the `Key=value` pairs of `scontrol -o`. Values with spaces (Command, Comment) keep their first word."""
    return dict(pair.split("=", 1) for pair in line.split() if "=" in pair)


def seconds_of(text: str) -> float | None:
    """Parse `30`, `30 sec` or `00:00:30` (with days before a dash) into seconds."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):(\d+):)?(\d+)(?: sec)?", text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def slurm_timestamp(text: str | None) -> float | None:
    """Parse a time that Slurm prints, as Unix seconds or local time; None where it prints none."""
    if text and text.isdigit():
        return float(text)
    try:
        return datetime.fromisoformat(text or "").timestamp()
    except ValueError:
        return None  # "Unknown", "None", "N/A"
