"""A run that begins with what another has learned: its weights, or all of its training state.

Its configuration is that of the other run, with the overrides on top. With the weights alone, it is a new training,
from step 0. With the optimizer it goes on at the other's step, as a resume does: so a finished run is made longer.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outlast.checkpoint.compatibility import compare
from outlast.checkpoint.manifest import Manifest, Sealed, is_weights
from outlast.config.configuration import Config, build, load
from outlast.config.trainer_keys import BATCH, EVALUATION, LENGTH, length_refusal
from outlast.errors import ConfigError, ResumeRefusedError
from outlast.ranks.layout import layout
from outlast.rundir.ancestry import Ancestry
from outlast.rundir.attempts import finished
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.storage.budget import gb

from .compose import Composer, evaluate_only_with_data, lacks_evaluation, parsed

DESCRIBING = (".safetensors.index.json", "adapter_config.json", "digests.json")
"""What tells where the weights are, what of, and what was in memory when they were saved."""
EVALUATED = ("eval_strategy", "load_best_model_at_end")
"""What of the trainer depends on whether there is data to evaluate on."""
OTHER_ROWS = ("packing", "chat_template_path")
"""Keys of the trainer that make other rows of the same data."""
SAME = ("job", "model", "peft")
"""Sections that the weights belong to."""


@dataclass(frozen=True)
class Fork:
    """What is taken over, and from where."""

    ancestry: Ancestry
    source: RunDirectory
    checkpoints: list[Sealed]
    """The one that it begins with; with the optimizer, also the best until then."""
    same_data: bool = False
    """Whether what was prepared of the data is taken over too: nothing that it depends on is another."""

    @property
    def files(self) -> list[tuple[Sealed, str]]:
        """The files to be copied: all of them, or what `from_pretrained` reads."""
        return [
            (checkpoint, name)
            for checkpoint in self.checkpoints
            for name in checkpoint.manifest.files
            if self.ancestry.optimizer or is_weights(name) or name.endswith(DESCRIBING)
        ]

    @property
    def bytes(self) -> int:
        return sum(int(checkpoint.manifest.files[name]["bytes"]) for checkpoint, name in self.files)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the plan."""
        return asdict(self.ancestry) | {"bytes": self.bytes}


