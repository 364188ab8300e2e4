"""Reads the data of a run as raw `datasets.Dataset`s, and checks it before anything trains on it.

A row has one of three forms, the same in all rows; other keys are dropped:

======================  ====================================================================
prompt and completion   two strings; the loss is on the completion alone
messages                a chat: a list of `{"role": ..., "content": ...}`, both strings
text                    one string
======================  ====================================================================
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast.config.configuration import Config
from outlast.config.data import HubData, JsonlData, PythonDocs
from outlast.errors import ConfigError, OutlastError

from . import jsonl, python_docs
from .jsonl import form_of, named

if TYPE_CHECKING:
    from datasets import Dataset

CHECKED_LINES = 1000
"""A plan reads as many lines of each file."""


def check(config: Config) -> None:
    """Refuse data that can be seen to be wrong without training libraries, as a plan does on the login node.

    Raises:
        ConfigError: it names the file, the line, what is wrong and what is valid.
    """
    match config.data:
        case JsonlData() as data:
            heads = [list(islice(rows, CHECKED_LINES)) for rows in _files(data)]
            _same_form([rows[0] for rows in heads])
        case HubData() as data if _is_local(data.path) and not Path(data.path or "").expanduser().is_dir():
            raise ConfigError("data.path", data.path, "valid: a directory that exists, or a dataset's name on the hub")


def load(config: Config) -> "tuple[Dataset, Dataset | None]":
    """Load the raw training data, and the evaluation data if the configuration has any.

    Raises:
        ConfigError: a file, a line or a column that is refused.
        OutlastError: the data can't be reached.
    """
    match config.data:
        case PythonDocs() as data:
            return _split(python_docs.pairs(data.max_pairs), data.eval_fraction)
        case JsonlData() as data:
            files = [list(rows) for rows in _files(data)]
            _same_form([rows[0] for rows in files])
            return _dataset(files[0]), _dataset(files[1]) if len(files) > 1 else None
        case HubData() as data:
            return _hub(data)


def texts(dataset: "Dataset") -> Iterator[str]:
    """Yield every string of a raw dataset, in order, to train a tokenizer on."""
    for row in dataset:
        for value in row.values():
            if isinstance(value, str):
                yield value
            else:
                yield from (message["content"] for message in value)


def _split(rows: list[dict[str, str]], fraction: float) -> "tuple[Dataset, Dataset]":
    """Split off the rows whose prompts hash lowest: a row stays on its side when others come or go."""
    count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    digests = {row["prompt"]: hashlib.sha256(b"eval:" + row["prompt"].encode()).digest() for row in rows}
    held_out = set(sorted(digests, key=digests.__getitem__)[:count])
    train = [row for row in rows if row["prompt"] not in held_out]
    return _dataset(train), _dataset([row for row in rows if row["prompt"] in held_out])


def _dataset(rows: list[dict[str, Any]]) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_list(rows)


def _files(data: JsonlData) -> list[Iterator[dict[str, Any]]]:
    paths = (("data.train", data.train), ("data.eval", data.eval))
    return [jsonl.rows(key, Path(path)) for key, path in paths if path]


def _same_form(samples: list[Iterable[str]]) -> None:
    """Refuse evaluation data of another form than the training data: their losses could not be compared."""
    forms = [form_of(sample) for sample in samples]
    if forms[0] != forms[-1]:
        raise ConfigError("data.eval", named(forms[-1]), f"valid: the form of the training data, {named(forms[0])}")


def _is_local(path: str | None) -> bool:
    return str(path).startswith(("/", "./", "../", "~"))


def _hub(data: HubData) -> "tuple[Dataset, Dataset | None]":
    splits = [_read_split(data, data.train_split)]
    if data.eval_split:
        splits.append(_read_split(data, data.eval_split))
    _same_form([split.column_names for split in splits])
    return splits[0], splits[1] if len(splits) > 1 else None


def _read_split(data: HubData, split: str) -> "Dataset":
    import datasets

    directory = Path(data.path or "").expanduser()
    try:
        if any((directory / name).is_file() for name in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(str(directory))
            dataset = (saved if isinstance(saved, datasets.DatasetDict) else {"train": saved})[split]
        else:
            path = str(directory) if directory.is_dir() else data.path
            dataset = datasets.load_dataset(path, data.name, split=split, revision=data.revision)
    except Exception as error:  # the hub's client, its HTTP library and every file format raise their own kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise OutlastError(
            f"data.path: split {split!r} of {data.path!r} can't be loaded: {type(error).__name__}: {reason}. "
            "Check the name and the split; without a network, give a local directory or use data=jsonl."
        ) from error
    form = form_of(dataset.column_names)
    if not form:
        raise ConfigError("data.path", f"{data.path} with columns {dataset.column_names}", jsonl.VALID)
    if not len(dataset):
        raise ConfigError("data.path", f"{data.path}, split {split}", "the split is empty")
    return dataset.select_columns(list(form))
