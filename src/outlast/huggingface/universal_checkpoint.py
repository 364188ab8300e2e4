"""Converts a DeepSpeed checkpoint for another number of ranks, by way of DeepSpeed's universal checkpoint.

ZeRO spreads the optimizer's state over the ranks, so a checkpoint fits the number of ranks that made it. Rank 0 writes
a second, universal copy of it into the staging area, all ranks load that, and it is removed. The checkpoint itself is
not touched: after a kill on the way, the next attempt converts it again.
"""

import errno
import os
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from outlast.checkpoint.manifest import Kind, Sealed
from outlast.checkpoint.writer import Writer
from outlast.errors import CheckpointError, ResumeRefusedError
from outlast.files import bytes_used
from outlast.storage.budget import gb

from .deepspeed import loading_shards

if TYPE_CHECKING:
    from transformers import Trainer

    from outlast.attempt.attempt import RankAttempt

POLL_S, SAY_S = 1.0, 30.0
PROBLEMS: dict[str, type[Exception]] = {"refused": ResumeRefusedError, "failed": CheckpointError, "transient": OSError}
"""The kinds of error that rank 0 may meet, the special before the general; all ranks raise the same."""
SMALL_FILE = 2_000
"""Bytes of a tensor's file beyond the tensor itself, rounded up."""


