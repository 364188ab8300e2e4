"""Adapts Hugging Face's Trainer and its subclasses (SFTTrainer, DPOTrainer, ...) to a run that may be preempted.

The Trainer keeps its loop, its optimizer, its data order and its file formats. The adapter decides when it saves,
where the files go (the store's staging area instead of `checkpoint-N` itself), what is deleted, and when it stops:

- A stop is agreed at a step's end and inside evaluation.
- An evaluation that is due or is cut short is not run in the grace period. The checkpoint says `pending_evaluation`,
  and the random state in it is from before the evaluation; the next attempt evaluates first, then goes on
  (`evaluation.py`, `decisions.py`). So the metrics, the best checkpoint and the random numbers are those of a run never
  interrupted.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from outlast.attempt.loading import refuse_unreadable
from outlast.checkpoint.manifest import Sealed, read_manifest
from outlast.errors import CheckpointError
from outlast.processes import shield_worker
from outlast.storage.budget import gb

from . import random_state
from .accumulation import Accumulation
from .decisions import Decisions
from .deepspeed import load_weights, loading_shards, saving_shards
from .described import describe, warn_of_others
from .evaluation import Evaluation
from .finite_loss import KEPT as GUARD
from .finite_loss import FiniteLoss
from .frozen_weights import frozen_weights, shortened
from .given_back import given_back
from .inexact import refuse_adapters, refuse_inexact
from .logged_loss import KEPT as LOSS
from .logged_loss import LoggedLoss
from .names import own_names
from .on_save import call_on_save, leave_out_on_save
from .own_state import OwnState
from .pipeline import KEPT, Pipeline
from .plain_modules import save_shared_weights
from .resharding import adapt, seed_rank
from .schedule_free import put_into_use
from .tracking.trackers import tracked
from .training_objects import allow_projectors
from .universal_checkpoint import Conversion, needs_conversion
from .verification import Verification

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from outlast.attempt.attempt import RankAttempt


LOADED = ("optimizer.pt", "scheduler.pt")
"""Files of a checkpoint that a Trainer loads as they are."""
FROZEN_SHARE = 0.1
"""Share of a checkpoint from which frozen weights in it are worth a warning."""


class _Shielded:
    """A DataLoader's `worker_init_fn`, preceded by :func:`shield_worker`. A class, so that it can be pickled."""

    def __init__(self, inner: Callable[[int], None] | None) -> None:
        self.inner = inner

    def __call__(self, worker_id: int) -> None:
        shield_worker(worker_id)
        if self.inner is not None:
            self.inner(worker_id)


def train(run: "RankAttempt", trainer: "Trainer") -> Any:
    """Train `trainer` from the newest checkpoint of `run` to the end, and publish the model as `final/`.

    Returns:
        The Trainer's `TrainOutput`. When the job is preempted this does not return.
    """
    with given_back(trainer):
        adapter = TrainerAdapter(run, trainer)
        checkpoint = adapter.resume_from()
        loading = loading_shards() if trainer.is_deepspeed_enabled else nullcontext()
        with loading, adapter.pipeline.skipping(), tracked(run, trainer):
            output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        state = trainer.state
        if trainer.args.load_best_model_at_end and state.best_global_step and not state.best_model_checkpoint:
            best = f"the best, step {state.best_global_step}"
            run.say(f"WARNING: {best}, could not be saved: final/ will be the last model")
        run.record("trained", metrics=output.metrics)
        run.finish(state.global_step, adapter.save_model, weights_step=adapter.loaded_best)
    return output


