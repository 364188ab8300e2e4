"""From override arguments to a checked configuration: Hydra composes the YAML, `outlast.config` checks the values.

Hydra is used as a library (its compose API): no `outputs/` directory, no logging set up, no working directory changed.
"""

import copy
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from outlast.config.configuration import SECTIONS, Config, build
from outlast.config.data import HubData, JsonlData
from outlast.config.section import accepts_text, declared
from outlast.errors import ConfigError

GROUPS = ("job", "model", "data", "peft", "parallel", "cluster", "tracking", "experiment")
"""Groups of the defaults list in `conf/train.yaml`."""


def compose(overrides: Sequence[str], *, config_dir: Path | None = None) -> Config:
    """The configuration that the overrides ask for, checked, with `run.name` filled in.

    Args:
        overrides: Hydra's override grammar: `model=pretrained` picks a file of a group, `seed=3` changes a value.
            Keys need no `+`, whether the YAML names them or not; the schema decides which are known.
        config_dir: a directory of the user's own groups and experiments, searched after outlast's.

    Raises:
        ConfigError: it names the key, value, group or file that is refused, and what is valid.
    """
    return Composer(config_dir).compose(overrides)


class Composer:
    """Composes many configurations from the same files: what the cells of a sweep share is composed once.

    Args:
        config_dir: as for :func:`compose`.
    """

    def __init__(self, config_dir: Path | None = None) -> None:
        if config_dir is not None and not config_dir.is_dir():
            raise ConfigError("config_dir", str(config_dir), "valid: a directory that exists")
        own = Path(str(files("outlast.conf")))
        self.directories = [own] if config_dir is None else [own, config_dir.absolute()]
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: Sequence[str], swept: Sequence[str] = ()) -> Config:
        """The configuration of `overrides`, then `swept` on top.

        Composing costs Hydra 150 ms, so it is done once for all cells that choose the same files; their swept
        values are then set as Hydra's `++key=value` would.

        Args:
            swept: one override for each key that differs from cell to cell, values without any sweep.

        Raises:
            ConfigError: as :func:`compose`.
        """
        groups = [text for text in swept if self.is_group(text)]
        shared = (*overrides, *groups)
        typed = " ".join((*overrides, *swept))
        if shared not in self._composed:
            arguments = [argument for text in shared if (argument := _argument(text, self.directories))]
            for directory in self.directories[1:]:
                arguments.append(f"hydra.searchpath=[{quoted(f'file://{directory}')}]")
            self._composed[shared] = _composed(arguments, self.directories, typed)
        composed = self._composed[shared]
        if len(groups) < len(swept):
            composed = copy.deepcopy(composed)
        for text in swept:
            if text not in groups:
                _set(composed, text, self.directories)
        tree = _plain(composed, typed)
        if "experiment" in tree:
            message = "its file must begin with the line '# @package _global_'"
            raise ConfigError("experiment", tree["experiment"], message)
        config = build(tree)
        if not any(text.lstrip("+").startswith("trainer.eval_strategy=") for text in (*overrides, *swept)):
            evaluate_only_with_data(config)
        config.run.name = config.run.name or config.derived_name
        return config

    def is_group(self, text: str) -> bool:
        """Whether an override picks files of a group, instead of a value."""
        return bool(self.options(text.partition("=")[0].lstrip("+~").partition("@")[0]))

    def options(self, group: str) -> list[str]:
        """Names of the files of a group; empty if there is no such group."""
        return _options(group, self.directories)


def _set(composed: DictConfig, text: str, directories: list[Path]) -> None:
    """Apply one `key=value` to what Hydra has composed."""
    _argument(text, directories)  # refuses what a single run would refuse
    override = parsed(text)
    try:
        OmegaConf.update(composed, override.key_or_group, override.value(), merge=True, force_add=True)
    except OmegaConfBaseException as error:
        raise ConfigError(override.key_or_group, override.get_value_string(), _first_line(error)) from None


def evaluate_only_with_data(config: Config) -> None:
    """Turn evaluation and keeping the best model off where the data has no evaluation split."""
    if lacks_evaluation(config) and config.job.name == "sft":
        config.trainer |= {"eval_strategy": "no", "load_best_model_at_end": False}


def lacks_evaluation(config: Config) -> bool:
    """Whether the data has no evaluation split."""
    return (isinstance(config.data, JsonlData) and config.data.eval is None) or (
        isinstance(config.data, HubData) and config.data.eval_split is None
    )


