"""The daemons of a devcluster: their start in order, their end by pid."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from outlast.deletion import delete
from outlast.errors import SlurmError
from outlast.processes import free_ports

from .configuration import Options, Record, conf_path, host_address, write_conf

START_LIMIT_S = 60.0
STOP_LIMIT_S = 20.0
RUNTIME = "outlast-"
"""How the name of a runtime directory begins."""

Say = Callable[[str], None]


def which(name: str) -> str | None:
    """The path of a program; Debian's daemons live in /usr/sbin, which a user's PATH may leave out."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


def slurm(directory: Path, *argv: str, timeout_s: float = 30.0) -> str:
    """The output of a Slurm command on this cluster.

    Raises:
        SlurmError: it failed or did not answer in time.
    """
    try:
        done = subprocess.run(argv, env=_environment(directory), capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{' '.join(argv)}: {error}") from None
    if done.returncode != 0:
        raise SlurmError(f"{' '.join(argv)} failed ({done.returncode}): {done.stderr.strip()}")
    return done.stdout


def start(directory: Path, options: Options, say: Say) -> Record:
    """Write the configuration and start every daemon; return once all nodes are ready. Stops all if that fails."""
    for name in ("logs", "state"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    runtime = Path(tempfile.mkdtemp(prefix=RUNTIME))
    runtime.chmod(0o755)  # plain users need munge's socket
    record = Record(options, runtime, free_ports(2 + options.nodes))
    record.write(directory)
    try:
        _start_munged(directory, record)
        write_conf(directory, record)
        if options.accounting:
            _start_accounting(directory, record, say)
        say(f"starting slurmctld and {options.nodes} slurmd on ports {record.ports[0]}, {record.ports[2:]}")
        _spawn(directory, record, "slurmctld", ["slurmctld", "-D", "-f", str(conf_path(directory))])
        for name in record.node_names:
            argv = ["slurmd", "-D", "-f", str(conf_path(directory)), "-N", name]
            _spawn(directory, record, f"slurmd-{name}", argv)
        _wait_for(directory, record, lambda: _all_registered(directory, record), "all nodes to register")
    except BaseException:
        stop(directory, record, lambda line: None)
        raise
    return record


def node_states(directory: Path) -> dict[str, str]:
    """Node name to state, as `sinfo` says; empty while slurmctld does not answer."""
    try:
        lines = slurm(directory, "sinfo", "-h", "-N", "-p", "low", "-o", "%N %T").splitlines()
    except SlurmError:
        return {}
    return dict(line.split() for line in lines)


def _all_registered(directory: Path, record: Record) -> bool:
    """Every node answers: idle, or already busy with jobs that a crash left in `state/`."""
    states = node_states(directory)
    pending = [state for state in states.values() if state.endswith("*") or state.startswith(("unk", "down"))]
    return list(states) == record.node_names and not pending


def stop(directory: Path, record: Record, say: Say) -> None:
    """Cancel all jobs, stop every daemon, remove the runtime directory and the record."""
    if "slurmctld" in record.alive():
        try:
            _cancel_all(directory, record.options.kill_wait_s + 30.0, say)
        except SlurmError as error:
            say(f"jobs could not be cancelled: {error}")
    for name, process in reversed(record.alive().items()):
        _end(process)
        say(f"stopped {name}")
    if strays := _strays(directory, record):
        say(f"killing {len(strays)} processes of jobs that outlived their daemons")
        for process in strays:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in strays:
            _gone(process, STOP_LIMIT_S)
    if record.runtime.name.startswith(RUNTIME):  # a record that was tampered with names no other directory
        with contextlib.suppress(OSError):
            delete(record.runtime, inside=record.runtime.parent)
    delete(directory / "devcluster.json", inside=directory)


def _cancel_all(directory: Path, limit_s: float, say: Say) -> None:
    """Cancel until no job is left. Again and again, since a job may requeue itself while it is being cancelled."""
    deadline, said = time.monotonic() + limit_s, False
    while jobs := slurm(directory, "squeue", "-h", "-o", "%A %T").split("\n")[:-1]:
        if time.monotonic() > deadline:
            raise SlurmError(f"{len(jobs)} jobs are still there after {limit_s:.0f} s")
        if active := sorted({line.split()[0] for line in jobs if not line.endswith("COMPLETING")}):
            if not said:
                say(f"cancelling {len(active)} jobs")
            said = True
            slurm(directory, "scancel", "-Q", *active)
        time.sleep(0.5)


def _start_munged(directory: Path, record: Record) -> None:
    key = record.runtime / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    sock = record.runtime / "munge.socket"
    files = {"socket": sock, "key-file": key, "pid-file": record.runtime / "munged.pid"}
    files["seed-file"] = record.runtime / "munged.seed"
    _spawn(directory, record, "munged", ["munged", "-F", *(f"--{name}={path}" for name, path in files.items())])
    _wait_for(directory, record, sock.is_socket, "munge's socket")


def _start_accounting(directory: Path, record: Record, say: Say) -> None:
    """mariadbd, reached by its socket alone, and slurmdbd above it."""
    data, sock = directory / "database", record.runtime / "mariadb.socket"
    say(f"starting mariadbd and slurmdbd on port {record.ports[1]}")
    if not (data / "mysql").is_dir():
        log = directory / "logs" / "mariadb-install-db.log"
        argv = [
            "--no-defaults",
            f"--datadir={data}",
            "--user=root",
            "--skip-test-db",
            "--auth-root-authentication-method=socket",
        ]
        with open(log, "w") as out:
            done = subprocess.run(
                [which("mariadb-install-db") or "", *argv], stdout=out, stderr=out, timeout=START_LIMIT_S
            )
        if done.returncode != 0:
            raise SlurmError(f"mariadb-install-db failed:\n{_tail(log)}")
    argv = ["--no-defaults", f"--datadir={data}", f"--socket={sock}", "--skip-networking", "--user=root"]
    _spawn(directory, record, "mariadbd", ["mariadbd", *argv, f"--pid-file={record.runtime / 'mariadbd.pid'}"])
    _wait_for(directory, record, sock.is_socket, "mariadbd's socket")
    _spawn(directory, record, "slurmdbd", ["slurmdbd", "-D"], MYSQL_UNIX_PORT=str(sock))
    _wait_for(directory, record, lambda: _accepts(record.ports[1]), "slurmdbd to listen")


def _spawn(directory: Path, record: Record, name: str, argv: list[str], **extra: str) -> None:
    """Start a daemon that outlives this process, and record it at once."""
    log = directory / "logs" / f"{name}.out"
    with open(log, "ab") as out:
        child = subprocess.Popen(
            [which(argv[0]) or argv[0], *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=record.runtime,
            env=_environment(directory) | extra,
            start_new_session=True,
        )
    child.returncode = 0  # not ours to wait for: without this, Python warns that it still runs
    created = psutil.Process(child.pid).create_time()
    record.daemons.append({"name": name, "pid": child.pid, "created": created})
    record.write(directory)


def _wait_for(directory: Path, record: Record, condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not condition():
        dead = record.dead()
        if dead or time.monotonic() > deadline:
            name = dead[0] if dead else record.daemons[-1]["name"]
            happened = f"{name} died" if dead else f"waited {START_LIMIT_S:.0f} s for {what}"
            raise SlurmError(f"devcluster: {happened}. End of its log:\n{_tail(directory / 'logs' / f'{name}.out')}")
        time.sleep(0.1)


def _end(process: psutil.Process) -> None:
    """SIGTERM, then SIGKILL; returns once the process is gone."""
    for send in (process.terminate, process.kill):
        with contextlib.suppress(psutil.NoSuchProcess):
            send()
        if _gone(process, STOP_LIMIT_S):
            return


def _gone(process: psutil.Process, limit_s: float) -> bool:
    """Wait for a process to end. A zombie has ended: in some containers nobody reaps those."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            process.wait(0)
            return True
        except psutil.TimeoutExpired:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_ZOMBIE:
                    return True
        time.sleep(0.02)
    return False


def _strays(directory: Path, record: Record) -> list[psutil.Process]:
    """Processes of this cluster's jobs that are still there: slurmstepd, and what it started."""
    conf, found = str(conf_path(directory)), []
    for process in psutil.process_iter():
        try:
            if process.name() == "slurmstepd":  # its title lies over its environment; its directory is slurmd's
                mine = process.cwd() == str(record.runtime)
            else:
                variables = process.environ()
                mine = variables.get("SLURM_CONF") == conf and "SLURMD_NODENAME" in variables
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _environment(directory: Path) -> dict[str, str]:
    """This process's environment without another Slurm's variables."""
    foreign = ("SLURM", "SBATCH_", "SINFO_", "SQUEUE_", "SCANCEL_", "MYSQL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {"SLURM_CONF": str(conf_path(directory))}


def _accepts(port: int) -> bool:
    try:
        socket.create_connection((host_address() or "127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _tail(log: Path, lines: int = 15) -> str:
    text = log.read_text(errors="replace") if log.exists() else "(no log)"
    return "\n".join(text.splitlines()[-lines:])
