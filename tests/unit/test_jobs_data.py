"""The data of a run: what is loaded, and what is refused with which words."""

import functools
import json
import re
import shutil
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


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}
TURN = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [CALL]}, "message 1 has 'tool_calls', which is not used"),
        ({"messages": [{**CALL, "content": ""}]}, "message 1 has 'tool_calls', which is not used"),
        ({"messages": [TURN], "tools": [{"type": "function"}]}, "it has 'tools', which is not used"),
        ({"messages": [TURN, {**TURN, "weight": 0}]}, "message 2 has 'weight', which is not used: all are trained on"),
        ({"messages": [{**TURN, "train": False}]}, "message 1 has 'train', which is not used"),
        ({"messages": [{**TURN, "reasoning_content": "hm"}]}, "message 1 has 'reasoning_content', which is not used"),
        ({"messages": [TURN], "images": ["a.png"]}, "it has 'images', which is not used: only text"),
        ({**PAIR, "system": "be kind"}, "it has 'system', which is not used"),
        ({**PAIR, "weight": 0.5}, "it has 'weight', which is not used"),
    ],
)
def test_what_would_change_a_rows_meaning_is_refused(row: dict[str, Any], reason: str, write: Write) -> None:
    config = jsonl(write(row))
    for read in (data.check, data.load):
        with pytest.raises(ConfigError, match=rf"line 1' is refused; {reason}"):
            read(config)


def test_what_is_left_out_is_counted_and_said(write: Write) -> None:
    nothing = {"tools": [], "images": None, "weight": 1, "system": ""}
    turns = [{**TURN, "tool_calls": None, "weight": 1, "name": "x"}]
    config = jsonl(write({"messages": turns, "id": 3, **nothing}, {"messages": [TURN], "id": 4}, CHAT))
    data.check(config)
    said = ["data.train: not used, of 3 rows: 'id' in 2, 'name' of messages in 1"]
    assert data.notes(config) == said
    loaded: list[str] = []
    train, _ = data.load(config, loaded.append)
    assert loaded == said
    assert train[0] == {"messages": [TURN]}
    assert data.notes(jsonl(write({**TEXT, "instruction": "a text is whole"}))) == [
        "data.train: not used, of 1 rows: 'instruction' in 1"
    ]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (
            ["[", '{"instruction": "a", "output": "b"}', "]"],
            r"one JSON array.*: jq -c '\.\[\] \| \{prompt: \(\.instruction",
        ),
        (['[{"text": "a"}, {"text": "b"}]'], r"one JSON array; make each element a line: jq -c '\.\[\]' train\.jsonl"),
        (["{", '"text": "a"', "}"], r"JSON over several lines; write one row a line: jq -c '\.' train\.jsonl"),
        ([b"\x1f\x8b\x08\x00"], r"it is packed \(gzip\); unpack it: gzip -dk train\.jsonl"),
        (["PK\x03\x04"], r"it is packed \(a zip archive\); unpack it: unzip train\.jsonl"),
        (['{"text": "a"}'.encode("utf-16")], r"text in UTF-16; valid: UTF-8 \(iconv"),
        (['{"conversations": [{"from": "human", "value": "a"}]}'], r"ShareGPT's form; to convert: jq -c '\{messages:"),
        (['{"instruction": "a", "input": "", "output": "b"}'], r"Alpaca's form; to convert: jq -c '\{prompt:"),
    ],
)
def test_other_formats_are_named_with_how_to_convert_them(lines: list[Any], reason: str, write: Write) -> None:
    with pytest.raises(ConfigError, match=reason):
        data.check(jsonl(write(*lines)))


@pytest.mark.skipif(shutil.which("jq") is None, reason="there is no jq here")
@pytest.mark.parametrize(
    ("lines", "rows"),
    [
        (
            ['[{"instruction": "Add", "input": "1", "output": "2"},', '{"instruction": "Say", "output": "b"}]'],
            [{"prompt": "Add\n\n1\n", "completion": "2"}, {"prompt": "Say\n", "completion": "b"}],
        ),
        (
            ['{"id": 3, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}'],
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
        ),
    ],
)
def test_the_command_that_converts_does(lines: list[str], rows: list[Any], write: Write, tmp_path: Path) -> None:
    path = write(*lines, name="source.jsonl")
    with pytest.raises(ConfigError) as refused:
        data.check(jsonl(path))
    command = re.search(r"jq -c '[^']+' \S+ > train\.jsonl", str(refused.value))
    assert command is not None
    subprocess.run(["sh", "-c", command[0].replace("FILE", path.name)], cwd=tmp_path, check=True)
    assert data.load(jsonl(tmp_path / "train.jsonl"))[0].to_list() == rows


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
    with pytest.raises(ConfigError, match=r"data\.train: '.*' is refused; valid: a file that exists"):
        data.check(config)


def test_a_plan_reads_the_beginning_and_loads_nothing_heavy(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    config = jsonl(write(*[TEXT] * 1500, "broken"))
    for read in (data.check, data.load):
        with pytest.raises(ConfigError, match="line 1501"):
            read(config)
    monkeypatch.setattr(data, "CHECKED_BYTES", 1000)
    data.check(config)
    assert data.notes(config) == ["data.train: its first 72 rows were checked; the others are when the run starts"]
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


def test_columns_and_messages_of_a_dataset_are_judged_alike(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([{"messages": [{**TURN, "name": "x"}], "id": 1, "tools": None}]).save_to_disk(str(tmp_path / "a"))
    said: list[str] = []
    train, _ = data.load(hub(tmp_path / "a"), said.append)
    assert train.to_list() == [{"messages": [TURN]}]
    assert said == ["data.path, split train: not used, of 1 rows: 'id' in 1, 'name' of messages in 1"]
    Dataset.from_list([{**CHAT, "tools": None}, {**CHAT, "tools": ["t"]}]).save_to_disk(str(tmp_path / "b"))
    with pytest.raises(ConfigError, match=r"split train, row 2' is refused; it has 'tools', which is not used"):
        data.load(hub(tmp_path / "b"))


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
