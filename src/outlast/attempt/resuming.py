"""What this attempt resumes from: the newest checkpoint that verifies, if it was made by the same run."""

from collections.abc import Callable, Sequence
from typing import Any

from outlast.checkpoint.compatibility import Comparison, check, compare, origin_of
from outlast.checkpoint.manifest import Manifest, Sealed, TransientError, versions
from outlast.checkpoint.store import CheckpointStore
from outlast.errors import CheckpointError, ConfigError, ResumeRefusedError
from outlast.ranks.collectives import Collectives
from outlast.ranks.layout import Layout, layout
from outlast.rundir.directory import RunDirectory

from .loading import guard_loads

DESCRIBED = frozenset(
    {"dataset", "seed", "global_batch", "micro_batch", "trainable", "config", "source", "length", "settings"}
)
"""What a run may say of itself."""


class Resuming:
    """Finds and compares; all ranks call each method together.

    Args:
        allow: what may differ from the run that made the checkpoint (`checkpoint.allow`).
        say: prints a line in the log (rank 0 only).
    """

    def __init__(
        self,
        run: RunDirectory,
        collectives: Collectives,
        store: CheckpointStore,
        allow: Sequence[str],
        say: Callable[[str], None],
    ) -> None:
        self._run, self._collectives, self._store, self._allow, self._say = run, collectives, store, allow, say
        self._accumulation = 0
        self._made: dict[str, Any] = {}
        self._layout: Layout | None = None
        self.origin: dict[str, Any] = {"world_size": collectives.world_size}
        """What this run is, as far as a checkpoint depends on it."""
        self.differences: dict[str, str] = {}
        """What of the origin has changed since that checkpoint, in words, by name."""

    @property
    def layout(self) -> Layout:
        """How the rows of a step are spread over the ranks.

        Raises:
            RuntimeError: :meth:`describe` was not told the accumulation; the loop sees to it itself.
        """
        if self._layout is None:
            raise RuntimeError("run.layout: say run.describe(micro_batch=..., accumulation=...) first")
        return self._layout

    @property
    def moved(self) -> bool:
        """Whether rows are spread in another way than in the run's first attempt; false if the loop sees to that."""
        return self._layout is not None and self._layout.moved

    def describe(self, accumulation: int | None = None, **origin: Any) -> None:
        """Say what this run is; see :meth:`outlast.Run.describe`."""
        for name in origin.keys() - DESCRIBED:
            raise ConfigError("run.describe", name, DESCRIBED | {"accumulation"})
        self.origin |= {name: value for name, value in origin.items() if value is not None}
        if accumulation is not None:
            self._accumulation = accumulation
            self._lay_out({"world_size": self._collectives.world_size})

    def accepts(self, name: str, difference: str) -> bool:
        """Whether `checkpoint.allow` has `name`; then `difference` is noted in the log and the ledger."""
        if name not in self._allow:
            return False
        self.differences[name] = difference
        self._say(f"WARNING: going on although {difference} (accepted by checkpoint.allow)")
        return True

    def find(self) -> Sealed | None:
        """The newest checkpoint that verifies, or None if there is none.

        Raises:
            ResumeRefusedError: it was made by another run than this one; nothing has been changed.
            CheckpointError: none verifies, or a rank does not see it; another attempt would fare no better.
            OSError: the file system hesitates: worth another attempt.
        """
        guard_loads(self._run)
        problems = (ResumeRefusedError, TransientError, CheckpointError, OSError)
        try:
            step, self._made = self._collectives.on_rank_0(self._newest, *problems)
        except TransientError as error:
            raise OSError(str(error)) from None
        self._lay_out(self._made)
        if step is None:
            return None
        found = next((c for c in self._store.sealed() if c.step == step), None)
        if not self._collectives.all_ok(found is not None):
            where = self._store.path(step).parent.parent
            raise CheckpointError(f"checkpoint-{step} is not visible to every rank: is {where} shared?")
        return found

    def _newest(self) -> tuple[int | None, dict[str, Any]]:
        """Step of the newest checkpoint, and what made it; compared with what this run is."""
        newest = self._store.newest_verified(restart="restart" in self._allow)
        if newest is None:  # the run has the global batch of its first attempt, though nothing was saved
            self._made = origin_of(self._run) or {"world_size": self._collectives.world_size}
            self._lay_out(self._made)
            if self._layout is not None and self._layout.accumulation != self._accumulation:
                self._say(f"it began with {self._made['world_size']} ranks: {self._adapted()}")
            return None, self._made
        compared = self.compared(newest.manifest)
        check(newest.path.name, compared)
        self.differences = compared.noted
        for difference in compared.noted.values():
            self._say(f"WARNING: resuming although {difference}")
        return newest.step, self._made

    def compared(self, manifest: Manifest) -> Comparison:
        """How this run differs from the one that `manifest` says made a checkpoint."""
        self._made = {"world_size": manifest.world_size, **manifest.origin}
        self._lay_out(self._made)
        return compare(
            self._made,
            self.origin,
            versions_made=manifest.versions,
            versions_now=versions(),
            allow=self._allow,
            adapted=self._adapted(),
        )

    def _lay_out(self, made: dict[str, Any]) -> None:
        if not self._accumulation:
            return
        ranks, micro_batch = self._collectives.world_size, int(self.origin["micro_batch"])
        self._layout = layout(made, ranks=ranks, micro_batch=micro_batch, accumulation=self._accumulation)
        self.origin |= {"global_batch": self._layout.global_batch, "first": list(self._layout.first)}

    def _adapted(self) -> str | None:
        """What becomes of the gradient accumulation, in words."""
        if self._layout is None:
            return None
        now, asked = self._layout.accumulation, self._accumulation
        change = f"is {now}, configured {asked} for {self._layout.first[0]} ranks" if now != asked else f"is {now}"
        return (
            f"gradient accumulation {change}; each step has the same {self._layout.global_batch} rows as before; "
            "random numbers (dropout) are others and sums are rounded in another order"
        )
