"""The arithmetic of a run's byte budget: how many bytes it will take, and what fits in `storage.budget_gb`.

A run directory holds fixed things, whole checkpoints at rest, one more while a save is in flight, and in the end the
finished model. With one checkpoint of C bytes, a model of M, fixed things of F and K checkpoints at rest:

    smallest budget = F + 2 C + M            (the newest, which never goes, and one in flight)
    K = the largest with F + (K + 1) C + M <= budget

The best checkpoint counts among the K. With K = 1 there are two when the best is not the newest; it is then made
light (weights only), and takes the place that the finished model will have, so nothing is added for it. A reserve
(`storage.reserve`) is one more checkpoint, in whole blocks. A margin stays free for what grows during a save.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from typing import Any

from outlast.errors import ConfigError

GB = 1_000_000_000
MARGIN = 65_536
"""The fewest bytes left free beside a save: the ledger and the logs grow while it is written."""
RESERVE_EXTRA = 262_144
"""Bytes that a reserve has beyond a checkpoint's. On disk a file takes whole blocks, and a directory some."""
MARGIN_SHARE = 0.005
"""The same, as a share of the budget."""
DEVIATION = 0.1
"""A measured part is reported if it is off by more than this share of the checkpoint's estimate."""

PART_OF = {
    "weights": ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model*.bin"),
    "optimizer": ("optimizer.pt", "optimizer*.bin", "optimizer_*/*", "*optim_states.pt"),
    "DeepSpeed's copy of the weights": ("*model_states.pt",),
    "random states": ("rng_state*.pth", "random_states_*.pkl", "kept_state_*.pt"),
    "schedule": ("scheduler*.pt", "scheduler*.bin", "scaler*.pt"),
    "trainer state": ("trainer_state.json",),
    "tokenizer": ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
                  "merges.txt", "spiece.model", "*processor_config.json"),
    "manifest": ("manifest.json",),
    "digests": ("digests*.json",),
}  # fmt: skip
"""Parts of a checkpoint, by the names that transformers, PEFT, accelerate and DeepSpeed give to their files."""
SMALL_FILES = "small files"
"""The part of everything else: configurations, training arguments, model card, DeepSpeed's scripts."""
RESUME_PARTS = ("optimizer", "DeepSpeed's copy of the weights", "random states", "schedule")
"""Parts that a light checkpoint lacks."""


