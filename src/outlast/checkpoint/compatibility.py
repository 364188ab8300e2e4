"""Decides whether a checkpoint fits the run that is about to resume from it.

A checkpoint records its origin: the facts about the run that its contents depend on. If one of them has changed:

| differs | then | because |
|---|---|---|
| `world_size` | adapted | the accumulation follows, so each step has the same rows; random states are per rank |
| `global_batch` | refused | the step no longer says how many samples have been seen |
| `dataset` | refused | the position in the data would point at other samples |
| `seed` | refused | the order of the data after the resume would be another one |
| `trainable` | refused | the optimizer's state belongs to other parameters |
| `micro_batch` | adapted | the position is the same; sums are rounded in another order |
| `source` | allowed | the job has asked for `checkpoint.allow=[dataset]` already |
| `settings` | allowed | such as a Trainer's learning rate or optimizer; each is named |
| `config` | allowed | something else that decides the weights was changed, such as the learning rate |
| a library's version | allowed | the weights may differ from those of a run that was not upgraded |

A loop that does not take its gradient accumulation from `run.layout` is refused another `world_size`. The user can
accept any other refused change by name: `checkpoint.allow=[dataset]`. Adapted and allowed changes are noted in the log
and in the ledger's `resumed` line.
"""

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from outlast.errors import CheckpointError, ResumeRefusedError
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger

from .manifest import read_manifest

if TYPE_CHECKING:
    import torch

REFUSED = {
    "world_size": "run it with {made} ranks, or have the loop use run.layout",
    "global_batch": "set per-device batch size * gradient accumulation * ranks to {made}",
    "dataset": "give it the data that it was made with",
    "seed": "set seed={made}",
    "trainable": "give it the model and the adapters that it was made with",
}
"""Changes that are refused, each with what the user can do."""

NOTED = {
    "micro_batch": "the batch is split in another way: sums are rounded in another order",
    "config": "the configuration has changed since",
    "source": "the files that the data comes from have changed since",
}
"""Changes that are adapted or allowed, each with what it means."""

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed")
SAMPLED_ROWS = 16


@dataclass(frozen=True)
class Comparison:
    """The differences between a checkpoint's origin and the current run."""

    refused: dict[str, str] = field(default_factory=dict)
    """`{name: what the user can do about it}`."""
    noted: dict[str, str] = field(default_factory=dict)
    """`{name: what it means}`."""


def compare(
    made: dict[str, Any],
    now: dict[str, Any],
    *,
    versions_made: dict[str, str],
    versions_now: dict[str, str],
    allow: Iterable[str] = (),
    adapted: str | None = None,
) -> Comparison:
    """Apply the rules of this module; facts that only one side has are not compared.

    Args:
        made: the checkpoint's origin.
        now: the current run's origin.
        allow: names of differences that the user accepts.
        adapted: how the current run adapts to another `world_size`, in words; None if it can't.
    """
    refused, noted = {}, {}
    for name, advice in REFUSED.items():
        if name in made and name in now and made[name] != now[name]:
            change = f"{name} is {now[name]}, it was {made[name]}"
            if name == "world_size" and adapted is not None:
                noted[name] = f"{change}: {adapted}"
            elif name in allow:
                noted[name] = f"{change} (accepted by checkpoint.allow)"
            else:
                accept = "" if name == "world_size" else f", or accept it with checkpoint.allow=[{name}]"
                refused[name] = f"{change}; {advice.format(made=made[name])}{accept}"
    for name, meaning in NOTED.items():
        if name in made and name in now and made[name] != now[name]:
            noted[name] = f"{name} is {now[name]}, it was {made[name]}: {meaning}"
    before, after = made.get("settings", {}), now.get("settings", {})
    for name in before.keys() & after.keys():
        if before[name] != after[name]:
            noted[name] = f"{name} is {after[name]}, it was {before[name]}: what the optimizer's state holds stays"
    for name in LIBRARIES:
        if name in versions_made and name in versions_now and versions_made[name] != versions_now[name]:
            noted[name] = f"{name} is {versions_now[name]}, it was {versions_made[name]}: weights may differ a little"
    return Comparison(refused, noted)


def check(checkpoint: str, comparison: Comparison) -> None:
    """Raise ResumeRefusedError if a difference is refused."""
    if comparison.refused:
        raise ResumeRefusedError(f"{checkpoint} can't be resumed from here: " + "; ".join(comparison.refused.values()))


def trainable_digest(model: "torch.nn.Module") -> str:
    """Digest the names, shapes and types of the trained parameters."""
    # With ZeRO 3 a parameter is empty on every rank; DeepSpeed notes its full shape in `ds_shape`.
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = sorted((name, tuple(getattr(p, "ds_shape", p.shape)), str(p.dtype)) for name, p in trained)
    return _digest(found)


def dataset_digest(data: Any) -> str | None:
    """Digest a dataset's length and some evenly spaced rows; None if it can't be read by row.

    Reading a row must not draw random numbers, so only plain sequences and `datasets.Dataset` are read. Of a tokenized
    row only the `input_ids` count, so that data read back from a cache is still the same data.
    """
    if type(data).__module__.partition(".")[0] != "datasets" and not isinstance(data, list | tuple):
        return None
    if getattr(data, "format", {}).get("type") == "custom":
        return None
    try:
        rows = len(data)
        sampled = [data[i * (rows - 1) // (SAMPLED_ROWS - 1)] for i in range(SAMPLED_ROWS)] if rows else []
    except TypeError:
        return None  # a stream: it has no length
    return _digest([rows, [row.get("input_ids", row) if isinstance(row, dict) else row for row in sampled]])


def _digest(value: Any) -> str:
    def plain(other: Any) -> Any:
        return other.tolist() if hasattr(other, "tolist") else type(other).__name__

    return hashlib.sha256(json.dumps(value, default=plain, sort_keys=True).encode()).hexdigest()[:16]


def origin_of(run: RunDirectory) -> dict[str, Any] | None:
    """The origin that the newest checkpoint records, else the first attempt; None before the run has begun."""
    steps = (path.name.rpartition("-")[2] for path in run.checkpoints.glob("checkpoint-*"))
    for step in sorted((int(step) for step in steps if step.isdecimal()), reverse=True):
        with suppress(CheckpointError):
            newest = read_manifest(run.checkpoints / f"checkpoint-{step}")
            if not newest.light:
                return {"world_size": newest.world_size, **newest.origin}
    started = [event for event in Ledger(run.ledger).read() if event["event"] == "attempt_started"]
    return {"world_size": started[0]["world_size"]} if started else None
