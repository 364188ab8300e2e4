"""Reads a DataLoader for a user's own loop: epoch after epoch, from the batch at which the run stands.

What a DataLoader draws at random (the order of an epoch, masks, augmentations) follows from its seeds, the epoch and
the batch's number, in this process and in workers alike; the random numbers of training are another stream. So batches
that are done need not be read again, only left out. Where batches have no number (a stream, or a loader that rank 0
reads for all), those of the epoch are read again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import BatchSampler, IterableDataset

from outlast.errors import ConfigError, ResumeRefusedError
from outlast.processes import shield_worker

from . import random_state
from .generators import derived, find, reseed, seed_process, too_large

GIVE = "run.epochs and run.batches"
STEPS_COMPARED = 3
"""Steps of an epoch of which the batches taken are compared."""


class Batches:
    """One DataLoader, and how far it has been read.

    Args:
        loader: a `DataLoader`, or what accelerate's `prepare` has made of it.
        number: which of the loop's loaders it is, so that no two draw alike.
        saved: what :meth:`state` returned at the checkpoint; None on a fresh run.
        ranks: how many ranks there are.

    Raises:
        ConfigError: its batches can't be found again.
        ResumeRefusedError: another number of ranks has begun it, and this one can't go on with it.
    """

    def __init__(self, loader: Any, number: int, saved: dict[str, Any] | None, ranks: int) -> None:
        self.loader, self._inner, self._ranks = loader, getattr(loader, "base_dataloader", loader), ranks
        _check(loader, self._inner)
        self._samplers = list(_samplers(loader))
        self._generators = find(self._samplers, self._inner.generator, getattr(loader, "synchronized_generator", None))
        self.too_large = too_large(self._inner.dataset, self._inner.collate_fn)
        """What can't be looked through for random generators."""
        own = [each.initial_seed() for each in self._generators if isinstance(each, torch.Generator)]
        self._seeds = saved["seeds"] if saved else [torch.initial_seed(), *own]
        self._first = [getattr(sampler, "initial_seed", None) for sampler in self._samplers]
        if saved:
            self._set_first(saved["first"])
        self._number, self.epoch = number, saved["epoch"] if saved else 0
        self.done = self._batches_done(saved) if saved else 0
        self._numbered = self._number_batches()
        self._count: int | None = None
        self._taken = [0]
        """Batches taken in each of the first steps of the epoch under way."""

    def state(self) -> dict[str, Any]:
        """Where it stands, as plain values."""
        return {
            "epoch": self.epoch,
            "done": self.done,
            "ranks": self._ranks,
            "rows": self._rows,
            "seeds": self._seeds,
            "first": self._first,
            "count": self._count,
        }

    def epochs(self, count: int | None) -> Iterator[tuple[int, "Epoch"]]:
        """See :meth:`outlast.Run.epochs`."""
        self._count = count
        while count is None or self.epoch < count:
            yield self.epoch, Epoch(self)
            self.epoch, self.done = self.epoch + 1, 0

    def read(self) -> Iterator[Any]:
        """The rest of the epoch under way."""
        state = None
        self._taken = [0]
        with self._own_random_numbers(state) as state:
            self._begin_epoch()
            iterator = iter(self.loader)
        try:
            for position in range(self.done) if self._numbered is None else ():
                with self._own_random_numbers(state) as state:
                    if next(iterator, _END) is _END:
                        self.done = position  # it was shorter this time; what is left is nothing
            while True:
                with self._own_random_numbers(state) as state:
                    batch = next(iterator, _END)
                if batch is _END:
                    return
                self.done += 1
                self._taken[-1] += 1
                yield batch
        finally:
            if self._numbered is not None:
                self._numbered.skip = 0

    def step_done(self) -> int:
        """Note that a step has ended; return how many batches the loop takes ahead of their steps, if that shows.

        It shows in the first step of an epoch, which takes more than those after it.
        """
        first, *others = taken = self._taken
        if len(taken) <= STEPS_COMPARED:
            taken.append(0)
        if len(taken) != STEPS_COMPARED + 1 or len(set(others)) != 1:
            return 0
        return max(first - others[0], 0)

    @property
    def _rows(self) -> int | None:
        """Rows of one rank's batch."""
        size = getattr(self._samplers[0], "batch_size", None) if self._samplers else self._inner.batch_size
        return size if isinstance(size, int) else None

    def _begin_epoch(self) -> None:
        """Set all that the order of this epoch depends on."""
        seed = derived(self._seeds[0], self._number, self.epoch)
        seed_process(seed)
        own = iter(self._seeds[1:])
        for index, generator in enumerate(self._generators):
            first = next(own, index) if isinstance(generator, torch.Generator) else index
            reseed(generator, derived(self._seeds[0], first, self.epoch))
        if self._numbered is None:  # no batch is seeded by itself
            for index, generator in enumerate(find(self._inner.dataset, self._inner.collate_fn)):
                reseed(generator, derived(seed, index))
        for thing in (self.loader, *self._samplers, self._inner.dataset):
            if hasattr(thing, "set_epoch"):
                thing.set_epoch(self.epoch)
        if self._numbered is not None:
            self._numbered.seed, self._numbered.skip = seed, self.done

    def _number_batches(self) -> "_Numbered | None":
        """Have the DataLoader number its batches; None if they have no numbers."""
        inner, shard = self._inner, type(self.loader).__name__
        inner.worker_init_fn = partial(_begin_worker, inner.worker_init_fn)
        if isinstance(inner.dataset, IterableDataset) or shard == "DataLoaderDispatcher":
            return None
        name = "sampler" if inner.batch_sampler is None else "batch_sampler"
        numbered = _Numbered(vars(inner)[name])
        vars(inner)[name] = numbered  # past `__setattr__`, which refuses: nothing has read it yet
        vars(inner)["dataset"] = _Seeded(inner.dataset, inner.collate_fn)
        return numbered

    def _batches_done(self, saved: dict[str, Any]) -> int:
        """The batches that this rank would have read of the epoch, had it begun with as many ranks as there are."""
        if saved["ranks"] == self._ranks and saved["rows"] == self._rows:
            return int(saved["done"])
        if saved["rows"] is None or self._rows is None or isinstance(self._inner.dataset, IterableDataset):
            raise ResumeRefusedError(
                f"{saved['ranks']} ranks have read {saved['done']} batches of a stream; {self._ranks} can't go on "
                f"with it; valid: {saved['ranks']}"
            )
        rows = int(saved["done"]) * int(saved["ranks"]) * int(saved["rows"])
        return rows // (self._ranks * self._rows)

    def _set_first(self, first: list[int | None]) -> None:
        for sampler, seed in zip(self._samplers, first, strict=False):
            if seed is not None:
                sampler.initial_seed = seed
        self._first = first

    @contextmanager
    def _own_random_numbers(self, state: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        """Draw from this loader's stream of random numbers within; what is yielded holds where it then stands."""
        outside, after = random_state.capture(devices=False), dict[str, Any]()
        if state is not None:
            random_state.restore(state)
        try:
            yield after
        finally:
            after |= random_state.capture(devices=False)
            random_state.restore(outside)


class Epoch:
    """The rest of one epoch: to be iterated over once. Its `len` is the number of batches that are left."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self._batches.read()

    def __len__(self) -> int:
        return max(len(self._batches.loader) - self._batches.done, 0)


class _Numbered(BatchSampler):
    """Gives each batch a seed, by its number in the epoch, and leaves out those that are done."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seed, self.skip = inner, 0, 0

    def __iter__(self) -> Iterator[Any]:
        for number, rows in enumerate(self.inner):
            if number >= self.skip:
                yield _Batch(derived(self.seed, number), rows)

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


class _Batch:
    """The rows of one batch (or one row, where the DataLoader makes no batches) and the seed to read them with."""

    def __init__(self, seed: int, rows: Any) -> None:
        self.seed, self.rows = seed, rows


class _Seeded:
    """A dataset whose rows are read with the seed of their batch, also in a worker. The collator draws after them."""

    def __init__(self, dataset: Any, collate: Any) -> None:
        self.dataset, self._collate = dataset, collate
        self._generators: list[Any] | None = None

    def __getitems__(self, batch: Any) -> Any:
        rows = self._seed(batch)
        read = getattr(self.dataset, "__getitems__", None)
        return read(rows) if read else [self.dataset[row] for row in rows]

    def __getitem__(self, batch: Any) -> Any:
        return self.dataset[self._seed(batch)]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name in ("dataset", "_collate", "_generators"):  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def _seed(self, batch: Any) -> Any:
        if not isinstance(batch, _Batch):
            return batch
        seed_process(batch.seed)
        if self._generators is None:
            self._generators = find(self.dataset, self._collate)
        for index, generator in enumerate(self._generators):
            reseed(generator, derived(batch.seed, index))
        return batch.rows


_END = object()


def _begin_worker(init: Any, worker_id: int) -> None:
    shield_worker(worker_id)
    if init is not None:
        init(worker_id)


def _samplers(loader: Any) -> Iterator[Any]:
    """The samplers of a DataLoader, from the outside in."""
    found = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    while found is not None:
        yield found
        found = getattr(found, "batch_sampler", None) or getattr(found, "sampler", None)


def _check(loader: Any, inner: Any) -> None:
    if not hasattr(inner, "dataset") or not hasattr(inner, "collate_fn"):
        raise ConfigError(GIVE, type(loader).__name__, "valid: a torch DataLoader, or what accelerate makes of one")
    if hasattr(inner, "load_state_dict"):
        raise ConfigError(GIVE, type(inner).__name__, "valid: a plain DataLoader; the run keeps its position by itself")
    if isinstance(vars(inner).get("dataset"), _Seeded):
        raise ConfigError(GIVE, "the same DataLoader twice", "valid: one call for each DataLoader")
    if hasattr(inner.dataset, "__next__"):
        what = f"a DataLoader over an iterator ({type(inner.dataset).__name__})"
        raise ConfigError(GIVE, what, "valid: a dataset that begins anew with each epoch; an iterator can't")
    if getattr(inner, "persistent_workers", False):
        why = "valid: persistent_workers=False; what a worker holds from one epoch to the next can't be saved"
        raise ConfigError(GIVE, "persistent_workers=True", why)
    if inner.num_workers and not getattr(inner, "in_order", True):
        raise ConfigError(GIVE, "in_order=False", "valid: in_order=True; else batches come in another order each time")
