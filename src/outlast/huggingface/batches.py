"""Makes each batch of a DataLoader depend on its place alone: on seed, epoch, number in the epoch, and rank.

Before a batch is fetched, in the main process or in a worker, the generators of Python, NumPy and torch are seeded for
it; the state of the training's own random numbers is put back afterwards. The order of the rows is drawn from a stream
of its own. So it does not matter what was fetched ahead when a run was interrupted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from . import random_state
from .generators import derived, seed_process
from .objects import Objects, State

ORDER, CREATION, FETCH = range(3)
"""What random numbers are drawn for; part of their seed."""
_END = object()


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Draw random numbers from generators seeded by `key`, if one is given; afterwards they are what they were."""
    before = random_state.capture(devices=False)
    if key:
        seed_process(derived(*key))
    try:
        yield
    finally:
        random_state.restore(before)


class Indices:
    """The rows of a batch on their way to a worker.

    What arrives are the plain indices, and the worker's generators are seeded for them.
    """

    def __init__(self, rows: Any, key: tuple[int, ...]) -> None:
        self.rows, self.key = rows, key

    def __reduce__(self) -> Any:
        return _arrive, (self.rows, self.key)


def _arrive(rows: Any, key: tuple[int, ...]) -> Any:
    seed_process(derived(*key))
    return rows


class Order:
    """A sampler with random numbers of its own, one stream for each epoch; the same on all ranks.

    Args:
        begin: called for each epoch: its seed, the batches to leave out, what to call before the first of the others,
            and how to wrap the indices of a batch, by its number.
    """

    def __init__(self, sampler: Any, begin: Callable[[], tuple[tuple[int, ...], int, Any, Any]]) -> None:
        self.inner, self._begin = sampler, begin

    def __iter__(self) -> Iterator[Any]:
        key, number, before_first, wrap = self._begin()
        with seeded(*key):
            indices = iter(self.inner)
            rows = next(islice(indices, number, None), _END)
            stream = random_state.capture(devices=False)
        before_first()
        while rows is not _END:
            yield wrap(rows, number)
            number += 1
            with seeded():
                random_state.restore(stream)
                rows = next(indices, _END)
                stream = random_state.capture(devices=False)

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


class Fetched:
    """A batch from a worker, and the state of the worker's objects after it."""

    def __init__(self, batch: Any, state: State) -> None:
        self.batch, self.state = batch, state

    def pin_memory(self) -> "Fetched":
        """Pin the batch; torch calls this."""
        from torch.utils.data._utils.pin_memory import pin_memory

        self.batch = pin_memory(self.batch)  # type: ignore[no-untyped-call]
        return self


class Worker:
    """Makes a DataLoader's worker take up the state of its objects, and send it with each batch.

    Its methods replace a DataLoader's `worker_init_fn` and `collate_fn`; a copy goes into each worker.
    """

    def __init__(self, loader: Any) -> None:
        self._init, self._collate = loader.worker_init_fn, loader.collate_fn
        self._roots = {"data_collator": loader.collate_fn, "train_dataset": loader.dataset}
        self.states: dict[int, State] = {}
        """The state to begin with, by worker."""
        self._objects: Objects | None = None

    def init(self, worker_id: int) -> None:
        """Begin, as `worker_init_fn`."""
        if self._init is not None:
            self._init(worker_id)
        roots = self._roots
        self._objects = Objects(lambda: roots, lambda: ())
        self._objects.note()
        if worker_id in self.states:
            self._objects.restore(self.states[worker_id])

    def collate(self, rows: Any) -> Fetched:
        """Make a batch, as `collate_fn`."""
        assert self._objects is not None
        batch = self._collate(rows)
        return Fetched(batch, self._objects.capture())


def is_stream(loader: Any) -> bool:
    """Whether rows can be left out only by reading them."""
    return not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset)


def digest(batch: Any) -> str:
    """Digest what a batch holds: tensors, arrays, and plain values, in any nesting."""
    import xxhash

    found = xxhash.xxh3_64()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{tuple(value.shape)}{value.dtype}".encode())
            if value.layout == torch.strided and value.numel():
                found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, np.ndarray) and value.dtype != object:
            found.update(value.tobytes())
        elif hasattr(value, "items"):
            for key, item in value.items():
                found.update(repr(key).encode())
                add(item)
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif isinstance(value, str | int | float | bool | type(None)):
            found.update(repr(value).encode())

    add(batch)
    return found.hexdigest()
