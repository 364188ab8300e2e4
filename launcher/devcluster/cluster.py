"""A real Slurm on this machine, in a directory of its own: `outlast devcluster up|down|status`.

What it holds::

    slurm.conf, slurmdbd.conf      what SLURM_CONF points at
    devcluster.json                options, daemons (pid and start time), the runtime directory
    logs/                          one file per daemon, kept after `down`
    state/, database/              what outlives `down`: job ids go on counting, `sacct` remembers

Sockets, spool directories and the munge key lie in a short runtime directory under /tmp: a Unix socket's path ends
at 107 characters. Nothing here reads or changes /etc/slurm or a Slurm that is already running.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from outlast.errors import OutlastError, SlurmError

from .configuration import Options, Record, conf_path, write_conf
from .daemons import Say, node_states, slurm, start, stop, which

DAEMONS = ("munged", "slurmctld", "slurmd", "scontrol")
ACCOUNTING_DAEMONS = ("mariadbd", "mariadb-install-db", "slurmdbd")


@dataclass(frozen=True)
class Devcluster:
    """A devcluster that is up."""

    directory: Path
    options: Options

    @property
    def conf(self) -> Path:
        return conf_path(self.directory)

    @property
    def env(self) -> dict[str, str]:
        return env(self.directory)


@dataclass(frozen=True)
class Status:
    """What `outlast devcluster status` shows; nodes and partitions are empty while the cluster is down."""

    directory: Path
    conf: Path
    up: bool
    options: Options | None = None
    nodes: dict[str, str] = field(default_factory=dict)
    """Node name to its state (`idle`, `mixed`, `allocated`, `down`, …)."""
    partitions: dict[str, str] = field(default_factory=dict)
    """Partition name to its availability (`up`)."""
    dead: list[str] = field(default_factory=list)
    """Daemons that were started and no longer run."""


def default_directory() -> Path:
    """`$OUTLAST_DEVCLUSTER`, or `outlast/devcluster` in the user's state directory."""
    chosen = os.environ.get("OUTLAST_DEVCLUSTER")
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(chosen or f"{state}/outlast/devcluster").expanduser().absolute()


def env(directory: Path) -> dict[str, str]:
    """The environment variables that point `sbatch`, `squeue` and all others at this cluster."""
    return {"SLURM_CONF": str(conf_path(directory))}


def up(
    directory: Path,
    *,
    grace_s: int = 30,
    user_signal: bool = False,
    accounting: bool = False,
    kill_wait_s: int = 30,
    nodes: int = 4,
    cpus_per_node: int = 4,
    say: Say = print,
) -> Devcluster:
    """Start the cluster and return once every node is ready. One that is up with the same options is left as it is.

    Args:
        directory: where the cluster lives; made when it is missing.
        grace_s, user_signal, accounting, kill_wait_s, nodes, cpus_per_node: see :class:`Options`.
        say: gets one line for each thing that happens.

    Raises:
        OutlastError: not root, a package is missing, or it is up with other options.
        SlurmError: a daemon died, or the nodes were not ready within a minute; the message ends with its log.
    """
    options = Options(
        grace_s=grace_s,
        user_signal=user_signal,
        accounting=accounting,
        kill_wait_s=kill_wait_s,
        nodes=nodes,
        cpus_per_node=cpus_per_node,
    )
    require(accounting=accounting)
    directory = directory.absolute()
    if re.search(r"[\s#=,\"'%$\\]", str(directory)):
        raise OutlastError(
            f"{directory}: slurm.conf can't hold this path; choose one of letters, digits, '.', '-', '_'"
        )
    with _locked(directory):
        record = Record.read(directory)
        if record is not None and record.complete:
            if record.options != options:
                raise OutlastError(
                    f"the devcluster in {directory} is up with other options "
                    f"({_differences(record.options, options)}). Run `outlast devcluster down` first."
                )
            say(f"devcluster is already up in {directory}")
            return Devcluster(directory, options)
        if record is not None:
            if record.alive():
                dead = ", ".join(record.dead()) or "never started"
                raise OutlastError(
                    f"the devcluster in {directory} is not whole (dead: {dead}). "
                    "Run `outlast devcluster down`, which cancels its jobs, then `up` again."
                )
            stop(directory, record, say)  # the machine was restarted, or everything was killed
        started = time.monotonic()
        start(directory, options, say)
        say(f"{nodes} nodes ready after {time.monotonic() - started:.1f} s; SLURM_CONF={conf_path(directory)}")
        return Devcluster(directory, options)


