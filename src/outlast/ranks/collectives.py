"""Ranks and their collectives: small collectives on a gloo group of their own, beside the one that trains."""

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
CLOSE_S = 2.0
"""Seconds that leaving the process groups may take; it takes milliseconds unless another rank is gone. A process that
stays longer than `preemption.requeue_delay_s` (5 s) after the requeue brings Slurm's hold of two minutes back."""


def rank() -> int:
    """This process's rank, as its launcher has said it; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many ranks there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Collectives:
    """What all ranks tell each other. With one rank every answer is its own, and torch is not imported.

    The group is made at the first use, which every rank must reach at the same point, after `torch.distributed` has
    been initialized (by accelerate, or by the Trainer's arguments).
    """

    def __init__(self) -> None:
        self.rank, self.world_size = rank(), world_size()
        self.calls = 0
        """How many of these this rank has come to."""
        self._group: ProcessGroup | None = None

    def maximum(self, value: int) -> int:
        """The largest `value` of any rank, on every rank."""
        if self.world_size == 1:
            return value
        import torch
        import torch.distributed as dist

        tensor = torch.tensor([value], dtype=torch.int32)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._side_group())
        return int(tensor.item())

    def all_ok(self, ok: bool) -> bool:
        """Whether `ok` holds on every rank."""
        return self.maximum(0 if ok else 1) == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.maximum(0)

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank. It must be of plain Python types."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._side_group())
        return box[0]

    def on_rank_0(self, act: Callable[[], T], *problems: type[Exception]) -> T:
        """What `act` returns on rank 0, on every rank, in plain Python types; one of `problems` is raised on all.

        Args:
            problems: errors that `act` may raise, the special before the general; they are made of their message.
        """
        value, kind, message = None, None, ""
        if self.rank == 0:
            try:
                value = act()
            except problems as error:
                kind = next(i for i, problem in enumerate(problems) if isinstance(error, problem))
                message = str(error)
                if self.world_size == 1:
                    raise
        found, kind, message = self.from_rank_0((value, kind, message))
        if kind is not None:
            raise problems[kind](message)
        return cast(T, found)

    def from_all(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank, on every rank. Of plain Python types."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._side_group())
        return values

    def close(self) -> None:
        """Leave the process groups, so that no communicator outlives an orderly exit.

        Where a peer is gone, that could wait for an operation it will never take part in. Everything is saved by now:
        after `CLOSE_S` the process goes on, and ends, without.
        """
        if self.world_size > 1:
            closing = threading.Thread(target=self._close, daemon=True)
            closing.start()
            closing.join(CLOSE_S)

    def _close(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
        self._group = None

    def _side_group(self) -> "ProcessGroup":
        self.calls += 1
        if self._group is None:
            import torch.distributed as dist

            if not dist.is_initialized():
                raise RuntimeError(
                    f"WORLD_SIZE is {self.world_size}, but torch.distributed is not initialized: create the "
                    "Accelerator, or the Trainer's arguments, before resuming the run"
                )
            self._group = dist.new_group(backend="gloo")
        return self._group
