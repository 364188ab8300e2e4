"""The errors whose messages are meant for the user, and the exit codes of the commands.

::

    OutlastError                 exit 1   something failed; the message says what to do next
    ├── ConfigError              exit 2   a key, value, group or file is refused, before anything starts
    ├── BudgetError              exit 2   the byte budget can't hold the run, by what was measured
    ├── RunBusyError             exit 2   another attempt is alive on this run directory
    ├── DivergedError            exit 1   a loss says that training is lost; the newest checkpoint is from before it
    ├── CheckpointError          exit 1   a checkpoint could not be written or does not verify
    │   └── ResumeRefusedError   exit 2   a checkpoint was made by a run other than the one about to resume
    └── SlurmError               exit 1   a Slurm command failed or did not answer
"""

import errno
import os
import pwd
import re
import stat
from collections.abc import Iterable
from difflib import get_close_matches
from enum import IntEnum
from typing import Any

DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class Exit(IntEnum):
    """Exit codes of every `outlast` command and of every rank."""

    DONE = 0
    FAILED = 1
    REFUSED = 2
    RESUME_ME = 75
    GAVE_UP = 93


class OutlastError(Exception):
    """Base of all errors whose messages are shown to the user as they are."""

    exit_code = Exit.FAILED


class ConfigError(OutlastError):
    """A configuration that is refused.

    Args:
        key: dotted key as the user would type it (`trainer.max_steps`).
        value: what was given; of `notify` it is not shown, since it may be a URL with a password.
        valid: what would have been accepted: a sentence, or the names to choose from.
    """

    exit_code = Exit.REFUSED

    def __init__(self, key: str, value: Any, valid: str | Iterable[str]) -> None:
        self.key, self.value = key, value
        if isinstance(valid, str):
            hint = valid
        else:
            names = sorted(valid)
            hint = "valid: " + ", ".join(names)
            close = get_close_matches(str(value), names, n=1)
            if close:
                hint = f"did you mean {close[0]}? {hint}"
        shown = "…" if key.partition(".")[0] == "notify" else value
        text = re.sub(r"\b(notify[\w.]*=)[^\s'\"]+", r"\1…", f"{shown!r}")  # where it stands in a whole command line
        super().__init__(f"{key}: {text} is refused; {hint}")


class BudgetError(OutlastError):
    """The byte budget can't hold the run, by what was measured."""

    exit_code = Exit.REFUSED


class RunBusyError(OutlastError):
    """Another attempt is alive on the run directory."""

    exit_code = Exit.REFUSED


class DivergedError(OutlastError):
    """Training has left the numbers, or its loss has jumped: what comes after is likely to be of no use."""


class CheckpointError(OutlastError):
    """A checkpoint could not be written, or what was read does not verify."""


class SlurmError(OutlastError):
    """A Slurm command failed, timed out, or is not installed."""


class ResumeRefusedError(CheckpointError):
    """The checkpoint was made by a run other than the one about to resume from it."""

    exit_code = Exit.REFUSED


def denied(error: BaseException) -> str | None:
    """What to tell a user whom the system denies a file or a directory; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in DENIED or error.filename is None:
        return None
    return f"{error.filename}: {error.strerror}; {whose(error.filename)}"


def whose(path: str | os.PathLike[str]) -> str:
    """Whose a path is, and what others can do; of a hidden one, its nearest visible parent."""
    place = os.path.abspath(path)
    while True:
        try:
            status = os.stat(place)
            break
        except OSError:
            if place == os.path.dirname(place):
                return "nothing is known of it"
            place = os.path.dirname(place)
    mode = stat.filemode(status.st_mode)
    return (
        f"{place} belongs to {_name(status.st_uid)} ({mode}), and this is {_name(os.geteuid())}. "
        "Ask for access, or choose another directory"
    )


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