class TrainerAdapter(TrainerCallback):  # type: ignore[misc]
    """Steers one Trainer for a run, by callbacks and by replacing some of its methods."""

    def __init__(self, run: "RankAttempt", trainer: "Trainer") -> None:
        self.run, self.trainer = run, trainer
        self.checkpoint: Sealed | None = None
        self.conversion: Conversion | None = None
        self.save_at_epoch_end = False
        self.loaded_best: int | None = None
        self._looked_for_frozen = False
        self._own, self._loss, self._finite = OwnState(trainer), LoggedLoss(trainer), FiniteLoss(run, trainer)
        self._accumulation = Accumulation(run, trainer, self._own, self._save_step_before)
        self._evaluation = Evaluation(run, trainer, lambda: self.save(trainer.model_wrapped, None))
        self._decisions = Decisions(run, trainer, self._evaluation, self.determine_best)

        args = trainer.args
        refuse_inexact(args)
        refuse_adapters(trainer.model)
        allow_projectors(str(getattr(args.optim, "value", args.optim)))
        self._output, args.output_dir = Path(args.output_dir), str(run.directory.checkpoints)
        run.store.room.retention.limit, args.save_total_limit = args.save_total_limit, None
        self._verification = Verification(run, trainer)
        self._save_checkpoint = trainer._save_checkpoint
        self._load_rng_state = trainer._load_rng_state
        self._determine_best = trainer._determine_best_metric
        trainer._save_checkpoint = self.save
        leave_out_on_save(trainer)
        save_shared_weights(trainer)
        trainer._load_rng_state = self.load_rng_state
        trainer._determine_best_metric = self.determine_best
        self._load_best, trainer._load_best_model = trainer._load_best_model, self.load_best
        if not run.loop_saves:
            args.save_strategy = SaveStrategy.NO
        for name in ("get_train_dataloader", "get_eval_dataloader"):
            setattr(trainer, name, _shield_loader(getattr(trainer, name)))
        for callback in (
            self._finite,  # before a step's end is decided on
            self,
            self._loss,
            self._accumulation,
            self._evaluation,
            self._decisions,
        ):
            trainer.add_callback(callback)

    def resume_from(self) -> Path | None:
        args, trainer = self.trainer.args, self.trainer
        describe(self.run, trainer)
        self.checkpoint = self.run.resume_point()
        adapt(trainer, self.run.layout)
        self.pipeline = Pipeline(self.run, trainer, self._own)
        self.run.keep(KEPT, self.pipeline)
        self.run.keep(LOSS, self._loss)
        if self.run.guarding.spike is not None:
            self.run.keep(GUARD, self._finite)
        if self.checkpoint is None:
            warn_of_others(self.run, self._output)
            return None
        same_ranks = self.checkpoint.manifest.world_size == args.world_size
        self.pipeline.resume_at(self.run.kept.saved(KEPT), same_ranks=same_ranks)
        if needs_conversion(self.checkpoint, trainer):
            self.conversion = Conversion(self.run, self.checkpoint, trainer)
            self.conversion.make()
        return self.conversion.path if self.conversion else self.checkpoint.path

    # Callbacks --------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        self.run.progress.now.total_steps = state.max_steps
        self._point_at_best(state)
        self._own.begin()
        self._verification.begin(self.checkpoint)
        self.run.begin(state.global_step)
        if self.conversion is not None:
            self.conversion.drop()
        if self.checkpoint is not None:
            self._verification.buffers(self.checkpoint.path)
            self._own.load(self.checkpoint.path, self.run.rank, self.checkpoint.manifest.world_size)
            self._decisions.complete(str(self.checkpoint.path), self.checkpoint.manifest.pending_evaluation)
            self._point_at_best(state)
        self.pipeline.begin()

    def on_step_end(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        step = state.global_step
        self.run.progress.update(step=step, epoch=state.epoch) if self.run.rank == 0 else None
        epoch_ends = float(state.epoch).is_integer() or control.should_training_stop or control.should_epoch_stop
        action = self.run.steps.done(step)
        # An evaluation may follow at the end of the epoch: the checkpoint of this step holds its result too.
        due = control.should_save or action == "save"
        self.save_at_epoch_end, control.should_save = due and epoch_ends, due and not epoch_ends
        if action == "stop":  # what is still to be done at this step, the next attempt does
            self._evaluation.pending = control.should_evaluate
            control.should_evaluate = False
            control.should_save = True

    def on_epoch_end(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        if self.run.stopping:
            self._evaluation.pending |= control.should_evaluate
            control.should_evaluate = False
            control.should_save = True
        elif self.save_at_epoch_end or control.should_training_stop:  # the last step has a checkpoint too
            control.should_save, self.save_at_epoch_end = True, False

    def on_log(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs and self.run.rank == 0:
            self.run.progress.update(loss=logs["loss"])

    # Replacements of the Trainer's methods ----------------------------------------------------------------------

    def save(self, model: Any, trial: Any) -> None:
        """Replace `Trainer._save_checkpoint`: the same files, through the store; leave if the run is stopping."""
        state = self.trainer.state
        self._verification.refuse_unfrozen()
        sealed = self.run.checkpoint(
            state.global_step,
            lambda staged: self._write(staged, model, trial),
            pending_evaluation=self._evaluation.pending and not self._evaluation.making_up,
            best_step=state.best_global_step,
        )
        self._point_at_best(state)
        if self.run.stopping:
            self.run.leave(state.global_step)
        if sealed is not None and self.run.rank == 0:
            self._look_for_frozen_weights(sealed)

    def load_rng_state(self, checkpoint: str | None) -> None:
        """Replace `Trainer._load_rng_state`: an evaluation that was made up for has drawn random numbers too."""
        if self.checkpoint is None or not seed_rank(self.trainer, self.checkpoint):
            self._load_rng_state(checkpoint)
            if self.checkpoint is not None:
                self._verification.random(self.checkpoint.path)
        if self._decisions.random_state is not None:
            random_state.restore(self._decisions.random_state)
        self._accumulation.keep()

    def determine_best(self, metrics: dict[str, float], trial: Any) -> bool:
        """Replace `Trainer._determine_best_metric`: a new best is saved, whatever the interval between saves."""
        state, new = self.trainer.state, bool(self._determine_best(metrics, trial))
        if new and self.trainer.args.load_best_model_at_end:
            state.best_global_step = state.global_step
            self.trainer.control.should_save = True
        return new

    def load_best(self) -> None:
        """Replace `Trainer._load_best_model`: it is verified; DeepSpeed needs shards made by this number of ranks."""
        best = Path(self.trainer.state.best_model_checkpoint or "")
        same_ranks = read_manifest(best).world_size == self.trainer.args.world_size
        shards = same_ranks and any(best.glob("global_step*"))
        if shards or not self.trainer.is_deepspeed_enabled:
            self._load_best()
        else:
            load_weights(self.trainer, best)
        self._verification.best(best, shards=shards)
        self.loaded_best = self.trainer.state.best_global_step

    # Inside -----------------------------------------------------------------------------------------------------

    def _save_step_before(self) -> None:
        """Save the last step's end, in the middle of the next."""
        self.pipeline.go_back()
        self._loss.go_back()
        self.save(self.trainer.model_wrapped, None)

    def _point_at_best(self, state: "TrainerState") -> None:
        """Set the path of the best checkpoint: the one in a saved state may be from before the run was moved."""
        if state.best_global_step:
            path = self.run.store.path(state.best_global_step)
            state.best_model_checkpoint = str(path) if path.is_dir() else None
            if path.is_dir():  # if it could not be saved, the previous best is still kept
                self.run.store.room.retention.best_step = state.best_global_step

    def _write(self, staged: Path, model: Any, trial: Any) -> None:
        trainer, state = self.trainer, self.trainer.state
        self._finite.read(state.global_step)
        holding = saving_shards(trainer, staged) if trainer.is_deepspeed_enabled else nullcontext()
        with self._quiet(staged.parent), self._verification.saving(), holding:
            self._save_checkpoint(model, trial)
        call_on_save(trainer, staged)
        self._verification.write(staged)
        # The Trainer took the staging area for its output directory when it noted where the best checkpoint is.
        if state.best_global_step:
            state.best_model_checkpoint = str(self.run.store.path(state.best_global_step))
        if trainer.args.should_save:
            self._decisions.refresh()
            state.save_to_json(str(staged / "trainer_state.json"))
        self._own.write(staged, self.run.rank)
        self._check_whole(staged)
        for name in LOADED if trainer.args.should_save else ():
            if (staged / name).exists():
                refuse_unreadable(staged / name)

    def _look_for_frozen_weights(self, sealed: Sealed) -> None:
        """Say once if each checkpoint carries weights that training never changes."""
        if not self._looked_for_frozen:
            self._looked_for_frozen = True
            found = frozen_weights(sealed.path, self.trainer.model)
            if sum(found.values()) > sealed.bytes * FROZEN_SHARE:
                self.run.record("frozen_weights", bytes=sum(found.values()), tensors=shortened(found))
                self.run.say(
                    f"WARNING: {gb(sum(found.values()))} of each checkpoint's {gb(sealed.bytes)} are frozen weights "
                    f"({shortened(found)}): wrap the model with PEFT's get_peft_model, so that only adapters are saved"
                )

    def _check_whole(self, staged: Path) -> None:
        """Check that no file is missing that the Trainer would silently do without on resume."""
        args = self.trainer.args
        rng = "rng_state.pth" if args.world_size <= 1 else f"rng_state_{args.process_index}.pth"
        needed: dict[str, tuple[str, ...]] = {"state of the random numbers": (rng,)}
        if self.trainer.is_deepspeed_enabled:
            shard = f"global_step*/*zero_pp_rank_{args.process_index}_*optim_states.pt"
            needed["optimizer's shard of this rank"] = (shard,)
        if args.should_save:
            needed["optimizer's state"] = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")
            needed["schedule"] = ("scheduler.pt", "global_step*")
            needed["model"] = ("*.safetensors", "*.bin", "*/adapter_model.*", "pytorch_model*", "global_step*")
        for what, names in needed.items():
            if not any(any(staged.glob(name)) for name in names):
                raise CheckpointError(f"the {what} is missing: the Trainer has written none of {', '.join(names)}")

    def save_model(self, directory: Path) -> None:
        put_into_use(self.trainer, self.run.store.path(self.loaded_best) if self.loaded_best else None)
        with self._quiet(directory):
            self.trainer.save_model(str(directory))

    @contextmanager
    def _quiet(self, output: Path) -> Iterator[None]:
        """Have the Trainer save to `output` without a model card, a question to the hub, or a barrier.

        A rank that could not write (a full disk) would never reach its barrier.
        """
        trainer, offline = self.trainer, os.environ.get("HF_HUB_OFFLINE")
        strategy, trainer.args.save_strategy = trainer.args.save_strategy, SaveStrategy.NO
        trainer._get_output_dir = lambda trial: str(output)
        trainer.create_model_card = lambda *_, **__: None
        os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            with own_names():
                yield
        finally:
            del trainer._get_output_dir, trainer.create_model_card
            trainer.args.save_strategy = strategy
            os.environ.pop("HF_HUB_OFFLINE")
            if offline is not None:
                os.environ["HF_HUB_OFFLINE"] = offline


def _shield_loader(get: Callable[..., Any]) -> Callable[..., Any]:
    def shielded(*args: Any, **kwargs: Any) -> Any:
        loader = get(*args, **kwargs)
        # accelerate's loader is a DataLoader, but iterates over another one that it holds; a user's may be none at all
        inners: tuple[Any, ...] = (loader, getattr(loader, "base_dataloader", None))
        for inner in inners:
            if getattr(inner, "num_workers", 0) and not isinstance(inner.worker_init_fn, _Shielded):
                inner.worker_init_fn = _Shielded(inner.worker_init_fn)
        return loader

    return shielded
