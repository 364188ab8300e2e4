"""`make demo`: the embedded default, preempted halfway on purpose, resumed, and reported."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.rundir.progress import read

OUTLAST = str(Path(sys.executable).with_name("outlast"))
RUN = RunDirectory(Path("runs/demo").absolute())
HALFWAY = 0.5


def preempt_halfway(command: "subprocess.Popen[bytes]") -> None:
    """Sends SIGUSR1 once the run is past its half, as Slurm would."""
    while command.poll() is None:
        now = read(RUN)
        if now and now.total_steps and now.phase == "training" and now.step >= HALFWAY * now.total_steps:
            print(f"\n>>> preempting it: kill -USR1 {command.pid}\n", flush=True)
            command.send_signal(signal.SIGUSR1)
            return
        time.sleep(0.1)


def main() -> int:
    shutil.rmtree(RUN.path, ignore_errors=True)
    print("$ outlast train experiment=demo\n", flush=True)
    with subprocess.Popen([OUTLAST, "train", "experiment=demo"]) as command:
        threading.Thread(target=preempt_halfway, args=[command], daemon=True).start()
        try:
            code = command.wait()
        except KeyboardInterrupt:
            return command.wait()
    if code == os.EX_OK:
        print("\n$ outlast report demo\n", flush=True)
        code = subprocess.call([OUTLAST, "report", "demo"])
    return code or (0 if any(e["event"] == "requeued" for e in Ledger(RUN.ledger).read()) else 1)


if __name__ == "__main__":
    sys.exit(main())
