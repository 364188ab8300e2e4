"""`make demo`: the embedded default, preempted halfway on purpose, resumed, and reported."""

import json
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

NEXT = """
What next, after `. .venv/bin/activate`:

  use the model it made         python
                                >>> from transformers import pipeline
                                >>> write = pipeline("text-generation", "runs/demo/final")
                                >>> write("What does `os.path.join` do?\\n", max_new_tokens=40)

  train on your own data        outlast train run.name=mine data=jsonl data.train=FILE.jsonl
                                a line of it: {"prompt": "2 + 2?", "completion": "4"}
  ... a model that can talk     the same, and: model=pretrained model.path=DIRECTORY_OR_HUB_NAME

  the same on Slurm             outlast train run.name=first experiment=demo cluster=slurm cluster.partition=NAME
                                outlast status
"""


def preempt_halfway(command: "subprocess.Popen[bytes]") -> None:
    """Sends SIGUSR1 once the run is past its half, as Slurm would."""
    while command.poll() is None:
        now = read(RUN)
        if now and now.total_steps and now.phase == "training" and now.step >= HALFWAY * now.total_steps:
            print(f"\n>>> preempting it: kill -USR1 {command.pid}\n", flush=True)
            command.send_signal(signal.SIGUSR1)
            return
        time.sleep(0.1)


def show_losses() -> None:
    """Print the training loss at the start, at the preemption and at the end, from the Trainer's own log."""
    newest = max(RUN.checkpoints.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name[11:]))
    losses = {e["step"]: float(e["loss"]) for e in json.loads(newest.read_text())["log_history"] if "loss" in e}
    preempted = next(e["step"] for e in Ledger(RUN.ledger).read() if e.get("cause") == "preempted" and "step" in e)
    nearest = min(losses, key=lambda step: abs(step - preempted))
    print("\nWhat it learnt (training loss)")
    for words, step in (("at the start", min(losses)), ("at the preemption", nearest), ("at the end", max(losses))):
        print(f"  {words:18} {losses[step]:5.2f}   step {step}")


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
    if code or not any(e["event"] == "requeued" for e in Ledger(RUN.ledger).read()):
        return code or 1
    show_losses()
    print(NEXT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