def part_of(name: str) -> str:
    """The part of a checkpoint that a file belongs to, by its path in the checkpoint."""
    return next((part for part, names in PART_OF.items() if any(fnmatch(name, n) for n in names)), SMALL_FILES)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """The estimated bytes of a run, by part."""

    checkpoint: dict[str, int] = field(default_factory=dict)
    """One whole checkpoint, its manifest included."""
    final: dict[str, int] = field(default_factory=dict)
    """The finished model."""
    fixed: dict[str, int] = field(default_factory=dict)
    """What stays for the whole run besides checkpoints: prepared model and data, code, logs and records."""
    notes: tuple[str, ...] = ()
    """What could not be counted exactly, in words."""

    @property
    def checkpoint_bytes(self) -> int:
        return sum(self.checkpoint.values())

    @property
    def light_bytes(self) -> int:
        """One light checkpoint: what evaluation and deployment need."""
        return sum(size for part, size in self.checkpoint.items() if part not in RESUME_PARTS)

    @property
    def final_bytes(self) -> int:
        return sum(self.final.values())

    @property
    def fixed_bytes(self) -> int:
        return sum(self.fixed.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `plan.json` holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Footprint":
        """Restore what :meth:`as_dict` returned, also after a round trip through JSON."""
        parts = {key: dict(values.get(key, {})) for key in ("checkpoint", "final", "fixed")}
        return cls(**parts, notes=tuple(values.get("notes", ())))

    def measured(self, files: Mapping[str, int]) -> "Footprint":
        """Replace the estimate of a checkpoint by its real bytes.

        Args:
            files: size of each file by its path in the checkpoint. The manifest's estimate is kept if it is not among
                them (a manifest does not list itself).
        """
        real = {"manifest": self.checkpoint["manifest"]} if "manifest" in self.checkpoint else {}
        return replace(self, checkpoint=real | by_part(files))

    def deviations(self, files: Mapping[str, int], share: float = DEVIATION) -> dict[str, tuple[int, int]]:
        """Find wrongly estimated parts of a checkpoint: `{part: (estimate, real)}`, the largest difference first.

        Args:
            files: as for :meth:`measured`.
            share: a difference counts above this share of the whole checkpoint's estimate. The smallest parts, a few
                kB, may be far off without mattering.
        """
        real = self.measured(files).checkpoint
        pairs = {part: (self.checkpoint.get(part, 0), real.get(part, 0)) for part in self.checkpoint | real}
        least = share * self.checkpoint_bytes
        off = {part: pair for part, pair in pairs.items() if abs(pair[1] - pair[0]) > least}
        return dict(sorted(off.items(), key=lambda item: -abs(item[1][1] - item[1][0])))


def by_part(files: Mapping[str, int]) -> dict[str, int]:
    """Sum the bytes of files, given by path, for each part."""
    parts: dict[str, int] = {}
    for name, size in files.items():
        parts[part_of(name)] = parts.get(part_of(name), 0) + size
    return parts


def margin(budget_bytes: int) -> int:
    """The bytes of a budget that are left free beside a save."""
    return max(MARGIN, int(budget_bytes * MARGIN_SHARE))


def with_margin(need_bytes: int) -> int:
    """The smallest budget that holds `need_bytes` besides its margin."""
    return max(need_bytes + MARGIN, math.ceil(need_bytes / (1 - MARGIN_SHARE)))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What fits in a budget."""

    budget_bytes: int
    smallest_bytes: int
    """The smallest budget that would be enough."""
    save_total_limit: int
    """Whole checkpoints at rest, the best among them; 0 if not even one fits."""
    asked_limit: int | None
    """`trainer.save_total_limit`."""
    peak_bytes: int
    """The most that the run directory will hold at an instant."""
    arithmetic: str
    """The sum that gives the smallest budget, in words."""

    @property
    def fits(self) -> bool:
        return self.budget_bytes >= self.smallest_bytes

    @property
    def smallest_gb(self) -> float:
        """The smallest budget as it can be typed: rounded up to three digits."""
        return round_up(self.smallest_bytes / GB)

    @property
    def lowered(self) -> bool:
        """Whether fewer checkpoints fit than were asked for."""
        return self.asked_limit is not None and self.save_total_limit < self.asked_limit


def verdict(
    footprint: Footprint,
    budget_bytes: int,
    *,
    save_total_limit: int | None = None,
    steps: int | None = None,
    reserve: bool = False,
) -> Verdict:
    """Work out what fits in `budget_bytes`, by the arithmetic of this module; nothing is refused.

    Args:
        save_total_limit: an upper bound; None: as many as fit.
        steps: optimizer steps of the run, if known: there can't be more checkpoints than steps.
        reserve: one more checkpoint's bytes are kept aside, and :data:`RESERVE_EXTRA`.
    """
    whole, extra = footprint.checkpoint_bytes, footprint.checkpoint_bytes + RESERVE_EXTRA if reserve else 0
    standing = footprint.fixed_bytes + footprint.final_bytes + extra
    smallest = with_margin(standing + 2 * whole)
    space = budget_bytes - margin(budget_bytes) - standing
    bounds = [max(space // max(whole, 1) - 1, 0), *(bound for bound in (save_total_limit, steps) if bound is not None)]
    limit = max(min(bounds), 1) if budget_bytes >= smallest else 0
    terms = [f"2 checkpoints of {gb(whole)} (the newest and one in flight)"]
    terms += [f"the finished model of {gb(footprint.final_bytes)}"]
    terms += [f"{name} {gb(size)}" for name, size in footprint.fixed.items() if size]
    terms += [f"the reserve {gb(extra)}"] * bool(extra) + [f"a margin of {gb(margin(smallest))}"]
    return Verdict(
        budget_bytes=budget_bytes,
        smallest_bytes=smallest,
        save_total_limit=limit,
        asked_limit=save_total_limit,
        peak_bytes=standing + (max(limit, 1) + 1) * whole,
        arithmetic=" + ".join(terms) + f" = {gb(smallest)}",
    )


def refusal(found: Verdict, budget_gb: float, changes: Iterable[tuple[str, int]]) -> ConfigError:
    """Make the error for a budget that is too small.

    Args:
        changes: what the user could change instead, as typed, each with the smallest budget in bytes that would then
            do; changes that would not be enough are left out.
    """
    fitting = [f"{change} ({gb(size)})" for change, size in changes if size <= found.budget_bytes]
    instead = f" Or change what is kept, so that this budget does: {', or '.join(fitting)}." if fitting else ""
    valid = f"valid: {found.smallest_gb:g} or more, since the run needs {found.arithmetic}.{instead}"
    return ConfigError("storage.budget_gb", budget_gb, valid)


def round_up(value: float, digits: int = 3) -> float:
    """Round a positive number up to `digits` significant digits."""
    scale = 10.0 ** (digits - 1 - math.floor(math.log10(value)))
    return float(f"{math.ceil(value * scale - 1e-9) / scale:.12g}")


def gb(size: int) -> str:
    """Bytes in words, with three significant digits."""
    for unit, scale in (("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000)):
        if size >= scale:
            return f"{float(f'{size / scale:.3g}'):g} {unit}"
    return f"{size} B"
