"""The trainer section against the installed TRL: what is refused before anything starts, and what is made of it."""

from pathlib import Path
from typing import Any

import pytest

from outlast.config.configuration import Config, build
from outlast.errors import ConfigError, Exit
from outlast.huggingface.inexact import INEXACT, refuse_inexact
from outlast.jobs import smoke
from outlast.jobs.training.trainer_arguments import RESERVED, as_arguments, check, hazards, sft_config
from outlast.launcher.planning.compose import compose

# datasets, fsspec and friends warn at import about their own dependencies
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning:(?!transformers)")


def sft(data: dict[str, Any] | None = None, **trainer: Any) -> Config:
    tree = compose([]).as_dict()
    return build({**tree, "data": data or tree["data"], "trainer": {**tree["trainer"], **trainer}})


def refusal(config: Config) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        check(config)
    assert refused.value.exit_code == Exit.REFUSED
    return refused.value


def test_the_defaults_pass_and_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")  # a real SFTConfig would wait here for the second rank
    monkeypatch.setenv("RANK", "0")
    config = sft()
    before = dict(config.trainer)
    check(config)
    assert config.trainer == before
    assert list(tmp_path.iterdir()) == []
    import torch

    assert not torch.distributed.is_initialized()


def test_the_demo_passes() -> None:
    check(compose(["experiment=demo"]))


@pytest.mark.parametrize(
    ("key", "value", "converted"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", 1, 1),
        ("max_steps", "12", 12),
        ("max_steps", 12.0, 12),
        ("packing", "yes", True),
        ("packing", 1, True),
        ("max_length", None, None),
        ("eval_steps", 7, 7),
        ("report_to", ["none"], ["none"]),
        ("lr_scheduler_kwargs", {"num_cycles": 2}, {"num_cycles": 2}),
        ("optim_target_modules", ["a"], ["a"]),
        ("data_seed", 7, 7),
        ("save_total_limit", 2, 2),
        ("trackio_static_space_id", False, False),
    ],
)
def test_values_are_converted_to_the_declared_type(key: str, value: Any, converted: Any) -> None:
    config = sft(**{key: value})
    check(config)
    assert config.trainer[key] == converted
    assert type(config.trainer[key]) is type(converted)


@pytest.mark.parametrize(
    ("key", "value", "valid"),
    [
        ("max_steps", "abc", "a whole number"),
        ("max_steps", 1.5, "a whole number"),
        ("max_steps", True, "a whole number"),
        ("max_steps", None, "a whole number"),
        ("max_steps", {"x": 3}, "a whole number"),
        ("max_steps", 0, "-1 for trainer.num_train_epochs"),
        ("learning_rate", "abc", "a number"),
        ("learning_rate", True, "a number"),
        ("learning_rate", float("nan"), "a finite number"),
        ("packing", 3, "true or false"),
        ("max_length", "long", "a whole number or null"),
        ("max_length", 0, "a positive number"),
        ("label_names", ["a", 3], "a list or null"),
        ("eval_strategy", "never", "epoch, no, steps"),
        ("lr_scheduler_type", "cosin", "did you mean cosine?"),
        ("packing_strategy", "bfdd", "did you mean bfd?"),
        ("per_device_train_batch_size", 0, "a positive number"),
        ("num_train_epochs", 3, "trainer.max_steps=120 decides; set it to -1 as well"),
        ("report_to", "wandbb", "installed here: none, all"),
        ("save_total_limit", 0, "a positive number"),
    ],
)
def test_a_wrong_value_is_refused_by_key(key: str, value: Any, valid: str) -> None:
    error = refusal(sft(**{key: value}))
    assert error.key == f"trainer.{key}"
    assert valid in str(error)


def test_an_unknown_key_gets_close_names_and_where_to_find_all() -> None:
    error = refusal(sft(max_step=3))
    assert (error.key, error.value) == ("trainer", "max_step")
    assert "did you mean max_steps" in str(error)
    assert "help(trl.SFTConfig)" in str(error)
    assert len(str(error)) < 300


@pytest.mark.parametrize("key", [*RESERVED, "hub_model_id"])
def test_a_reserved_key_is_refused_with_what_to_do_instead(key: str) -> None:
    error = refusal(sft(**{key: "x"}))
    assert error.key == f"trainer.{key}"
    assert RESERVED.get(key, "push the run's final/") in str(error)


