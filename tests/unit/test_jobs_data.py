"""The data of a run: what is loaded, and what is refused with which words."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import outlast.config.configuration
from outlast.errors import ConfigError, OutlastError
from outlast.jobs.training import data, python_docs

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file from lines: dictionaries as JSON, bytes and strings as they are."""

    def _write(*lines: Any, name: str = "train.jsonl") -> Path:
        encoded = [json.dumps(line) if isinstance(line, dict | list) else line for line in lines]
        raw = [line if isinstance(line, bytes) else line.encode() for line in encoded]
        path = tmp_path / name
        path.write_bytes(b"\n".join(raw) + b"\n")
        return path

    return _write


def jsonl(train: Path, evaluation: Path | None = None) -> outlast.config.configuration.Config:
    return outlast.config.configuration.build(
        {"data": {"kind": "jsonl", "train": str(train), "eval": evaluation and str(evaluation)}}
    )


def hub(path: Path | str, **values: Any) -> outlast.config.configuration.Config:
    return outlast.config.configuration.build({"data": {"kind": "hub", "path": str(path), **values}})


# Python's documentation


@pytest.fixture(scope="module", autouse=True)
def read_afresh() -> Iterator[Callable[..., Any]]:
    """The standard library's sources are parsed once for all tests; this is what parses them again."""
    read = python_docs._docstrings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_docs, "_docstrings", functools.cache(lambda root: tuple(read(root))))
        yield read


def test_python_docs_are_many_clean_and_repeatable(
    read_afresh: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = python_docs.pairs(3000)
    monkeypatch.setattr(python_docs, "_docstrings", read_afresh)
    assert pairs == python_docs.pairs(3000)
    assert len(pairs) == 3000
    prompts = [pair["prompt"] for pair in pairs]
    assert prompts == sorted(set(prompts))
    assert all(prompt.endswith("\n") for prompt in prompts)
    completions = [pair["completion"] for pair in pairs]
    assert len(set(completions)) == 3000
    assert all(20 <= len(text) <= 2000 and text == text.strip() for text in completions)


def test_python_docs_hold_topics_modules_classes_and_functions() -> None:
    prompts = {pair["prompt"] for pair in python_docs.pairs(10**6)}
    assert {
        "Explain the Python topic `assignment`.\n",
        "What is the Python module `json` for?\n",
        "What is `collections.Counter`?\n",
        "What does `shutil.copytree` do?\n",
        "What does `pathlib.Path.read_text` do?\n",
    } <= prompts


def test_python_docs_without_sources_say_so(tmp_path: Path) -> None:
    with pytest.raises(OutlastError, match=r"topics\.py is missing.*data=jsonl"):
        python_docs.pairs(20, source=tmp_path)


def test_python_docs_are_split_by_fraction_and_without_overlap() -> None:
    config = outlast.config.configuration.build({"data": {"max_pairs": 200, "eval_fraction": 0.1}})
    train, evaluation = data.load(config)
    assert evaluation is not None
    assert (len(train), len(evaluation)) == (180, 20)
    assert not set(train["prompt"]) & set(evaluation["prompt"])
    again, _ = data.load(config)
    assert again.to_list() == train.to_list()


# JSON Lines

PAIR = {"prompt": "a", "completion": "b"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "é\u2028b"}]}
TEXT = {"text": "a"}


@pytest.mark.parametrize("row", [PAIR, CHAT, TEXT])
def test_the_three_forms_are_loaded(row: dict[str, Any], write: Write) -> None:
    config = jsonl(write({**row, "id": 1}, row), write(row, name="eval.jsonl"))
    data.check(config)
    train, evaluation = data.load(config)
    assert evaluation is not None
    assert train.to_list() == [row, row]
    assert evaluation.to_list() == [row]
    assert list(data.texts(evaluation)) == (["a", "b"] if row is PAIR else ["a"] if row is TEXT else ["a", "é\u2028b"])


