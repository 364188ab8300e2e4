"""The code that will run, frozen at submission: outlast's own package and the user's project, copied once.

    code/outlast/…         the package as it is imported now, its rooms inside
    code/project/…         the files of the user's git repository: tracked, and untracked but not ignored
    code/project.patch     what the working tree has changed since the commit (`outlast.patch`: the same of outlast's)
    code/code.json         commits, versions of the libraries, what was left out

An attempt that Slurm starts again in a week runs this, whatever has become of the working tree. The libraries
underneath are not copied: their versions are recorded. Nothing of the environment is.
"""

import importlib
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import outlast
from outlast.checkpoint.manifest import versions
from outlast.errors import ConfigError
from outlast.files import staged_directory

from ..planning import secret_scan

ROOMS = ("launcher", "jobs", "conf", "shell")
LIBRARIES = (
    "outlast", "accelerate", "datasets", "hydra-core", "peft", "safetensors", "submitit", "tokenizers", "torch",
    "transformers", "trl",
)  # fmt: skip
MARKERS = ("ledger.jsonl", "plan.json", "sweep.json", "submitted.json", "pyvenv.cfg", "devcluster.json")
"""A directory of untracked files that holds one of these is a run, a sweep or an environment, and no code."""
SECRETS = (
    ".env", ".env.*", ".envrc", ".netrc", "*.pem", "*.key", "*.p12", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    "*credentials*", "*.token", "*_token", "*secret*", ".npmrc", ".pypirc", "kaggle.json",
)  # fmt: skip
"""Names of files that are left out, unless they are code that git tracks: a run directory is there to be shared. Others
are left out, or refused, for what is in them (`secret_scan.py`)."""
SECRET_DIRECTORIES = frozenset((".ssh", ".aws", ".azure", ".docker", ".gnupg", ".kube"))
PATCH_BYTES = 5_000_000


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What `code.json` says."""

    time: float
    python: str
    versions: dict[str, str]
    outlast: dict[str, Any]
    """`path` it was imported from; `commit`, `dirty` if that is a git repository."""
    project: dict[str, Any] | None
    """`path`, `commit`, `dirty`, `prefix` (the directory of the command, below `path`), `files`, `bytes`."""
    left_out: list[str] = field(default_factory=list)
    """Files that were not copied because they may hold a secret, and anything that could not be recorded."""


def take(target: Path, project: Path, *, limit_mb: float = 100.0) -> Snapshot:
    """Copy the code into `target`, as a whole or not at all; what was there is replaced.

    Args:
        target: the `code` directory of a run or of a sweep.
        project: the directory that the command is run from. Outside a git repository, and in outlast's own, there is
            no project to copy.
        limit_mb: what the project's files may take, in MB (10^6 bytes).

    Raises:
        ConfigError: the project is larger than that, and the largest files are named; or there is a secret in its code.
        OSError: it can't be written.
    """
    with staged_directory(target, durable=False) as staging:
        own = Path(outlast.__path__[0])
        _copy_package(own, staging / "outlast")
        own_top, _ = _toplevel(own)
        if own_top is not None and not _git_lines(own, "ls-files", "-z", "--", "__init__.py"):
            own_top = None  # installed in an environment inside somebody's repository
        top, problem = _toplevel(project)
        left_out = [problem] if problem else []
        details = None
        if top is not None and top != own_top:
            names = _files(top)
            secrets = _secrets(top, names)
            files = [name for name in names if name not in secrets]
            left_out += [f"{name}: {why}" if why else name for name, why in secrets.items()]
            size = _check_size(top, files, limit_mb)
            _copy_files(top, files, staging / "project")
            prefix = os.path.relpath(project.resolve(), top)
            details = {"path": str(top), "prefix": prefix, "files": len(files), "bytes": size}
            details |= _commit(top, staging / "project.patch", left_out, without=secrets)
        snapshot = Snapshot(
            time=time.time(),
            python=f"{platform.python_version()} ({sys.executable})",
            versions=versions(LIBRARIES),
            outlast={"path": str(own)} | (_commit(own_top, staging / "outlast.patch", left_out) if own_top else {}),
            project=details,
            left_out=left_out,
        )
        (staging / "code.json").write_text(json.dumps(asdict(snapshot), indent=1) + "\n")
    return snapshot


def size(project: Path) -> int:
    """Bytes that :func:`take` would copy, what is written beside them not counted."""
    own = Path(outlast.__path__[0])
    rooms = [own, *(Path(importlib.import_module(f"outlast.{name}").__path__[0]) for name in ROOMS)]
    copied = {file for room in rooms for file in room.rglob("*") if file.is_file() and file.suffix != ".pyc"}
    top, own_top = _toplevel(project)[0], _toplevel(own)[0]
    if top is not None and top != own_top:
        copied |= {top / name for name in _files(top)}
    return sum(os.lstat(file).st_size for file in copied)


def _copy_package(own: Path, target: Path) -> None:
    """Copy outlast as it is imported: an editable install has its rooms elsewhere, a wheel has them inside."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(own, target, ignore=skip)
    for name in ROOMS:
        room = Path(importlib.import_module(f"outlast.{name}").__path__[0])
        shutil.copytree(room, target / name, ignore=skip, dirs_exist_ok=True)


