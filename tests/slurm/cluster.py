"""A handle on a devcluster under test, to talk to it as a user does."""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from outlast.launcher.devcluster import cluster as launcher_devcluster


def wait_for(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    """Poll until the condition holds; fail with `what` when it does not within `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.1)


def processes_of(job: str) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """All processes of a job, on all nodes, with their environments."""
    for process in psutil.process_iter():
        try:
            env = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if env.get("SLURM_JOB_ID") == job:
            yield process, env


@dataclass(frozen=True)
class Cluster:
    """A devcluster under test."""

    directory: Path
    _settled: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)
    """Held by what reads or changes the configuration: while slurmctld reads it anew, it has forgotten where its munge
    socket is, and refuses what it is asked (measured on 22.05.8: "Zero Bytes were transmitted or received")."""

    @property
    def env(self) -> dict[str, str]:
        """This process's environment, pointed at the cluster."""
        return os.environ | launcher_devcluster.env(self.directory)

    def run(self, *argv: str, timeout_s: float = 60.0) -> str:
        """The output of a command; fails with its stderr when it fails."""
        done = subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{argv} exited {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: str | int) -> dict[str, str]:
        """What `scontrol show job` says."""
        with self._settled:
            words = self.run("scontrol", "show", "job", "-o", str(job_id)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job_id: str | int) -> str:
        return self.job(job_id)["JobState"]

    def wait_for_state(self, job_id: str | int, state: str, limit_s: float) -> None:
        wait_for(lambda: self.state(job_id) == state, limit_s, f"job {job_id} in state {state}")

    def wait_for(self, condition: Callable[[], bool], limit_s: float, what: str) -> None:
        wait_for(condition, limit_s, what)

    def set_user_signal(self, on: bool) -> None:
        """Whether a preemption sends the job's `--signal` instead of SIGTERM."""
        with self._settled:
            launcher_devcluster.set_user_signal(self.directory, on)

    def cancel_all(self) -> None:
        """Kill every job at once and wait until none is left."""

        def none_left() -> bool:
            for line in self.run("squeue", "-h", "-o", "%A %T").splitlines():
                job_id, state = line.split()
                if state in ("RUNNING", "COMPLETING"):
                    _quietly(self.env, "scancel", "--signal=KILL", "--full", job_id)
                _quietly(self.env, "scancel", job_id)
            return not self.run("squeue", "-h")

        wait_for(none_left, 60, "every job cancelled")


def _quietly(env: dict[str, str], *argv: str) -> None:
    subprocess.run(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30)