def test_no_token_is_repeated() -> None:
    assert "hf_secret" not in str(refusal(sft(hub_token="hf_secret")))


INEXACT_EXAMPLES: dict[str, Any] = {
    "save_only_model": True,
    "ignore_data_skip": True,
    "auto_find_batch_size": True,
    "enable_jit_checkpoint": True,
    "resume_from_checkpoint": "checkpoint-7",
    "dataloader_persistent_workers": True,
    "dataloader_in_order": False,
    "train_sampling_strategy": "group_by_length",
    "optim": "galore_adamw_layerwise",
    "accelerator_config.dispatch_batches": True,
    "accelerator_config.split_batches": True,
    "accelerator_config.use_seedable_sampler": False,
}


@pytest.mark.parametrize("key", INEXACT)
def test_what_can_not_be_resumed_exactly_is_refused_by_the_launcher_and_in_a_script_alike(key: str) -> None:
    from transformers import TrainingArguments

    name, _, inner = key.partition(".")
    value = {inner: INEXACT_EXAMPLES[key]} if inner else INEXACT_EXAMPLES[key]
    extra = {"dataloader_num_workers": 1} if name == "dataloader_persistent_workers" else {}
    with pytest.raises(ConfigError) as in_script:
        refuse_inexact(TrainingArguments("unused", use_cpu=True, **{name: value}, **extra))
    assert (in_script.value.key, in_script.value.value) == (key, INEXACT_EXAMPLES[key])
    assert INEXACT[key].valid in str(in_script.value)
    launched = refusal(sft(**{name: value}))
    assert launched.key == f"trainer.{name}"
    assert inner or INEXACT[key].valid in str(launched)


@pytest.mark.parametrize("accepted", [{}, {"accelerator_config": {"even_batches": False}}, {"optim": "adafactor"}])
def test_what_resumes_exactly_is_accepted(accepted: dict[str, Any]) -> None:
    from transformers import TrainingArguments

    refuse_inexact(TrainingArguments("unused", use_cpu=True, **accepted))


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        ({"eval_steps": 2.5}, "must be an integer"),
        ({"logging_steps": 0}, "non-zero --logging_steps"),
        ({"warmup_steps": -1}, "warmup_steps >= 0"),
        ({"fp16": True, "bf16": True}, "At most one of fp16 and bf16"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_num_workers"),
    ],
)
def test_what_transformers_refuses_is_refused_now(trainer: dict[str, Any], says: str) -> None:
    error = refusal(sft(**trainer))
    assert error.key == "trainer"
    assert error.value == trainer
    assert says in str(error)


@pytest.mark.parametrize("key", ["bf16", "fp16", "tf32", "bf16_full_eval"])
def test_what_needs_a_gpu_passes_on_a_login_node(key: str) -> None:
    check(sft(**{key: True}))


