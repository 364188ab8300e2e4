"""Digests of what is in memory: taken when it is saved, compared when it is loaded.

A file's digest says that its bytes are those that were written. It does not say that a library has saved all that was
in memory, nor that it puts back all that it has read. So each rank also digests its tensors and its other state, and
writes `digests.json` (rank 0) or `digests_<rank>.json` beside them; the manifest lists these files like all others.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from outlast.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Digests = dict[str, dict[str, str]]
"""`{part: {name: digest}}`; parts are `model`, `optimizer`, `schedule`, ..."""
PIECE = 1 << 26
"""Bytes of a tensor that are fetched from a GPU at a time."""


def digest(value: Any) -> str:
    """Digest a tensor (its bytes, type and shape), a plain value, or mappings and sequences of such: 16 hex digits.

    A tuple equals a list, and the order of a mapping's keys does not count. Any other object is digested by its
    `state_dict`, or by its type and attributes.
    """
    hasher = xxhash.xxh3_64()
    _feed(hasher, value, ())
    return hasher.hexdigest()


def _feed(hasher: "xxhash.xxh3_64", value: Any, inside: tuple[int, ...]) -> None:
    """Add `value` to the digest; `inside` are the ids of the objects that it is an attribute of."""
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        _feed_tensor(hasher, value)
    elif isinstance(value, np.ndarray | np.generic):
        hasher.update(f"array {value.dtype} {value.shape};".encode())
        hasher.update(value.tobytes())
    elif isinstance(value, Mapping):
        hasher.update(f"mapping {len(value)};".encode())
        for key in sorted(value, key=str):
            hasher.update(f"{key};".encode())
            _feed(hasher, value[key], inside)
    elif isinstance(value, list | tuple):
        hasher.update(f"sequence {len(value)};".encode())
        if all(type(item) in (int, float) for item in value):
            hasher.update(repr(list(value)).encode())
        else:
            for item in value:
                _feed(hasher, item, inside)
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes):
        hasher.update(f"{value!r};".encode())
    elif hasattr(value, "state_dict"):
        _feed(hasher, value.state_dict(), inside)
    else:
        hasher.update(f"{type(value).__qualname__};".encode())
        if hasattr(value, "__dict__") and not isinstance(value, type) and id(value) not in inside:
            _feed(hasher, vars(value), (*inside, id(value)))


def _feed_tensor(hasher: "xxhash.xxh3_64", tensor: "torch.Tensor") -> None:
    import torch

    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):  # a DTensor: this rank's shard
        tensor = tensor.to_local()
    hasher.update(f"tensor {tensor.dtype} {tuple(tensor.shape)};".encode())
    if hasattr(tensor, "__tensor_flatten__"):  # a quantized tensor is made of others
        for name in tensor.__tensor_flatten__()[0]:
            _feed(hasher, getattr(tensor, name), ())
    elif tensor.layout != torch.strided:
        _feed_tensor(hasher, tensor.to_dense())
    elif tensor.numel() and tensor.device.type != "meta":
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, len(flat), PIECE if flat.device.type != "cpu" else len(flat)):
            hasher.update(flat[start : start + PIECE].cpu().numpy().data)


def path_of(directory: Path, rank: int) -> Path:
    """The file of a rank's digests."""
    return directory / (f"digests_{rank}.json" if rank else "digests.json")


def write(directory: Path, rank: int, digests: Digests) -> None:
    """Write a rank's digests into a checkpoint that is being made."""
    path_of(directory, rank).write_text(json.dumps(digests, separators=(",", ":")))


def read(directory: Path, rank: int) -> Digests | None:
    """A rank's digests; None in a checkpoint without (made by an older version, or by fewer ranks).

    Raises:
        CheckpointError: the file can't be read.
    """
    path = path_of(directory, rank)
    try:
        values: Digests = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    return values


def differences(saved: Mapping[str, str], loaded: Mapping[str, str]) -> list[str]:
    """Names under which something else is in memory than was saved, or nothing, or nothing was saved; sorted."""
    return sorted(name for name in saved.keys() | loaded.keys() if saved.get(name) != loaded.get(name))
