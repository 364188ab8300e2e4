"""The configuration of a run as a whole: built from plain values, checked, compared, frozen and read back.

`trainer` stays an open mapping: each job checks it against the class that will receive it (TRL's `SFTConfig` for
`job=sft`). What the other sections may hold stands in the module of each.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml

from outlast.errors import ConfigError
from outlast.files import parse_yaml

from .checkpoint import CheckpointSection
from .cluster import LocalCluster, SlurmCluster
from .data import HubData, JsonlData, PythonDocs
from .guard import GuardSection
from .model import Lora, NoPeft, PretrainedModel, TinyModel
from .notify import NotifySection
from .parallel import Ddp, Zero
from .preemption import PreemptionSection
from .run import JobSection, RunSection
from .section import Number, Section, declared, require, section
from .storage import StorageSection
from .tracking import TrackingSection
from .trainer_keys import deciding

IDENTITY = ("seed", "job", "model", "data", "peft", "parallel", "trainer")
"""Sections that decide the weights: a run directory belongs to one value of them."""


@dataclass(kw_only=True)
class Config(Section):
    """The whole configuration of a run, checked."""

    run: RunSection = field(default_factory=RunSection)
    job: JobSection = field(default_factory=JobSection)
    model: TinyModel | PretrainedModel = field(default_factory=TinyModel)
    data: PythonDocs | JsonlData | HubData = field(default_factory=PythonDocs)
    peft: Lora | NoPeft = field(default_factory=Lora)
    parallel: Ddp | Zero = field(default_factory=Ddp)
    cluster: LocalCluster | SlurmCluster = field(default_factory=LocalCluster)
    preemption: PreemptionSection = field(default_factory=PreemptionSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    storage: StorageSection = field(default_factory=StorageSection)
    notify: NotifySection = field(default_factory=NotifySection)
    guard: GuardSection = field(default_factory=GuardSection)
    tracking: TrackingSection = field(default_factory=TrackingSection)
    seed: Annotated[int, Number(ge=0, le=2**32 - 1)] = 42
    """Seed of the weights, the order of the data, and dropout."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Arguments of the job's trainer, passed on as they are (`SFTConfig` for `job=sft`) and checked against it."""

    @property
    def directory(self) -> Path:
        """The run directory, absolute."""
        return Path(self.run.root) / (self.run.name or self.derived_name)

    @property
    def derived_name(self) -> str:
        """Name of a run that was given none: what it is, and eight digits of what decides its weights."""
        return f"{self.job.name}-{self.model.kind}-{self.data.kind}-{self.digest[:8]}"

    @property
    def digest(self) -> str:
        """Of what decides the weights: 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True, default=str).encode()).hexdigest()

    @property
    def digest_of_any_ranks(self) -> str:
        """The same, whatever the number of ranks: a run adapts to that."""
        return hashlib.sha256(json.dumps(self._compared(), sort_keys=True, default=str).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """The sections that decide the weights, as plain values."""
        everything = self.as_dict()
        del everything["parallel"]["launch"]  # whoever starts the ranks, they do the same
        if everything["peft"].get("modules_to_save") is None:
            everything["peft"].pop("modules_to_save", None)  # a run from before there was this key stays the same run
        return {section: everything[section] for section in IDENTITY}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in the order of the sections: what `config.yaml` holds."""
        return asdict(self)

    def flat(self) -> dict[str, Any]:
        """All values by dotted key."""
        return _flat(self.as_dict())

    def differences(self, other: "Config") -> dict[str, tuple[Any, Any]]:
        """Dotted keys that decide the weights and differ: `{key: (mine, other's)}`."""
        mine, theirs = (one._compared() | {"trainer": deciding(one.trainer)} for one in (self, other))
        return _differences(mine, theirs)

    def all_differences(self, other: "Config") -> dict[str, tuple[Any, Any]]:
        """The same of all keys, but for the place of the run, which may have been moved."""
        return _differences(self.as_dict() | {"run": {}}, other.as_dict() | {"run": {}})

    def _compared(self) -> dict[str, Any]:
        """The identity without the number of ranks, which a run adapts to (`ranks/layout.py`)."""
        identity = self.identity()
        parallel = dict(identity["parallel"])
        del parallel["nodes"], parallel["ranks_per_node"]
        return identity | {"parallel": parallel}


def _differences(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    mine, theirs = _flat(mine), _flat(theirs)
    keys = [*mine, *(key for key in theirs if key not in mine)]
    return {key: (mine.get(key), theirs.get(key)) for key in keys if mine.get(key) != theirs.get(key)}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


SECTIONS: dict[str, dict[str, type[Section]]] = {
    name: {kind: schema for schema in get_args(annotation) for kind in get_args(declared(schema)["kind"])}
    or {"": annotation}
    for name, annotation in declared(Config).items()
    if name not in ("seed", "trainer")
}
"""The classes of each section: by the group option chosen, which the section names as `kind`, or one, under ""."""


def build(tree: dict[str, Any]) -> Config:
    """A checked :class:`Config` from plain values (a composed Hydra configuration, or `config.yaml`).

    Raises:
        ConfigError: it names the key, the value, and what is valid.
    """
    require(isinstance(tree, dict), "configuration", tree, "valid: a mapping of sections")
    checked: dict[str, Any] = {key: value for key, value in tree.items() if key != "trainer" or value is not None}
    for name, options in SECTIONS.items():
        values = {} if tree.get(name) is None else tree[name]
        require(isinstance(values, dict), name, values, "valid: a section with keys of its own")
        kind = "" if "" in options else values.get("kind", next(iter(options)))
        if not isinstance(kind, str) or kind not in options:
            raise ConfigError(name, kind, options)
        checked[name] = section(name, options[kind], values)
    return section("", Config, checked)


def load(path: Path) -> Config:
    """Read a frozen `config.yaml`.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not hold a configuration.
    """
    try:
        tree = parse_yaml(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("config.yaml", str(path), f"it can't be read: {error}") from None
    saving = tree.get("checkpoint") if isinstance(tree, dict) else None
    if isinstance(saving, dict):  # runs frozen before `every` said it all
        steps, minutes = saving.pop("every_steps", None), saving.pop("every_minutes", None)
        if saving.get("every", "auto") == "auto" and (steps or minutes):
            saving["every"] = steps or f"{minutes:f}min"
    return build(tree)


def dump(config: Config) -> str:
    """The text of `config.yaml`."""
    return yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)
