"""Writes the model card of an exported model: what it is, and how it was trained."""

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from outlast.checkpoint.manifest import Manifest
from outlast.config.configuration import Config
from outlast.config.data import HubData, JsonlData, PythonDocs
from outlast.files import read_json
from outlast.rundir import ancestry
from outlast.rundir.attempts import attempts
from outlast.rundir.ledger import Event, Ledger

from .source import Source

SHOWN = ("seed", "model", "data", "peft", "parallel", "trainer")
"""Sections of the configuration that a card shows: those that decide the weights."""
WORDS = {"preempted": "preempted", "time_limit": "ended by the time limit", "node_failure": "lost with a node",
         "failed": "failed", "cancelled": "cancelled", "out_of_memory": "out of memory"}  # fmt: skip


def card(source: Source, manifest: Manifest, base: str | None, *, merged: bool, dtype: str, check: str) -> str:
    """The text of `README.md`.

    Args:
        base: the base model by the name under which others find it; None where nobody else has it, or there is none.
        merged: adapters were merged into their base model.
        check: how it was compared with the run's model, in words.
    """
    events = Ledger(source.run.ledger).read()
    adapter = source.adapter is not None and not merged
    head: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    head |= {"base_model": base} if base and base == _without_place(base) else {}
    head |= {"pipeline_tag": "text-generation"} if _generates(source) else {}
    head["tags"] = ["outlast", *(["lora"] if adapter else [])]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {source.run.path.name}",
        "\n".join(_facts(source, manifest, base, events, merged=merged, dtype=dtype, check=check)),
        f"## Use\n\n```python\n{_code(source, adapter)}\n```",
    ]
    if source.config is not None:
        parts.append(f"## Configuration\n\n```yaml\n{_configuration(source.config)}```")
    if manifest.versions:
        parts.append("## Versions\n\n" + ", ".join(f"{name} {number}" for name, number in manifest.versions.items()))
    return "\n\n".join(parts) + "\n"


def _facts(
    source: Source, manifest: Manifest, base: str | None, events: list[Event], *, merged: bool, dtype: str, check: str
) -> list[str]:
    kind = "a whole model"
    if source.adapter is not None:
        kind = f"{source.adapter.get('peft_type', 'PEFT')} adapters" + (
            " merged into their base model" if merged else ""
        )
    facts = {
        "Base model": _without_place(base or _own_base(source)),
        "Began with": before.words if (before := ancestry.read(source.run)) else "",
        "Data": _data(source, events),
        "Kind": f"{kind}, {dtype}",
        "Step": _step(source, manifest, events),
        "Metric": _metrics(manifest.step, events),
        "Attempts": _attempts(events),
        "Verified": check,
    }
    return [f"- **{name}**: {text}" for name, text in facts.items() if text]


def _own_base(source: Source) -> str:
    if source.config is not None and source.config.model.kind == "tiny":
        return "the embedded tiny model, made with fresh weights for this run"
    if source.config is not None:
        return str(getattr(source.config.model, "path", ""))
    return "one that lay in the run directory" if source.adapter is not None else ""


def _data(source: Source, events: list[Event]) -> str:
    """The data, by names and digests that hold elsewhere."""
    record = read_json(source.run.prepared / "source.json")
    digests = record if isinstance(record, dict) else {}

    def named(key: str, path: str) -> str:
        digest = f" (xxh3-128 {digests[key]})" if key in digests else ""
        return f"`{Path(path).name}`{digest}"

    match source.config.data if source.config else None:
        case PythonDocs():
            text = "documentation that ships with Python (data=python_docs)"
        case JsonlData() as data:
            text = named("data.train", data.train or "")
            text += f", evaluated on {named('data.eval', data.eval)}" if data.eval else ""
        case HubData() as data:
            local = "data.path" in digests
            text = named("data.path", data.path or "") if local else f"`{data.path}`"
            text += "".join(f" {part}" for part in (data.name, data.train_split, data.revision) if part)
        case _:
            text = ""
    rows = next((event["rows"] for event in reversed(events) if event["event"] == "data"), None)
    return text + (f", {rows} rows" if rows and text else "")


def _step(source: Source, manifest: Manifest, events: list[Event]) -> str:
    total = max((int(event["step"]) for event in events if event["event"] == "finished"), default=None)
    best = ", the best by its metric" if source.path == source.run.final and manifest.best_step == manifest.step else ""
    of = f" of {total}" if total else ", of a run that has not finished"
    return f"{manifest.step}{of}{best}"


def _metrics(step: int, events: list[Event]) -> str:
    """What was evaluated at the step of the weights."""
    found: dict[str, Any] = next(
        (e["metrics"] for e in reversed(events) if e["event"] == "evaluated" and e["step"] == step), {}
    )
    left_out = ("runtime", "_per_second", "epoch", "num_tokens")
    values = {k: v for k, v in found.items() if isinstance(v, int | float) and not k.endswith(left_out)}
    return ", ".join(f"{name} {value:.6g}" for name, value in values.items())


def _attempts(events: list[Event]) -> str:
    """How many attempts it took, and how those before the last ended."""
    made = [attempt for attempt in attempts(events) if attempt.started]
    causes = Counter(attempt.ended["cause"] if attempt.ended else "killed" for attempt in made[:-1])
    survived = ", ".join(f"{count} {WORDS.get(cause, cause)}" for cause, count in causes.items())
    return f"{len(made)}" + (f": survived {survived}" if survived else "")


def _generates(source: Source) -> bool:
    causal = source.adapter is not None and source.adapter.get("task_type") == "CAUSAL_LM"
    return causal or str(_architecture(source)).endswith("ForCausalLM")


def _architecture(source: Source) -> str | None:
    """The class of the model, or of the base model if that is a directory; None if its configuration names none."""
    described = read_json((source.base_path or source.path) / "config.json")
    names = described.get("architectures") if isinstance(described, dict) else None
    return str(names[0]) if names else None


def _code(source: Source, adapter: bool) -> str:
    kind = "ForCausalLM" if _generates(source) else ""
    library, name = ("peft", f"AutoPeftModel{kind}") if adapter else ("transformers", f"AutoModel{kind}")
    if not kind and not adapter:
        name = _architecture(source) or name
    lines = [f"from {library} import {name}", "", f'model = {name}.from_pretrained("DIRECTORY")']
    if source.tokenizer is not None:
        lines.insert(1, "from transformers import AutoTokenizer")
        lines.append('tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")')
    return "\n".join(lines)


def _configuration(config: Config) -> str:
    """The sections that decide the weights; of local paths, the last part."""
    values = {name: _without_place(config.as_dict()[name]) for name in SHOWN}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _without_place(value: Any) -> Any:
    """What others may know of a value: of each local path in it, the last part."""
    if isinstance(value, dict):
        return {key: _without_place(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_place(item) for item in value]
    local = isinstance(value, str) and (value.startswith(("/", "~", "./", "../")) or ("/" in value and _exists(value)))
    return Path(value).name if local else value


def _exists(path: str) -> bool:
    with suppress(OSError, ValueError):
        return Path(path).exists()
    return False
