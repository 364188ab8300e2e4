"""Iterates over the training's DataLoader from a position that is saved and resumed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader

from .batches import CREATION, FETCH, ORDER, Indices, Order, Worker, digest, is_stream, seeded
from .objects import Objects, State

PIPELINE = ("data_collator", "train_dataset", "sampler", "loader")
"""The roots from which a batch is made."""
_END = object()


@dataclass(kw_only=True)
class Position:
    """Where a pass over the data stands, and the state of the pipeline there."""

    epoch: int
    batches: int
    """Batches taken by the training in this epoch."""
    fetched: int
    """Batches fetched: there may be one more."""
    start: State
    """State before the first batch of the epoch."""
    before: State | None = None
    """State before the first batch that wasn't taken."""
    workers: dict[int, State] = field(default_factory=dict)
    """State of each worker before the round of batches that `batches` is in."""
    next_digest: str | None = None
    """Digest of the last batch fetched, if it wasn't taken."""


class Source:
    """A DataLoader (or any iterable of batches) whose iteration can begin at a :class:`Position`.

    Args:
        loader: what is iterated over; its sampler, `collate_fn` and `worker_init_fn` are wrapped.
        key: seed, and rank.
    """

    def __init__(self, loader: Any, objects: Objects, key: tuple[int, int]) -> None:
        self.loader, self._objects, self._key = loader, objects, key
        self.epoch = 0
        self.factor = 1
        """Batches of this loader in one of the training's."""
        self.resume: Position | None = None
        """Where the next pass begins; taken by it."""
        self.live: State | None = None
        """The state of all objects with which the training goes on, once what had been fetched is fetched again."""
        self.differs = False
        """Whether a batch fetched again was another one."""
        self.skips: Callable[[], None] | None = None
        """If what iterates over this leaves out itself what isn't wanted: has it do so no longer."""
        self.fetched = 0
        """Batches fetched in this epoch."""
        self._skipped, self._at_first = 0, lambda: None
        self._starts: dict[int, State] = {}
        self._before: dict[tuple[int, int], State] = {}
        self._workers: dict[tuple[int, int], State] = {}
        self._last: Any = None
        self._worker: Worker | None = None
        self.roots: dict[str, Any] = {"loader": loader}
        """What a batch is made of."""
        if isinstance(loader, DataLoader):
            name = "sampler" if loader.batch_sampler is None else "batch_sampler"
            sampler = getattr(loader, name)
            self.roots = {"data_collator": loader.collate_fn, "train_dataset": loader.dataset, "sampler": sampler}
            self.roots["loader"] = {"generator": loader.generator}
            object.__setattr__(loader, name, Order(sampler, self._begin_order))
            if loader.num_workers:
                self._worker = Worker(loader)
                loader.worker_init_fn, loader.collate_fn = self._worker.init, self._worker.collate

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # accelerate and users ask whether it is a DataLoader
        return self.loader.__class__

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is."""
        self.epoch = epoch
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        at, self.resume = self.resume, None
        epoch, (seed, rank) = self.epoch, self._key
        if at is not None and at.epoch != epoch:
            at = None  # that epoch was over
        number = self.fetched = self._begin_at(at)
        replayed = at is not None and (is_stream(self.loader) or self.skips is not None)
        wanted = at.batches if at is not None and self.skips is None else 0
        self._starts[epoch] = self._objects.capture(PIPELINE)
        with seeded(seed, CREATION, epoch, rank):
            iterator = iter(self.loader)
        while True:
            if at is not None and number == at.batches and not self._worker:
                if replayed:
                    self._set_before(at)
                self._before[epoch, number] = at.before or {}
            elif not self._worker and number >= wanted:
                self._before[epoch, number] = self._objects.capture(PIPELINE)
            with seeded(seed, FETCH, epoch, number, rank):
                batch: Any = next(iterator, _END)
            if batch is _END:
                break
            if self._worker is not None:
                self._workers[epoch, number], batch = batch.state, batch.batch
            self.fetched, self._last = number + 1, batch
            if at is not None and number + 1 == at.fetched:
                self.differs = at.next_digest is not None and digest(batch) != at.next_digest
                self._go_on()
            if number >= wanted:
                yield batch
            number += 1

    def position(self, epoch: int, batches: int, fetched: int) -> Position:
        """The position after `batches` of `epoch`, when `fetched` were fetched."""
        ahead = fetched > batches and fetched == self.fetched
        count = self.loader.num_workers if self._worker and not is_stream(self.loader) else 0
        before_round = batches - batches % count - count if count else 0
        states = {w: self._workers.get((epoch, before_round + w)) for w in range(count)}
        return Position(
            epoch=epoch,
            batches=batches,
            fetched=fetched,
            start=self._starts.get(epoch, {}),
            before=self._before.get((epoch, batches)),
            workers={w: state for w, state in states.items() if state is not None},
            next_digest=digest(self._last) if ahead else None,
        )

    def pipeline_at(self, epoch: int, fetched: int) -> State | None:
        """The pipeline's state when the batch after `fetched` was asked for; None if it wasn't, yet."""
        return self._before.get((epoch, fetched))

    def forget(self, epoch: int, batches: int) -> None:
        """Forget what only positions before this one need."""
        spare = 2 * self.loader.num_workers if self._worker else 0
        self._starts = {e: state for e, state in self._starts.items() if e >= epoch}
        self._before = {at: state for at, state in self._before.items() if at >= (epoch, batches)}
        self._workers = {at: state for at, state in self._workers.items() if at >= (epoch, batches - spare)}

    def _begin_at(self, at: Position | None) -> int:
        """Prepare a pass that begins at `at`; returns the number of the first batch that is fetched."""
        self._skipped, self._at_first = 0, lambda: None
        if self._worker:
            self._worker.states = {}
        if at is None:
            if self.skips is not None:
                self.skips()
            self.skips = None
            return 0
        self._objects.restore(at.start, PIPELINE)
        if is_stream(self.loader) or self.skips is not None:
            return 0
        if self._worker is None:
            self._skipped, self._at_first = at.batches, lambda: self._set_before(at)
            return at.batches
        count = int(self.loader.num_workers)
        self._skipped = first = at.batches - at.batches % count
        self._worker.states = at.workers
        self._workers |= {(at.epoch, first - count + w): state for w, state in at.workers.items()}
        if at.fetched <= first:
            self._go_on()
        return first

    def _begin_order(self) -> Any:
        (seed, rank), epoch = self._key, self.epoch
        workers = self._worker is not None

        def wrap(rows: Any, number: int) -> Any:
            return Indices(rows, (seed, FETCH, epoch, number, rank)) if workers else rows

        return (seed, ORDER, epoch), self._skipped, self._at_first, wrap

    def _set_before(self, at: Position) -> None:
        """The batches before `at` are left out: the pipeline is as it was before the next was fetched."""
        if at.fetched <= at.batches:
            self._go_on()
        elif at.before is not None:
            self._objects.restore(at.before, PIPELINE)

    def _go_on(self) -> None:
        """What had been fetched when the position was saved is fetched: all is as it was then."""
        live, self.live = self.live, None
        if live is not None:
            self._objects.restore(live)
