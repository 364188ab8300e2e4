"""Composing with Hydra: what may be typed, and how each mistake is answered."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from outlast.config.configuration import build
from outlast.errors import ConfigError, Exit
from outlast.launcher.planning.compose import compose


def refusal(*overrides: str, config_dir: Path | None = None) -> str:
    with pytest.raises(ConfigError) as refused:
        compose(overrides, config_dir=config_dir)
    assert refused.value.exit_code == Exit.REFUSED
    message = str(refused.value)
    assert "\n" not in message
    assert "HYDRA_FULL_ERROR" not in message
    assert not GlobalHydra.instance().is_initialized()
    return message


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's own configuration directory, its name hard to quote."""
    directory = tmp_path / "my conf, it's"
    (directory / "experiment").mkdir(parents=True)
    (directory / "model").mkdir()
    return directory


def test_the_defaults_compose_and_get_a_name() -> None:
    config = compose([])
    assert config.run.name == config.derived_name
    assert config.checkpoint.every == "auto"
    assert config.trainer["eval_steps"] == 50  # evaluations belong to steps, however saves are spaced
    assert "seed" not in config.trainer
    peft = {"kind": "lora", "modules_to_save": ["lm_head"]}
    expected = build({"run": {"name": config.run.name}, "peft": peft, "trainer": config.trainer})
    assert config == expected


def test_composing_twice_gives_the_same_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose(["seed=3"]) == compose(["seed=3"])
    assert list(tmp_path.iterdir()) == []
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize("text", ["experiment=demo", "+experiment=demo", "experiment=[demo]"])
def test_an_experiment_is_a_whole_run(text: str) -> None:
    config = compose([text])
    assert (config.run.name, config.checkpoint.steps, config.trainer["max_steps"]) == ("demo", 20, 60)
    assert config.trainer["eval_steps"] == 20
    assert compose([text, "trainer.max_steps=7", "job=sft"]).trainer["max_steps"] == 7


def test_values_and_groups_are_chosen_without_a_plus() -> None:
    config = compose(
        [
            "model=pretrained",
            "model.path=/x",
            "job=smoke",
            "trainer.something_new=1",
            "cluster=slurm",
            "cluster.sbatch.reservation=r",
            "checkpoint.every=30min",
            "checkpoint.allow=[seed,config]",
            r"cluster.setup=['export A=\${HOME}']",
            "peft=none",
            "~trainer.step_s",
            "experiment=null",
        ]
    )
    tree = config.as_dict()
    assert tree["model"]["path"] == "/x"
    assert tree["job"] == {"name": "smoke"}
    assert tree["trainer"]["something_new"] == 1
    assert tree["trainer"]["dataset_size"] == 256
    assert "step_s" not in tree["trainer"]
    assert tree["cluster"]["sbatch"] == {"reservation": "r"}
    assert tree["cluster"]["setup"] == ["export A=${HOME}"]
    assert tree["peft"] == {"kind": "none"}
    assert (config.checkpoint.seconds, tree["checkpoint"]["allow"]) == (1800.0, ["seed", "config"])


def test_the_devcluster_is_a_slurm_cluster() -> None:
    cluster = compose(["cluster=devcluster", "cluster.mem_gb=2"]).as_dict()["cluster"]
    assert (cluster["kind"], cluster["partition"], cluster["time_min"], cluster["mem_gb"]) == (
        "devcluster",
        "low",
        60,
        2,
    )


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("foo", "override", "valid: key=value"),
        ("", "override", "valid: key=value"),
        ("=3", "override", "valid: key=value"),
        ("~", "override", "valid: key=value"),
        ("trainer.max_steps", "override", "valid: key=value"),
        ("data.train=/a(b", "data.train", "put special characters in quotes: 'data.train=\"/a(b\"'"),
        ("run.name=${", "run.name", "put special characters in quotes"),
        ("model=big", "model", "valid: pretrained, tiny"),
        ("model=pretraind", "model", "did you mean pretrained?"),
        ("model=null", "model", "valid: pretrained, tiny"),
        ("model=3", "model", "valid: pretrained, tiny"),
        ("model=", "model", "valid: pretrained, tiny"),
        ("model={kind: tiny}", "model", "valid: pretrained, tiny"),
        ("~model", "model", "choose one instead"),
        ("model@x=tiny", "model", "choose one instead"),
        ("experiment=nope", "experiment", "valid: demo"),
        ("modle=tiny", "configuration", "did you mean model?"),
        ("foo.bar=1", "configuration", "valid: checkpoint, cluster"),
        ("model/tiny=1", "configuration", "did you mean model?"),
        ("preemption.led_s=3", "preemption", "did you mean lead_s? valid: "),
        ("preemption=3", "preemption", "a section"),
        ("preemption.lead_s=soon", "preemption.lead_s", "a whole number of seconds, 5 or more"),
        ("seed=1.5", "seed", "an integer"),
        ("seed=1,2", "seed", "not a sweep"),
        ("seed=range(1,3)", "seed", "not a sweep"),
        ("model=tiny,pretrained", "model", "not a sweep"),
        ("run.name=${nope}", "run.name", "Interpolation key 'nope' not found"),
        ("run.name=${oc.env:OUTLAST_NOPE}", "run.name", "'OUTLAST_NOPE' not found"),
        ("cluster.setup=[${nope}]", "cluster.setup[0]", "Interpolation key 'nope' not found"),
        ("run.name=???", "run.name", "Missing mandatory value"),
        ("~trainer.nope", "configuration", "'trainer.nope' does not exist"),
        ("hydra.run.dir=x", "hydra.run.dir", "no effect"),
        ("cluster.partition=low", "cluster=local", "requeue_delay_s"),
        ("model=pretrained", "model.path", "model=pretrained needs it"),
    ],
)
def test_a_mistake_is_answered_in_one_line(override: str, key: str, hint: str) -> None:
    message = refusal(override)
    assert message.startswith(f"{key}: ")
    assert hint in message


