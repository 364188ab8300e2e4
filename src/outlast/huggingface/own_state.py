"""The state that a Trainer's subclass, or a callback, keeps in attributes of its own.

TRL's trainers count micro-batches, keep generated text for several steps, and collect metrics until the next log. None
of it is in a checkpoint of the Trainer. What changes in training is found by comparing the attributes with those that
training began with, so nothing has to know their names. Models beside the trained one (a reference model that follows
it) are compared by a sum over their bits, and saved as soon as they have changed.
"""

import dis
import inspect
import types
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from outlast.attempt.values import NotPlainError, bits, decode, encode, same
from outlast.errors import ConfigError

from .reachable import PROCESS

CODE = (torch.nn.Module, type, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
"""Types of values that are no state, or are looked at as models."""
FILE = "kept_state_trainer_{rank}.pt"
"""Name of a rank's file in a checkpoint."""


class OwnState:
    """The attributes of `owner` that hold plain values: numbers, text, tensors, and containers of them.

    Objects of the user's in other attributes are looked into by `objects.py`.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._skipped = _attributes_of_trainer() if _is_trainer(owner) else frozenset()
        self._began: dict[str, Any] = {}
        self._models: dict[str, list[int]] = {}
        self._unknown: set[str] = set()
        self._at_step_end: dict[str, Any] = {}

    def begin(self) -> None:
        """Note the attributes as they are now: training begins.

        Raises:
            ConfigError: a reference model follows the trained one, and each rank holds a part of it only.
        """
        follows = getattr(getattr(self._owner, "args", None), "sync_ref_model", False)
        for name, model in self._other_models():
            if follows and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
                valid = f"valid with ZeRO 3: false; {name}, which each rank holds a part of, can't be saved"
                raise ConfigError("sync_ref_model", True, valid)
        self._began = self.values()
        self._models = {name: _bits(model) for name, model in self._other_models()}
        self._unknown = set(vars(self._owner)) - set(self._began)

    def write(self, directory: Path, rank: int) -> None:
        """Write what has changed into `directory`; models are the same on all ranks, and rank 0 writes them."""
        state: dict[str, Any] = {"values": self.changed(), "models": {}}
        for name, model in self._other_models() if rank == 0 else ():
            if _bits(model) != self._models.get(name):
                state["models"][name] = model.state_dict()
        if state["values"] or state["models"]:
            torch.save(state, directory / FILE.format(rank=rank))

    def load(self, directory: Path, rank: int, ranks: int) -> None:
        """Restore what :meth:`write` wrote.

        Args:
            directory: a checkpoint that `ranks` ranks have made.
        """
        of_rank, of_first = directory / FILE.format(rank=rank % ranks), directory / FILE.format(rank=0)
        if of_rank.exists():
            self.restore(torch.load(of_rank, weights_only=True)["values"])
        if of_first.exists():
            models = torch.load(of_first, weights_only=True)["models"]
            for name, model in self._other_models():
                if name in models:
                    model.load_state_dict(models[name])

    def keep(self) -> None:
        """Keep the values of now: a step has ended."""
        self._at_step_end = self.values()

    def go_back(self) -> bool:
        """Set the values to those that were kept last; False if a model has changed, which can't go back."""
        if any(_bits(model) != self._models.get(name) for name, model in self._other_models()):
            return False
        self.restore(self._at_step_end)
        return True

    def changed(self) -> dict[str, Any]:
        """The values, encoded, that are no longer those that training began with."""
        values = self.values()
        return {
            name: value
            for name, value in values.items()
            if name not in self._began or not same(value, self._began[name])
        }

    def lost(self) -> dict[str, str]:
        """What has changed and can't be saved: the attribute's name, and what is in it."""
        found = {}
        for name, value in list(vars(self._owner).items()):
            if name not in self._unknown | self._skipped | PROCESS and not isinstance(value, CODE):
                try:
                    encode(value)
                except NotPlainError as error:
                    found[name] = str(error)
        return found

    def values(self) -> dict[str, Any]:
        """All plain attributes, encoded; nothing of them is shared with the owner."""
        found = {}
        for name, value in self._candidates():
            try:
                found[name] = encode(value)
            except NotPlainError:
                continue
        return found

    def restore(self, values: Mapping[str, Any]) -> None:
        """Set attributes to encoded values; containers are filled, so that who else holds them sees it."""
        attributes = vars(self._owner)
        for name, value in values.items():
            attributes[name] = _filled(attributes.get(name), value)

    def _other_models(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Models in attributes that share no parameter with the one that is trained."""
        trained = getattr(self._owner, "model", None)
        known = {id(one) for one in trained.parameters()} if isinstance(trained, torch.nn.Module) else set()
        for name, value in list(vars(self._owner).items()):
            if name in self._skipped or not isinstance(value, torch.nn.Module):
                continue
            if known.isdisjoint(id(parameter) for parameter in value.parameters()):
                yield name, value

    def _candidates(self) -> Iterator[tuple[str, Any]]:
        for name, value in list(vars(self._owner).items()):
            if name not in self._skipped and name not in PROCESS and not callable(value):
                yield name, value


def _filled(into: Any, encoded: Any) -> Any:
    if isinstance(into, dict) and isinstance(encoded, tuple) and encoded[0] == "dict":
        items = {decode(key): item for key, item in encoded[1]}
        for key in set(into) - set(items):
            del into[key]
        for key, item in items.items():  # in a defaultdict, a new key gets the container that it makes
            into[key] = _filled(into[key] if isinstance(into, defaultdict) else into.get(key), item)
        return into
    return decode(encoded, into=into)


def _bits(model: torch.nn.Module) -> list[int]:
    """A sum over the bits of each tensor: another one if the tensor is another one, but for chance."""
    tensors = (tensor.detach() for tensor in model.state_dict().values() if torch.is_tensor(tensor))
    return [int(bits(tensor).sum(dtype=torch.int64)) for tensor in tensors]


def _is_trainer(owner: Any) -> bool:
    from transformers import Trainer

    return isinstance(owner, Trainer)


@cache
def _attributes_of_trainer() -> frozenset[str]:
    """The names that the methods of `Trainer` itself assign to: those it saves, or computes again, by itself."""
    from transformers import Trainer

    functions = [inspect.unwrap(member) for member in vars(Trainer).values() if inspect.isfunction(member)]
    stored = (one for function in functions for one in dis.get_instructions(function) if one.opname == "STORE_ATTR")
    return frozenset(one.argval for one in stored)
