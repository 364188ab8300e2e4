"""A run that begins with what another has learned: its weights, or all of its training state.

Its configuration is that of the other run, with the overrides on top. With the weights alone, it is a new training,
from step 0. With the optimizer it goes on at the other's step, as a resume does: so a finished run is made longer.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outlast.checkpoint.manifest import Sealed, is_weights
from outlast.config.configuration import Config, build, load
from outlast.config.trainer_keys import LENGTH, length_refusal
from outlast.errors import ConfigError
from outlast.rundir.ancestry import Ancestry
from outlast.rundir.directory import RunDirectory
from outlast.storage.budget import gb

from .compose import Composer, parsed

DESCRIBING = (".safetensors.index.json", "adapter_config.json", "digests.json")
"""What tells where the weights are, what of, and what was in memory when they were saved."""
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
    return build(tree)


def exactness(before: Config, config: Config, found: Sealed, fork: Fork) -> list[str]:
    """Say how what comes is related to what the other run would have done."""
    said = [f"beginning with {fork.ancestry.words}, {gb(fork.bytes)}"]
    if not fork.ancestry.optimizer:
        return [*said, "the optimizer, its schedule and the data begin anew, at step 0"]
    changes = list(before.differences(config))
    lengths = [f"trainer.{key}" for key in LENGTH if f"trainer.{key}" in changes]
    others = [key for key in changes if key not in lengths]
    if lengths and (reason := length_refusal(before.trainer)):
        said.append(f"not what a longer run would have been from the beginning: {reason}")
    if others:
        said.append(f"not exact: {', '.join(others)} differ from {fork.ancestry.run}'s")
    if before.parallel.world_size != config.parallel.world_size:
        said.append("not exact: another number of ranks rounds sums in another order, and draws other random numbers")
    elif not changes:
        said.append(f"exact: as if {fork.ancestry.run} went on from step {found.step}")
    return said


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