def test_a_directory_of_the_users_own_adds_options(mine: Path) -> None:
    (mine / "experiment" / "night.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: wide\nseed: 7\ntrainer: {max_steps: 9}\n"
    )
    (mine / "model" / "wide.yaml").write_text("kind: tiny\nhidden_size: 256\n")
    config = compose(["experiment=night"], config_dir=mine)
    assert (config.seed, config.trainer["max_steps"], config.as_dict()["model"]["hidden_size"]) == (7, 9, 256)
    assert "valid: demo, night" in refusal("experiment=day", config_dir=mine)


def test_mistakes_in_the_users_own_files_name_the_file(mine: Path) -> None:
    files = {
        "broken": "a: [1\n",
        "twice": "seed: 1\nseed: 2\n",
        "option": "# @package _global_\ndefaults:\n  - override /model: big\n",
        "group": "# @package _global_\ndefaults:\n  - override /nope: big\n",
        "missing": "# @package _global_\ntrainer: {extra: '???'}\n",
        "key": "# @package _global_\ncheckpoint: {evry: 3}\n",
        "header": "seed: 3\n",
        "other": "# @package _global_\ndefaults:\n  - nope\n",
    }
    for name, text in files.items():
        (mine / "experiment" / f"{name}.yaml").write_text(text)
    messages = {name: refusal(f"experiment={name}", config_dir=mine) for name in files}
    assert "broken.yaml, line 2" in messages["broken"]
    assert "not valid YAML" in messages["broken"]
    assert "duplicate key seed" in messages["twice"]
    assert messages["option"] == "model: 'big' is refused; valid: pretrained, tiny"
    assert "nope" in messages["group"]
    assert messages["missing"].startswith("trainer.extra: '???'")
    assert messages["key"].startswith("checkpoint: 'evry' is refused; did you mean every? valid: allow, every")
    assert messages["header"].endswith("must begin with the line '# @package _global_'")
    assert messages["other"].startswith("experiment: 'nope'")


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    assert refusal(config_dir=tmp_path / "nope").startswith("config_dir: ")


def test_composing_imports_no_torch() -> None:
    code = "import sys; from outlast.launcher.planning.compose import compose; compose([])"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ), timeout=60)


def test_data_without_an_evaluation_split_turns_the_default_evaluation_off(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"text": "a"}\n')
    overrides = ["data=jsonl", f"data.train={file}"]
    assert compose(overrides).trainer["eval_strategy"] == "no"
    assert compose(overrides).trainer["load_best_model_at_end"] is False
    assert compose([*overrides, "trainer.eval_strategy=steps"]).trainer["eval_strategy"] == "steps"
    assert compose([*overrides, f"data.eval={file}"]).trainer["eval_strategy"] == "steps"


@pytest.mark.parametrize("name", ["12e4567", "1e5", "007", "1_000", "0x10", "nan", "true"])
def test_what_looks_like_a_number_is_a_name(name: str, tmp_path: Path) -> None:
    assert compose(["job=smoke", f"run.name={name}"]).run.name == name
    assert compose(["job=smoke", "cluster=slurm", f"cluster.account={name}"]).cluster.account == name  # type: ignore[union-attr]
    assert compose(["job=smoke", f'run.name="{name}"']).run.name == name


def test_a_number_in_a_file_where_text_is_wanted_has_to_be_quoted() -> None:
    with pytest.raises(ConfigError, match=r"run\.name: 100000\.0 is refused; .*put it in quotes"):
        build({"run": {"name": 1e5}})