def _argument(text: str, directories: list[Path]) -> str | None:
    """One override as Hydra needs it: `++key=value` for values, `group=option` for groups; None says nothing.

    Raises:
        ConfigError: the override does not parse, or means something that a single run does not have.
    """
    override = parsed(text)
    key, value = override.key_or_group, override.get_value_string() if override.value_type else None
    text = override.input_line or text
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        raise ConfigError(key, value, "Hydra only composes the configuration here, its own settings have no effect")
    if override.is_sweep_override():
        raise ConfigError(
            key,
            value,
            "this command runs one job, not a sweep (add -m); valid: one value (a list is [a,b]; quote other commas)",
        )
    group = key.partition("@")[0]
    options = _options(group, directories)
    if not options or "." in key:
        return text if override.is_delete() else "++" + text.lstrip("+")
    if override.is_delete() or override.package is not None:
        raise ConfigError(group, text, f"choose one instead, {group}=...; valid: {', '.join(options)}")
    chosen = override.value()
    if group == "experiment" and chosen is None:
        return None
    for name in chosen if group in ("experiment", "tracking") and isinstance(chosen, list) else [chosen]:
        if not isinstance(name, str) or name not in options:
            raise ConfigError(group, name, options)
    return text.lstrip("+") if group in GROUPS else "+" + text.lstrip("+")


@lru_cache(maxsize=4096)
def parsed(text: str) -> Override:
    """One override, parsed. What a text key is given is text: `run.name=1e5` is no number.

    Raises:
        ConfigError: it is none.
    """
    key, equals, value = text.partition("=")
    name = key.strip().lstrip("+~")
    if not name or not (equals or key.startswith("~")):
        raise ConfigError("override", text, "valid: key=value, as in trainer.max_steps=100 or model=pretrained")
    try:
        override: Override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        hint = f"put special characters in quotes: '{name}=\"{value}\"'"
        raise ConfigError(name, value, f"it does not parse ({_first_line(error)}); {hint}") from None
    if not equals or override.is_sweep_override():
        return override
    if isinstance(override.value(), bool | int | float) and str(override.key_or_group) in _text_keys():
        override = OverridesParser.create().parse_override(f"{key}={quoted(value.strip())}")
    return override


@lru_cache(maxsize=1)
def _text_keys() -> set[str]:
    """The keys whose values are text, in whatever option of a group."""
    return {
        f"{name}.{key}"
        for name, kinds in SECTIONS.items()
        for schema in kinds.values()
        for key, annotation in declared(schema).items()
        if key != "kind" and accepts_text(annotation)
    }


def _options(group: str, directories: list[Path]) -> list[str]:
    """Names of the files of a group; empty if there is no such group."""
    if not group or "." in group:
        return []
    return sorted({file.stem for directory in directories for file in (directory / group).glob("*.yaml")})


def quoted(text: str) -> str:
    """A string of the override grammar, in double quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${") + '"'


def _composed(arguments: list[str], directories: list[Path], typed: str) -> DictConfig:
    """What Hydra makes of the arguments. `typed` is what the user gave, for messages.

    Raises:
        ConfigError: a group option or a file is missing or broken.
    """
    try:
        with initialize_config_dir(config_dir=str(directories[0]), job_name="outlast", version_base="1.3"):
            composed: DictConfig = hydra_compose("train", arguments)
            return composed
    except MissingConfigException as error:
        group, _, option = (error.missing_cfg_file or "train").rpartition("/")
        raise ConfigError(
            group or "defaults", option, error.options or _options(group, directories) or str(error).partition("\n")[0]
        ) from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{mark.name}, line {mark.line + 1}" if mark else "a file of the configuration"
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError("configuration", place, f"it is not valid YAML: {problem}") from None
    except (HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        raise ConfigError("configuration", typed, _first_line(error.__cause__ or error)) from None


def _plain(composed: DictConfig, typed: str) -> dict[str, Any]:
    """Plain values, interpolations resolved.

    Raises:
        ConfigError: a value can't be resolved.
    """
    try:
        tree = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "configuration"
        raise ConfigError(key, _as_written(composed, key), _first_line(error)) from None
    except ValueError as error:
        raise ConfigError("configuration", typed, _first_line(error)) from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _as_written(composed: DictConfig, key: str) -> Any:
    """The value of a dotted key before interpolation."""
    value: Any = OmegaConf.to_container(composed, resolve=False)
    for part in re.findall(r"[^.\[\]]+", key):
        value = value[int(part)] if isinstance(value, list) else value.get(part)
    return value


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
