"""Ranks and their collectives: small collectives on a gloo group of their own, beside the one that trains.

Values travel as JSON in tensors, and nothing that comes from the network is unpickled. So a tuple arrives as a list, on
every rank alike.
"""

import json
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import torch
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
        """Rank 0's `value`, on every rank: what JSON makes of it."""
        if self.world_size == 1:
            return value
        import torch
        import torch.distributed as dist

        group, own = self._side_group(), _encoded(value if self.rank == 0 else None)
        size = torch.tensor([len(own)])
        dist.broadcast(size, src=0, group=group)
        text = own if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(text, src=0, group=group)
        return _decoded(text)

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
        """Every rank's `value`, by rank, on every rank: what JSON makes of them."""
        if self.world_size == 1:
            return [value]
        import torch
        import torch.distributed as dist

        group, own = self._side_group(), _encoded(value)
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=group)
        longest = max(int(size) for size in sizes)
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        padded = torch.nn.functional.pad(own, (0, longest - len(own)))
        dist.all_gather(texts, padded, group=group)
        return [_decoded(text[: int(size)]) for text, size in zip(texts, sizes, strict=True)]

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


def _encoded(value: Any) -> "torch.Tensor":
    import torch

    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decoded(text: "torch.Tensor") -> Any:
    return json.loads(text.numpy().tobytes())
