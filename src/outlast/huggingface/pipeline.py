"""Keeps a Trainer's place in its data, and the state of objects that its own checkpoint leaves out.

Those are the data pipeline (collator, dataset, sampler), callbacks, what a model holds beside its weights, and what a
user's Trainer class adds. Their state is one of the run's kept objects. What is known not to be saved is said when
training begins, and after the first step, by name, and recorded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import transformers.trainer
from transformers import TrainerCallback

from outlast.errors import ConfigError

from .logged_loss import KEPT as LOSS
from .objects import Objects, State
from .own_state import OwnState
from .reachable import Classes, is_users
from .source import Position, Source
from .training_objects import roots_of

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from outlast.attempt.attempt import RankAttempt

KEPT = "outlast.trainer"
"""The name under which a run keeps this state."""
NOT_WALKED = (
    *("model_wrapped", "optimizer", "lr_scheduler", "args", "accelerator", "state", "control"),
    *("callback_handler", "processing_class", "eval_dataset", "train_dataset"),
)
"""Attributes of a Trainer that a checkpoint holds, or that belong to its own workings."""
NOT_PARTS = (*NOT_WALKED, "model", "data_collator")
"""Attributes of a Trainer that aren't looked into under their own names."""


class Pipeline(TrainerCallback):  # type: ignore[misc]
    """Follows one Trainer's way through its data, by callbacks and by replacing some of its methods.

    Args:
        own: saves the Trainer's attributes that hold plain values; objects in the others are looked into here.

    Raises:
        ConfigError: the Trainer uses something whose state can't be saved.
    """

    def __init__(self, run: "RankAttempt", trainer: "Trainer", own: OwnState) -> None:
        self._run, self._trainer, self._own = run, trainer, own
        self._named: dict[str, str] = {}  # what was said not to be saved
        self._looked_after_step = False
        self._parts = [name for name, value in vars(trainer).items() if name not in NOT_PARTS and is_users(value)]
        self._source: Source | None = None
        self._outer: Any = None
        self._at: Position | None = None
        self._epoch = self._taken = self._steps = 0  # batches taken, and optimizer steps done, in this epoch
        self._open = 0  # batches taken of an optimizer step that isn't done
        self._mark = (0, 0, 0, 0)  # at the last step's end: epoch, batches taken and fetched, steps
        self._objects = Objects(self._roots, self._without)
        self._after_step: State | None = None
        self._kept_after_step: dict[str, Any] = {}
        self._get_loader, trainer.get_train_dataloader = trainer.get_train_dataloader, self._train_dataloader
        self._init_state, trainer._init_training_state = trainer._init_training_state, self._init_training_state
        self._get_batches, trainer.get_batch_samples = trainer.get_batch_samples, self._batch_samples
        self._run_one_epoch, trainer._run_epoch = trainer._run_epoch, self._run_epoch
        trainer.callback_handler.callbacks.insert(0, self)
        self._objects.note()

    # What is kept ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position at the last step's end, and the state of all objects there."""
        epoch, taken, fetched, steps = self._mark
        live = self._after_step if self._open and self._after_step is not None else self._objects.capture()
        if self._source is None:
            return {"live": live}
        position = self._source.position(epoch, taken * self._source.factor, fetched)
        return {"position": asdict(position), "steps": steps, "live": live}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the state of all objects; the position was set by :meth:`resume_at`."""
        self._objects.restore(state["live"])

    def resume_at(self, saved: dict[str, Any] | None, *, same_ranks: bool) -> None:
        """Go on from the position in a saved state.

        Args:
            same_ranks: whether it was saved by as many ranks; if not, the position is that of the same step.
        """
        if saved is None or "position" not in saved:
            return
        at, steps = Position(**saved["position"]), saved["steps"]
        if not same_ranks:
            batches = steps * self._trainer.args.gradient_accumulation_steps
            at = Position(epoch=at.epoch, batches=batches, fetched=batches, start=at.start)
        self._at, self._steps = at, steps

    def go_back(self) -> None:
        """Leave the step that is not done: what the user keeps is set to what it was before it."""
        self._run.kept.go_back(self._kept_after_step)

    def begin(self) -> None:
        """All is loaded, and an evaluation that was due is made: training goes on with the state of now."""
        if self._at is not None and self._source is not None and self._at.batches:
            self._source.resume, self._source.live = self._at, self._objects.capture()
        self._at = None
        self._say_what_is_lost()

    # Callbacks ------------------------------------------------------------------------------------------------------

    def on_epoch_begin(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        self._note_for_mid_step()

    def on_step_begin(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        if self._source is not None and self._source.differs:
            self._source.differs = False
            step = state.global_step
            self._run.record("batch_differs", step=step)
            self._run.say(
                f"WARNING: the batch after step {step} is another one than before the interruption: the data, or some "
                "state of the collator, the dataset or the sampler, was not restored; run.keep() adds state"
            )

    def on_step_end(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        self._steps, self._open = self._steps + 1, 0
        self._set_mark()
        if not self._looked_after_step:  # some things are made by the first step
            self._looked_after_step = True
            self._say_what_is_lost()

    # Replacements of the Trainer's methods --------------------------------------------------------------------------

    def _train_dataloader(self) -> Any:
        args = self._trainer.args
        outer = self._get_loader()
        inner = getattr(outer, "base_dataloader", outer)
        if type(inner).__module__.startswith("torchdata"):
            valid = "valid: a torch.utils.data.DataLoader; outlast saves its position"
            raise ConfigError("get_train_dataloader", type(inner).__name__, valid)
        seed = args.seed if args.data_seed is None else args.data_seed
        self._source = source = Source(inner, self._objects, (seed, args.process_index))
        if inner is outer:
            outer = source
        else:  # accelerate's: it iterates over the one that it holds
            set_epoch = outer.set_epoch

            def set_both(epoch: int) -> None:
                source.epoch = epoch
                set_epoch(epoch)

            outer.base_dataloader, outer.set_epoch = source, set_both
            if _is_dispatcher(outer) and not outer.split_batches:  # one rank reads for all
                source.factor = args.world_size
        self._outer = outer
        self._objects.note()
        return outer

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """The epoch, and the batches of it that have been taken: as saved, unless that epoch is over."""
        epoch, batches = self._init_state(*args, **kwargs)
        factor = self._source.factor if self._source is not None else 1
        at = self._at
        if at is not None and batches and at.epoch == epoch and at.batches:
            batches = at.batches // factor
        elif batches:  # a checkpoint without a position of its own
            at = Position(epoch=epoch, batches=batches * factor, fetched=batches * factor, start={})
            self._steps = batches // self._trainer.args.gradient_accumulation_steps
        else:
            at, self._steps = None, 0
        self._at, self._epoch, self._taken = at, epoch, batches
        self._mark = (epoch, batches, at.fetched if at is not None else 0, self._steps)
        return epoch, batches

    def _run_epoch(self, **kwargs: Any) -> None:
        if kwargs["epoch"] != self._epoch:
            self._epoch, self._taken, self._steps = kwargs["epoch"], 0, 0
            if self._source is not None:
                self._source.fetched = 0
            if not self._open:
                self._set_mark()
        self._run_one_epoch(**kwargs)

    def _batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        if self._taken:
            self._note_for_mid_step()
        batches, items = self._get_batches(*args, **kwargs)
        self._taken, self._open = self._taken + len(batches), self._open + len(batches)
        return batches, items

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Have the Trainer leave the skipping of batches to :class:`Source`, which knows the state to go on with."""
        original = transformers.trainer.skip_first_batches

        def skip(loader: Any, count: int = 0) -> Any:
            if loader is not self._outer or self._source is None:
                return original(loader, count)
            if _is_dispatcher(loader):  # it needs the first batch to fill up the last one
                loader.skip_batches = count
                self._source.skips = lambda: setattr(loader, "skip_batches", 0)
            return loader

        transformers.trainer.skip_first_batches = skip
        try:
            yield
        finally:
            transformers.trainer.skip_first_batches = original

    # Inside ---------------------------------------------------------------------------------------------------------

    def _say_what_is_lost(self) -> None:
        """Name what is known not to be saved, each once."""
        self._objects.unsaved.clear()  # named before by another way to them
        self._objects.capture()
        own = {f"trainer.{name}": f"it holds {what}, which can't be saved" for name, what in self._own.lost().items()}
        found = {path: why for path, why in (self._objects.unsaved | own).items() if path not in self._named}
        self._named |= found
        if found:
            self._run.record("not_saved", objects=found)
        for path, why in found.items():
            self._run.say(f"WARNING: {path}: {why}. After a resume the weights may differ; run.keep() adds state")

    def _roots(self) -> dict[str, Any]:
        roots = dict(self._source.roots) if self._source is not None else {}
        for callback in self._trainer.callback_handler.callbacks:
            kind = type(callback)
            if kind.__module__.partition(".")[0] not in ("transformers", "outlast"):
                same = sum(name.partition("#")[0] == f"callbacks.{kind.__name__}" for name in roots)
                roots[f"callbacks.{kind.__name__}" + (f"#{same + 1}" if same else "")] = callback
        roots |= roots_of(self._trainer) | {"args": self._trainer.args}
        roots |= {"model": self._trainer.model, "trainer": Classes(type(self._trainer))}
        attributes = vars(self._trainer)
        return roots | {f"trainer.{name}": attributes[name] for name in self._parts if name in attributes}

    def _without(self) -> list[Any]:
        """What is saved elsewhere, or belongs to the Trainer's own workings."""
        trainer = self._trainer
        found = [*(getattr(trainer, name, None) for name in NOT_WALKED), roots_of(trainer).get("optimizer")]
        modules = list(trainer.model.modules()) if trainer.model is not None else []
        return [self, trainer, self._run, self._outer, *modules, *(thing for thing in found if thing is not None)]

    def _note_for_mid_step(self) -> None:
        """Capture the state at a step's end, to which leaving in the middle of the next goes back."""
        if self._trainer.args.gradient_accumulation_steps > 1 and not self._open:
            live = self._source.live if self._source is not None else None
            self._after_step = live if live is not None else self._objects.capture()
            self._kept_after_step = self._run.kept.snapshot(without=(KEPT, LOSS))

    def _set_mark(self) -> None:
        fetched = self._source.fetched if self._source is not None else 0
        self._mark = (self._epoch, self._taken, fetched, self._steps)
        if self._source is not None:
            self._source.forget(self._epoch, self._taken * self._source.factor)


def _is_dispatcher(loader: Any) -> bool:
    return hasattr(loader, "slice_fn")
