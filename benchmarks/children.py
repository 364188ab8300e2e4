"""The processes that are measured: started, listened to, signalled, and ended whatever happens."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

WORKLOAD = Path(__file__).with_name("workload.py")
FOREIGN = ("SLURM_", "SBATCH_", "OUTLAST_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_")
"""Beginnings of variables that would make the child part of another job. It must not requeue that one."""


class ChildError(Exception):
    """A measured process did something else than expected; the message holds the end of its log."""


class Child:
    """One run of `workload.py`, as a context: left, it has ended.

    Args:
        directory: made here; the process writes nothing outside of it.
    """

    def __init__(self, mode: str, directory: Path, **options: Any) -> None:
        self.log = directory.with_suffix(".log")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKLOAD), json.dumps({"mode": mode, "directory": str(directory), **options})],
                stdin=subprocess.PIPE,  # closed when this process ends, which ends the child
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**environment, "HF_HUB_OFFLINE": "1"},
                start_new_session=True,
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)

    def line(self, limit_s: float = 300.0) -> dict[str, Any] | None:
        """The next line that it reports; None when there are no more.

        Raises:
            ChildError: it is silent for `limit_s` seconds.
        """
        try:
            return self._lines.get(timeout=limit_s)
        except queue.Empty:
            raise self.error(f"was silent for {limit_s:g} s") from None

    def signal(self, number: signal.Signals) -> float:
        """Signal it; when that was, Unix seconds."""
        now = time.time()
        self.process.send_signal(number)
        return now

    def wait(self, limit_s: float = 300.0) -> int:
        """Its exit code.

        Raises:
            ChildError: it goes on for longer than `limit_s` seconds.
        """
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise self.error(f"went on for {limit_s:g} s") from None

    def error(self, what: str) -> ChildError:
        return ChildError(f"the measured process {what}. The end of its log:\n{self.log.read_text()[-3000:]}")

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
