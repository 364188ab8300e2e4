"""The stretches of an attempt whose file events are looked at, each from a copy of a base run on."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from .attempt import Arming, Attempt
from .harness import Base, FileEvent, Server, logged


@dataclass(frozen=True)
class Window:
    """Where it begins, and the attempt that comes through it."""

    arming: Arming
    attempt: Attempt
    code: int = 0
    """How that attempt ends."""


SAVE = Arming(window="save", step=6, what="")
WINDOWS: dict[str, Window] = {
    # checkpoint-3 goes by `save_total_limit` once checkpoint-6 is sealed
    "periodic": Window(SAVE, Attempt(directory="")),
    # checkpoint-3 stays, as a milestone, without its optimizer
    "lightening": Window(SAVE, Attempt(directory="", milestone_every=3)),
    # checkpoint-3 goes before checkpoint-5 is written, for a budget that has no room for it
    "emergency": Window(replace(SAVE, step=5), Attempt(directory="", stop_at=5), code=75),
    "final": Window(Arming(window="final", what=""), Attempt(directory="")),
    # a save was killed, a deletion too, and a disk has gone bad: see `spoil`
    "recovery": Window(Arming(window="recovery", what=""), Attempt(directory="")),
}


def prepare(base: Base, window: str, directory: Path, rank: int) -> tuple[Attempt, Arming]:
    """A copy of the base at `directory`, the attempt to be made on it, and what to arm on `rank`."""
    base.copy(directory)
    spec = WINDOWS[window]
    attempt = replace(spec.attempt, directory=str(directory), lora=base.lora, hidden=base.hidden)
    if window == "recovery":
        spoil(directory)
    if window == "emergency":
        # no room beside the 64 kB that are kept free for the ledger
        attempt.budget_gb = (sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()) + 70_000) / 1e9
    return attempt, replace(spec.arming, rank=rank)


def spoil(run: Path) -> None:
    """What is left of a kill in a save, of one in a deletion, and of a bit flipped in the newest checkpoint."""
    newest, checkpoints = run / "checkpoints/checkpoint-4", run / "checkpoints"
    shutil.copytree(newest, checkpoints / ".staging/checkpoint-5")
    shutil.copytree(newest, checkpoints / ".deleted/checkpoint-2")
    shutil.copytree(newest, checkpoints / "checkpoint-1")
    (checkpoints / "checkpoint-1/manifest.json").rename(checkpoints / "checkpoint-1/.manifest.deleted")
    flip_bit(newest / "scheduler.pt")


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def log_window(server: Server, base: Base, window: str, directory: Path, rank: int) -> list[FileEvent]:
    """The file events of one rank in a window, as the attempt that nothing happens to makes them."""
    attempt, arming = prepare(base, window, directory, rank)
    outcome, log = logged(server, attempt, arming, Path(f"{directory}.log"), ranks=base.ranks)
    assert outcome.codes == [WINDOWS[window].code] * base.ranks, outcome.output
    return log
