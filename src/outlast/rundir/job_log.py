"""Finds in the log of a batch job why its ranks never began."""

import os
import re
from pathlib import Path

LAST_BYTES = 65_536
_START = re.compile(r"\[outlast\] attempt \d+ ended: ")
"""What `outlast.epilogue` prints when a start of the job is over; the next one appends to the same log."""
_NOISE = re.compile(r"srun: |slurmstepd: |\[outlast\] |\s")


def last_words(log: Path) -> str | None:
    """The line that says best why the newest start of a job has failed; None if nothing does.

    That is a message of outlast, else the last line that the program itself has printed (a traceback ends with the
    error), else the first error of Slurm's.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - LAST_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    lines = [re.sub(r"^\d+: ", "", line) for line in lines]  # `srun --label`
    ends = [number for number, line in enumerate(lines) if _START.match(line)]
    lines = [line for line in lines[ends[-1] + 1 if ends else 0 :] if line.strip()]
    if ours := [line.removeprefix("outlast: ") for line in lines if line.startswith("outlast: ")]:
        return ours[-1].strip()
    if words := [line for line in lines if not _NOISE.match(line)]:
        return words[-1].strip()
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line and not line.startswith("[outlast]")]
    return errors[0].strip() if errors else None


def own_log() -> Path | None:
    """The file that standard output goes to, in a batch script the job's log; None: no file."""
    try:
        path = Path(os.readlink("/proc/self/fd/1"))
    except OSError:
        return None
    return path if path.is_file() else None
