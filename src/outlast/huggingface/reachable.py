"""Walks the objects that can be reached from a few roots: attributes, closures, globals that functions use, containers.

What can't hold state that matters is left out: tokenizers, settings, and data (large containers).
"""

import inspect
import io
import itertools
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from outlast.attempt.values import PLAIN, is_generator

from .training_objects import hooks_of, is_settings, of_optimizer, settings_of

_CLOSED = (
    *("tokenizers", "pyarrow", "pandas", "PIL", "logging", "threading", "multiprocessing", "concurrent", "asyncio"),
    *("pathlib", "typing", "outlast", "safetensors", "deepspeed", "tqdm", "wandb", "tensorboard"),
    *("mlflow", "weakref", "queue", "_thread", "vllm"),
)
"""Packages whose instances aren't looked into."""
CLOSED = frozenset(_CLOSED)
LIBRARIES = CLOSED | {
    *(
        "accelerate",
        "torch",
        "transformers",
        "trl",
        "peft",
        "datasets",
        "numpy",
        "torchvision",
        "sklearn",
        "scipy",
        "evaluate",
    ),
    *("abc", "collections", "functools", "contextlib", "builtins", "dataclasses", "warnings", "io", "os", "sys", "re"),
    *("json", "random", "enum"),
}
"""Packages whose functions and classes hold no state of the user's; their instances may."""
DATASET_INTERNALS = ("_state_dict", "_starting_state_dict", "_prepared_ex_iterable")
ITERATORS: tuple[type, ...] = (
    *(types.GeneratorType, enumerate, zip, map, filter, io.IOBase, itertools.count, itertools.cycle, itertools.chain),
    *(itertools.islice, itertools.repeat, type(iter([])), type(iter(())), type(iter({})), type(iter(range(0)))),
)
"""Types whose position can be neither read nor set."""
PROCESS = {"_last_loaded_step"}
"""Attributes that say what this process has done, not the run: which weights it has handed to a generating server."""
OBJECTS = 5_000
"""Objects looked at from one root, at most."""
DATA = 1_000
"""Items from which a container is data, and isn't looked into."""


@dataclass(frozen=True)
class Holder:
    """A place whose named values can be read and replaced: an object, a closure, a container."""

    path: str
    read: Callable[[], dict[str, Any]]
    write: Callable[[str, Any], None]
    join: str = "."
    grows: bool = False
    """Whether a name that isn't there can be written too."""
    remove: Callable[[str], None] | None = None
    """Takes a name away, where one that was not there before may be."""
    known: set[str] = field(default_factory=set)
    """Names of values that need not be walked: they are plain to their depths. Whoever reads them adds them."""

    def of(self, name: str) -> str:
        """The path of one of its values."""
        return f"{self.path}[{name}]" if self.join == "[" else f"{self.path}.{name}" if self.path else name


def holders(path: str, value: Any, seen: dict[int, Any]) -> Iterator[Holder]:
    """Walk from `value`: each place in it that holds values, before what is in these.

    Args:
        seen: what has been walked already, or shall not be, by `id`; added to, so that no `id` is used again.

    Raises:
        OverflowError: there are too many objects.
    """
    left = [(path, value)]
    count = 0
    while left:
        where, found = left.pop()
        if id(found) in seen or isinstance(found, PLAIN):
            continue
        seen[id(found)] = found
        count += 1
        if count > OBJECTS:
            raise OverflowError(path)
        for holder in _places(where, found):
            yield holder
            # read only now: who walks may have replaced a value
            items = reversed(holder.read().items())
            left.extend((holder.of(name), item) for name, item in items if name not in holder.known)


