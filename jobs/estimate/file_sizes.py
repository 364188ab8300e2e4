"""Computes the sizes of a checkpoint's files, without making them and without the memory for what they hold.

Nothing here knows how an optimizer lays out its state. The libraries' own code runs, on fake tensors (a shape and a
type, no memory), and what it would write is counted. Formulas are left where that is impossible: optimizers that only
step on a GPU.
"""

import io
import json
import random
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast.files import bytes_used

if TYPE_CHECKING:
    import torch

    Groups = list[list[tuple[tuple[int, ...], torch.dtype]]]
    """Shapes and types of the trainable parameters, by parameter group."""

DEEPSPEED_SCRIPTS = 41_100
"""`zero_to_fp32.py` and `zero_to_torch.py`, which DeepSpeed 0.19 copies into each checkpoint, and `latest`."""
DEEPSPEED_HEADER = 2_000
"""Bytes of DeepSpeed's configuration and counters, in each of its files."""

BLOCK, SMALLEST_8BIT = 256, 4096
STATES_8BIT = {"adamw": 2, "lion": 1, "rmsprop": 1, "ademamix": 3}


class _Counter:
    """A file that keeps nothing but its length."""

    def __init__(self) -> None:
        self.size = self._position = 0

    def write(self, data: Any) -> int:
        count = memoryview(data).nbytes
        self.seek(count, io.SEEK_CUR)
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (self._position if whence == io.SEEK_CUR else 0)
        self.size = max(self.size, self._position)
        return self._position

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        pass


@contextmanager
def quiet() -> Iterator[None]:
    """Hide from the user the libraries' warnings about each other while a plan is made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def torch_file(value: Any) -> int:
    """Return the size of the file that `torch.save(value, file)` makes; `value` may hold fake tensors.

    About 8 bytes per tensor too much: a fake tensor's device is pickled anew each time.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    counter = _Counter()
    with quiet(), FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(value, counter)  # type: ignore[arg-type]
    return counter.size


def safetensors_file(tensors: "Mapping[str, torch.Tensor]") -> int:
    """Return the size of a safetensors file: 8 bytes, a JSON header padded to 8, the data.

    Source: the format's definition in the README of huggingface/safetensors; `checkpoint/writer.py` writes it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # widest elements first, then by name: where a tensor lies decides how many digits its offsets have
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = offset + tensor.numel() * tensor.element_size()
        dtype = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}.get(str(tensor.dtype)[6:], "I64")
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + text + -text % 8 + offset


def written(*writes: Callable[[Path], Any]) -> int:
    """Write small files into a temporary directory, and return their bytes."""
    with tempfile.TemporaryDirectory(prefix="outlast-plan-") as directory, quiet():
        for write in writes:
            write(Path(directory))
        return bytes_used(Path(directory))


def random_states(gpus: int) -> int:
    """Return the size of one rank's `rng_state*.pth`.

    It holds Python's state, NumPy's, torch's on the CPU, and 16 bytes for each GPU that the rank sees.
    """
    import numpy as np
    import torch

    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if gpus:
        states["cuda"] = [torch.zeros(16, dtype=torch.uint8) for _ in range(gpus)]
    return torch_file(states)


def stepped(groups: "Groups", cls: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return, in fake tensors, the `state_dict()` of a torch optimizer that has made a step.

    Raises:
        Exception: whatever it raises if it can't step without a GPU.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with quiet(), FakeTensorMode():
        made = [[torch.nn.Parameter(torch.empty(shape, dtype=dtype)) for shape, dtype in group] for group in groups]
        optimizer = cls([{"params": group, "weight_decay": 0.0} for group in made], **arguments)
        for parameter in (p for group in made for p in group):
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        return dict(optimizer.state_dict())


def optimizer_8bit(name: str, groups: "Groups") -> int:
    """Return the bytes of an 8-bit state of bitsandbytes, which steps on a GPU alone.

    For each state one byte per element and a 4-byte constant per block of 256; parameters of fewer than 4096 elements
    keep 4 bytes per element. Source: `Optimizer2State.init_state` of bitsandbytes 0.50; not measured here. The Trainer
    has embeddings keep 4 bytes as well (`create_optimizer`): that is for the caller to add.
    """
    states = next((count for prefix, count in STATES_8BIT.items() if prefix in name), 2)
    total = 0
    for count in (numel(shape) for group in groups for shape, _ in group):
        total += 600 + states * (4 * count if count < SMALLEST_8BIT else count + 4 * -(-count // BLOCK))
    return total


def zero_files(
    model: "torch.nn.Module",
    saved: "Mapping[str, torch.Tensor]",
    groups: "Groups",
    cls: Any,
    arguments: Mapping[str, Any],
    *,
    stage: int,
    ranks: int,
) -> tuple[int, int]:
    """Return the bytes that DeepSpeed writes with ZeRO, over all ranks: (optimizer, its own copy of the weights).

    Each rank keeps a shard of what is trained: a 32-bit master copy, and the optimizer's state of it in 32 bits, flat,
    whatever type the weights have. With stages 1 and 2 each group is flattened and cut into equal parts of an even
    number of elements (`stage_1_and_2.py`, `flatten_dense_tensors_aligned`); with stage 3 each parameter is cut into
    `ranks` parts (`partition_parameters.py`), which are flattened together. Rank 0 also writes the weights a second
    time, as they are used (`mp_rank_00_model_states.pt`); with stage 3 each rank writes their names alone. Source:
    deepspeed 0.19.8, `engine.py`, `_save_checkpoint` and `_save_zero_checkpoint`. The Trainer leaves frozen weights out
    (`exclude_frozen_parameters`).

    Args:
        saved: the weights that are written, by name, in the type that DeepSpeed uses them in.
        groups: what is trained, by parameter group; empty ones are dropped.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    full = [group for group in groups if group]
    if stage == 3:
        shards = [sum(-(-numel(shape) // ranks) for shape, _ in group) for group in full]
    else:
        shards = [2 * -(-sum(numel(shape) for shape, _ in group) // (2 * ranks)) for group in full]
    flat: Groups = [[((size,), torch.float32)] for size in shards]
    with FakeTensorMode():
        masters = [torch.empty(size) for size in shards]
        # with stage 3 the weights are elsewhere, what is left of them is empty
        used = {n: torch.empty(t.shape if stage < 3 else (0,), dtype=t.dtype) for n, t in saved.items()}
    mappings = [(name, count, start) for start, (name, count) in enumerate((n, t.numel()) for n, t in saved.items())]
    state = {"state": stepped(flat, cls, arguments), "masters": masters}
    if stage < 3:  # which of a rank's elements belong to which parameter
        state["mappings"] = mappings[: -(-len(mappings) // ranks)]
    module: Any = OrderedDict(used)
    module._metadata = getattr(model.state_dict(), "_metadata", None)
    weights = {"module": module, "param_shapes": OrderedDict((name, tensor.shape) for name, tensor in saved.items())}
    copies = ranks if stage == 3 else 1
    return ranks * (torch_file(state) + DEEPSPEED_HEADER), copies * (torch_file(weights) + DEEPSPEED_HEADER)


def numel(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a tensor."""
    count = 1
    for size in shape:
        count *= size
    return count