def configured(run: RunDirectory, overrides: Sequence[str], config_dir: Path | None, *, target: RunDirectory) -> Config:
    """The configuration of a run with overrides on top: values, or groups, whose sections are then composed anew.

    Where the run lives, and what of it was once accepted (`checkpoint.allow`), is not taken over.

    Args:
        target: the run to be made.
    """
    composer, tree = Composer(config_dir), copy.deepcopy(load(run.config).as_dict())
    tree["run"] |= {"name": target.path.name, "root": str(target.path.parent)}
    tree["checkpoint"]["allow"] = []
    groups = {text.partition("=")[0].lstrip("+") for text in overrides if composer.is_group(text)}
    if groups & {"experiment", "job"}:
        raise ConfigError("--from", ", ".join(sorted(groups)), "a fork has the job of its run; valid: other groups")
    if groups:
        composed = composer.compose(
            [text for text in overrides if text.lstrip("+~").partition("=")[0].partition(".")[0] in groups]
        )
        tree |= {group: composed.as_dict()[group] for group in groups}
    for text in overrides:
        override = parsed(text)
        section, _, rest = str(override.key_or_group).partition(".")
        if section in groups:
            continue
        if override.is_delete() or override.is_sweep_override():
            raise ConfigError(section, text, "valid: one value, key=value")
        if not rest and section != "seed":
            raise ConfigError(section, text, f"valid: {section}.<key>=…")
        place, path = tree, str(override.key_or_group).split(".")
        for part in path[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(str(override.key_or_group), text, f"{part} has no keys of its own")
        place[path[-1]] = override.value()
    config = build(tree)
    if not any(text.lstrip("+").startswith("trainer.eval_strategy=") for text in overrides):
        if lacks_evaluation(load(run.config)) and not lacks_evaluation(config) and config.job.name == "sft":
            usual = composer.compose(["job=sft"]).trainer
            config.trainer |= {key: usual[key] for key in EVALUATED if key in usual}
        evaluate_only_with_data(config)
    return config


def exactness(before: Config, config: Config, found: Sealed, fork: Fork) -> list[str]:
    """Say how what comes is related to what the other run would have done."""
    said = [f"beginning with {fork.ancestry.words}, {gb(fork.bytes)}"]
    if not fork.ancestry.optimizer:
        return [*said, "the optimizer, its schedule and the data begin anew, at step 0"]
    changes = list(before.differences(config))
    lengths = [f"trainer.{key}" for key in LENGTH if f"trainer.{key}" in changes]
    others = [key for key in changes if key not in lengths]
    drawn = _other_draws(before, config)
    extra = _is_longer(before, config) and _evaluated_at_its_end(before, found, fork.source)
    if lengths and (reason := length_refusal(before.trainer)):
        said.append(f"not what a longer run would have been from the beginning: {reason}")
    if others:
        said.append(f"not exact: {', '.join(others)} differ from {fork.ancestry.run}'s")
    if drawn:
        said.append(f"not exact: with another {', '.join(drawn)} other random numbers are drawn, or sums are rounded")
    if extra:
        said.append(f"not exact: {fork.ancestry.run} has evaluated at its end, which a longer run would not have done")
    if before.parallel.world_size != config.parallel.world_size:
        said.append("not exact: another number of ranks rounds sums in another order, and draws other random numbers")
    elif not changes and not drawn and not extra:
        said.append(f"exact: as if {fork.ancestry.run} went on from step {found.step}")
    return said


def _other_draws(before: Config, config: Config) -> list[str]:
    """What differs that is free to a run, and yet changes its random numbers or how its sums are rounded."""
    one, other = before.trainer, config.trainer
    keys = [key for key in (*sorted(EVALUATION), *BATCH) if one.get(key) != other.get(key)]
    by_steps = other.get("eval_strategy", "no") == "steps"
    if by_steps and not other.get("eval_steps") and one.get("logging_steps") != other.get("logging_steps"):
        keys.append("logging_steps")  # which is then that of evaluations
    if by_steps and _is_longer(before, config) and 0 < float(other.get("eval_steps") or 0) < 1:
        keys.append(f"length (trainer.eval_steps={other['eval_steps']:g} is a share of it)")
    return [key if " " in key else f"trainer.{key}" for key in keys]


def _is_longer(before: Config, config: Config) -> bool:
    return any(before.trainer.get(key) != config.trainer.get(key) for key in LENGTH)


def _evaluated_at_its_end(before: Config, found: Sealed, source: RunDirectory) -> bool:
    """Whether a checkpoint is from after an evaluation that was made because the run ended there."""
    done, trainer = finished(Ledger(source.ledger).read()), before.trainer
    if done is None or done["step"] != found.step:
        return False
    every = float(trainer.get("eval_steps") or trainer.get("logging_steps") or 1)
    by_steps = trainer.get("eval_strategy") == "steps" and every >= 1 and found.step % every != 0
    return by_steps or (trainer.get("eval_strategy") == "epoch" and int(trainer.get("max_steps", -1)) > 0)


def refuse_other_training(before: Config, config: Config, manifest: Manifest) -> None:
    """Refuse to go on with the optimizer of a checkpoint where the first attempt would be refused.

    Raises:
        ConfigError: it names what differs, and the ways out.
    """
    made: dict[str, Any] = {"world_size": manifest.world_size, **manifest.origin}
    now: dict[str, Any] = {"seed": config.seed}
    micro_batch, accumulation = (
        int(config.trainer.get(key) or usual) for key, usual in zip(BATCH, (8, 1), strict=True)
    )
    try:
        ranks = config.parallel.world_size
        laid_out = layout(made, ranks=ranks, micro_batch=micro_batch, accumulation=accumulation)
    except ResumeRefusedError as error:
        raise ConfigError("parallel.nodes * parallel.ranks_per_node", ranks, str(error)) from None
    if config.job.name == "sft":
        now["global_batch"] = laid_out.global_batch
    changed = config.all_differences(before)
    rows = [
        key for key in changed if key.startswith("data.") and not key.endswith((".train", ".eval", ".path", "_split"))
    ]
    rows += [f"trainer.{key}" for key in OTHER_ROWS if f"trainer.{key}" in changed]
    if rows and "dataset" in made:
        now["dataset"] = f"another by {', '.join(rows)}"
    refused = compare(made, now, versions_made={}, versions_now={}, allow=config.checkpoint.allow).refused
    if refused:
        raise ConfigError("--optimizer", ", ".join(refused), "; ".join(refused.values()))


def has_same_data(before: Config, config: Config) -> bool:
    """Whether a run reads the very rows that another has prepared: it differs in its length alone."""
    return {key.removeprefix("trainer.") for key in before.differences(config)} <= set(LENGTH)


def check_same(before: Config, config: Config, name: str) -> None:
    """Refuse another job, model or adapters than those that the weights belong to.

    Raises:
        ConfigError: it names the keys.
    """
    for section in SAME:
        if getattr(config, section) != getattr(before, section):
            changed = [key for key in config.all_differences(before) if key.startswith(f"{section}.")]
            valid = f"the weights belong to the {section} of {name}; leave it as it is there"
            raise ConfigError(", ".join(changed) or section, config.flat()[changed[0]] if changed else "", valid)