def test_bom_blank_lines_crlf_and_raw_line_separators_are_read(write: Write) -> None:
    path = write(b"\xef\xbb\xbf" + b'{"text": "a"}\r', b"", b"  \r", '{"text": "é\u2028b"}')
    train, evaluation = data.load(jsonl(path))
    assert train.to_list() == [{"text": "a"}, {"text": "é\u2028b"}]
    assert evaluation is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a"', r"not JSON \(Expecting ',' delimiter at column 15\)"),
        (b'{"text": "\xff"}', "not text in UTF-8"),
        (r'{"text": "\ud800"}', "not text in UTF-8"),
        ("[" * 100_000, "not JSON that can be read"),
        ('["a"]', "it is a list, not an object"),
        ('"a"', "it is a string, not an object"),
        ("null", "it is null, not an object"),
        ("{}", "it has no keys"),
        ('{"prompt": "a", "answer": "b"}', "it has 'prompt', 'answer', which is none of the forms"),
        ('{"prompt": "a", "completion": null}', "its 'completion' is null, not a string"),
        ('{"prompt": "a", "completion": 7}', "its 'completion' is a number, not a string"),
        ('{"text": true}', "its 'text' is a boolean, not a string"),
        ('{"messages": []}', "its 'messages' is an empty list, not a list of messages"),
        ('{"messages": "a"}', "its 'messages' is a string"),
        ('{"messages": ["a"]}', "message 1 is a string, not an object"),
        ('{"messages": [{"role": "user"}]}', "message 1 has null as its 'content'"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "message 1 has a list as its 'content'"),
        ('{"prompt": "a", "completion": "b"}', "it has prompt and completion, but the lines before have text"),
    ],
)
def test_a_malformed_line_is_refused_with_its_number(line: Any, reason: str, write: Write) -> None:
    config = jsonl(write(TEXT, "", line))
    for read in (data.check, data.load):
        with pytest.raises(ConfigError, match=reason) as refused:
            read(config)
        assert "data.train: " in str(refused.value)
        assert "train.jsonl, line 3" in str(refused.value)
        assert 'valid, the same in all lines: {"prompt"' in str(refused.value)


def test_an_empty_file_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"data\.eval: .*eval\.jsonl.*the file is empty"):
        data.check(jsonl(write(TEXT), write("", name="eval.jsonl")))


def test_evaluation_data_of_another_form_is_refused(write: Write) -> None:
    config = jsonl(write(TEXT), write(PAIR, name="eval.jsonl"))
    for read in (data.check, data.load):
        with pytest.raises(ConfigError, match=r"data\.eval: 'prompt and completion'.*training data, text"):
            read(config)


def test_a_file_that_is_gone_is_refused(write: Write) -> None:
    path = write(TEXT)
    config = jsonl(path)
    path.unlink()
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        data.load(config)


def test_a_plan_reads_the_beginning_and_loads_nothing_heavy(write: Write) -> None:
    data.check(jsonl(write(*[TEXT] * data.CHECKED_LINES, "broken")))
    with pytest.raises(ConfigError, match="line 1001"):
        data.load(jsonl(write(*[TEXT] * data.CHECKED_LINES, "broken")))
    program = "import sys, outlast.jobs.training.data; sys.exit(bool({'torch', 'datasets'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], check=True)


# Hub


def test_a_saved_dataset_is_loaded_and_other_columns_are_dropped(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"id": 1, "prompt": "a", "completion": "b"}] * 3)
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(str(tmp_path / "both"))
    config = hub(tmp_path / "both", eval_split="test")
    data.check(config)
    train, evaluation = data.load(config)
    assert evaluation is not None
    assert train.to_list() == [PAIR] * 3
    assert evaluation.to_list() == [PAIR]
    with pytest.raises(OutlastError, match="split 'validation' of"):
        data.load(hub(tmp_path / "both", eval_split="validation"))


def test_a_saved_dataset_without_splits_is_its_train_split(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([CHAT]).save_to_disk(str(tmp_path / "one"))
    train, evaluation = data.load(hub(tmp_path / "one"))
    assert (train.to_list(), evaluation) == ([CHAT], None)
    with pytest.raises(OutlastError, match="split 'test' of"):
        data.load(hub(tmp_path / "one", eval_split="test"))


def test_columns_of_no_form_are_refused(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([{"question": "a"}]).save_to_disk(str(tmp_path / "one"))
    with pytest.raises(ConfigError, match=r"data\.path: .*'question'.*valid, the same"):
        data.load(hub(tmp_path / "one"))


def test_a_directory_that_does_not_exist_is_refused_at_plan_time() -> None:
    with pytest.raises(ConfigError, match="a directory that exists"):
        data.check(hub("/nowhere/at/all"))
    data.check(hub("somebody/something"))


def test_without_a_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OutlastError, match=r"'nobody/nothing' can't be loaded.*use data=jsonl"):
        data.load(hub("nobody/nothing"))
