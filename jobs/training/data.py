"""Reads the data of a run as raw `datasets.Dataset`s, and checks it before anything trains on it.

A row has one of three forms, the same in all rows. What else it holds is left out and counted, or refused if the row
would mean something else without it (`unused.py`):

======================  ====================================================================
prompt and completion   two strings; the loss is on the completion alone
messages                a chat: a list of `{"role": ..., "content": ...}`, both strings
text                    one string
======================  ====================================================================
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast.config.configuration import Config
from outlast.config.data import HubData, JsonlData, PythonDocs
from outlast.errors import ConfigError, OutlastError

from . import jsonl, python_docs
from .jsonl import form_of, named
from .other_formats import conversion
from .unused import Unused, is_chat

if TYPE_CHECKING:
    from datasets import Dataset

CHECKED_BYTES = 64_000_000
"""A plan reads as much of each file, in about two seconds; the first attempt reads all of it."""


def check(config: Config) -> None:
    """Refuse data that can be seen to be wrong without training libraries, as a plan does on the login node.

    Raises:
        ConfigError: it names the file, the line, what is wrong and what is valid.
    """
    match config.data:
        case JsonlData() as data:
            _same_form([head.rows[0][1] for head in heads(data)])
        case HubData() as data if _is_local(data.path) and not Path(data.path or "").expanduser().is_dir():
            raise ConfigError(
                "data.path", data.path, "valid: a directory that exists, or a dataset's name on the hub"
            ) from FileNotFoundError(data.path)


def notes(config: Config) -> list[str]:
    """Say what of the data is not trained on, and what a plan has not looked at."""
    if not isinstance(config.data, JsonlData):
        return []
    found = heads(config.data)
    return [note for head in found for note in head.unused.notes(head.key)] + [
        f"{head.key}: its first {len(head.rows)} rows were checked; the others are when the run starts"
        for head in found
        if not head.whole
    ]


@dataclass(frozen=True)
class Head:
    """The beginning of a file, or all of it."""

    key: str
    """What names the file in the configuration."""
    rows: list[tuple[int, dict[str, Any]]]
    """Line numbers and rows."""
    unused: Unused
    whole: bool


def heads(data: JsonlData) -> list[Head]:
    """Read the beginnings of the files, once for all the cells of a sweep.

    Raises:
        ConfigError: a line of them is refused.
    """
    found = []
    for key, path in _files(data):
        if not path.is_file():
            raise ConfigError(key, str(path), "valid: a file that exists")
        try:
            stat = path.stat()
        except OSError as error:
            raise ConfigError(key, str(path), f"it can't be read: {error.strerror}") from None
        found.append(_head(key, path, stat.st_mtime_ns, stat.st_size, CHECKED_BYTES))
    return found


@lru_cache(maxsize=8)
def _head(key: str, path: Path, mtime_ns: int, size: int, limit: int) -> Head:
    unused = Unused()
    lines = jsonl.rows(key, path, unused)
    if size <= limit:
        return Head(key, list(lines), unused, True)
    with open(path, "rb") as file:
        count = sum(1 for _ in iter(lambda: file.tell() < limit and file.readline(), False))
    return Head(key, list(islice(lines, count)), unused, False)


def load(config: Config, note: Callable[[str], None] = lambda _: None) -> "tuple[Dataset, Dataset | None]":
    """Load the raw training data, and the evaluation data if the configuration has any.

    Args:
        note: told, in words, what of the data is not trained on.

    Raises:
        ConfigError: a file, a line or a column that is refused.
        OutlastError: the data can't be reached.
    """
    match config.data:
        case PythonDocs() as data:
            return _split(python_docs.pairs(data.max_pairs), data.eval_fraction)
        case JsonlData() as data:
            files = []
            for key, path in _files(data):
                unused = Unused()
                files.append([row for _, row in jsonl.rows(key, path, unused)])
                for text in unused.notes(key):
                    note(text)
            _same_form([rows[0] for rows in files])
            return _dataset(files[0]), _dataset(files[1]) if len(files) > 1 else None
        case HubData() as data:
            return _hub(data, note)


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


def _files(data: JsonlData) -> list[tuple[str, Path]]:
    return [(key, Path(path)) for key, path in (("data.train", data.train), ("data.eval", data.eval)) if path]


def _same_form(samples: list[Iterable[str]]) -> None:
    """Refuse evaluation data of another form than the training data: their losses could not be compared."""
    forms = [form_of(sample) for sample in samples]
    if forms[0] != forms[-1]:
        raise ConfigError("data.eval", named(forms[-1]), f"valid: the form of the training data, {named(forms[0])}")


def _is_local(path: str | None) -> bool:
    return str(path).startswith(("/", "./", "../", "~"))


def _hub(data: HubData, note: Callable[[str], None]) -> "tuple[Dataset, Dataset | None]":
    splits = [_read_split(data, data.train_split, note)]
    if data.eval_split:
        splits.append(_read_split(data, data.eval_split, note))
    _same_form([split.column_names for split in splits])
    return splits[0], splits[1] if len(splits) > 1 else None


def _read_split(data: HubData, split: str, note: Callable[[str], None]) -> "Dataset":
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
        hint = "Check the name and the split; without a network, give a local directory or use data=jsonl."
        if isinstance(error, PermissionError):
            hint = "Set HF_HOME to a directory that you may write to: the dataset is cached there."
        raise OutlastError(
            f"data.path: split {split!r} of {data.path!r} can't be loaded: {type(error).__name__}: {reason}. {hint}"
        ) from error
    form = form_of(dataset.column_names)
    if not form:
        columns = f"{data.path} with columns {dataset.column_names}"
        raise ConfigError("data.path", columns, f"{conversion(dataset.column_names).strip(' ()')}; {jsonl.VALID}")
    if not len(dataset):
        raise ConfigError("data.path", f"{data.path}, split {split}", "the split is empty")
    unused, more = Unused(), False
    for number, row in enumerate(dataset, start=1):
        if problem := unused.judge(row, form):
            raise ConfigError("data.path", f"{data.path}, split {split}, row {number}", f"{problem}; {jsonl.VALID}")
        more = more or _without_more(row, form) != {name: row[name] for name in form}
    dataset = dataset.select_columns(list(form))
    if more:
        dataset = _dataset([_without_more(row, form) for row in dataset])  # `map` would keep the fields, as nulls
    for text in unused.notes(f"data.path, split {split}"):
        note(text)
    return dataset


def _without_more(row: dict[str, Any], form: tuple[str, ...]) -> dict[str, Any]:
    """Return the row with messages of role and content alone."""
    return {
        name: [{"role": message["role"], "content": message["content"]} for message in row[name]]
        if is_chat(row[name]) and all({"role", "content"} <= set(message) for message in row[name])
        else row[name]
        for name in form
    }
