"""Reads JSON Lines files line by line; a refusal names the file, the line's number and the reason."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from outlast.errors import ConfigError

from .other_formats import conversion, other_format
from .unused import Unused

FORMS: tuple[tuple[str, ...], ...] = (("prompt", "completion"), ("messages",), ("text",))
"""Keys of the forms. A row that has the keys of several is read as the first of them."""

VALID = (
    'valid, the same in all lines: {"prompt": "...", "completion": "..."}, '
    '{"messages": [{"role": "...", "content": "..."}, ...]}, or {"text": "..."}'
)


def rows(key: str, path: Path, unused: Unused | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of one file, each with its line's number, and reduced to the keys of its form.

    UTF-8, with or without a byte order mark; blank lines are skipped.

    Args:
        unused: counts what is left out.

    Raises:
        ConfigError: `key` with the file, the line's number, what is wrong, and what is valid.
    """
    form: tuple[str, ...] | None = None
    unused = Unused() if unused is None else unused
    try:
        with open(path, "rb") as file:  # by bytes: a line ends at \n and nowhere else, and bad UTF-8 has a line number
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                    if hint := other_format(line, path):
                        raise ConfigError(key, str(path), hint)
                if not line.strip():
                    continue
                row, problem = _parse(line, unused)
                if not problem and form not in (None, form_of(row)):
                    problem = f"it has {named(form_of(row))}, but the lines before have {named(form)}"
                if problem:
                    raise ConfigError(key, f"{path}, line {number}", f"{problem}; {VALID}")
                form = form_of(row)
                yield number, row
    except OSError as error:
        raise ConfigError(key, str(path), f"it can't be read: {error.strerror}") from None
    if form is None:
        raise ConfigError(key, str(path), f"the file is empty; {VALID}")


def _parse(line: bytes, unused: Unused) -> tuple[dict[str, Any], str]:
    """Return the row of one line, and what is wrong with it (nothing: an empty string)."""
    try:
        row = json.loads(line.decode("utf-8").strip())
        if rb"\u" in line:
            json.dumps(row, ensure_ascii=False).encode(
                "utf-8"
            )  # half of a surrogate pair can be escaped, but is no text
    except UnicodeError:
        return {}, "it is not text in UTF-8"
    except json.JSONDecodeError as error:
        return {}, f"it is not JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:
        return {}, f"it is not JSON that can be read ({error})"
    if not isinstance(row, dict):
        return {}, f"it is {_kind(row)}, not an object"
    form = form_of(row)
    if not form:
        keys = ", ".join(map(repr, row)) or "no keys"
        return {}, f"it has {keys}, which is none of the forms{conversion(row)}"
    if problem := unused.judge(row, form):
        return {}, problem
    for name in form:
        if name == "messages":
            if problem := _chat_problem(row[name]):
                return {}, problem
            row[name] = [{"role": message["role"], "content": message["content"]} for message in row[name]]
        elif not isinstance(row[name], str):
            return {}, f"its {name!r} is {_kind(row[name])}, not a string"
    return {name: row[name] for name in form}, ""


def _chat_problem(messages: Any) -> str:
    if not isinstance(messages, list) or not messages:
        return f"its 'messages' is {_kind(messages)}, not a list of messages"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            return f"message {number} is {_kind(message)}, not an object"
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                return f"message {number} has {_kind(message.get(name))} as its {name!r}, not a string"
    return ""


def _kind(value: Any) -> str:
    """Say what a JSON value is, in JSON's own words."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else "a boolean"
    names = {int: "a number", float: "a number", str: "a string", dict: "an object"}
    return names.get(type(value), "a list" if value else "an empty list")


def form_of(keys: Iterable[str]) -> tuple[str, ...]:
    """Return the form that these keys (of a row) or columns (of a dataset) have; empty if none."""
    present = set(keys)
    return next((form for form in FORMS if present.issuperset(form)), ())


def named(form: tuple[str, ...] | None) -> str:
    return " and ".join(form or ())
