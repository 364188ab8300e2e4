"""The configuration of a run as a whole: built from plain values, checked, compared, frozen and read back.

`trainer` stays an open mapping: each job checks it against the class that will receive it (TRL's `SFTConfig` for
`job=sft`). What the other sections may hold stands in `sections.py`.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from outlast.errors import ConfigError

from .sections import (
    CheckpointSection,
    Ddp,
    HubData,
    JobSection,
    JsonlData,
    LocalCluster,
    Lora,
    NoPeft,
    PreemptionSection,
    PretrainedModel,
    PythonDocs,
    RunSection,
    SlurmCluster,
    StorageSection,
    TinyModel,
    Zero,
    require,
)

SCHEMAS: dict[str, dict[str, type]] = {
    "model": {"tiny": TinyModel, "pretrained": PretrainedModel},
    "data": {"python_docs": PythonDocs, "jsonl": JsonlData, "hub": HubData},
    "peft": {"lora": Lora, "none": NoPeft},
    "parallel": {"ddp": Ddp, **dict.fromkeys(("zero1", "zero2", "zero3", "zero3_offload"), Zero)},
    "cluster": {"local": LocalCluster, "slurm": SlurmCluster, "devcluster": SlurmCluster},
}
"""Sections whose type depends on the group option chosen, which the section names as `kind`."""

IDENTITY = ("seed", "job", "model", "data", "peft", "parallel", "trainer")
"""Sections that decide the weights: a run directory belongs to one value of them."""


@dataclass(kw_only=True)
class Config:
    """The whole configuration of a run, checked."""

    run: RunSection
    job: JobSection
    model: TinyModel | PretrainedModel
    data: PythonDocs | JsonlData | HubData
    peft: Lora | NoPeft
    parallel: Ddp | Zero
    cluster: LocalCluster | SlurmCluster
    preemption: PreemptionSection
    checkpoint: CheckpointSection
    storage: StorageSection
    seed: int = 42
    trainer: dict[str, Any] = field(default_factory=dict)
    """Passed to the job's trainer as it is (`SFTConfig` for `job=sft`)."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", self.seed, "valid: 0 to 2^32 - 1")

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
        return {section: everything[section] for section in IDENTITY}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in the order of the sections: what `config.yaml` holds."""
        return asdict(self)

    def differences(self, other: "Config") -> dict[str, tuple[Any, Any]]:
        """Dotted keys that decide the weights and differ: `{key: (mine, other's)}`."""
        mine, theirs = _flat(self._compared()), _flat(other._compared())
        keys = [*mine, *(key for key in theirs if key not in mine)]
        return {key: (mine.get(key), theirs.get(key)) for key in keys if mine.get(key) != theirs.get(key)}

    def _compared(self) -> dict[str, Any]:
        """The identity without the number of ranks, which a run adapts to (`world_size.py`)."""
        identity = self.identity()
        parallel = dict(identity["parallel"])
        del parallel["nodes"], parallel["ranks_per_node"]
        return identity | {"parallel": parallel}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def section(name: str, schema: type, values: dict[str, Any]) -> Any:
    """One section as its dataclass.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or one that the dataclass refuses.
    """
    known = {f.name: f.type for f in fields(schema)}
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), _escaped(values)))
    except ConfigKeyError as error:
        names = [key for key in known if key != "kind"]
        place = f"{name}={values['kind']}" if "kind" in values else name
        raise ConfigError(place, error.key, names or "it has no keys of its own") from None
    except OmegaConfBaseException as error:
        key = re.split(r"[.\[]", error.full_key or "")[0]
        if key not in known:
            raise ConfigError(name, values, str(error).partition("\n")[0]) from None
        kind = getattr(known[key], "__name__", str(known[key]))
        raise ConfigError(f"{name}.{key}", values.get(key), f"valid: a value of type {kind}") from None


def _escaped(value: Any) -> Any:
    """A plain value such that OmegaConf takes `${` in its texts (a shell's variables) as it stands."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _mapping(tree: dict[str, Any], name: str) -> dict[str, Any]:
    values = tree.get(name)
    require(values is None or isinstance(values, dict), name, values, "valid: a section with keys of its own")
    return dict(values or {})


def build(tree: dict[str, Any]) -> Config:
    """A checked :class:`Config` from plain values (a composed Hydra configuration, or `config.yaml`).

    Raises:
        ConfigError: it names the key, the value, and what is valid.
    """
    require(isinstance(tree, dict), "configuration", tree, "valid: a mapping of sections")
    known = {f.name for f in fields(Config)}
    for key in tree:
        if key not in known:
            raise ConfigError("configuration", key, known)
    sections: dict[str, Any] = {"seed": tree.get("seed", 42), "trainer": _mapping(tree, "trainer")}
    require(type(sections["seed"]) is int, "seed", sections["seed"], "valid: an integer")
    fixed = {
        "run": RunSection,
        "job": JobSection,
        "preemption": PreemptionSection,
        "checkpoint": CheckpointSection,
        "storage": StorageSection,
    }
    for name, schema in fixed.items():
        sections[name] = section(name, schema, _mapping(tree, name))
    for name, options in SCHEMAS.items():
        values = _mapping(tree, name)
        kind = values.get("kind", next(iter(options)))
        if not isinstance(kind, str) or kind not in options:
            raise ConfigError(name, kind, options)
        sections[name] = section(name, options[kind], values)
    return Config(**sections)


def load(path: Path) -> Config:
    """Read a frozen `config.yaml`.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not hold a configuration.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("config.yaml", str(path), f"it can't be read: {error}") from None
    return build(tree)


def dump(config: Config) -> str:
    """The text of `config.yaml`."""
    return yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)
