"""What a run saves and restores for a loop of the user's own, beside what the loop itself writes.

Each rank's `loop_state_<rank>.pt` holds its random state at the end of the step, and how far each DataLoader was read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import dataloader

from outlast.checkpoint.manifest import Sealed
from outlast.ranks.layout import derived_seed

from . import random_state
from .generators import seed_process
from .loop_data import Batches, Epoch
from .resharding import with_batches

if TYPE_CHECKING:
    from outlast.attempt.attempt import RankAttempt

TOO_LARGE = "too many objects can be reached from it to look for random generators in all"
_Iterator: Any = dataloader._BaseDataLoaderIter
"""What all iterators over DataLoaders are made of."""


class OwnLoop:
    """One rank's part.

    Args:
        checkpoint: what the run resumes from, if anything.
    """

    def __init__(self, run: "RankAttempt", checkpoint: Sealed | None) -> None:
        self._run, self._loaders = run, list[Batches]()
        self._saved: dict[str, Any] | None = _read(checkpoint, run.rank) if checkpoint else None
        self._watch: _Watch | None = _Watch()
        if self._saved is None or checkpoint is None:
            return
        if checkpoint.manifest.world_size == run.world_size:
            random_state.restore(_decoded(self._saved["random"]))
        else:
            seed = derived_seed(self._saved["seed"], checkpoint.step, run.rank, run.world_size)
            seed_process(seed)
            torch.manual_seed(seed)

    def epochs(self, loader: Any, count: int | None) -> Iterator[tuple[int, Epoch]]:
        """See :meth:`outlast.Run.epochs`."""
        number, ranks = len(self._loaders), self._run.world_size
        states = self._saved["loaders"] if self._saved else []
        saved = states[number] if number < len(states) else None
        if self._run.moved and type(loader).__name__ == "DataLoaderShard":
            loader = with_batches(loader, self._run.layout, self._run.rank)
        self._loaders.append(batches := Batches(loader, number, saved, ranks))
        if large := {type(thing).__name__: TOO_LARGE for thing in batches.too_large}:
            self._run.record("not_saved", objects=large)
            self._run.say(f"WARNING: {', '.join(large)}: {TOO_LARGE}. After a resume its random numbers may differ")
        return batches.epochs(count)

    def write(self, directory: Path) -> None:
        """Write this rank's state."""
        state = {
            "random": _encoded(random_state.capture()),
            "seed": torch.initial_seed() % 2**32,
            "loaders": [batches.state() for batches in self._loaders],
        }
        torch.save(state, directory / f"loop_state_{self._run.rank}.pt")

    def step_done(self) -> None:
        """Say once if a step's batches come from a DataLoader that the run does not know."""
        if self._watch is not None and self._watch.step_done():
            self._watch.close()
            self._watch = None
            if not self._loaders:
                self._run.record("batches_unknown")
                self._run.say(
                    "WARNING: this loop iterates over a DataLoader by itself. A resume would begin the epoch anew, on "
                    "other data; `for epoch, batches in run.epochs(loader, 3)` or `next(run.batches(loader))` go on "
                    "from the batch at which the run was interrupted"
                )

    def close(self) -> None:
        """The run is done."""
        if self._watch is not None:
            self._watch.close()


class _Watch:
    """Notices whether one iteration over a DataLoader goes on from step to step."""

    def __init__(self) -> None:
        self._fetched: set[int] = set()
        self._before: set[int] = set()
        self._next = original = _Iterator.__next__

        def fetch(iterator: Any) -> Any:
            self._fetched.add(id(iterator))
            try:
                return original(iterator)
            except StopIteration:
                self._fetched.discard(id(iterator))
                raise

        _Iterator.__next__ = fetch

    def step_done(self) -> bool:
        found = bool(self._fetched & self._before)
        self._fetched, self._before = set(), self._fetched
        return found

    def close(self) -> None:
        _Iterator.__next__ = self._next


def _read(checkpoint: Sealed, rank: int) -> dict[str, Any] | None:
    for number in (rank, rank % checkpoint.manifest.world_size):
        path = checkpoint.path / f"loop_state_{number}.pt"
        if path.exists():
            return dict(torch.load(path, weights_only=True))
    return None


def _encoded(state: dict[str, Any]) -> dict[str, Any]:
    """The state in tensors and plain values, which `weights_only` reads."""
    version, numbers, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    python = (version, torch.tensor(numbers), gauss)
    return state | {"python": python, "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest)}


def _decoded(state: dict[str, Any]) -> dict[str, Any]:
    version, numbers, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    python = (version, tuple(numbers.tolist()), gauss)
    return state | {"python": python, "numpy": (kind, keys.numpy().astype(np.uint32), *rest)}
