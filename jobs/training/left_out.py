"""Counts the rows of raw data that preparing it has left out or cut, which TRL shows in a progress bar alone."""

from typing import TYPE_CHECKING, Any

from outlast.config.configuration import Config
from outlast.config.data import JsonlData
from outlast.errors import ConfigError

from . import data, models, trainer_arguments

if TYPE_CHECKING:
    from datasets import Dataset

TRIED = 200
"""Rows of each file that a plan tokenizes."""


def notes(config: Config, args: Any, raw: "dict[str, Dataset]", prepared: "dict[str, Dataset]") -> list[str]:
    """Say how many rows training does not see, or does not see whole.

    Args:
        args: the `SFTConfig` that the data was prepared with.
        raw: the data as it was loaded, by `train` and `eval`.
        prepared: what has become of it.

    Raises:
        ConfigError: nothing is left of one of them.
    """
    found = []
    for name, split in prepared.items():
        key = {"jsonl": f"data.{name}", "hub": "data.path"}.get(config.data.kind, "data")
        lengths, rows = _lengths(split, args.packing), len(raw[name])
        if not len(split):
            raise nothing_left(args.max_length, key, rows)
        if lengths is None or args.max_length is None:
            continue
        if dropped := rows - len(lengths):
            found.append(
                f"{key}: {dropped} of {rows} rows are left out: with trainer.max_length={args.max_length}, nothing of "
                "what is to be learned is left of them"
            )
        if full := sum(length >= args.max_length for length in lengths):
            found.append(
                f"{key}: {full} of {rows} rows fill trainer.max_length={args.max_length} tokens; what was longer is cut"
            )
    return found


def foreseen(config: Config) -> list[str]:
    """Say what a plan can see of it, by the first rows of each file and the tokenizer of a pretrained model.

    Raises:
        ConfigError: as :func:`notes`, if all the rows were looked at.
    """
    args, found = trainer_arguments.with_defaults(config), []
    tokenizer = models.known_tokenizer(config)
    length = args["max_length"]
    if tokenizer is None or not isinstance(config.data, JsonlData) or not length or args["packing"]:
        return []
    if args["truncation_mode"] != "keep_start" or args["completion_only_loss"] is False:
        return []
    for head in data.heads(config.data):
        prompts = [row["prompt"] for _, row in head.rows[:TRIED] if "prompt" in row]
        too_long = sum(len(tokenizer(prompt)["input_ids"]) >= length for prompt in prompts)
        if too_long and too_long == len(head.rows) and head.whole:
            raise nothing_left(length, head.key, len(head.rows))
        if too_long:
            found.append(
                f"{head.key}: {too_long} of the first {len(prompts)} rows have prompts that fill "
                f"trainer.max_length={length} tokens: they are left out"
            )
    return found


def nothing_left(max_length: int | None, key: str, rows: int) -> ConfigError:
    """Refuse data of which truncation leaves nothing that is to be learned."""
    valid = (
        f"nothing of what is to be learned is left of the {rows} rows of {key}: their prompts are longer; valid: more"
    )
    return ConfigError("trainer.max_length", max_length, valid)


def _lengths(split: "Dataset", packed: bool) -> list[int] | None:
    """Return the tokens of each row before packing; None if packing has cut the rows into each other."""
    if "seq_lengths" in split.column_names:
        return [int(length) for lengths in split["seq_lengths"] for length in lengths]
    return None if packed else [len(tokens) for tokens in split.with_format("numpy")["input_ids"]]
