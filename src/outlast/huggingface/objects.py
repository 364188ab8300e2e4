"""Finds, captures and restores the state of objects that no checkpoint of the Trainer holds.

State is what changes: random generators, and attributes, closures or globals made of plain values that differ from
what they were when the attempt began. So a value that the user has set otherwise for this attempt stays as it is.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

from outlast.attempt.values import NotPlainError, decode, encode, is_generator, is_still, same

from .reachable import ITERATORS, Holder, holders

LARGE = 1 << 20
"""Bytes of a tensor or an array beyond which its value at the beginning isn't noted."""
NESTED = 2_000
"""Values in a container, in all depths, beyond which it is taken for data: it isn't looked at again."""
State = dict[str, dict[str, Any]]
"""Encoded values, by the place that holds them and by name."""


class _Noted:
    """What is known of a value that is only compared: it is the same as long as this is."""

    def __init__(self, value: Any, token: Any) -> None:
        self.value, self.token = value, token  # held, so that its id isn't used again


class Objects:
    """The state that can be reached from named roots.

    Args:
        roots: gives the roots, by name; asked each time, since callbacks may be replaced.
        without: gives objects that aren't walked: what a checkpoint holds anyway.
    """

    def __init__(self, roots: Callable[[], dict[str, Any]], without: Callable[[], Collection[Any]]) -> None:
        self._roots, self._without = roots, without
        self._first: dict[str, dict[str, Any]] = {}
        self._data: dict[int, Any] = {}
        self._skipped: dict[int, Any] = {}
        self.unsaved: dict[str, str] = {}
        """What is known not to be saved, by path, and why."""

    def note(self) -> None:
        """Note how all is now, as far as it isn't noted yet: what differs from it later is state."""
        for holder in self._walk(None):
            first = self._first.setdefault(holder.path, {})
            for name, value in holder.read().items():
                if name not in first and (cell := self._cell(value, holder.of(name), at_first=True)) is not _NONE:
                    first[name] = cell

    def capture(self, names: Collection[str] | None = None) -> State:
        """Return the state of the roots with these names, or of all."""
        state: State = {}
        for holder in self._walk(names):
            first = self._first.get(holder.path, {})
            for name, value in holder.read().items():
                if name in first and is_still(value, first[name]):
                    holder.known.add(name)
                    continue
                cell = self._cell(value, holder.of(name))
                if isinstance(cell, _Noted):
                    if name in first and isinstance(first[name], _Noted) and first[name].token == cell.token:
                        continue
                    cell = self._whole(value, holder.of(name))
                if cell is _NONE or (name in first and not is_generator(value) and _same(cell, first[name])):
                    continue
                state.setdefault(holder.path, {})[name] = cell
        return state

    def restore(self, state: State, names: Collection[str] | None = None) -> None:
        """Set what :meth:`capture` returned; what isn't in it goes back to how it was noted first."""
        for holder in self._walk(names):
            first, now = self._first.get(holder.path, {}), holder.read()
            wanted = {name: cell for name, cell in first.items() if not isinstance(cell, _Noted)}
            wanted |= state.get(holder.path, {})
            for name, cell in wanted.items():
                if name not in now and not holder.grows:
                    continue
                current = now.get(name)
                known = self._cell(current, holder.of(name)) if name in now else _NONE
                if known is _NONE or isinstance(known, _Noted) or not _same(known, cell):
                    value = _load(cell, current)
                    if value is not current:
                        holder.write(name, value)
            if holder.remove is not None:  # a name that was not there then
                for name in [name for name in now if name not in wanted and name not in first]:
                    if self._cell(now[name], holder.of(name)) is not _NONE:
                        holder.remove(name)

    def _walk(self, names: Collection[str] | None) -> Iterator[Holder]:
        import torch

        if names is None:
            self._skipped = {id(thing): thing for thing in self._without()}
        seen = self._skipped | self._data
        for name, root in self._roots().items():
            if names is None or name in names:
                seen.pop(id(root), None)
                if id(root) not in seen and not isinstance(root, torch.nn.Module | torch.optim.Optimizer):
                    yield Holder("", lambda: {name: root}, lambda *_: None)  # noqa: B023  (used at once)
                try:
                    yield from holders(name, root, seen)
                except OverflowError:
                    self.unsaved[name] = "too many objects can be reached from it to look through"

    def _cell(self, value: Any, path: str, *, at_first: bool = False) -> Any:
        """The value, encoded; a :class:`_Noted` if it is only compared; `_NONE` if it isn't state."""
        import numpy as np
        import torch

        # a method that the run has replaced leads to this very object
        ours = type(value).__module__.partition(".")[0] == "outlast"
        if ours or id(value) in self._skipped or id(value) in self._data:
            return _NONE
        if isinstance(value, ITERATORS):
            self.unsaved[path] = f"the position of an iterator ({type(value).__name__}) can't be saved"
            return _NONE
        if isinstance(value, torch.nn.Module) or (_has_state(value) and not _is_replayed(value)):
            return self._of_stateful(value, path)
        if isinstance(value, torch.Tensor):
            noted = _Noted(value, (id(value), value._version))
            return encode(value) if at_first and value.nbytes <= LARGE and value.layout == torch.strided else noted
        if isinstance(value, np.ndarray) and value.nbytes > LARGE:
            return _Noted(value, (id(value), _digest(value)))
        if isinstance(value, list | tuple | dict | set | frozenset) and at_first and _nested(value) > NESTED:
            self._data[id(value)] = value
            return _NONE
        try:
            return encode(value)
        except NotPlainError:
            return _NONE

    def _of_stateful(self, value: Any, path: str) -> Any:
        """An object with a `state_dict`: a model only if its tensors have changed, anything else always."""
        import torch

        if isinstance(value, torch.nn.Module):
            tensors = [*value.parameters(), *value.buffers()]
            return _Noted(value, tuple((id(tensor), tensor._version) for tensor in tensors))
        try:
            return ("state_dict", encode(value.state_dict()))
        except Exception as error:  # the user's own code, or a state that can't be encoded
            self.unsaved[path] = f"its state can't be saved: {error}"
            return _NONE

    def _whole(self, value: Any, path: str) -> Any:
        import torch

        try:
            if isinstance(value, torch.nn.Module):
                return ("state_dict", encode(value.state_dict()))
            return encode(value)
        except NotPlainError as error:
            self.unsaved[path] = f"it holds {error}, which can't be saved"
            return _NONE


_NONE = object()


def _load(cell: Any, current: Any) -> Any:
    if isinstance(cell, tuple) and cell[0] == "state_dict":
        if hasattr(current, "load_state_dict"):
            current.load_state_dict(decode(cell[1]))
        return current
    return decode(cell, into=current)


def _same(one: Any, other: Any) -> bool:
    return not isinstance(one, _Noted) and not isinstance(other, _Noted) and same(one, other)


def _has_state(value: Any) -> bool:
    return not isinstance(value, type) and hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def _nested(value: Any) -> int:
    """The number of values in a container, in all depths, counted no further than is of interest."""
    left, count = [value], 0
    while left and count <= NESTED:
        found = left.pop()
        items = list(found.values()) if isinstance(found, dict) else list(found)
        count += len(items)
        left.extend(item for item in items[:NESTED] if isinstance(item, list | tuple | dict | set))
    return count


def _is_replayed(value: Any) -> bool:
    """Whether it is a stream of `datasets`, which is read again from the beginning of an epoch."""
    return type(value).__module__.partition(".")[0] == "datasets"


def _digest(array: Any) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(array.tobytes())
