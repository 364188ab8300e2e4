"""The configuration's types and checks: what `build` accepts, and how it says no."""

from dataclasses import MISSING, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from outlast.config.configuration import SECTIONS, Config, build, dump, load
from outlast.config.reference import json_schema
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


@pytest.mark.parametrize(("section", "option"), [(s, o) for s, options in SECTIONS.items() for o in options if o])
def test_each_group_option_is_a_file_with_the_keys_of_its_class(section: str, option: str) -> None:
    values = yaml.safe_load((CONF / section / f"{option}.yaml").read_text())
    schema = SECTIONS[section][option]
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
    for name in ("run", "preemption", "checkpoint", "guard", "storage", "notify"):
        assert tree.pop(name) == defaults_of(SECTIONS[name][""])
    assert tree.pop("seed") == 42
    assert list(tree) == ["defaults"]


@pytest.mark.parametrize(
    ("tree", "key", "valid"),
    [
        ({"foo": 1}, "configuration", "valid: checkpoint, cluster"),
        ({"modle": {}}, "configuration", "did you mean model?"),
        ({"run": {"name": "a/b"}}, "run.name", "directory name"),
        ({"run": {"name": ".."}}, "run.name", "directory name"),
        ({"run": {"name": "é" * 101}}, "run.name", "200 bytes at most"),
        ({"run": 3}, "run", "a section"),
        ({"trainer": [1]}, "trainer", "a section"),
        ({"job": {"name": "sfd"}}, "job.name", "did you mean sft?"),
        ({"seed": "abc"}, "seed", "an integer"),
        ({"seed": True}, "seed", "an integer"),
        ({"seed": -1}, "seed", "an integer from 0 to 4294967295"),
        ({"model": {"kind": "big"}}, "model", "pretrained, tiny"),
        ({"model": {"kind": ["tiny"]}}, "model", "pretrained, tiny"),
        ({"model": {"hidden_size": 100}}, "model.hidden_size", "multiple of 2 * model.heads"),
        ({"model": {"vocab_size": 10}}, "model.vocab_size", "tokens, 300 or more"),
        ({"model": {"layers": "many"}}, "model.layers", "valid: a positive integer"),
        ({"model": {"kind": "pretrained"}}, "model.path", "model=pretrained needs it"),
        ({"model": {"kind": "pretrained", "path": "x", "dtype": "float12"}}, "model.dtype", "did you mean float32?"),
        ({"data": {"max_pairs": 3}}, "data.max_pairs", "valid: a whole number of pairs, 20 or more"),
        ({"data": {"kind": "jsonl"}}, "data.train", "data=jsonl needs it"),
        ({"data": {"kind": "hub"}}, "data.path", "data=hub needs it"),
        ({"peft": {"dropout": 1.0}}, "peft.dropout", "valid: a number from 0 to below 1"),
        ({"peft": {"kind": "none", "r": 3}}, "peft=none", "it has no keys of its own"),
        ({"parallel": {"nodes": 0}}, "parallel.nodes", "positive integer"),
        ({"parallel": {"launch": "mpi"}}, "parallel.launch", "srun"),
        ({"cluster": {"kind": "slurm", "time_min": 0}}, "cluster.time_min", "a positive whole number of minutes"),
        ({"cluster": {"kind": "slurm", "setup": "module load x"}}, "cluster.setup", "valid: a list of texts"),
        ({"preemption": {"led_s": 3}}, "preemption", "did you mean lead_s?"),
        ({"preemption": {"signal": "KILL"}}, "preemption.signal", "TERM, USR1, USR2"),
        ({"preemption": {"lead_s": 1}}, "preemption.lead_s", "valid: a whole number of seconds, 5 or more"),
        ({"preemption": {"lead_s": True}}, "preemption.lead_s", "valid: a whole number of seconds, 5 or more"),
        ({"preemption": {"grace_s": -1}}, "preemption.grace_s", "valid: a number of seconds, 0 or more, or null"),
        ({"cluster": {"kind": "slurm", "partition": True}}, "cluster.partition", "valid: text, or null"),
        ({"cluster": {"kind": "slurm", "sbatch": 3}}, "cluster.sbatch", "valid: a section with keys of its own"),
        ({"storage": {"reserve": "maybe"}}, "storage.reserve", "valid: true or false"),
        ({"checkpoint": {"every_steps": 20}}, "checkpoint.every_steps", "it is checkpoint.every now; valid: auto"),
        ({"checkpoint": {"every_minutes": None}}, "checkpoint.every_minutes", "it is checkpoint.every now"),
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
        (
            {"checkpoint": {"milestone_every": 0}},
            "checkpoint.milestone_every",
            "a positive whole number of steps, or null",
        ),
        ({"checkpoint": {"mtbf_hours": 0}}, "checkpoint.mtbf_hours", "a positive number of hours"),
        ({"checkpoint": {"mtbf_hours": float("nan")}}, "checkpoint.mtbf_hours", "a positive number of hours"),
        ({"checkpoint": {"allow": ["seed", "sed"]}}, "checkpoint.allow", "did you mean seed? valid: config, dataset"),
        ({"checkpoint": {"allow": "seed"}}, "checkpoint.allow", "valid: a list of: config, dataset"),
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
    ],
)
def test_when_to_save_is_auto_or_steps_or_a_time(
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


OLDER = """\
run: {name: x, root: /tmp/runs}
job: {name: sft}
model: {kind: tiny, vocab_size: 4096, hidden_size: 128, layers: 4, heads: 4, max_length: 1024}
data: {kind: python_docs, max_pairs: 3000, eval_fraction: 0.05}
peft: {kind: lora, r: 16, alpha: 32, dropout: 0.05, target_modules: all-linear}
parallel: {kind: ddp, nodes: 1, ranks_per_node: 1, cpus_per_rank: 2, gpus_per_rank: 0, launch: srun}
cluster: {kind: local, requeue_delay_s: 1.0, parallel_cells: 1}
preemption: {signal: USR1, lead_s: 90, grace_s: null, hang_s: 120.0, requeue_delay_s: 5, max_requeues: 1000,
  max_crashes: 2}
checkpoint: {every: auto, every_steps: null, every_minutes: null, milestone_every: null, mtbf_hours: 24.0, allow: []}
storage: {budget_gb: 10.0, sweep_budget_gb: null, reserve: false}
seed: 42
trainer: {max_steps: 120, per_device_train_batch_size: 8, per_device_eval_batch_size: 8,
  gradient_accumulation_steps: 1, learning_rate: 0.002, lr_scheduler_type: cosine, max_length: 256, packing: true,
  gradient_checkpointing: false, logging_steps: 5, eval_strategy: steps, eval_steps: 50, load_best_model_at_end: true,
  metric_for_best_model: eval_loss, report_to: none}
"""
"""The `config.yaml` of a run that was frozen when `checkpoint.every` had two more names."""


@pytest.mark.parametrize(
    ("every", "steps", "seconds"),
    [
        ("every: auto, every_steps: null, every_minutes: null", None, None),
        ("every: auto, every_steps: 20, every_minutes: null", 20, None),
        ("every: auto, every_steps: null, every_minutes: 1.5", None, 90.0),
        ("every: 30min, every_steps: null, every_minutes: 30", None, 1800.0),
    ],
)
def test_an_older_run_is_the_same_run(every: str, steps: int | None, seconds: float | None, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(OLDER.replace("every: auto, every_steps: null, every_minutes: null", every))
    config = load(file)
    assert (config.checkpoint.steps, config.checkpoint.seconds) == (steps, seconds)
    assert config.derived_name == "sft-tiny-python_docs-81680351"
    assert config.digest_of_any_ranks == "d4c8eb439b42dd1f0bb996a3fb7943a16208f2aff7610c6b00e64ef71ead3487"
    file.write_text(dump(config))
    assert load(file) == config


def test_the_json_schema_has_the_keys_their_ranges_and_their_meaning() -> None:
    found = json_schema()
    assert set(found["properties"]) == {field.name for field in fields(Config)}
    lead = found["$defs"]["PreemptionSection"]["properties"]["lead_s"]
    assert (lead["type"], lead["minimum"], lead["default"]) == ("integer", 5, 90)
    for options in SECTIONS.values():
        for schema in options.values():
            keys = found["$defs"][schema.__name__]["properties"]
            assert set(keys) == set(defaults_of(schema))
            assert all(key == "kind" or values["description"].endswith(".") for key, values in keys.items())


def test_texts_become_numbers_and_numbers_names() -> None:
    config = build({"preemption": {"lead_s": "60"}, "run": {"name": 7}, "peft": {"dropout": 0}})
    assert (config.preemption.lead_s, config.run.name) == (60, "7")
    assert repr(config.as_dict()["peft"]["dropout"]) == "0.0"


def test_the_derived_name_follows_what_decides_the_weights() -> None:
    def name(**tree: Any) -> str:
        return build(tree).derived_name

    assert name() == name(storage={"budget_gb": 3}) == name(cluster={"kind": "slurm"})
    assert len({name(), name(seed=1), name(trainer={"max_steps": 3}), name(parallel={"nodes": 2})}) == 4


def test_differences_name_dotted_keys() -> None:
    mine, other = build({"trainer": {"max_steps": 3}}), build({"seed": 1, "storage": {"budget_gb": 1.0}})
    assert mine.differences(other) == {"seed": (42, 1), "trainer.max_steps": (3, None)}
    assert isinstance(mine, Config)
    assert mine.differences(mine) == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("notify.url", "mailto://me:secret@host"),
        ("notify", "json://secret"),
        ("override", "a=1 notify.url=x://secret b=2"),
    ],
)
def test_the_url_of_a_service_is_not_repeated(key: str, value: str) -> None:
    said = str(ConfigError(key, value, "valid: another"))
    assert "secret" not in said
    assert "…" in said
