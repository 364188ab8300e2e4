"""What an attempt of the script under test is asked to do: plain values that travel to its process."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class Arming:
    """Which events of which rank count, and what happens at one of them."""

    rank: int = 0
    window: str
    """`recovery` (from the start to the first step), `save` (the save at `step`), or `final` (the publishing)."""
    step: int = 0
    what: str
    """`log`, `kill` before the event `number`, or `tear` it in half."""
    number: int = 0
    log: str = ""


@dataclass(kw_only=True)
class Attempt:
    """What one attempt is asked to do."""

    directory: str
    lora: bool = True
    steps: int = 8
    every: int | None = 3
    """None: when to save is up to the Trainer, which never does."""
    limit: int | None = 2
    milestone_every: int | None = None
    budget_gb: float = 1.0
    hidden: int = 16
    stop_at: int | None = None
    """The step in which every rank signals itself (USR1)."""
    arming: Arming | None = None
    bound: bool = False
    """Give up root's privilege to read and write whatever it likes."""
    file_bytes: int | None = None
    """`RLIMIT_FSIZE` of the last rank, set when training begins."""
    ballast: str = ""
    """A file that fills its file system in step `fill_at`, but for `leave` bytes, and goes in step `free_at`."""
    fill_at: int | None = None
    leave: int = 0
    free_at: int | None = None