def _places(path: str, value: Any) -> Iterator[Holder]:
    """The places that `value` itself has."""
    import torch

    package = type(value).__module__.partition(".")[0]
    if is_generator(value) or isinstance(value, (torch.Tensor, type, types.ModuleType, *ITERATORS)):
        return
    if isinstance(value, types.MethodType):
        yield Holder(path, lambda: {"self": value.__self__, "function": value.__func__}, _fixed)
    elif isinstance(value, partial):
        yield Holder(path, lambda: {"func": value.func, "args": value.args, "keywords": value.keywords}, _fixed)
    elif isinstance(value, types.FunctionType):
        yield from _of_function(path, value)
    elif isinstance(value, list | tuple | deque | dict | set | frozenset) and len(value) > DATA:
        return
    elif isinstance(value, list | tuple | deque):
        keep = value if isinstance(value, list) else None
        yield Holder(path, lambda: {str(i): item for i, item in enumerate(value)}, _item(keep), "[")
    elif isinstance(value, dict):
        yield Holder(path, lambda: {repr(key): item for key, item in value.items()}, _key(value), "[")
    elif isinstance(value, Classes):
        yield from _of_classes(value.kind)
    elif is_settings(value):
        yield Holder(path, lambda: settings_of(value), lambda name, item: setattr(value, name, item), grows=True)
    elif package in CLOSED or _is_closed(value):
        return
    elif isinstance(value, torch.nn.Module):
        yield from _of_modules(path, value)
    elif isinstance(value, torch.optim.Optimizer):
        yield Holder(path, lambda: of_optimizer(value), lambda name, item: setattr(value, name, item), grows=True)
        yield from _of_classes(type(value))
    else:
        yield from _of_object(path, value)


def _is_closed(value: Any) -> bool:
    """Whether it is a library's object of settings or of text processing, or seeds itself for each epoch."""
    if type(value).__module__.startswith("accelerate."):
        samplers = type(value).__module__ == "accelerate.data_loader"
        return not samplers or type(value).__name__ == "SeedableRandomSampler"
    import transformers

    return isinstance(value, transformers.PreTrainedTokenizerBase | transformers.ProcessorMixin)


def _of_object(path: str, value: Any) -> Iterator[Holder]:
    package = type(value).__module__.partition(".")[0]
    if type(value).__module__.startswith("datasets.arrow_dataset"):
        yield Holder(path, lambda: dict(value._format_kwargs or {}), _fixed)
        return

    def read() -> dict[str, Any]:
        attributes = dict(getattr(value, "__dict__", {}))
        for cls in type(value).__mro__:
            slots = vars(cls).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    attributes[name] = getattr(value, name)
        left_out = {*PROCESS, *(DATASET_INTERNALS if package == "datasets" else ())}
        return {name: item for name, item in attributes.items() if name not in left_out}

    def write(name: str, item: Any) -> None:
        object.__setattr__(value, name, item)

    def remove(name: str) -> None:
        object.__delattr__(value, name)

    yield Holder(path, read, write, grows=True, remove=remove)
    yield from _of_classes(type(value))


def is_users(value: Any, depth: int = 3) -> bool:
    """Whether it is an object, a function or an iterator of the user's, or a container with one in it.

    A model is not.
    """
    import torch

    if isinstance(value, partial):
        return is_users(value.func)
    if isinstance(value, types.MethodType):
        return is_users(value.__self__)
    if isinstance(value, list | tuple | dict):
        items = value.values() if isinstance(value, dict) else value
        return depth > 0 and len(value) <= DATA and any(is_users(item, depth - 1) for item in items)
    if isinstance(value, (type, types.ModuleType, torch.nn.Module)):
        return False
    kind = value if isinstance(value, types.FunctionType) else type(value)
    return isinstance(value, ITERATORS) or (kind.__module__ or "").partition(".")[0] not in LIBRARIES


@dataclass(frozen=True)
class Classes:
    """Stands for a class: what it and its base classes hold, those of the user's, with what their functions use."""

    kind: type


def _of_classes(kind: type) -> Iterator[Holder]:
    for cls in kind.__mro__:
        if cls.__module__.partition(".")[0] not in LIBRARIES:
            yield from _of_class(f"{cls.__module__}.{cls.__qualname__}", cls)


def _of_class(path: str, cls: type) -> Iterator[Holder]:
    """A class of the user's: its own values and its functions."""

    def read() -> dict[str, Any]:
        kinds = (property, classmethod, staticmethod, types.MemberDescriptorType, types.GetSetDescriptorType)
        return {
            name: item
            for name, item in vars(cls).items()
            if (isinstance(item, types.FunctionType) or not name.startswith("__"))
            and name != "_abc_impl"
            and not isinstance(item, kinds)
        }

    yield Holder(path, read, lambda name, item: setattr(cls, name, item), grows=True)


