"""Tries rows of chats with a model's chat template, and names the first that it refuses."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from outlast.config.configuration import Config
from outlast.config.data import HubData, JsonlData
from outlast.errors import ConfigError

from . import data, jsonl

TRIED = 2000
"""Rows of each file that a plan tries, in less than a second; the first attempt tokenizes all."""

Row = tuple[str, str, dict[str, Any]]
"""A key of the configuration, the place of a row in its data, and the row."""


def check_plan(config: Config, tokenizer: Any) -> None:
    """Try the first rows of files, as a plan does.

    Raises:
        ConfigError: as :func:`check`.
    """
    for head in data.heads(config.data) if isinstance(config.data, JsonlData) else ():
        path = getattr(config.data, head.key.partition(".")[2])
        check(config, tokenizer, ((head.key, f"{path}, line {n}", row) for n, row in islice(head.rows, TRIED)))


def check(config: Config, tokenizer: Any, rows: Iterable[Row]) -> None:
    """Render chats with the tokenizer's template.

    Raises:
        ConfigError: there is no template, or it refuses a row; with the row's place, the cause and the ways out.
    """
    template = _template(config, tokenizer)
    for key, place, row in rows:
        chats = [row[name] for name in ("messages", "prompt") if isinstance(row.get(name), list)]
        if chats and template is None:
            valid = (
                "its tokenizer has no chat template, which chats need; valid: a model that has one (an instruct one), "
                "trainer.chat_template_path=FILE.jinja, or rows of prompt and completion"
            )
            raise ConfigError("model.path", getattr(config.model, "path", config.model.kind), valid)
        for chat in chats:
            try:
                tokenizer.apply_chat_template(chat, tokenize=False, chat_template=template)
            except Exception as error:  # templates raise what they like
                reason = " ".join(str(error).split()) or type(error).__name__
                valid = (
                    f"the model's chat template refuses it: {reason}. Change or leave out the row, or give another "
                    "template: trainer.chat_template_path=FILE.jinja"
                )
                raise ConfigError(key, place, valid) from None


def all_rows(config: Config) -> Iterator[Row]:
    """Yield every row of the data with its place, read again."""
    match config.data:
        case JsonlData() as files:
            for key, path in (("data.train", files.train), ("data.eval", files.eval)):
                for number, row in jsonl.rows(key, Path(path)) if path else ():
                    yield key, f"{path}, line {number}", row
        case HubData() as hub:
            train, evaluation = data.load(config)
            for split, rows in ((hub.train_split, train), (hub.eval_split, evaluation)):
                for number, row in enumerate(rows or (), start=1):
                    yield "data.path", f"{hub.path}, split {split}, row {number}", row


def _template(config: Config, tokenizer: Any) -> str | None:
    path = Path(str(config.trainer.get("chat_template_path") or ""))
    if path.suffix in (".jinja", ".j2") and path.is_file():
        return path.read_text(encoding="utf-8")
    template: str | dict[str, str] | None = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template
