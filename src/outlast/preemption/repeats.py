"""Tells an error that the next attempt will raise again from one that may have passed by then."""

import re
from collections.abc import Iterator

_MACHINE = re.compile(
    r"cuda|cublas|cudnn|nccl|gloo|rocm|hip error|device|driver|connect|socket|timed? ?out|timeout|address|store|"
    r"memory|network|broken pipe|temporar",
    re.IGNORECASE,
)
"""Words of a RuntimeError that speak of a machine, a network or a peer."""


def will_repeat(error: BaseException) -> bool:
    """Whether an error before an attempt's first step comes from the program, so that another attempt would raise it.

    What the operating system, the network or a device has a part in may have passed; so may what was raised on
    account of it. An import that failed otherwise than by a missing module may be one node's fault.
    """
    return all(_is_the_programs(one) for one in _chain(error))


def _is_the_programs(error: BaseException) -> bool:
    if not isinstance(error, Exception) or isinstance(error, OSError | MemoryError | EOFError):
        return False
    if isinstance(error, ImportError):
        return isinstance(error, ModuleNotFoundError) or "install" in str(error)
    if not isinstance(error, RuntimeError) or isinstance(error, NotImplementedError | RecursionError):
        return True
    return type(error) is RuntimeError and not _MACHINE.search(str(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it was raised on account of."""
    one: BaseException | None = error
    seen: set[int] = set()
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
