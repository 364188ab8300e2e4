"""What a run keeps for a loop of the user's own, beside what the loop itself writes.

That is the random state at the end of the step, and how far each DataLoader was read. It is one of the kept objects.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import dataloader

from outlast.attempt.not_finite import NotFinite
from outlast.checkpoint.manifest import Sealed
from outlast.ranks.layout import derived_seed

from . import random_state
from .finite_weights import Stepped
from .generators import seed_process
from .loop_data import Batches, Epoch
from .resharding import with_batches

if TYPE_CHECKING:
    from outlast.attempt.attempt import RankAttempt

KEPT = "outlast.loop"
"""The name under which a run keeps this state."""
TOO_LARGE = "too many objects can be reached from it to look for random generators in all"
TAKEN_AHEAD = "batches are taken {} ahead of the step that trains on them, and a resume would leave these out"
_Iterator: Any = dataloader._BaseDataLoaderIter
"""What all iterators over DataLoaders are made of."""


class OwnLoop:
    """One rank's part.

    Args:
        checkpoint: what the run resumes from, if anything.
    """

    def __init__(self, run: "RankAttempt", checkpoint: Sealed | None) -> None:
        self._run, self._loaders = run, list[Batches]()
        self._checkpoint, self._saved = checkpoint, list[dict[str, Any]]()
        self._watch: _Watch | None = _Watch()
        self._finite, self._stepped = NotFinite(run), Stepped()
        self._takes_ahead = False

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state, as of now."""
        return {
            "random": random_state.capture(),
            "seed": torch.initial_seed() % 2**32,
            "loaders": [batches.state() for batches in self._loaders],
            "losses": self._finite.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the random state; the loaders go on from theirs as they are given."""
        assert self._checkpoint is not None
        self._saved = state["loaders"]
        self._finite.load_state_dict(state.get("losses", {"losses": []}))
        if self._checkpoint.manifest.world_size == self._run.world_size:
            random_state.restore(state["random"])
        else:
            seed = derived_seed(state["seed"], self._checkpoint.step, self._run.rank, self._run.world_size)
            seed_process(seed)
            torch.manual_seed(seed)

    def epochs(self, loader: Any, count: int | None) -> Iterator[tuple[int, Epoch]]:
        """See :meth:`outlast.Run.epochs`."""
        number, ranks = len(self._loaders), self._run.world_size
        saved = self._saved[number] if number < len(self._saved) else None
        if self._run.moved and type(loader).__name__ == "DataLoaderShard":
            loader = with_batches(loader, self._run.layout, self._run.rank)
        self._loaders.append(batches := Batches(loader, number, saved, ranks))
        if large := {type(thing).__name__: TOO_LARGE for thing in batches.too_large}:
            self._run.record("not_saved", objects=large)
            self._run.say(f"WARNING: {', '.join(large)}: {TOO_LARGE}. After a resume its random numbers may differ")
        return batches.epochs(count)

    def counted(self, number: int) -> int | None:
        """The epochs that the loop's loader of this number had in all, in what was loaded; None: not known."""
        return self._saved[number].get("count") if number < len(self._saved) else None

    def step_done(self) -> None:
        """Say once if batches are taken ahead of their step, or from a DataLoader that the run does not know."""
        if (ahead := max((batches.step_done() for batches in self._loaders), default=0)) and not self._takes_ahead:
            self._takes_ahead = True
            self._run.record("not_saved", objects={"run.epochs": TAKEN_AHEAD.format(ahead)})
            self._run.say(f"WARNING: {TAKEN_AHEAD.format(ahead)}. Take a batch in the step that trains on it")
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

    def look_at_loss(self, step: int, loss: float | None) -> None:
        """See whether the loss of a step says that training is lost."""
        if loss is not None:
            self._finite.look_at_loss(step, float(loss), self._stepped.are_finite)

    def close(self) -> None:
        """Stop following the loop: the run is done."""
        self._stepped.close()
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
