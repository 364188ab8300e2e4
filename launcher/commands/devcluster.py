"""`outlast devcluster`: start, stop or show a real Slurm on this machine."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path

from outlast.errors import Exit

from ..devcluster import cluster


def up(directory: Path | None, *, grace_s: int, user_signal: bool, accounting: bool) -> int:
    """Start the cluster."""
    directory = directory or cluster.default_directory()
    cluster.up(directory, grace_s=grace_s, user_signal=user_signal, accounting=accounting)
    return Exit.DONE


def down(directory: Path | None) -> int:
    """Stop the cluster."""
    cluster.down(directory or cluster.default_directory())
    return Exit.DONE


def status(directory: Path | None, *, env: bool, as_json: bool) -> int:
    """Show the cluster, or print the exports that point Slurm's commands at it."""
    directory = directory or cluster.default_directory()
    if env:
        names = {**cluster.env(directory), "OUTLAST_DEVCLUSTER": str(directory)}
        print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in names.items()))
        return Exit.DONE
    shown = cluster.status(directory)
    print(json.dumps(asdict(shown), default=str, indent=1) if as_json else cluster.describe(shown))
    return Exit.DONE
