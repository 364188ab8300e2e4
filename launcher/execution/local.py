"""`cluster=local`: attempts in the foreground, one after the other, until the run is done.

The launcher starts one process per rank, shows where they are, and starts the next attempt after one that was
preempted. It trains nothing itself, so it starts fast and has nothing to lose when it is killed.
"""

import errno
import os
import secrets
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import BinaryIO, Protocol

from rich.console import Console

from outlast.checkpoint.retention import newest_full
from outlast.config.cluster import LocalCluster
from outlast.errors import Exit
from outlast.notification import tell_end
from outlast.preemption.outcome import Outcome
from outlast.processes import PARENT_ENV, free_ports, ignore_output_errors, python_module_command, signals_blocked
from outlast.rundir.attempts import ATTEMPT_ENV, attempts, finished, next_attempt
from outlast.rundir.cancelled import CancelMark
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Event, Ledger
from outlast.rundir.lock import RunLock
from outlast.rundir.progress import Progress, read
from outlast.slurm.environment import MEETING_ENV, environment_without_job

from ..display.progress import ProgressBar
from ..planning.plan import Plan
from ..runs.chosen import kept
from .freeze import freeze, make_run_directory
from .signals import passing_on_signals

POLL_S = 0.1
RESUMES = "The same command again resumes."
STRAGGLER_S = 10.0
"""How long the other ranks may outlive the first that left: an orderly leave takes milliseconds."""


class Shown(Protocol):
    """Shows an attempt's progress: in a progress bar, or as a line in the table of a sweep."""

    def update(self, progress: Progress | None, note: str | None = None) -> None: ...

    def note(self, text: str) -> None: ...


