"""What a devcluster is: its options, its record on disk, its `slurm.conf`."""

import importlib.resources
import json
import socket
import string
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from outlast.errors import OutlastError
from outlast.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a devcluster was asked to be."""

    grace_s: int = 30
    """Seconds from the preemption's SIGTERM to SIGKILL for jobs of the partition `low` (`GraceTime`)."""
    user_signal: bool = False
    """Preemption sends the job's own `--signal` instead of SIGTERM."""
    accounting: bool = False
    """Run slurmdbd and mariadbd, so that `sacct` works."""
    kill_wait_s: int = 30
    """Seconds from SIGTERM to SIGKILL at the time limit and at `scancel` (`KillWait`)."""
    nodes: int = 4
    cpus_per_node: int = 4

    def __post_init__(self) -> None:
        for name, least in (("grace_s", 0), ("kill_wait_s", 1), ("nodes", 1), ("cpus_per_node", 1)):
            if getattr(self, name) < least:
                raise OutlastError(f"devcluster: {name} is {getattr(self, name)}; valid: {least} or more")


@dataclass
class Record:
    """`devcluster.json`: what `up` has started so far. It is complete even if `up` is killed."""

    options: Options
    runtime: Path
    """Directory of the sockets, spool directories and the munge key, removed by `down`."""
    ports: list[int]
    """Of slurmctld, slurmdbd, and each slurmd."""
    daemons: list[dict[str, Any]] = field(default_factory=list)
    """`name`, `pid` and `created` (Unix seconds), in the order of their start."""

    @classmethod
    def read(cls, directory: Path) -> "Record | None":
        try:
            tree = json.loads((directory / "devcluster.json").read_text())
        except FileNotFoundError:
            return None
        return cls(Options(**tree["options"]), Path(tree["runtime"]), tree["ports"], tree["daemons"])

    def write(self, directory: Path) -> None:
        tree = asdict(self) | {"runtime": str(self.runtime)}
        write_atomically(directory / "devcluster.json", json.dumps(tree, indent=1) + "\n")

    @property
    def node_names(self) -> list[str]:
        return [f"n{index}" for index in range(self.options.nodes)]

    def alive(self) -> dict[str, psutil.Process]:
        """The daemons that still run, by name. A pid that another process has by now does not count."""
        found = {}
        for daemon in self.daemons:
            try:
                process = psutil.Process(daemon["pid"])
                same = abs(process.create_time() - daemon["created"]) < 0.02  # one clock tick is 0.01 s
                if same and process.status() != psutil.STATUS_ZOMBIE:
                    found[daemon["name"]] = process
            except psutil.NoSuchProcess:
                continue
        return found

    def dead(self) -> list[str]:
        """The names of the daemons that were started and no longer run."""
        alive = self.alive()
        return [daemon["name"] for daemon in self.daemons if daemon["name"] not in alive]

    @property
    def complete(self) -> bool:
        """All of the cluster's daemons run."""
        return len(self.alive()) == len(self.daemons) == self.options.nodes + (4 if self.options.accounting else 2)


def conf_path(directory: Path) -> Path:
    """The `slurm.conf` of the cluster in `directory`."""
    return directory.absolute() / "slurm.conf"


def write_conf(directory: Path, record: Record) -> None:
    """Write `slurm.conf` (and `slurmdbd.conf`) from their templates."""
    options, address = record.options, host_address()
    memory = psutil.virtual_memory().total // 2**20
    host = socket.gethostname().split(".")[0]
    cpus = options.cpus_per_node
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr={address or '127.0.0.1'} Port={port} CPUs={cpus} Boards=1 "
        f"SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory={memory} State=UNKNOWN"
        for name, port in zip(record.node_names, record.ports[2:], strict=True)
    ]
    accounting = [
        "AccountingStorageType=accounting_storage/slurmdbd",
        f"AccountingStorageHost={address or '127.0.0.1'}",
        f"AccountingStoragePort={record.ports[1]}",
        f"AccountingStoragePass={record.runtime}/munge.socket",  # with slurmdbd, the "password" is munge's socket
    ]
    values = {
        "directory": directory,
        "runtime": record.runtime,
        "host": host,
        "address": address or "127.0.0.1",
        # A daemon binds to what the host's name resolves to, or to any address. Messages are signed by munge anyway.
        "communication": "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny" if address else "",
        "slurmctld_port": record.ports[0],
        # Ranks meet on a port that follows from the job's id, so two clusters on a machine may not have the same ids.
        "first_job_id": 5003 * (record.ports[0] - 20_000) + 1,
        "slurmdbd_port": record.ports[1],
        "kill_wait_s": options.kill_wait_s,
        "grace_s": options.grace_s,
        # Also written PreemptParameters=send_user_signal in later versions, which still know this spelling.
        "user_signal": "SlurmctldParameters=preempt_send_user_signal" if options.user_signal else "",
        "accounting": "\n".join(accounting) if options.accounting else "",
        "nodes": "\n".join(nodes),
    }
    _render("slurm.conf", conf_path(directory), values, 0o644)
    if options.accounting:
        _render("slurmdbd.conf", directory / "slurmdbd.conf", values, 0o600)


def host_address() -> str | None:
    """Find the loopback address that the host's name stands for, to which the daemons can be bound."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return None
    return address if address.startswith("127.") else None


def _render(name: str, path: Path, values: dict[str, Any], mode: int) -> None:
    template = importlib.resources.files("outlast.shell.devcluster").joinpath(name).read_text()
    path.touch(mode)
    path.chmod(mode)
    path.write_text(string.Template(template).substitute(values))