def test_evaluation_needs_something_to_evaluate_on(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n')
    jsonl = {"kind": "jsonl", "train": str(file)}
    message = str(refusal(sft(jsonl)))
    assert "data.eval=FILE" in message
    assert "trainer.eval_strategy=no trainer.load_best_model_at_end=false" in message
    assert "data.eval_split=NAME" in str(refusal(sft({"kind": "hub", "path": "x"})))
    assert "no best model" in str(refusal(sft(jsonl, eval_strategy="no")))
    check(sft(jsonl, eval_strategy=False, load_best_model_at_end=False))  # YAML reads a bare no as false
    check(sft({**jsonl, "eval": str(file)}))


def made(tmp_path: Path, **trainer: Any) -> Any:
    config = sft(**trainer)
    check(config)
    return sft_config(config, tmp_path / "out")


def test_what_outlast_fills_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    args = made(tmp_path, save_total_limit=2, learning_rate="1e-4")
    assert (args.output_dir, args.seed, args.use_cpu, args.bf16) == (str(tmp_path / "out"), 42, True, False)
    assert (args.save_strategy, args.save_steps, args.eval_steps) == ("steps", 50, 50)
    assert (args.save_total_limit, args.report_to, args.disable_tqdm, args.ddp_backend) == (2, [], True, None)
    assert args.learning_rate == 1e-4
    assert not (tmp_path / "out").exists()


def test_without_a_best_model_transformers_saves_nothing_by_itself(tmp_path: Path) -> None:
    assert made(tmp_path, load_best_model_at_end=False).save_strategy == "no"
    assert made(tmp_path, eval_strategy="epoch").save_strategy == "epoch"
    assert made(tmp_path, eval_steps=None).save_steps == 5  # evaluates every logging_steps, as transformers would


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize(
    ("trainer", "on"),
    [({}, False), ({"gradient_checkpointing": True}, True), ({"activation_checkpointing": True}, True)],
)
def test_both_names_of_gradient_checkpointing_work(tmp_path: Path, trainer: dict[str, Any], on: bool) -> None:
    args = made(tmp_path, **trainer)
    assert args.gradient_checkpointing is args.activation_checkpointing is on


def test_further_arguments_win(tmp_path: Path) -> None:
    assert sft_config(sft(), tmp_path, use_cpu=True, logging_steps=3).logging_steps == 3


def composed(*overrides: str) -> Config:
    return compose(["model=pretrained", "model.path=nobody/nothing", *overrides])


@pytest.mark.parametrize(("peft", "rate"), [("lora", 2e-4), ("none", 2e-5)])
def test_a_pretrained_model_has_defaults_of_its_own(peft: str, rate: float) -> None:
    config = composed(f"peft={peft}")
    check(config)
    assert config.trainer["learning_rate"] == rate
    assert config.trainer["max_steps"] == -1, "epochs decide"
    assert config.trainer["warmup_steps"] == 0.03
    assert (config.trainer["max_length"], config.trainer["packing"]) == (1024, False)
    assert hazards(config) == []


def test_what_is_typed_goes_before_these_defaults() -> None:
    config = composed("trainer.learning_rate=1e-4", "trainer.max_steps=1000", "peft=none")
    check(config)
    assert (config.trainer["learning_rate"], config.trainer["max_steps"]) == (1e-4, 1000)
    config = composed("trainer.num_train_epochs=1")
    check(config)
    assert config.trainer["num_train_epochs"] == 1


def test_a_model_file_of_ones_own_begins_with_them_too(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [pretrained]\npath: nobody/nothing\n")
    assert compose(["model=mine"], config_dir=tmp_path).trainer == composed().trainer


def test_the_tiny_model_has_its_own_and_its_head_is_trained() -> None:
    config = compose([])
    assert (config.trainer["learning_rate"], config.trainer["max_steps"]) == (0.002, 120)
    assert getattr(config.peft, "modules_to_save", None) == ["lm_head"]
    assert getattr(composed().peft, "modules_to_save", None) is None


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["trainer.learning_rate=0.002"],
            "learning_rate=0.002 is likely to destroy what the model knows; for adapters",
        ),
        (["peft=none", "trainer.learning_rate=2e-4"], "for full fine-tuning of a pretrained model, 2e-05 is usual"),
        (["trainer.learning_rate=2e-8"], "will hardly change the model"),
    ],
)
def test_a_rate_that_is_clearly_wrong_for_a_pretrained_model_is_pointed_out(overrides: list[str], says: str) -> None:
    (hazard,) = hazards(composed(*overrides))
    assert says in hazard


def test_other_optimizers_have_other_rates() -> None:
    assert hazards(composed("trainer.learning_rate=0.01", "trainer.optim=adafactor")) == []


def test_trackers_are_those_of_both_keys(tmp_path: Path) -> None:
    config = compose(["tracking=[tensorboard,wandb]", "trainer.report_to=[tensorboard,none]"])
    assert as_arguments(config, tmp_path, cuda=False, bf16=False)["report_to"] == ["tensorboard", "wandb"]
    assert as_arguments(compose([]), tmp_path, cuda=False, bf16=False)["report_to"] == ["none"]
    config = compose(["tracking=tensorboard", "trainer.report_to=all"])
    assert as_arguments(config, tmp_path, cuda=False, bf16=False)["report_to"] == ["all"]
    with pytest.raises(ConfigError, match="tracking: 'tensorboard' is refused; valid for job=smoke"):
        smoke.check(compose(["job=smoke", "tracking=tensorboard"]))
