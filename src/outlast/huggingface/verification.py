"""Verifies after every load that what is in a Trainer's memory is what was there when the checkpoint was made.

======================  ========================================================================================
`model`                 weights and buffers that a checkpoint holds; with ZeRO 3 and FSDP, a rank's shard of them
`base`, `config`        the frozen weights under adapters, which no checkpoint holds; the model's configuration
`buffers`               buffers that the weights' files leave out, and `pipeline.py` keeps if training changes them
`whole`                 with ZeRO 3, the weights gathered from all ranks, for another number of ranks
`optimizer`             the state of each parameter, or of each partition of ZeRO and its weights; the groups' settings
`schedule`, `scaler`    the learning rate's schedule; the loss scale
`random`                a rank's random state
======================  ========================================================================================

The optimizer's partitions of ZeRO are not compared on another number of ranks: they are cut in another way there. The
conversion reads only files that verify, and the weights that come of it are compared.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from outlast.checkpoint import digests
from outlast.checkpoint.digests import Digests, digest
from outlast.checkpoint.manifest import Sealed
from outlast.errors import ConfigError, ResumeRefusedError

from . import random_state
from .frozen_weights import shortened
from .reachable import is_saved
from .training_objects import SAVING_CHANGES

if TYPE_CHECKING:
    from transformers import Trainer

    from outlast.attempt.attempt import RankAttempt


class Verification:
    """Digests a Trainer's state when it is saved, and compares it when it is loaded. All ranks call each method."""

    def __init__(self, run: "RankAttempt", trainer: "Trainer") -> None:
        self._run, self._trainer = run, trainer
        plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
        self._stage_3 = plugin is not None and plugin.hf_ds_config.is_zero3()
        self._sharded = self._stage_3 or trainer.is_fsdp_enabled
        self._fixed: Digests = {}
        self._base: set[str] = set()
        self._whole: dict[str, str] = {}
        self._buffers: dict[str, str] = {}

    # Saving -----------------------------------------------------------------------------------------------------

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Digest the weights that ZeRO 3 gathers while the Trainer saves."""
        trainer, save = self._trainer, self._trainer._save

        def digesting(output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
            self._whole = {name: digest(tensor) for name, tensor in (state_dict or {}).items()}
            save(output_dir, state_dict=state_dict)

        own = "_save" in vars(trainer)
        if self._stage_3:
            trainer._save = digesting
        try:
            yield
        finally:
            if own:
                trainer._save = save
            elif self._stage_3:
                del trainer._save

    def refuse_unfrozen(self) -> None:
        """Refuse to train weights that lay frozen under adapters when training began: no checkpoint holds them.

        Raises:
            ConfigError: it names the weights.
        """
        named = self._trainer.model.named_parameters(remove_duplicate=False) if self._base else ()
        if trained := [name for name, p in named if p.requires_grad and name in self._base]:
            way = "valid: false of what adapters lie on, which no checkpoint holds; name its module in modules_to_save"
            raise ConfigError("requires_grad", f"true of {shortened(trained)}", way)

    def write(self, staged: Path) -> None:
        """Write this rank's digests into a checkpoint that is being made."""
        rank, found = self._run.rank, self._local()
        if rank == 0:
            found |= self._fixed | {"buffers": self._unsaved_buffers()}
            found |= {"whole": self._whole} if self._stage_3 else {}
            self._warn_of_buffers(found["buffers"])
        digests.write(staged, rank, found | {"random": _random()})

    def _warn_of_buffers(self, now: dict[str, str]) -> None:
        changed = digests.differences(self._buffers, now) if self._buffers and self._is_adapted() else []
        self._buffers = {}
        if changed:
            self._run.record("unsaved_buffers", names=changed)
            self._run.say(
                f"WARNING: training changes buffers ({shortened(changed)}) that the finished model will not hold: "
                "it is an adapter. Name their modules in modules_to_save"
            )

    # Loading ----------------------------------------------------------------------------------------------------

    def begin(self, checkpoint: Sealed | None) -> None:
        """Compare what a resume has loaded; without a checkpoint, only note what no checkpoint will hold.

        Raises:
            ResumeRefusedError: on every rank, if something differs on any; it names the tensors.
        """
        if self._is_adapted():
            named = self._trainer.model.named_parameters(remove_duplicate=False)
            self._base = {name for name, parameter in named if not parameter.requires_grad}
        config = getattr(self._trainer.model, "config", None)
        values = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
        self._fixed = {
            "base": self._digests(lambda name: name in self._base) if self._run.rank == 0 or self._sharded else {},
            "config": {key: digest(value) for key, value in values.items() if key not in SAVING_CHANGES},
        }
        self._buffers = self._unsaved_buffers()
        if checkpoint is None:
            return
        ranks_changed = checkpoint.manifest.world_size != self._trainer.args.world_size
        partitioned = self._trainer.is_deepspeed_enabled or self._trainer.is_fsdp_enabled
        found = self._local(everywhere=True)
        if self._run.rank == 0:
            found |= self._fixed
        if ranks_changed and partitioned:
            found.pop("optimizer", None)
        if ranks_changed and self._sharded:
            found["whole"] = self._gathered()
            found.pop("model", None)
        self._compare(checkpoint.path, found)

    def best(self, checkpoint: Path, *, shards: bool = True) -> None:
        """Compare the weights after the best checkpoint was loaded, before they become the finished model.

        Args:
            shards: it was loaded from the ranks' own shards.

        Raises:
            ResumeRefusedError: as :meth:`begin`.
        """
        if self._sharded and not shards:
            self._compare(checkpoint, {"whole": self._gathered()})
        else:
            self._compare(checkpoint, {"model": self._model()})

    def buffers(self, checkpoint: Path) -> None:
        """Compare the buffers that the weights' files leave out, when those that training changed are restored.

        Raises:
            ResumeRefusedError: as :meth:`begin`.
        """
        self._compare(checkpoint, {"buffers": self._unsaved_buffers()} if self._run.rank == 0 else {})

    def random(self, checkpoint: Path) -> None:
        """Compare this rank's random state, just restored.

        Raises:
            ResumeRefusedError: as :meth:`begin`.
        """
        self._compare(checkpoint, {"random": _random()})

    def _compare(self, checkpoint: Path, found: Digests) -> None:
        rank = self._run.rank
        of_rank_0, own = digests.read(checkpoint, 0) or {}, digests.read(checkpoint, rank) or {}
        problems: dict[str, list[str]] = {}
        for part, values in found.items():
            each = part == "random" or (part in ("model", "base") and self._sharded)
            each |= part == "optimizer" and self._trainer.is_deepspeed_enabled
            saved = (own if each else of_rank_0).get(part)
            if saved is None or (part == "whole" and rank != 0):
                continue
            if part == "whole":  # it has buffers too
                saved = {name: value for name, value in saved.items() if name in values}
            if different := digests.differences(saved, values):
                problems[part] = different
        everywhere = self._run.collectives.from_all(problems)
        if first := next((found for found in everywhere if found), None):
            self._refuse(checkpoint, first)

    def _refuse(self, checkpoint: Path, problems: dict[str, list[str]]) -> None:
        base = [f"{part} {shortened(problems[part])}" for part in ("base", "config") if part in problems]
        rest = [f"{part} {shortened(names)}" for part, names in problems.items() if part not in ("base", "config")]
        reasons = [f"the base model is not the one that it was made with: {', '.join(base)}"] if base else []
        reasons += [f"what was loaded is not what was saved: {', '.join(rest)}"] if rest else []
        text = f"{checkpoint.name}: {'; '.join(reasons)}"
        self._run.record("differs", checkpoint=checkpoint.name, names=problems)
        if not self._run.accepts("state", text):
            raise ResumeRefusedError(f"{text}. Mend that, or accept it with checkpoint.allow=[state]")

    # What is in memory ------------------------------------------------------------------------------------------

    def _local(self, *, everywhere: bool = False) -> Digests:
        """What this rank digests: all of it if its state is sharded, or if it is rank 0, or `everywhere`."""
        trainer, found = self._trainer, Digests()
        if self._run.rank == 0 or self._sharded or everywhere:
            found["model"] = self._model()
        if self._run.rank == 0 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or everywhere:
            found["optimizer"] = self._optimizer()
        if self._run.rank == 0 or everywhere:
            holders = {"schedule": trainer.lr_scheduler, "scaler": getattr(trainer.accelerator, "scaler", None)}
            for part, holder in holders.items():
                if hasattr(holder, "state_dict"):
                    found[part] = {str(key): digest(value) for key, value in holder.state_dict().items()}
        return found

    def _is_adapted(self) -> bool:
        from peft import PeftModel

        return isinstance(self._trainer.model, PeftModel)

    def _model(self) -> dict[str, str]:
        found = self._digests(lambda name: name not in self._base)
        return found | {name: digest(buffer) for name, buffer in self._all_buffers() if self._is_saved(name)}

    def _digests(self, wanted: Callable[[str], bool]) -> dict[str, str]:
        """Digests of parameters by name; a tied one, which has several names, is read once."""
        known: dict[int, str] = {}
        found = {}
        for name, parameter in self._trainer.model.named_parameters(remove_duplicate=False):
            if wanted(name):
                if id(parameter) not in known:
                    known[id(parameter)] = digest(getattr(parameter, "ds_tensor", parameter))
                found[name] = known[id(parameter)]
        return found

    def _all_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._trainer.model.named_buffers()

    def _is_saved(self, buffer: str) -> bool:
        path, _, name = buffer.rpartition(".")
        model = self._trainer.model
        return is_saved(model, model.get_submodule(path), name)

    def _unsaved_buffers(self) -> dict[str, str]:
        return {name: digest(buffer) for name, buffer in self._all_buffers() if not self._is_saved(name)}

    def _optimizer(self) -> dict[str, str]:
        optimizer = outer = self._trainer.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
            if hasattr(optimizer, "fp32_partitioned_groups_flat") or hasattr(
                optimizer, "single_partition_of_fp32_groups"
            ):
                outer = optimizer
        partitions = getattr(outer, "fp32_partitioned_groups_flat", None)
        partitions = partitions or getattr(outer, "single_partition_of_fp32_groups", None)
        if partitions is not None:
            pairs = {f"partition {i}": [p, optimizer.state.get(p)] for i, p in enumerate(partitions)}
        else:
            names = {id(p): name for name, p in self._trainer.model.named_parameters()}
            pairs = {names.get(id(p), f"parameter {i}"): state for i, (p, state) in enumerate(optimizer.state.items())}
        settings = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
        found = {name: digest(state) for name, state in pairs.items()}
        return found | {f"group {i}": digest(group) for i, group in enumerate(settings)}

    def _gathered(self) -> dict[str, str]:
        """The whole weights under ZeRO 3, on rank 0; all ranks take part."""
        if not self._stage_3:
            return {}
        from deepspeed.runtime.zero import GatheredParameters

        found = {}
        for name, parameter in self._trainer.model.named_parameters(remove_duplicate=False):
            with GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else nullcontext():
                if self._run.rank == 0 and name not in self._base:
                    found[name] = digest(parameter)
        return found


def _random() -> dict[str, str]:
    """Digests of the generators whose state the Trainer saves: of several GPUs, the current one."""
    state = random_state.capture()
    if "cuda" in state:
        state["cuda"] = state["cuda"][torch.cuda.current_device()]
    return {name: digest(value) for name, value in state.items()}