class Launcher:
    """Runs one run to its end, or to the point where it was told to stop."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.config = plan, plan.config
        self.run: RunDirectory = plan.directory
        self.ledger = Ledger(self.run.ledger)
        self.agent = self.config.parallel.launch == "accelerate"
        self.ranks: list[subprocess.Popen[bytes]] = []
        """One process per rank, or the agent that has started them all."""
        self.stop_requested = threading.Event()

    def main(self, shown: Shown) -> int:
        """Run attempts until the run is done, and return the exit code of the command.

        Raises:
            RunBusyError: the run directory is in use.
        """
        make_run_directory(self.run)
        lock = RunLock(self.run)
        lock.acquire("outlast train")
        try:
            freeze(self.plan)  # not before: a command that is refused changes nothing
            before = next_attempt(self.ledger.read())
            code = self._attempts(lock, shown)
            events = self.ledger.read()
        finally:
            lock.release()
        if (last := next_attempt(events) - 1) >= before:
            tell_end(self.run, events, last, shown.note)
        return code

    def stop(self) -> None:
        """Make the run save and leave."""
        self.stop_requested.set()
        self.send(signal.SIGTERM)

    def send(self, number: int) -> None:
        """Signal every rank."""
        for process in self.ranks:
            if process.poll() is None:
                process.send_signal(number)

    def _attempts(self, lock: RunLock, bar: Shown) -> int:
        assert isinstance(self.config.cluster, LocalCluster)
        if attempts(self.ledger.read()):
            bar.note(f"resuming {self.run.path}")
        cancelled = CancelMark(self.run.path)
        while True:
            number = next_attempt(self.ledger.read())
            code = self._attempt(number, lock, bar)
            events = self.ledger.read()
            if not self.run.path.exists():
                bar.note(f"{self.run.path} was moved or deleted meanwhile: nothing more was saved in it")
                return Exit.FAILED
            if finished(events):
                bar.note(f"finished; the model is in {self.run.final}")
                return Exit.DONE
            last = next((a for a in attempts(events) if a.number == number), None)
            outcome = Outcome.of(self.run, number, self.config.preemption, bar.note)
            if last is not None and last.ended is None:
                outcome.ended("failed", detail=f"exit code {code}")
            if code != Exit.RESUME_ME:
                self._explain(code, number, bar)
                return code if code in (Exit.REFUSED, Exit.GAVE_UP) else Exit.FAILED
            if self.stop_requested.is_set():
                bar.note(_left(events, number, _newest_step(self.run)))
                return Exit.RESUME_ME
            if cancelled.is_set:
                bar.note("cancelled; `outlast resume`, or the same command, goes on")
                return Exit.RESUME_ME
            outcome.requeued("preempted", job_id=None)
            bar.note(
                f"attempt {number} was preempted; the next one starts in {self.config.cluster.requeue_delay_s:g} s"
            )
            if self.stop_requested.wait(self.config.cluster.requeue_delay_s) or cancelled.is_set:
                return Exit.RESUME_ME

    def _attempt(self, number: int, lock: RunLock, bar: Shown) -> int:
        """Start the ranks, wait until the last has gone, and return what the first to leave said."""
        world_size = self.config.parallel.world_size
        self._meeting = secrets.token_hex(8)
        with signals_blocked():  # held back in the ranks until their guards are in place
            self.ranks = [self._start(rank, number, lock) for rank in range(1 if self.agent else world_size)]
        if self.stop_requested.is_set():
            self.send(signal.SIGTERM)
        first_code, deadline = None, 0.0
        while [process for process in self.ranks if process.poll() is None]:  # asks each of them
            if first_code is None and (gone := [p.returncode for p in self.ranks if p.returncode is not None]):
                first_code, deadline = next((c for c in gone if c != 0), 0), time.monotonic() + STRAGGLER_S
            if first_code not in (None, 0) and time.monotonic() > deadline:
                for process in self.ranks:
                    if process.poll() is None:
                        process.kill()
            progress = read(self.run)
            bar.update(progress if progress and progress.attempt == number else None)
            time.sleep(POLL_S)
        bar.update(read(self.run))
        codes = [process.returncode for process in self.ranks]
        if self.ranks[0].returncode in (Exit.RESUME_ME, Exit.GAVE_UP):
            return codes[0]  # it speaks for all: the others may have been ended in start-up
        ended = next((a.ended for a in attempts(self.ledger.read()) if a.number == number), None)
        if ended is not None and ended["cause"] == "preempted" and Exit.RESUME_ME in codes:
            return Exit.RESUME_ME  # rank 0 was stuck, and another has spoken for it
        # A rank that was killed is the cause; what its peers then raised is the effect.
        return min((code for code in codes if code < 0), default=first_code or max(codes))

    def _start(self, rank: int, number: int, lock: RunLock) -> subprocess.Popen[bytes]:
        world_size = self.config.parallel.world_size
        env = environment_without_job() | {
            ATTEMPT_ENV: str(number),
            **lock.environment,
            PARENT_ENV: str(os.getpid()),
            MEETING_ENV: self._meeting,
            "OMP_NUM_THREADS": str(self.config.parallel.cpus_per_rank),
        }
        if world_size > 1 and not self.agent:
            if rank == 0:
                [self._port] = free_ports(1)
            env |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._port),
            }
        with self._open_log(number, rank) as log:
            return subprocess.Popen(
                python_module_command("outlast.rank", str(self.run.path)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                pass_fds=[lock.fd] if lock.fd is not None else [],
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes on what it means
            )

    def _open_log(self, number: int, rank: int) -> BinaryIO:
        try:
            return open(self._log(number, rank), "ab")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return open(os.devnull, "ab")  # what a rank prints is lost, not the run

    def _log(self, number: int, rank: int) -> Path:
        return self.run.agent_log(number) if self.agent else self.run.log(number, rank)

    def _explain(self, code: int, number: int, bar: Shown) -> None:
        own = [e for e in self.ledger.read() if e["attempt"] == number]
        # A rank that is "gone" has an exit code, which says more; one that was late for a save is no cause at all.
        stuck = any(e["event"] == "straggler" and e["how"] in ("silent", "behind") for e in own)
        why = [e["detail"] for e in own if e["event"] == "attempt_ended" and "detail" in e]
        if stuck and why:
            bar.note(f"{why[-1]}, so the attempt was ended; its logs: {self.run.log(number, 0).parent}")
            return
        refused = [e["error"] for e in own if e["event"] == "attempt_ended" and "error" in e]
        if code == Exit.REFUSED and refused:
            bar.note(f"refused: {refused[-1].partition(': ')[2]}")
            return
        failed = next((i for i, process in enumerate(self.ranks) if process.returncode == code), 0)
        who, log = f"rank {failed}", self._log(number, failed)
        if self.agent:
            who = "the agent"
            ended = [e for e in own if e["event"] == "attempt_ended"]
            if 0 < code < 128:  # by a rank; one that was killed is named by the agent
                log = next((self.run.log(number, e["rank"]) for e in ended if "rank" in e), log)
        lines = log.read_text(errors="replace").splitlines()[-15:] if log.exists() else []
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        bar.note("\n".join([f"{who} {how}; the end of {log}:", *(f"    {line}" for line in lines)]))
        saved = max((a.saved_step for a in attempts(self.ledger.read())), default=0)
        if code != Exit.REFUSED and (newest := _newest_step(self.run)):
            bar.note(f"The same command again resumes from step {newest}.")
        elif code != Exit.REFUSED and not saved:
            bar.note("No step was saved: the same command begins again, and fails again unless the cause is gone.")


def _newest_step(run: RunDirectory) -> int:
    """The step that a resume would begin from, by what is on disk; 0 if there is none."""
    newest = newest_full(kept(run))
    return 0 if newest is None else newest.step


def _left(events: list[Event], number: int, newest: int) -> str:
    """What an attempt that was told to stop has left behind, in words.

    Args:
        newest: the step that a resume would begin from.
    """
    last = next((attempt for attempt in attempts(events) if attempt.number == number), None)
    if last is None or not last.has_trained or newest >= last.last_step:
        return f"saved. {RESUMES}"
    failed = [e["reason"] for e in events if e["attempt"] == number and e["event"] == "checkpoint_failed"]
    why = f": {failed[-1]}" if failed else ""
    resumes = f"resumes from step {newest}" if newest else "begins again"
    return f"WARNING: step {last.last_step} was not saved{why}. The same command again {resumes}."


def train(plan: Plan, console: Console | None = None) -> int:
    """Run `plan` here, in the foreground.

    Args:
        console: where the progress is shown; standard output, if left out.

    Returns:
        The command's exit code.

    Raises:
        RunBusyError: the run directory is in use.
    """
    launcher = Launcher(plan)
    ignore_output_errors()  # the ranks end with this process: a full disk behind its output must not end it
    with (
        ProgressBar(launcher.run.path.name, console or Console(highlight=False)) as bar,
        passing_on_signals(launcher.stop, launcher.send),
    ):
        return launcher.main(bar)