def _of_function(path: str, function: types.FunctionType) -> Iterator[Holder]:
    """A function of the user's: what it closes over, and the globals that it names."""
    if function.__module__ is None or function.__module__.partition(".")[0] in LIBRARIES:
        return
    function = inspect.unwrap(function)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def closed_over() -> dict[str, Any]:
        return {name: cell.cell_contents for name, cell in cells.items() if not _is_empty(cell)}

    def fill(name: str, item: Any) -> None:
        cells[name].cell_contents = item

    yield Holder(path, closed_over, fill)
    # in an order that is the same in each process: a thing with two names goes by the first
    names = list(dict.fromkeys(_names(function.__code__)))
    space = function.__globals__

    # the path says whose globals they are, so that a counter has one name, whoever uses it
    def used() -> dict[str, Any]:
        return {name: space[name] for name in names if name in space and not name.startswith("__")}

    yield Holder(function.__module__, used, lambda name, item: space.__setitem__(name, item), grows=True)
    if function.__defaults__:
        yield Holder(path, lambda: {f"default{i}": d for i, d in enumerate(function.__defaults__ or ())}, _fixed)


def _of_modules(path: str, model: Any) -> Iterator[Holder]:
    """A model: what its modules hold beside parameters and saved buffers, and which parameters are trained."""
    import torch

    usual = set(vars(torch.nn.Module()))
    for name, module in model.named_modules():
        library = type(module).__module__.partition(".")[0] in LIBRARIES

        def read(module: Any = module, library: bool = library) -> dict[str, Any]:
            unsaved = {key: item for key, item in module._buffers.items() if not is_saved(model, module, key)}
            own = {key: item for key, item in vars(module).items() if key not in usual and not _is_code(item)}
            if library:  # its settings are not looked into
                own = {key: item for key, item in own.items() if _is_simple(item)}
            return unsaved | own

        def write(key: str, item: Any, module: Any = module) -> None:
            (module._buffers if key in module._buffers else vars(module))[key] = item

        place = f"{path}.{name}" if name else path
        yield Holder(place, read, write, grows=True)
        if own := dict(module.named_parameters(recurse=False)):
            yield Holder(f"{place}.requires_grad", lambda own=own: _trainable(own), _train(own))  # type: ignore[misc]
        if hooks := hooks_of(module):
            yield Holder(f"{place}.hooks", lambda hooks=hooks: hooks, _fixed)  # type: ignore[misc]
        if not library:
            yield from _of_classes(type(module))


def _trainable(parameters: dict[str, Any]) -> dict[str, bool]:
    """Which parameters are trained: callbacks freeze layers, and unfreeze one after the other."""
    return {name: parameter.requires_grad for name, parameter in parameters.items()}


def _train(parameters: dict[str, Any]) -> Callable[[str, Any], None]:
    return lambda name, trained: parameters[name].requires_grad_(trained)


def is_saved(model: Any, module: Any, buffer: str) -> bool:
    """Whether a checkpoint's weights hold a buffer of a module of the model; under adapters they hold none."""
    from peft import PeftModel

    return not isinstance(model, PeftModel) and buffer not in module._non_persistent_buffers_set


def _is_simple(value: Any) -> bool:
    return isinstance(value, PLAIN) or is_generator(value) or is_settings(value)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_code(value: Any) -> bool:
    return isinstance(value, type | types.ModuleType | types.FunctionType | types.BuiltinFunctionType)


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _fixed(name: str, item: Any) -> None:
    """Replace nothing: what is there can only be changed in place."""


def _item(values: list[Any] | None) -> Callable[[str, Any], None]:
    def write(name: str, item: Any) -> None:
        if values is not None and int(name) < len(values):
            values[int(name)] = item

    return write


def _key(values: dict[Any, Any]) -> Callable[[str, Any], None]:
    def write(name: str, item: Any) -> None:
        for key in values:
            if repr(key) == name:
                values[key] = item
                return

    return write
