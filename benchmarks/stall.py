"""The stall of a periodic save: the arms, run at the step ends of one training run, in the process of `workload.py`."""

import json
import mmap
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from workload import Emit, build_trainer

import outlast

CHUNK = 1 << 23
"""Bytes in one write of the plain arms; 256 kB to 64 MB made no difference here."""


def measure(gb: float, directory: Path, rounds: int, seed: int, emit: Emit) -> None:
    """Train, one step before each arm, and `emit` a line for each: round (0 is the warm-up), arm, bytes, seconds."""
    directory.mkdir()
    arms = ["sealed", "trainer", "flushed", "plain"] + ["direct"] * _direct_works(directory)
    shuffled = random.Random(seed)
    order = [(number, arm) for number in range(rounds + 1) for arm in shuffled.sample(arms, len(arms))]
    run = outlast.start(directory / "run", budget_gb=100 * gb)
    trainer = build_trainer(gb, directory / "unused", max_steps=1 + len(order))
    trainer.add_callback(_Arms(trainer, directory, order, emit))
    run.train(trainer)


class _Arms(TrainerCallback):  # type: ignore[misc]
    """Runs the next arm at each step's end. The first step makes the optimizer's state, and the second buffer."""

    def __init__(self, trainer: Any, directory: Path, order: list[tuple[int, str]], emit: Emit) -> None:
        self.trainer, self.directory, self.order, self.emit = trainer, directory, order, emit
        self.plain = directory / "plain"
        self.buffer = mmap.mmap(-1, mmap.PAGESIZE)
        self.arms: dict[str, Callable[[], None]] = {
            "sealed": self.sealed,
            "trainer": self.trainer_alone,
            "flushed": self.trainer_and_flush,
            "plain": self.plain_write,
            "direct": lambda: self.plain_write(os.O_DIRECT),
        }

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.clear()
            self.trainer_alone()
            self.buffer = _touched(tree_bytes(self.plain))
            self.emit(arms=len(self.order), bytes=len(self.buffer))
            return
        number, arm = self.order[state.global_step - 2]
        self.clear()
        began = time.perf_counter()
        self.arms[arm]()
        seconds = time.perf_counter() - began
        place = self.published if arm == "sealed" else self.plain
        self.emit(round=number, arm=arm, seconds=seconds, bytes=tree_bytes(place), **self.ledger(arm))

    @property
    def published(self) -> Path:
        return self.directory / "run" / "checkpoints" / f"checkpoint-{self.trainer.state.global_step}"

    def clear(self) -> None:
        """The same start for every arm: nothing of an earlier one on disk, nothing left for the kernel to write, and
        free memory that is really there. A virtual machine may have given back to its host what was freed two seconds
        ago; getting a GB of page cache then takes 0.2 to 2 s, which would hit one arm or the other."""
        for path in (*self.published.parent.glob("checkpoint-*"), self.plain):
            shutil.rmtree(path, ignore_errors=True)
        self.plain.mkdir()
        os.sync()
        _touched(len(self.buffer) + len(self.buffer) // 4).close()

    def sealed(self) -> None:
        """What the Trainer calls when it saves: outlast has put its own method there."""
        self.trainer._save_checkpoint(self.trainer.model, None)

    def trainer_alone(self) -> None:
        """The Trainer's own method, into a plain directory."""
        args = self.trainer.args
        before, args.output_dir = args.output_dir, str(self.plain)
        type(self.trainer)._save_checkpoint(self.trainer, self.trainer.model, None)
        args.output_dir = before

    def trainer_and_flush(self) -> None:
        self.trainer_alone()
        for path in (*self.plain.rglob("*"), self.plain):
            _flush(path)

    def plain_write(self, flags: int = 0) -> None:
        """One file, from memory that has been touched before."""
        fd = os.open(self.plain / "bytes", os.O_WRONLY | os.O_CREAT | flags, 0o644)
        with memoryview(self.buffer) as view:
            done = 0
            while done < len(view):
                done += os.write(fd, view[done : done + CHUNK])
        os.fsync(fd)
        os.close(fd)
        _flush(self.plain)

    def ledger(self, arm: str) -> dict[str, float]:
        """What outlast says of its own save, and that it is one: published, with a manifest of every other file."""
        if arm != "sealed":
            return {}
        manifest = self.published / "manifest.json"
        listed = sum(entry["bytes"] for entry in json.loads(manifest.read_text())["files"].values())
        assert listed == tree_bytes(self.published) - manifest.stat().st_size, "the manifest lists other bytes"
        lines = (self.directory / "run" / "ledger.jsonl").read_text().splitlines()
        event = next(e for e in map(json.loads, reversed(lines)) if e["event"] == "checkpoint")
        return {"ledger_stall_s": event["stall_s"], "ledger_sealed_s": event["sealed_s"]}


def tree_bytes(path: Path) -> int:
    """Bytes of all files below `path`."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _touched(size: int) -> mmap.mmap:
    """Aligned memory of whole pages, private as a tensor's is, filled with what no file system can compress."""
    block = os.urandom(CHUNK)
    buffer = mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start in range(0, len(buffer), CHUNK):
        end = min(start + CHUNK, len(buffer))
        buffer[start:end] = block[: end - start]
    return buffer


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _direct_works(directory: Path) -> bool:
    """Whether the file system takes writes that bypass the page cache."""
    path = directory / "probe"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    except (OSError, AttributeError):
        return False
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            return os.write(fd, page) == mmap.PAGESIZE
    except OSError:
        return False
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)
