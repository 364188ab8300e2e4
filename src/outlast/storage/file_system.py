"""How much the file system can take: free space, and quotas of the user, the group and the project.

Free space is the kernel's answer (statvfs). For quotas, the site's own tools are asked where they exist: `lfs quota` on
Lustre, `quota` elsewhere (ext4, XFS, NFS), `xfs_quota` on XFS without it. They answer in 1024-byte blocks: used, soft
limit, hard limit; 0 is no limit. A tool that is missing, fails or is slow is ignored.
"""

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

TIMEOUT_S = 5.0
"""Each tool gets this long: quotas over NFS ask a server, which may not answer."""
NUMBERS = re.compile(r"(?<!\S)\[?(\d+)\]?\*?\s+(\d+)\s+(\d+)(?!\S)")
"""Used, soft and hard limit in a tool's answer; `*` marks an exceeded limit, brackets what Lustre is unsure of."""


@dataclass(frozen=True)
class Limit:
    """One thing that limits what can be written."""

    kind: str
    """`free space`, or `user quota`, `group quota`, `project quota`."""
    free_bytes: int
    total_bytes: int
    """Size of the file system, or the quota."""


def existing(path: Path) -> Path:
    """The path itself if it exists, else its nearest parent that does."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def free_space(path: Path) -> Limit:
    """The free space for a plain user and the file system's size; takes microseconds.

    Raises:
        OSError: it does not answer.
    """
    answer = os.statvfs(existing(path))
    return Limit("free space", answer.f_bavail * answer.f_frsize, answer.f_blocks * answer.f_frsize)


def quotas(place: Path) -> list[Limit]:
    """The quotas on an existing directory that are set and that a tool reports; may take seconds."""
    status = place.stat()
    owners = {
        "user": os.geteuid(),
        # a directory with the setgid bit hands its group on to what is made in it
        "group": status.st_gid if status.st_mode & stat.S_ISGID else os.getegid(),
        "project": _project(place),
    }
    found = []
    for kind, number in owners.items():
        numbers = NUMBERS.search(_ask(kind, number, place)) if number is not None else None
        if numbers:
            used, soft, hard = (int(text) * 1024 for text in numbers.groups())
            if limit := hard or soft:
                found.append(Limit(f"{kind} quota", max(limit - used, 0), limit))
    return found


def _ask(kind: str, number: int, place: Path) -> str:
    """Ask a tool about one owner; its output, empty if it gave none."""
    flag, (mount, fstype) = kind[0], _mount(place)
    if fstype == "lustre":
        return _output(["lfs", "quota", "-q", f"-{flag}", str(number), str(place)])
    if shutil.which("quota"):
        letter = "P" if kind == "project" else flag
        return _output(["quota", "-w", "-p", "-v", f"--filesystem={mount}", f"-{letter}", str(number)])
    if fstype == "xfs":
        return _output(["xfs_quota", "-c", f"quota -{flag} -N -b -v {number}", mount])
    return ""


def _project(place: Path) -> int | None:
    """The project that a directory belongs to; None if there is none or no tool says."""
    command = ["lfs", "project", "-d"] if _mount(place)[1] == "lustre" else ["lsattr", "-p", "-d"]
    number = _output([*command, str(place)]).split()[:1]
    return int(number[0]) or None if number and number[0].isdigit() else None


def _mount(place: Path) -> tuple[str, str]:
    """The mount point and type of the file system that a directory is on."""
    real = place.resolve()
    mounts = [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]
    fitting = [mount for mount in mounts if real.is_relative_to(mount[0])]
    return max(fitting, key=lambda mount: len(mount[0]), default=("/", ""))


def _output(command: Sequence[str]) -> str:
    env = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, env=env, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return done.stdout  # `quota` exits 1 when a limit is exceeded
