"""Makes prompt/completion pairs from the documentation that every Python carries: its topics and its docstrings.

Real text with real structure, on any machine and without a network. The modules are read, never imported.
"""

import ast
import hashlib
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

from outlast.errors import OutlastError

SHORTEST, LONGEST = 20, 2000
"""The number of characters that a completion may have."""

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data"}
SKIPPED |= {"site-packages", "dist-packages", "__pycache__"}
"""Directories that don't belong to the library, or don't document it."""


def pairs(max_pairs: int, source: Path | None = None) -> list[dict[str, str]]:
    """Return up to `max_pairs` pairs of `prompt` and `completion`, sorted by prompt, without duplicates.

    The same Python gives the same pairs. When there are more than `max_pairs`, the choice is spread over the whole
    library by a hash. A prompt ends in a newline, so that no token spans the boundary to its completion.

    Args:
        source: the directory of the standard library's sources; left out, that of the running Python.

    Raises:
        OutlastError: this Python was installed without its sources or its topics.
    """
    root = Path(sysconfig.get_path("stdlib")) if source is None else source
    found: dict[str, str] = {}
    seen: set[str] = set()
    for prompt, completion in (*_topics(root), *_docstrings(root)):
        if SHORTEST <= len(completion) <= LONGEST and prompt not in found and completion not in seen:
            found[prompt] = completion
            seen.add(completion)
    chosen = sorted(sorted(found, key=_digest)[:max_pairs])
    return [{"prompt": prompt, "completion": found[prompt]} for prompt in chosen]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _missing(path: Path) -> OutlastError:
    return OutlastError(
        f"data=python_docs: {path} is missing: this Python was installed without the sources of its standard "
        "library. Install them (on Debian: libpython3-stdlib), or use data=jsonl."
    )


def _topics(root: Path) -> Iterator[tuple[str, str]]:
    """Yield what `help("TOPIC")` shows, cut into parts at paragraphs."""
    path = root / "pydoc_data" / "topics.py"
    try:
        tree = ast.parse(path.read_bytes())
    except OSError:
        raise _missing(path) from None
    texts: dict[str, str] = next(
        (ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)), {}
    )
    for topic, text in sorted(texts.items()):
        for number, part in enumerate(_parts(cleandoc(text)), start=1):
            suffix = "" if number == 1 else f", part {number}"
            yield f"Explain the Python topic `{topic}`{suffix}.\n", part


def _parts(text: str) -> list[str]:
    """Join whole paragraphs into parts of at most `LONGEST` characters; a longer paragraph is cut off."""
    parts = [""]
    for paragraph in text.split("\n\n"):
        whole = f"{parts[-1]}\n\n{paragraph}" if parts[-1] else paragraph
        if len(whole) <= LONGEST:
            parts[-1] = whole
        else:
            parts.append(paragraph[:LONGEST])
    return [textwrap.dedent(part).strip() for part in parts]


def _docstrings(root: Path) -> Iterator[tuple[str, str]]:
    paths = [path for path in sorted(root.rglob("*.py")) if not SKIPPED & set(path.relative_to(root).parts)]
    if not paths:
        raise _missing(root)
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody else's source
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue  # a template or a bad-encoding sample that some distributions ship
        yield from _of(tree, module, f"What is the Python module `{module}` for?\n")


def _of(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str, prompt: str
) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield prompt, _parts(docstring)[0]
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in _definitions(node.body):
            if not child.name.startswith("_"):
                inner = f"{name}.{child.name}"
                question = f"What is `{inner}`?\n" if isinstance(child, ast.ClassDef) else f"What does `{inner}` do?\n"
                yield from _of(child, inner, question)


def _definitions(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield classes and functions, also those that are defined under an `if` or a `try`."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            handlers = [inner for handler in getattr(node, "handlers", []) for inner in handler.body]
            yield from _definitions([*node.body, *handlers, *node.orelse])
