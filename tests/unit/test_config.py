"""The configuration's types and checks: what `build` accepts, and how it says no."""

from dataclasses import MISSING, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from outlast.config import configuration as module
from outlast.config.configuration import SCHEMAS, Config, build, dump, load
from outlast.errors import ConfigError, Exit

CONF = Path(str(files("outlast.conf")))


def test_an_empty_tree_gives_the_defaults() -> None:
    config = build({})
    assert (config.seed, config.job.name, config.model.kind, config.data.kind) == (42, "sft", "tiny", "python_docs")
    assert config.parallel.world_size == 1
    assert config.storage.budget_bytes == 10_000_000_000
    assert Path(config.run.root).is_absolute()


def defaults_of(schema: type) -> dict[str, Any]:
    return {
        f.name: f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc]
        for f in fields(schema)
    }


@pytest.mark.parametrize(("section", "option"), [(s, o) for s, options in SCHEMAS.items() for o in options])
def test_each_group_option_is_a_file_with_the_keys_of_its_class(section: str, option: str) -> None:
    values = yaml.safe_load((CONF / section / f"{option}.yaml").read_text())
    schema = SCHEMAS[section][option]
    assert values.pop("kind") == option
    values.pop("defaults", None)
    defaults = defaults_of(schema)
    defaults.pop("kind")
    if option == "devcluster":
        assert set(values) <= set(defaults)
    else:
        assert values == defaults


def test_the_fixed_sections_of_the_yaml_hold_the_defaults_of_their_classes() -> None:
    tree = yaml.safe_load((CONF / "train.yaml").read_text())
    classes = {
        "run": module.RunSection,
        "preemption": module.PreemptionSection,
        "checkpoint": module.CheckpointSection,
        "storage": module.StorageSection,
    }
    for name, schema in classes.items():
        assert tree.pop(name) == defaults_of(schema)
    assert tree.pop("seed") == 42
    assert list(tree) == ["defaults"]