class Conversion:
    """The universal copy of `checkpoint`; all ranks make it, load it and drop it together.

    Attributes:
        path: the directory to resume from: the copy of DeepSpeed's state, and links to the other files.
    """

    def __init__(self, run: "RankAttempt", checkpoint: Sealed, trainer: "Trainer") -> None:
        self._run, self._checkpoint, self._trainer = run, checkpoint, trainer
        self._staging = run.directory.staging
        self.path = self._staging / checkpoint.path.name
        self._problem: Exception | None = None
        self._loading = ExitStack()

    def make(self) -> None:
        """Convert, on rank 0; the others wait.

        Raises:
            ResumeRefusedError: the budget has no room for the copy; nothing was changed.
            CheckpointError: DeepSpeed could not convert it.
            OSError: the copy could not be written.
        """
        expect(self._trainer)
        self._loading.enter_context(_repaired_stage_3())
        run, began, said = self._run, time.monotonic(), time.monotonic()
        worker = threading.Thread(target=self._try, daemon=True)
        if run.rank == 0:
            worker.start()
        state: Sequence[str] | None = ("", "")
        while state is not None and not any(state):
            if run.rank == 0:
                worker.join(POLL_S)
                state = ("", "") if worker.is_alive() else self._outcome()
                if time.monotonic() - said > SAY_S:
                    said = time.monotonic()
                    run.say(f"converting: {gb(bytes_used(self.path, skip_unreadable=True))} written")
            state = run.collectives.from_rank_0(state)
        if state is not None:
            raise PROBLEMS[state[0]](state[1])
        if run.rank == 0:
            seconds, size = time.monotonic() - began, bytes_used(self.path, skip_unreadable=True)
            ranks = run.collectives.world_size
            run.record("converted", checkpoint=self.path.name, ranks=ranks, bytes=size, seconds=seconds)
            run.say(f"converted in {seconds:.1f} s; the copy of {gb(size)} is removed when it is loaded")

    def drop(self) -> None:
        """Remove the copy; all ranks have loaded it."""
        self._loading.close()
        self._trainer.model_wrapped._config.load_universal_checkpoint = False  # the best has its own shards
        if self._run.rank == 0:
            self._run.store.clean_up()

    def _outcome(self) -> tuple[str, str] | None:
        if self._problem is None:
            return None
        self._run.store.clean_up()
        return next(name for name, kind in PROBLEMS.items() if isinstance(self._problem, kind)), str(self._problem)

    def _try(self) -> None:
        try:
            self._convert()
        except Exception as error:
            name = self._checkpoint.path.name
            if isinstance(error, OSError) and error.errno == errno.EDQUOT:
                error = self._no_space(self._need())
            elif not isinstance(error, ResumeRefusedError | OSError):  # the disk may be better next time
                error = CheckpointError(f"{name} can't be converted for {self._ranks} ranks: {error!r}")
            self._problem = error

    def _convert(self) -> None:
        run = self._run
        shards = sorted({name.partition("/")[0] for name in self._checkpoint.manifest.files if "/" in name})
        source = next(self._checkpoint.path / name for name in shards if name.startswith("global_step"))
        need = self._need()
        run.say(
            f"{self._checkpoint.path.name} was made by {self._checkpoint.manifest.world_size} ranks: converting it for "
            f"{self._ranks} (DeepSpeed's universal checkpoint, up to {gb(need)} for a while)"
        )
        run.progress.update(phase="converting", step=self._checkpoint.step, force=True)
        if not run.store.room.make_space(kind=Kind.PERIODIC, need=need):
            raise self._no_space(need)
        self.path.mkdir(parents=True)
        from deepspeed.checkpoint import ds_to_universal

        arguments = Namespace(
            input_folder=str(source),
            output_folder=str(self.path / source.name),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        writer = Writer(self.path, run.store.space.free() - self._weights)
        with writer.capture(), _quiet(ds_to_universal), loading_shards():
            ds_to_universal.main(arguments)
        self._link(source.name)

    def _link(self, converted: str) -> None:
        """Link the other files that the manifest lists: nothing is written any more, so nothing through a link."""
        for name in self._checkpoint.manifest.files:
            link, file = self.path / name, self._checkpoint.path / name
            if name.partition("/")[0] != converted and not os.path.lexists(link):
                link.parent.mkdir(parents=True, exist_ok=True)
                os.symlink(file, link)

    def _need(self) -> int:
        """The most that a conversion writes: slices of all shards, what they are merged into, the weights."""
        sizes = {name: int(entry["bytes"]) for name, entry in self._checkpoint.manifest.files.items()}
        shards = sum(size for name, size in sizes.items() if name.endswith("_optim_states.pt"))
        tensors = sum(1 for p in self._trainer.model.parameters() if p.requires_grad)
        return 2 * shards + self._weights + tensors * SMALL_FILE * 4 * (self._checkpoint.manifest.world_size + 1)

    def _no_space(self, need: int) -> ResumeRefusedError:
        free, budget = max(self._run.store.space.free(), 0), self._run.store.space.budget()
        return ResumeRefusedError(
            f"{self._checkpoint.path.name} can't be converted for {self._ranks} ranks: that takes up to {gb(need)} "
            f"beside it, and storage.budget_gb={budget / 1e9:g} has room for {gb(free)}; set "
            f"storage.budget_gb={(budget + need - free) / 1e9 * 1.02:.3g}, or go on with "
            f"{self._checkpoint.manifest.world_size} ranks"
        )

    @property
    def _weights(self) -> int:
        """Bytes of the files that are copied as they are."""
        files = self._checkpoint.manifest.files
        return sum(int(entry["bytes"]) for name, entry in files.items() if name.endswith("_model_states.pt"))

    @property
    def _ranks(self) -> int:
        return self._run.collectives.world_size


def needs_conversion(checkpoint: Sealed | None, trainer: "Trainer") -> bool:
    """Whether `checkpoint` has to be converted for this number of ranks."""
    if checkpoint is None or not trainer.is_deepspeed_enabled:
        return False
    return bool(checkpoint.manifest.world_size != trainer.args.world_size)


def expect(trainer: "Trainer") -> None:
    """Have DeepSpeed, which is not set up yet, load a universal checkpoint."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    for config in (plugin.deepspeed_config, plugin.hf_ds_config.config):
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}


@contextmanager
def _repaired_stage_3() -> Iterator[None]:
    """Repair what stage 3 of DeepSpeed 0.19 loads wrongly from a universal checkpoint.

    All parts of the optimizer get one and the same tensor as step count, which each of them then increments. Every
    parameter group gets the settings of the first, so that weight decay reaches what it should not.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    name = "load_hp_checkpoint_state_from_checkpoint_dir_stage3"
    load = getattr(Stage3, name)

    def load_all(self: Any, checkpoint_dir: str) -> None:
        load(self, checkpoint_dir)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
        with loading_shards():
            saved = torch.load(os.path.join(checkpoint_dir, "zero", "optimizer_state.pt"), weights_only=True)
        groups = saved["optimizer_state_dict"]["param_groups"]
        for group, made in zip(self.optimizer.param_groups, groups, strict=True):
            group.update({key: value for key, value in made.items() if key != "params"})

    setattr(Stage3, name, load_all)
    try:
        yield
    finally:
        setattr(Stage3, name, load)


@contextmanager
def _quiet(converter: Any) -> Iterator[None]:
    """Silence the converter, whose output would be mixed into the log."""
    bars = converter.tqdm
    converter.print, converter.tqdm = lambda *_, **__: None, Namespace(tqdm=lambda chunks: chunks)
    try:
        yield
    finally:
        del converter.print
        converter.tqdm = bars
