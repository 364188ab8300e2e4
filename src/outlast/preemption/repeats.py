"""Tells an error that the next attempt will raise again from one that may have passed by then."""

import re
from collections.abc import Iterator

from outlast.errors import Exit, OutlastError, RunBusyError, SlurmError
from outlast.slurm.environment import in_own_batch_script

_MACHINE = re.compile(
    r"cuda|cublas|cudnn|nccl|gloo|rocm|hip error|device|driver|connect|socket|timed? ?out|timeout|address|store|"
    r"memory|network|broken pipe|temporar",
    re.IGNORECASE,
)
"""Words of a RuntimeError that speak of a machine, a network or a peer."""


def will_repeat(error: BaseException) -> bool:
    """Whether an error before an attempt's first step comes from the program, so that another attempt would raise it.

    What the operating system, the network or a device has a part in may have passed; so may what was raised on
    account of it, a refusal of our own too: a file may be missing on one node alone. An import that failed otherwise
    than by a missing module may be one node's fault. A run that is in use, and a Slurm that does not answer, pass.
    """
    return all(_is_the_programs(one) for one in _chain(error))


def exit_code_of(error: OutlastError) -> Exit:
    """The exit code of a process that ends by `error`.

    In a job, 2 is final: what may have passed by the next start ends with 1.
    """
    return Exit.FAILED if in_own_batch_script() and not will_repeat(error) else error.exit_code


def _is_the_programs(error: BaseException) -> bool:
    if not isinstance(error, Exception) or isinstance(error, OSError | MemoryError | EOFError):
        return False
    if isinstance(error, OutlastError):
        return not isinstance(error, RunBusyError | SlurmError)
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
        hidden = one.__suppress_context__ and not isinstance(one, OutlastError)  # which hides it from users alone
        one = one.__cause__ or (None if hidden else one.__context__)
