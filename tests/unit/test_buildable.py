"""What a plan builds, and which mistakes it finds so."""

import json
from pathlib import Path
from typing import Any

import pytest

from outlast.config.configuration import Config, build
from outlast.errors import ConfigError
from outlast.jobs.training import chat, left_out, models, trainer_arguments
from outlast.launcher.planning.compose import compose

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning:(?!transformers)")

TURN, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def sft(**trainer: Any) -> Config:
    tree = compose([]).as_dict()
    return build({**tree, "trainer": {**tree["trainer"], **trainer}})


@pytest.mark.parametrize(
    ("trainer", "key", "reason"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "trainer.lr_scheduler_kwargs", "min_lr"),
        ({"lr_scheduler_kwargs": {"nonsense": 1}}, "trainer.lr_scheduler_kwargs", "nonsense"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "trainer.lr_scheduler_kwargs", "num_decay_steps"),
        ({"optim": "adamw_bnb_8bit"}, "trainer.optim", "bitsandbytes"),
        ({"optim": "lion_32bit"}, "trainer.optim", "bitsandbytes"),
        ({"optim": "grokadamw"}, "trainer.optim", "grokadamw"),
        ({"metric_for_best_model": "eval_acuracy"}, "trainer.metric_for_best_model", "valid: eval_aux_loss"),
        ({"metric_for_best_model": "eval_los"}, "trainer.metric_for_best_model", "did you mean eval_loss?"),
    ],
)
def test_what_can_not_be_built_is_refused(trainer: dict[str, Any], key: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        trainer_arguments.check(sft(**trainer))
    assert refused.value.key == key


def test_what_can_be_built_passes() -> None:
    minimum = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    for trainer in (minimum, {"optim": "adafactor"}, {"metric_for_best_model": "mean_token_accuracy"}):
        trainer_arguments.check(sft(**trainer))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of a model whose template knows no system messages."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("strict")
    letters = {letter: n for n, letter in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(kinds.BPE(vocab=letters, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m['role'] + ': ' + m['content'] + '<eos>' }}{% endfor %}"
    )
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", chat_template=template).save_pretrained(path)
    LlamaConfig().save_pretrained(path)
    return path


def pretrained(directory: Path, path: Path, rows: list[Any], **trainer: Any) -> Config:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": {"kind": "pretrained", "path": str(directory)}, "data": {"kind": "jsonl", "train": str(path)}}
    return build({**values, "trainer": trainer})


def test_a_row_that_the_template_refuses_is_named(directory: Path, tmp_path: Path) -> None:
    rows = [{"messages": [TURN, ANSWER]}] * 3 + [{"messages": [{"role": "system", "content": "x"}, TURN]}]
    config = pretrained(directory, tmp_path / "train.jsonl", rows)
    tokenizer = models.known_tokenizer(config)
    for look in (
        lambda: chat.check_plan(config, tokenizer),
        lambda: chat.check(config, tokenizer, chat.all_rows(config)),
    ):
        with pytest.raises(ConfigError, match=r"line 4' is refused; .*template refuses it: System role not supported"):
            look()
    other = tmp_path / "other.jinja"
    other.write_text("{{ messages[0]['content'] }}")
    chat.check_plan(pretrained(directory, tmp_path / "train.jsonl", rows, chat_template_path=str(other)), tokenizer)


def test_chats_need_a_template(directory: Path, tmp_path: Path) -> None:
    config = pretrained(directory, tmp_path / "train.jsonl", [{"messages": [TURN, ANSWER]}])

    class Untemplated:
        chat_template = None

    with pytest.raises(ConfigError, match=r"model\.path: .*no chat template.*trainer\.chat_template_path=FILE"):
        chat.check_plan(config, Untemplated())


def test_rows_whose_prompts_fill_the_length_are_foreseen(directory: Path, tmp_path: Path) -> None:
    short, long = ({"prompt": "p" * count, "completion": "c"} for count in (3, 30))
    some = pretrained(directory, tmp_path / "some.jsonl", [short, long, long], max_length=20)
    assert left_out.foreseen(some) == [
        "data.train: 2 of the first 3 rows have prompts that fill trainer.max_length=20 tokens: they are left out"
    ]
    with pytest.raises(
        ConfigError, match=r"max_length: 20 is refused; nothing .* is left of the 2 rows of data\.train"
    ):
        left_out.foreseen(pretrained(directory, tmp_path / "all.jsonl", [long, long], max_length=20))


def test_adapters_for_modules_that_are_not_there_are_refused() -> None:
    from outlast.jobs import sft as job

    config = compose(["peft.target_modules=[q_prj]"])
    with pytest.raises(ConfigError, match=r"peft\.target_modules: .*PEFT says: .*Modules with weights: .*q_proj"):
        job.footprint(config)
