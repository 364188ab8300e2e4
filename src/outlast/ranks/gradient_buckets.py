"""Gives DistributedDataParallel one layout of gradient buckets for all steps of all attempts.

By itself DDP reduces the gradients of its first step in one bucket, and builds others after it, in the order in which
the gradients came. With three ranks or more, the order in which gloo adds up a gradient depends on its place in its
bucket. So an attempt's first step would be rounded in another way than the same step of a run left alone.

Here the buckets are built once, when the model is wrapped, as DDP would build them if gradients came in the reverse
order of the parameters: what it takes for granted itself with `find_unused_parameters=True`, where nothing is rebuilt.
Reducing overlaps with the backward pass as ever, from the first step on.
"""

import functools
from typing import Any


def keep_one_layout() -> None:
    """Have every `DistributedDataParallel` that is made from here on keep its first layout. Imports torch."""
    from torch.nn.parallel import DistributedDataParallel as Wrapper

    if hasattr(Wrapper.__init__, "__wrapped__"):
        return
    Wrapper.__init__ = _then_rebuild(Wrapper.__init__)  # type: ignore[method-assign]
    Wrapper._build_params_for_reducer = _reversed(Wrapper._build_params_for_reducer)  # type: ignore[method-assign]


def _then_rebuild(init: Any) -> Any:
    @functools.wraps(init)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        reducer = getattr(self, "reducer", None)  # none if every gradient is reduced by the caller's own hook
        if reducer is not None and not self._use_python_reducer:
            reducer._push_all_rebuilt_params()  # in the order of their numbers; nothing where DDP never rebuilds
            self._has_rebuilt_buckets = reducer._rebuild_buckets()

    return made


def _reversed(build: Any) -> Any:
    """Number the parameters in reverse, so that the buckets fill up in the order in which gradients come."""

    @functools.wraps(build)
    def built(self: Any) -> tuple[list[Any], list[bool]]:
        parameters, sparse = build(self)
        return parameters[::-1], sparse[::-1]

    return built
