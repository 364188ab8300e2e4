"""Signal to sealed: a run with outlast, or with the Trainer's own `enable_jit_checkpoint`, is signalled in mid-step."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

from children import Child

SIGNALS = {"outlast": signal.SIGUSR1, "jit": signal.SIGTERM}
STEPS_BEFORE = 3


def shut_down(mode: str, directory: Path, gb: float, rng: random.Random) -> dict[str, Any]:
    """Start a run, signal it at a random moment of a step, and wait until it is gone.

    Returns:
        `saved_s` and `exit_s`, from the signal, by this process's clock; `steps_made`, `checkpoint_step`,
        `steps_lost`; `exit_code`; and for outlast `ledger_sealed_s`, by its own clock.
    """
    with Child(mode, directory, gb=gb) as child:
        times: list[float] = []
        while len(times) < STEPS_BEFORE:
            line = child.line()
            if line is None:
                raise child.error("ended before it was signalled")
            times.append(line["time"])
        time.sleep(rng.random() * (times[-1] - times[-2]))
        sent = child.signal(SIGNALS[mode])
        code = child.wait()
        gone = time.time()
        made = STEPS_BEFORE
        while (line := child.line()) is not None:
            made = line["step"]
        found = _sealed(directory / "run") if mode == "outlast" else _saved(directory / "trainer")
        if found is None:
            raise child.error(f"left with exit code {code} and without a checkpoint")
    saved, step, own = found
    return {
        "saved_s": saved - sent,
        "exit_s": gone - sent,
        "steps_made": made,
        "checkpoint_step": step,
        "steps_lost": made - step,
        "exit_code": code,
        **own,
    }


def _sealed(run: Path) -> tuple[float, int, dict[str, float]] | None:
    """The emergency checkpoint by the ledger: when it was sealed, its step, `sealed_s`."""
    for event in map(json.loads, (run / "ledger.jsonl").read_text().splitlines()):
        if event["event"] == "checkpoint" and event["kind"] == "emergency":
            return event["time"], event["step"], {"ledger_sealed_s": event["sealed_s"]}
    return None


def _saved(output: Path) -> tuple[float, int, dict[str, float]] | None:
    """The Trainer's checkpoint: its directory last changes when the mark of an incomplete one is removed."""
    for path in output.glob("checkpoint-*"):
        if (path / "trainer_state.json").exists() and not (path / "checkpoint-is-incomplete.txt").exists():
            return path.stat().st_mtime, int(path.name.removeprefix("checkpoint-")), {}
    return None