@pytest.mark.parametrize(
    ("tree", "key", "valid"),
    [
        ({"foo": 1}, "configuration", "valid: checkpoint, cluster"),
        ({"modle": {}}, "configuration", "did you mean model?"),
        ({"run": {"name": "a/b"}}, "run.name", "directory name"),
        ({"run": {"name": ".."}}, "run.name", "directory name"),
        ({"run": 3}, "run", "a section"),
        ({"trainer": [1]}, "trainer", "a section"),
        ({"job": {"name": "sfd"}}, "job.name", "did you mean sft?"),
        ({"seed": "abc"}, "seed", "an integer"),
        ({"seed": True}, "seed", "an integer"),
        ({"seed": -1}, "seed", "2^32"),
        ({"model": {"kind": "big"}}, "model", "pretrained, tiny"),
        ({"model": {"kind": ["tiny"]}}, "model", "pretrained, tiny"),
        ({"model": {"hidden_size": 100}}, "model.hidden_size", "multiple of 2 * model.heads"),
        ({"model": {"vocab_size": 10}}, "model.vocab_size", "300"),
        ({"model": {"layers": "many"}}, "model.layers", "type int"),
        ({"model": {"kind": "pretrained"}}, "model.path", "model=pretrained needs it"),
        ({"model": {"kind": "pretrained", "path": "x", "dtype": "float12"}}, "model.dtype", "did you mean float32?"),
        ({"data": {"max_pairs": 3}}, "data.max_pairs", "20 or more"),
        ({"data": {"kind": "jsonl"}}, "data.train", "data=jsonl needs it"),
        ({"data": {"kind": "jsonl", "train": "/nowhere.jsonl"}}, "data.train", "a file that exists"),
        ({"data": {"kind": "hub"}}, "data.path", "data=hub needs it"),
        ({"peft": {"dropout": 1.0}}, "peft.dropout", "below 1"),
        ({"peft": {"kind": "none", "r": 3}}, "peft=none", "it has no keys of its own"),
        ({"parallel": {"nodes": 0}}, "parallel.nodes", "positive integer"),
        ({"parallel": {"launch": "mpi"}}, "parallel.launch", "srun"),
        ({"cluster": {"kind": "slurm", "time_min": 0}}, "cluster.time_min", "1 or more"),
        ({"cluster": {"kind": "slurm", "setup": "module load x"}}, "cluster.setup", "type list"),
        ({"preemption": {"led_s": 3}}, "preemption", "did you mean lead_s?"),
        ({"preemption": {"signal": "KILL"}}, "preemption.signal", "TERM, USR1, USR2"),
        ({"preemption": {"lead_s": 1}}, "preemption.lead_s", "5 or more"),
        ({"checkpoint": {"every_steps": 0}}, "checkpoint.every_steps", "positive integer"),
        ({"checkpoint": {"every_steps": 1.5}}, "checkpoint.every_steps", "type int"),
        ({"checkpoint": {"every_steps": True}}, "checkpoint.every_steps", "type int"),
        ({"checkpoint": {"every": 0}}, "checkpoint.every", "auto, a number of steps (500), or a time"),
        ({"checkpoint": {"every": -3}}, "checkpoint.every", "auto, a number of steps"),
        ({"checkpoint": {"every": True}}, "checkpoint.every", "auto, a number of steps"),
        ({"checkpoint": {"every": 1.5}}, "checkpoint.every", "auto, a number of steps"),
        ({"checkpoint": {"every": None}}, "checkpoint.every", "auto, a number of steps"),
        ({"checkpoint": {"every": "Auto"}}, "checkpoint.every", "auto, a number of steps"),
        ({"checkpoint": {"every": "0s"}}, "checkpoint.every", "a time (90s, 30min, 2h)"),
        ({"checkpoint": {"every": "30 days"}}, "checkpoint.every", "a time (90s, 30min, 2h)"),
        ({"checkpoint": {"every": "30min!"}}, "checkpoint.every", "a time (90s, 30min, 2h)"),
        ({"checkpoint": {"every": "9" * 400 + "s"}}, "checkpoint.every", "a time (90s, 30min, 2h)"),
        ({"checkpoint": {"every_minutes": 0}}, "checkpoint.every_minutes", "a positive number of minutes, or null"),
        ({"checkpoint": {"every_minutes": float("inf")}}, "checkpoint.every_minutes", "a positive number of minutes"),
        ({"checkpoint": {"milestone_every": 0}}, "checkpoint.milestone_every", "a positive integer, or null"),
        ({"checkpoint": {"mtbf_hours": 0}}, "checkpoint.mtbf_hours", "a positive number of hours"),
        ({"checkpoint": {"mtbf_hours": float("nan")}}, "checkpoint.mtbf_hours", "a positive number of hours"),
        ({"checkpoint": {"allow": ["seed", "sed"]}}, "checkpoint.allow", "did you mean seed? valid: config, dataset"),
        ({"checkpoint": {"allow": "seed"}}, "checkpoint.allow", "type list"),
        (
            {"checkpoint": {"every": 20, "every_steps": 30}},
            "checkpoint.every_steps",
            "checkpoint.every is 20; give one",
        ),
        ({"checkpoint": {"every": "2h", "every_steps": 30}}, "checkpoint.every_steps", "checkpoint.every is '2h'"),
        ({"checkpoint": {"every": "2h", "every_minutes": 3}}, "checkpoint.every_minutes", "checkpoint.every is '2h'"),
        ({"checkpoint": {"every_steps": 9, "every_minutes": 3}}, "checkpoint.every_minutes", "every_steps is 9"),
        ({"storage": {"budget_gb": float("inf")}}, "storage.budget_gb", "positive number"),
    ],
)
def test_a_refusal_names_the_key_and_what_is_valid(tree: dict[str, Any], key: str, valid: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(tree)
    assert refused.value.exit_code == Exit.REFUSED
    assert refused.value.key == key
    assert str(refused.value).startswith(f"{key}: ")
    assert valid in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("values", "steps", "seconds"),
    [
        ({}, None, None),
        ({"every": "auto"}, None, None),
        ({"every": 20}, 20, None),
        ({"every": "90s"}, None, 90.0),
        ({"every": "1.5min"}, None, 90.0),
        ({"every": "2h"}, None, 7200.0),
        ({"every_steps": 20}, 20, None),
        ({"every": "auto", "every_steps": 20}, 20, None),
        ({"every": 20, "every_steps": 20}, 20, None),
        ({"every_minutes": 1.5}, None, 90.0),
        ({"every": "30min", "every_minutes": 30}, None, 1800.0),
    ],
)
def test_when_to_save_may_be_said_in_several_ways(
    values: dict[str, Any], steps: int | None, seconds: float | None, tmp_path: Path
) -> None:
    config = build({"checkpoint": values})
    (tmp_path / "config.yaml").write_text(dump(config))
    for section in (config.checkpoint, load(tmp_path / "config.yaml").checkpoint):
        assert (section.steps, section.seconds) == (steps, seconds)


def test_what_is_dumped_is_what_is_loaded(tmp_path: Path) -> None:
    config = build({"cluster": {"kind": "slurm", "setup": ["export A=${HOME}", r"echo \${x}"]}, "trainer": {"a": 1e-5}})
    assert config.as_dict()["cluster"]["setup"] == ["export A=${HOME}", r"echo \${x}"]
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("text", ["a: [", "- 1\n", "\xff\xfe: 1"])
def test_a_broken_frozen_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^config"):
        load(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="can't be read"):
        load(tmp_path / "missing.yaml")


def test_the_derived_name_follows_what_decides_the_weights() -> None:
    def name(**tree: Any) -> str:
        return build(tree).derived_name

    assert name() == name(storage={"budget_gb": 3}) == name(cluster={"kind": "slurm"})
    assert len({name(), name(seed=1), name(trainer={"max_steps": 3}), name(parallel={"nodes": 2})}) == 4


def test_differences_name_dotted_keys() -> None:
    mine, other = build({"trainer": {"max_steps": 3}}), build({"seed": 1, "storage": {"budget_gb": 1.0}})
    assert mine.differences(other) == {"seed": (42, 1), "trainer.max_steps": (3, None), "trainer": (None, {})}
    assert isinstance(mine, Config)
    assert mine.differences(mine) == {}
