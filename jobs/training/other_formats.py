"""Recognizes files and rows that are not JSON Lines of a known form, and says how to convert them."""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path

LARGE = 100_000_000
"""Bytes from which a file is not read as a whole only to make a hint more exact."""

PACKED = {
    b"\x1f\x8b": ("gzip", "gzip -dk"),
    b"BZh": ("bzip2", "bzip2 -dk"),
    b"\xfd7zXZ": ("xz", "xz -dk"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dk"),
    b"PK\x03\x04": ("a zip archive", "unzip"),
}
"""What packed files begin with: their kind, and the command that unpacks them."""

_ALPACA = (
    '{prompt: (.instruction + (if (.input // "") == "" then "" else "\\n\\n" + .input end) + "\\n"), '
    "completion: .output}"
)
_SHAREGPT = (
    '{messages: [.conversations[] | {role: ({human: "user", gpt: "assistant"}[.from] // .from), content: .value}]}'
)
CONVERSIONS: tuple[tuple[frozenset[str], str, str], ...] = (
    (frozenset({"instruction", "output"}), "Alpaca's form", _ALPACA),
    (frozenset({"conversations"}), "ShareGPT's form", _SHAREGPT),
    (frozenset({"question", "answer"}), "questions and answers", '{prompt: (.question + "\\n"), completion: .answer}'),
    (frozenset({"prompt", "response"}), "prompts and responses", "{prompt, completion: .response}"),
    (frozenset({"prompt", "chosen"}), "preferences", "{prompt, completion: .chosen}"),
    (frozenset({"content"}), "texts", "{text: .content}"),
)
"""Keys of rows of other forms: what they are called, and the `jq` filter that makes rows of ours."""


def other_format(head: bytes, path: Path) -> str:
    """Say what a file is, by its first line, and how to convert it; empty if it may be JSON Lines."""
    for magic, (kind, command) in PACKED.items():
        if head.startswith(magic):
            return f"it is packed ({kind}); unpack it: {command} {shlex.quote(path.name)}"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        name = shlex.quote(path.name)
        return f"it is text in UTF-16; valid: UTF-8 (iconv -f UTF-16 -t UTF-8 {name} > train.jsonl)"
    if head.startswith(b"PAR1"):
        return f"it is a Parquet file; valid: JSON Lines, or data=hub data.path={shlex.quote(str(path.parent))}"
    text = head.strip()
    if text == b"{":
        return f"it is JSON over several lines; write one row a line: {_jq('.', path)}"
    if text.startswith(b"[") and (b"{" in text or not text.endswith(b"]")):
        _, program = _of_keys(_first_keys(path))
        return f"it is one JSON array; make each element a line: {_jq('.[]' + (program and f' | {program}'), path)}"
    return ""


def conversion(keys: Iterable[str]) -> str:
    """Say how to convert rows with these keys; empty if nothing is known."""
    called, program = _of_keys(keys)
    return f" ({called}; to convert: jq -c '{program}' FILE > train.jsonl)" if program else ""


def _of_keys(keys: Iterable[str]) -> tuple[str, str]:
    present = set(keys)
    found = ((called, program) for needed, called, program in CONVERSIONS if needed <= present)
    return next(found, ("", ""))


def _first_keys(path: Path) -> Iterable[str]:
    """Return the keys of an array's first element; none if it is large, or no JSON."""
    try:
        rows = json.loads(path.read_bytes()) if path.stat().st_size < LARGE else []
    except (OSError, ValueError, RecursionError):
        return ()
    return rows[0] if rows and isinstance(rows[0], dict) else ()


def _jq(program: str, path: Path) -> str:
    return f"jq -c '{program}' {shlex.quote(path.name)} > train.jsonl"
