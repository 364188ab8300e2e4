"""Estimates how much data a run has, before anything is tokenized: rows, tokens, optimizer steps."""

import json
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from outlast.config.configuration import Config
from outlast.config.data import HubData, JsonlData, PythonDocs
from outlast.config.model import TinyModel

PAIR_BYTES = 345
"""Mean size of a pair of `data=python_docs` (measured: 341, over 3000 of them)."""
BYTES_PER_TOKEN = 3.0
"""Taken for a pretrained tokenizer that can't be asked; English text has 4 to 5 bytes per token, code 3."""
PER_ROW = 8
"""About as many tokens are added to a row by a template."""
SAMPLE = 200
"""Rows that are tokenized to see how many tokens a byte makes."""
BYTES_OF_TOKEN = 12
"""Bytes of a prepared token: 4 bytes of input and 8 of label (the Arrow types that TRL 1.16 makes)."""
BYTES_OF_ROW = 16
"""Bytes of a prepared row beside its tokens: offsets of its lists, lengths of the sequences in it."""


@dataclass(frozen=True)
class DatasetSize:
    """The size of the training and evaluation data together."""

    rows: int
    tokens: int


def estimate(config: Config, tokenizer: Any = None) -> DatasetSize | None:
    """Estimate the rows and tokens of the data; None for a dataset on the hub, which can't be known.

    Args:
        tokenizer: of a pretrained model; the first rows of a file are tokenized with it.
    """
    match config.data:
        case PythonDocs() as data:
            rows, size, sample = data.max_pairs, data.max_pairs * PAIR_BYTES, ""
        case JsonlData() as data:
            files = [Path(path) for path in (data.train, data.eval) if path]
            size = sum(path.stat().st_size for path in files)
            lines = _head(files[0])
            rows = math.ceil(size * len(lines) / max(sum(len(line.encode()) for line in lines), 1))
            sample = "\n".join(_texts(lines))
            # keys, quotes and escapes are no text
            size = math.ceil(size * len(sample.encode()) / max(sum(len(line.encode()) for line in lines), 1))
        case HubData() as data:
            directory = Path(data.path or "").expanduser()
            if not directory.is_dir():
                return None
            size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
            rows, sample = max(size // PAIR_BYTES, 1), ""
    tokens = math.ceil(size / _bytes_per_token(config, tokenizer, sample)) + PER_ROW * rows
    if not config.trainer.get("packing"):
        tokens = min(tokens, rows * _length(config))
    return DatasetSize(rows, tokens)


def prepared_bytes(config: Config, found: DatasetSize) -> int:
    """Return the bytes that the tokenized data takes in `prepared/`."""
    rows = math.ceil(found.tokens / _length(config)) if config.trainer.get("packing") else found.rows
    return found.tokens * BYTES_OF_TOKEN + (found.rows + rows) * BYTES_OF_ROW + 3_000


def optimizer_steps(config: Config, found: DatasetSize | None) -> int | None:
    """Return the optimizer steps of the whole run, or None if they can't be known."""
    trainer = config.trainer
    if (most := trainer.get("max_steps", -1)) > 0:
        return int(most)
    if found is None:
        return None
    rows = math.ceil(found.tokens / _length(config)) if trainer.get("packing") else found.rows
    batch = int(trainer.get("per_device_train_batch_size", 8)) * int(trainer.get("gradient_accumulation_steps", 1))
    return math.ceil(float(trainer.get("num_train_epochs", 3.0)) * rows / (batch * config.parallel.world_size))


def _length(config: Config) -> int:
    return int(config.trainer.get("max_length") or 1024)


def _bytes_per_token(config: Config, tokenizer: Any, sample: str) -> float:
    if isinstance(config.model, TinyModel):
        # Measured on `data=python_docs`: 1.4 with 300 tokens, 2.5 with 1000, 3.6 with 4096, 4.2 with 16384.
        return min(1.3 + 0.58 * math.log2(config.model.vocab_size / 300), 4.0)
    if tokenizer is None or not sample:
        return BYTES_PER_TOKEN
    return len(sample.encode()) / max(len(tokenizer(sample, add_special_tokens=False)["input_ids"]), 1)


def _head(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [line for line in islice(file, SAMPLE) if line.strip()]


def _texts(lines: list[str]) -> list[str]:
    """Return the strings that are trained on; `data.check` has seen that the lines can be read."""
    texts: list[str] = []
    for row in map(json.loads, lines):
        messages = row.get("messages") or []
        texts += [message["content"] for message in messages]
        texts += [row[key] for key in ("prompt", "completion", "text") if isinstance(row.get(key), str)]
    return texts
