"""Prints the reference of all configuration keys (`docs/configuration.md`), or with `--schema` their JSON schema.

python -m outlast.config.reference > docs/configuration.md
"""

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from itertools import pairwise
from typing import Any

from .configuration import SECTIONS, Config
from .section import Section, declared, words

INTRODUCTION = """\
# Configuration: all keys

This page is made from the declarations in `src/outlast/config/` by `python -m outlast.config.reference`.

The defaults stand in `conf/`, and Hydra composes them. A key is set on the command line
(`outlast train preemption.lead_s=120`) or in an experiment, a file of its own. A group is chosen by name:
`model=pretrained` takes the keys of `model/pretrained.yaml`, which `model.path=...` then sets. What is not valid is
refused before anything starts (exit code 2). `python -m outlast.config.reference --schema` prints the JSON schema of a
run's `config.yaml`, for editors and other programs."""

CLASSES = {schema for options in SECTIONS.values() for schema in options.values()}


def sentences(schema: type) -> dict[str, str]:
    """What the docstring below each key says, the keys of base classes included."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__[:-1]):
        (tree,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(tree, ast.ClassDef)
        for key, text in pairwise(tree.body):
            if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(key.target)] = " ".join(str(text.value.value).split())
    return found


def json_schema() -> dict[str, Any]:
    """The JSON schema of `config.yaml`, with what each key means."""
    found = Config.adapter().json_schema()
    parts: dict[type, dict[str, Any]] = {one: found["$defs"][one.__name__] for one in CLASSES}
    for schema, part in {Config: found, **parts}.items():
        for key, sentence in sentences(schema).items():
            if key in part["properties"]:
                part["properties"][key]["description"] = sentence
    return found


def reference() -> Iterator[str]:
    """The lines of the page."""
    yield INTRODUCTION
    for name, options in SECTIONS.items():
        yield f"\n## {name}"
        for schema in dict.fromkeys(options.values()):
            kinds = [kind for kind, one in options.items() if kind and one is schema]
            if kinds:
                yield "\n### " + ", ".join(f"`{name}={kind}`" for kind in kinds)
            yield "\n" + " ".join(str(schema.__doc__).split())
            yield from _table(schema, f"{name}.", [key for key in declared(schema) if key != "kind"])
    yield "\n## Keys without a section"
    yield from _table(Config, "", [key for key in declared(Config) if key not in SECTIONS])


def _table(schema: type[Section], prefix: str, keys: list[str]) -> Iterator[str]:
    if not keys:
        return
    meaning = sentences(schema)
    yield "\n| key | valid | default | meaning |\n| --- | --- | --- | --- |"
    for field in fields(schema):  # type: ignore[arg-type]  # every section is a dataclass
        if field.name in keys:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            shown = default if isinstance(default, str) else json.dumps(default)
            yield f"| `{prefix}{field.name}` | {words(field.type)} | `{shown}` | {meaning[field.name]} |"


def main() -> None:
    print(json.dumps(json_schema(), indent=2) if "--schema" in sys.argv else "\n".join(reference()))


if __name__ == "__main__":
    main()
