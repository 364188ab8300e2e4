"""Keeps state for the user: `run.keep(name, obj)` puts it into each checkpoint."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from outlast.checkpoint.manifest import Sealed
from outlast.errors import CheckpointError, ConfigError

from .values import NotPlainError, decode, encode, is_generator

VALID = (
    "valid: an object with state_dict() and load_state_dict(state), a torch.Generator, random.Random or "
    "numpy.random.Generator; its state made of numbers, text, tensors, arrays, and lists or dicts of them"
)


class Kept:
    """The kept objects of one rank: each rank saves its own, `kept_state_<rank>.pt`.

    Args:
        rank: this process.
        say: prints a line in the log (rank 0 only).
    """

    def __init__(self, rank: int, say: Callable[[str], None]) -> None:
        self._rank, self._say = rank, say
        self._objects: dict[str, Any] = {}
        self._read: dict[str, Any] | None = None
        self._checkpoint, self._begun = "", False

    def add(self, name: str, obj: Any) -> None:
        """Keep `obj` under `name`; if training has begun already, its state is set at once.

        Raises:
            ConfigError: the name is taken, or the state of `obj` can't be saved.
        """
        if name in self._objects:
            raise ConfigError("keep", name, "valid: a name that no other kept object has")
        if not is_generator(obj) and not (hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict")):
            raise ConfigError("keep", f"{name} ({type(obj).__name__})", VALID)
        try:
            _state(obj)
        except NotPlainError as error:
            raise ConfigError("keep", f"{name}: its state holds {error}", VALID) from None
        self._objects[name] = obj
        if self._begun and self._read is not None and name in self._read:
            self._set(name, obj)

    def snapshot(self, without: Collection[str] = ()) -> dict[str, Any]:
        """The states of now, to which :meth:`go_back` goes back."""
        return {name: _state(obj) for name, obj in self._objects.items() if name not in without}

    def go_back(self, snapshot: dict[str, Any]) -> None:
        """Set the states that were kept in a snapshot; an object added since keeps its own."""
        for name, state in snapshot.items():
            _set_state(self._objects[name], state)

    def write(self, directory: Path) -> None:
        """Write this rank's file, if anything is kept."""
        if self._objects:
            import torch

            states = {name: _state(obj) for name, obj in self._objects.items()}
            torch.save(states, directory / f"kept_state_{self._rank}.pt")

    def read(self, checkpoint: Sealed) -> None:
        """Read what was saved; a rank that there was not takes what another one saved."""
        import torch

        paths = [checkpoint.path / f"kept_state_{rank}.pt" for rank in self._ranks(checkpoint)]
        path = next((path for path in paths if path.exists()), None)
        self._read = torch.load(path, weights_only=True) if path else {}
        self._checkpoint = checkpoint.path.name

    def saved(self, name: str) -> Any:
        """The state that was read for `name`, or None."""
        return decode(self._read[name]) if self._read is not None and name in self._read else None

    def restore(self, *, of_others: bool = True) -> None:
        """Set the state of each kept object; one that is added later gets it then.

        Args:
            of_others: say which state nothing keeps now.

        Raises:
            CheckpointError: an object can't take the state that was saved for it.
        """
        self._begun = True
        if self._read is None:
            return
        for name, obj in self._objects.items():
            if name in self._read:
                self._set(name, obj)
            else:
                self._say(f"WARNING: {self._checkpoint} has no state of {name!r}: it begins anew")
        for name in sorted(set(self._read) - set(self._objects)) if of_others else ():
            self._say(f"WARNING: {self._checkpoint} holds state of {name!r}, which nothing keeps now")

    def _set(self, name: str, obj: Any) -> None:
        assert self._read is not None
        try:
            _set_state(obj, self._read[name])
        except Exception as error:
            raise CheckpointError(f"{name!r} can't take its state from {self._checkpoint}: {error!r}") from error

    def _ranks(self, checkpoint: Sealed) -> list[int]:
        return [self._rank, self._rank % checkpoint.manifest.world_size]


def _state(obj: Any) -> Any:
    return encode(obj if is_generator(obj) else obj.state_dict())


def _set_state(obj: Any, state: Any) -> None:
    if is_generator(obj):
        decode(state, into=obj)
    else:
        obj.load_state_dict(decode(state))