def down(directory: Path, *, say: Say = print) -> None:
    """Cancel all jobs, stop every daemon, leave no process behind. Logs stay. Nothing happens when it is down."""
    directory = directory.absolute()
    if not directory.is_dir():
        say(f"no devcluster in {directory}")
        return
    with _locked(directory):
        record = Record.read(directory)
        if record is None:
            say(f"no devcluster is up in {directory}")
            return
        stop(directory, record, say)
        say(f"devcluster is down; its logs are in {directory / 'logs'}")


def status(directory: Path) -> Status:
    """The cluster as it is now.

    Raises:
        SlurmError: its daemons run, but slurmctld does not answer.
    """
    directory = directory.absolute()
    record = Record.read(directory)
    if record is None:
        return Status(directory, conf_path(directory), up=False)
    try:
        if record.complete:
            lines = slurm(directory, "sinfo", "-h", "-o", "%R %a").splitlines()
            partitions = dict(line.split() for line in lines)
            return Status(directory, conf_path(directory), True, record.options, node_states(directory), partitions)
    except SlurmError:
        if record.complete:
            raise  # else a daemon died just now
    return Status(directory, conf_path(directory), up=False, options=record.options, dead=record.dead())


def describe(shown: Status) -> str:
    """A status in words."""
    if not shown.up:
        dead = f" (no longer running: {', '.join(shown.dead)})" if shown.dead else ""
        return f"devcluster in {shown.directory}: down{dead}"
    nodes = ", ".join(f"{name} {state}" for name, state in shown.nodes.items())
    lines = [f"devcluster in {shown.directory}: up", f"  nodes       {nodes}"]
    lines.append(f"  partitions  {', '.join(shown.partitions)}")
    if shown.options is not None:
        lines.append("  options     " + ", ".join(f"{key} {value}" for key, value in asdict(shown.options).items()))
    return "\n".join([*lines, f"  use it      export SLURM_CONF={shown.conf}"])


def require(*, accounting: bool = False) -> None:
    """Check what a devcluster needs.

    Raises:
        OutlastError: it says what to install.
    """
    if os.geteuid() != 0:
        raise OutlastError("outlast devcluster needs root: slurmd starts each job's processes as the job's user")
    packages = "slurmctld slurmd slurm-client munge" + (" slurmdbd mariadb-server" if accounting else "")
    missing = [name for name in DAEMONS + (ACCOUNTING_DAEMONS if accounting else ()) if not which(name)]
    if missing:
        raise OutlastError(f"not installed: {', '.join(missing)}. Run `apt-get install {packages}`, then try again.")


def set_user_signal(directory: Path, on: bool) -> None:
    """Change `user_signal` of a cluster that is up; jobs go on.

    Raises:
        OutlastError: no cluster is up in the directory.
    """
    directory = directory.absolute()
    with _locked(directory):
        record = Record.read(directory)
        if record is None or not record.complete:
            raise OutlastError(f"no devcluster is up in {directory}; `outlast devcluster up` starts one")
        record.options = replace(record.options, user_signal=on)
        write_conf(directory, record)
        record.write(directory)
        _reconfigure(directory)


def _reconfigure(directory: Path) -> None:
    """Have slurmctld read its configuration again, in a later second than the last time.

    What it has parsed of the parameters it parses again only if the configuration is of another second.
    """
    last = slurm(directory, "scontrol", "show", "config").splitlines()[0].split()[-1]
    while time.strftime("%Y-%m-%dT%H:%M:%S") == last:
        time.sleep(0.05)
    slurm(directory, "scontrol", "reconfigure")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One `up` or `down` at a time in a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _differences(now: Options, asked: Options) -> str:
    mine, theirs = asdict(now), asdict(asked)
    return ", ".join(f"{name}={mine[name]}, asked {theirs[name]}" for name in mine if mine[name] != theirs[name])
