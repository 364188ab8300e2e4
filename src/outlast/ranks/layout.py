"""Which rows each rank reads, and what the gradient accumulation becomes, on another number of ranks.

A run keeps the global batch that it began with: the rows of each optimizer step, their order over the epochs, the
number of steps in an epoch, and so the schedule, belong to the number of ranks of its first attempt (its *first
layout*). On another number of ranks each step has the same rows, split in another way. Nothing here needs torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any

from outlast.errors import ResumeRefusedError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the rows of an optimizer step are spread over ranks and micro-batches."""

    ranks: int
    micro_batch: int
    """Rows of one rank in one forward pass."""
    accumulation: int
    """Micro-batches of one rank in an optimizer step."""
    first: tuple[int, int]
    """Ranks and micro-batch of the run's first attempt: they decide how the end of an epoch is filled up."""

    @property
    def global_batch(self) -> int:
        """Rows in an optimizer step, over all ranks."""
        return self.ranks * self.micro_batch * self.accumulation

    @property
    def moved(self) -> bool:
        """Whether the end of an epoch would be filled up in another way than in the first attempt."""
        return self.first != (self.ranks, self.micro_batch)


def layout(made: dict[str, Any], *, ranks: int, micro_batch: int, accumulation: int) -> Layout:
    """The layout with which `ranks` ranks go on with a run.

    Args:
        made: the origin of its checkpoint: `world_size`, and as far as known `global_batch`, `micro_batch`, `first`.
        accumulation: as configured, for the number of ranks that the run began with.

    Returns:
        One with the run's global batch, if `micro_batch * accumulation` times the first number of ranks, or times
        `ranks`, is that; else (the configuration has another global batch) as configured.

    Raises:
        ResumeRefusedError: the global batch is no multiple of `micro_batch * ranks`; the message says what would be.
    """
    before = made.get("first") or (made["world_size"], made.get("micro_batch", micro_batch))
    first = (int(before[0]), int(before[1]))
    rows = made.get("global_batch", micro_batch * accumulation * first[0])
    if micro_batch * accumulation * first[0] == rows != micro_batch * accumulation * ranks:
        accumulation = _divided(rows, ranks=ranks, micro_batch=micro_batch, made=made)
    elif micro_batch * accumulation * ranks != rows:
        first = (ranks, micro_batch)
    return Layout(ranks=ranks, micro_batch=micro_batch, accumulation=accumulation, first=first)


def _divided(rows: int, *, ranks: int, micro_batch: int, made: dict[str, Any]) -> int:
    """The gradient accumulation that makes a global batch of `rows`, a multiple of `micro_batch`."""
    if rows % (micro_batch * ranks) == 0:
        return rows // (micro_batch * ranks)
    valid = [str(n) for n in range(1, rows // micro_batch + 1) if rows % (micro_batch * n) == 0]
    was = f"global batch {rows}"
    if "micro_batch" in made:
        accumulated = rows // (made["micro_batch"] * made["world_size"])
        was += f" = {made['micro_batch']} rows x {accumulated} accumulated x {made['world_size']} ranks"
    raise ResumeRefusedError(
        f"{was} can't be made of {ranks} ranks x {micro_batch} rows; valid numbers of ranks: {', '.join(valid)}"
    )


def epoch_rows(order: Sequence[int], first: tuple[int, int], *, drop_last: bool) -> list[int]:
    """The rows of an epoch as the first attempt read them: `order`, padded or cut at its end like accelerate.

    With several ranks, accelerate fills the last round of micro-batches up with rows from the beginning of the epoch
    (`BatchSamplerShard` with `even_batches`), or drops it; with one rank it leaves a short batch, or drops that.
    """
    ranks, micro_batch = first
    unit = ranks * micro_batch
    if drop_last:
        return list(order[: len(order) // unit * unit])
    length = len(order) if ranks == 1 else ceil(len(order) / unit) * unit
    return [order[i % len(order)] for i in range(length)]


def micro_batches(rows: Sequence[int], layout: Layout, filler: Sequence[int]) -> list[list[list[int]]]:
    """The rows of one optimizer step, `[micro-batch][rank][row]`.

    A whole step is cut in order: micro-batch 0 of rank 0, of rank 1, ..., then micro-batch 1. The last step of an epoch
    may have fewer rows: it is cut into as few rounds as hold them, as even as can be. Only if it has fewer rows than
    ranks, rows of `filler` are added.
    """
    parts = ceil(len(rows) / (layout.ranks * layout.micro_batch)) * layout.ranks
    filled = [*rows, *(filler[i % len(filler)] for i in range(parts - len(rows)))]
    bounds = [i * (len(filled) // parts) + min(i, len(filled) % parts) for i in range(parts + 1)]
    cut = [filled[a:b] for a, b in pairwise(bounds)]
    return [cut[i : i + layout.ranks] for i in range(0, parts, layout.ranks)]


class RankBatches:
    """A batch sampler: the micro-batches of one rank, such that each optimizer step has the rows of the first layout.

    Args:
        sampler: gives the order of an epoch's rows, the same on every rank; what has a `set_epoch` keeps it.
    """

    def __init__(self, sampler: Any, layout: Layout, rank: int, *, drop_last: bool) -> None:
        self.sampler, self.layout, self.rank, self.drop_last = sampler, layout, rank, drop_last
        self.batch_size = layout.micro_batch

    def __iter__(self) -> Iterator[list[int]]:
        rows = epoch_rows(list(self.sampler), self.layout.first, drop_last=self.drop_last)
        for begin in range(0, len(rows), self.layout.global_batch):
            for round_ in micro_batches(rows[begin : begin + self.layout.global_batch], self.layout, rows):
                yield round_[self.rank]

    def __len__(self) -> int:
        rows = len(epoch_rows(range(len(self.sampler)), self.layout.first, drop_last=self.drop_last))
        whole, rest = divmod(rows, self.layout.global_batch)
        return whole * self.layout.accumulation + ceil(rest / (self.layout.ranks * self.layout.micro_batch))


def derived_seed(seed: int, step: int, rank: int, ranks: int) -> int:
    """A seed for `rank` of `ranks` that go on at `step` from a checkpoint without random states for that many.

    The same on every attempt at the same step; another for each rank. What follows is not that of the run left alone.
    """
    import numpy as np

    return int(np.random.SeedSequence([seed, step, ranks, rank]).generate_state(1)[0])