def _toplevel(directory: Path) -> tuple[Path | None, str | None]:
    """Find the git repository around `directory`, or the reason why git refuses to read it."""
    done = _git(directory, "rev-parse", "--show-toplevel")
    if done is None:
        return None, None
    if done.returncode == 0:
        return Path(done.stdout.rstrip("\n")).resolve(), None
    text = done.stderr.strip()
    return None, None if "not a git repository" in text else f"the project: {text.splitlines()[0] if text else 'git'}"


def _files(top: Path) -> list[str]:
    """List the files below `top` to copy: tracked ones, those of submodules, and untracked ones that are code."""
    tracked = _git_lines(top, "ls-files", "-z", "--cached", "--recurse-submodules")
    plain: dict[Path, bool] = {}
    untracked = [
        name
        for name in _git_lines(top, "ls-files", "-z", "--others", "--exclude-standard")
        if not _in_marked(top, Path(name).parent, plain)
    ]
    return [name for name in dict.fromkeys([*tracked, *untracked]) if os.path.lexists(top / name)]


def _secrets(top: Path, names: list[str]) -> dict[str, str]:
    """Find the files that may hold a secret, and say why, or nothing where the name says it.

    Raises:
        ConfigError: one is code, which the run would lack.
    """
    committed, found = set(_git_lines(top, "ls-tree", "-r", "-z", "--name-only", "HEAD", missing=True)), {}
    for name in names:
        path = Path(name)
        own_code = name in committed and path.suffix in secret_scan.CODE
        if SECRET_DIRECTORIES & set(path.parts) or (
            not own_code and any(fnmatch(path.name, pattern) for pattern in SECRETS)
        ):
            found[name] = ""
        elif stat.S_ISREG(os.lstat(top / name).st_mode) and (seen := secret_scan.in_file(top / name)) is not None:
            why, is_code = seen
            if is_code:
                way = "read it from the environment, ignore the file (.gitignore), or, if it is none, end the line with"
                raise ConfigError("project", f"{top / name}, {why}", f"a secret: {way} `pragma: allowlist secret`")
            found[name] = why
    return found


def _in_marked(top: Path, directory: Path, known: dict[Path, bool]) -> bool:
    """Whether a directory between `top` and this one is a run, a sweep or an environment."""
    if directory == Path("."):
        return False
    if directory not in known:
        marked = any((top / directory / marker).exists() for marker in MARKERS)
        known[directory] = marked or _in_marked(top, directory.parent, known)
    return known[directory]


def _check_size(top: Path, files: list[str], limit_mb: float) -> int:
    sizes = {name: os.lstat(top / name).st_size for name in files}
    total = sum(sizes.values())
    if total > limit_mb * 1e6:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        shown = ", ".join(f"{name} ({sizes[name] / 1e6:.1f} MB)" for name in largest)
        raise ConfigError(
            "cluster.code_limit_mb",
            limit_mb,
            f"the files of {top} that git does not ignore take {total / 1e6:.0f} MB, the largest: {shown}. "
            "Ignore what is no code (.gitignore), or raise the limit.",
        )
    return total


def _copy_files(top: Path, files: list[str], target: Path) -> None:
    target.mkdir()
    for name in files:
        source, copy = top / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            aim = os.readlink(source)
            inside = (source.parent / aim).resolve().is_relative_to(top)
            os.symlink(aim if inside else os.path.abspath(source.parent / aim), copy)
        elif source.is_file():  # a directory is a submodule that was not checked out
            shutil.copy2(source, copy)


def _commit(top: Path, patch: Path, left_out: list[str], *, without: Collection[str] = ()) -> dict[str, Any]:
    """The commit that is checked out, and the difference to it, `without` some files, written to `patch`."""
    head = _git(top, "rev-parse", "HEAD")
    commit = head.stdout.strip() if head is not None and head.returncode == 0 else None
    if commit is None:
        return {"commit": None, "dirty": True}
    dirty = _git(top, "diff", "HEAD", "--quiet", "--no-ext-diff")
    but = [f":(top,exclude,literal){name}" for name in without]
    difference = _git(top, "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--", ":/", *but)
    text = difference.stdout if difference is not None and difference.returncode == 0 else ""
    if secret_scan.in_patch(text):
        left_out.append(f"{patch.name}: it holds what looks like a secret")
    elif len(text) > PATCH_BYTES:
        left_out.append(f"{patch.name}: {len(text) / 1e6:.0f} MB of difference to the commit")
    elif text:
        patch.write_text(text, errors="surrogateescape")
    return {"commit": commit, "dirty": dirty is not None and dirty.returncode == 1}


def _git_lines(top: Path, *arguments: str, missing: bool = False) -> list[str]:
    done = _git(top, *arguments)
    if missing and done is not None and done.returncode != 0:
        return []  # there is no commit yet
    if done is None or done.returncode != 0:
        raise ConfigError("project", str(top), f"git can't list its files: {done.stderr.strip() if done else ''}")
    return [name for name in done.stdout.split("\0") if name]


def _git(directory: Path, *arguments: str) -> "subprocess.CompletedProcess[str] | None":
    """git's answer, or None where there is no git. File names and patches may hold any bytes."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        return subprocess.run(
            command,
            capture_output=True,
            check=False,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=120,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        return None
