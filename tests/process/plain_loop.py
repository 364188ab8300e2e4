"""A loop of the user's own without torch: what it is depends on numbers alone, so a test of bytes costs a second.

Arguments: run directory, and options as JSON: steps, arguments of `outlast.start`, bytes of each checkpoint, and what
else happens. `beside`: a file in the run directory of so many bytes, at a step. `prints`: characters a step. `clock`:
the wall clock is set by so many seconds inside the first save from a step on. `uid`, `umask`: of the
process. `until`: four steps before the end, it waits for this word in the ledger.
`coming`: bytes that are asked for before training begins.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

import outlast

options = json.loads(sys.argv[2])
os.umask(options.get("umask", 0o022))
if "uid" in options:
    os.setgroups([])
    os.setegid(options["uid"])
    os.seteuid(options["uid"])
run = outlast.start(sys.argv[1], **options.get("start", {}))
checkpoint = run.resume_point()
step, state = 0, 1
if checkpoint is not None:
    saved = np.load(checkpoint.path / "state.npy")
    step, state = checkpoint.step, int(saved[0])
if "coming" in options:
    run.check_budget("prepared data", options["coming"])
run.begin(step)


def set_clock(seconds: float) -> None:
    real = time.time
    time.time = lambda: real() + seconds


def save(directory: Path) -> None:
    if step >= options.get("clock", [math.inf])[0]:
        set_clock(options.pop("clock")[1])
    np.save(directory / "state.npy", np.full(options.get("bytes", 80) // 8, state, dtype=np.int64))


while step < options["steps"]:
    state = state * 6364136223846793005 % (2**61 - 1)
    step += 1
    if step == options.get("signal_at"):
        os.kill(os.getpid(), signal.SIGUSR1)
    for at, name, size in options.get("beside", []):
        if step == at:
            (run.directory.path / name).write_bytes(bytes(size))
    if options.get("prints"):
        print(f"step {step} " + "x" * options["prints"], flush=True)
    time.sleep(options.get("step_s", 0.0))
    if options.get("until") and step == options["steps"] - 4:
        limit = time.monotonic() + 30
        while options["until"] not in (run.directory.path / "ledger.jsonl").read_text() and time.monotonic() < limit:
            time.sleep(0.1)
    run.step_end(step, save)
run.finish(step, save)
