"""Exports a model: into a directory that plain `from_pretrained`, or PEFT, loads anywhere.

It is written beside its place, loaded again as a receiver would, compared with the run's model, and published by one
rename. So the directory holds a model that was tried, or is not there.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.checkpoint.manifest import Manifest, read_manifest
from outlast.errors import ConfigError, OutlastError
from outlast.files import bytes_used, staged_directory
from outlast.storage.budget import gb
from outlast.storage.file_system import free_space

from .source import Source

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
BESIDE = 50_000_000
"""Bytes beside the weights, at most: a large vocabulary, and the file system's own."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was exported."""

    merged: bool
    base: str | None
    """The base model that the receiver needs; None if the directory is all."""
    dtype: str
    """The number formats of its weights."""
    bytes: int
    apart: float | None
    """How far its logits are from the run's, as a share of the largest. None: it takes no tokens."""


def export(source: Source, target: Path, *, merge: bool, dtype: str | None, say: Callable[[str], None]) -> Exported:
    """Export the model to `target`, which is not there, or empty.

    Args:
        merge: merge adapters into their base model. So it is also done where nobody else has that base model.
        dtype: the number format of the weights; None: as they are.
        say: told what is done.

    Raises:
        ConfigError: it is refused.
        OutlastError: it can't be loaded or written, or what was written is not the model.
    """
    source.check()
    manifest = read_manifest(source.path)  # now: the run may delete a checkpoint while it is exported
    inside = source.base_is_inside
    if inside and not merge:
        say(f"the base model, {source.base}, is in the run directory, where no receiver has it: merging the adapters")
    merge |= inside
    import torch

    from . import comparison, model

    if source.adapter is None and len(source.formats) > 1:
        say(f"the weights are {' and '.join(sorted(source.formats))}: loaded as {source.dtype}, which holds them all")
    say(f"loading {source.path}")
    loaded = model.load(source)
    before = comparison.answer(loaded)
    base = None if merge else source.base
    base_dtype = str(loaded.dtype).removeprefix("torch.")
    if merge:
        if dtype is not None and _is_wider(getattr(torch, dtype), loaded.dtype):
            loaded = loaded.to(getattr(torch, dtype))  # first, so that the sum is not rounded to fewer digits
        loaded = _merged(loaded)
    elif source.adapter is not None:
        next(iter(loaded.peft_config.values())).base_model_name_or_path = base
    whole = base is None
    if dtype is not None:
        _cast(loaded, getattr(torch, dtype), whole=whole)
    exported = _exported(loaded, whole=whole)
    written = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in exported}))
    digests, formats = comparison.weights(loaded)
    need = sum(tensor.numel() * tensor.element_size() for tensor in exported) + BESIDE
    del exported
    if need > (free := free_space(target.parent).free_bytes):
        raise ConfigError("--to", str(target), f"{gb(need)} are needed there, and {gb(free)} are free")
    tokenizer = model.tokenizer(source)
    with _alone(target), staged_directory(target, replace=False) as staged:
        say(f"writing {target}")
        _save(loaded, staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        del loaded
        say("loading it again, to compare it with the run's model")
        copy = _as_received(staged, base, base_dtype, causal=source.is_causal)
        found, _ = comparison.weights(copy, formats)
        comparison.same_weights(digests, found)
        rounded = [base_dtype, *([dtype] if dtype else [])] if merge or dtype else []
        apart = comparison.compare(before, comparison.answer(copy), rounded)
        del copy
        _write_card(source, manifest, staged, base, merge, written, apart)
        if pickles := [file.name for file in staged.rglob("*") if file.suffix in PICKLES]:
            raise OutlastError(f"the libraries have written pickles, {', '.join(pickles)}: nothing is published")
        size = bytes_used(staged)
    return Exported(merged=merge, base=base, dtype=written, bytes=size, apart=apart)


def _merged(model: Any) -> Any:
    """The base model with the adapters merged into it.

    Raises:
        ConfigError: adapters of this kind can't be merged.
    """
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError) as error:
        kind = next(iter(model.peft_config.values())).peft_type.value
        raise ConfigError(
            "--merge", True, f"{kind} adapters can't be merged here: {error}; export them as they are"
        ) from None
    inputs, outputs = merged.get_input_embeddings(), merged.get_output_embeddings()
    if outputs is not None and inputs is not None and outputs.weight is not inputs.weight:
        # One of them was trained apart from the other: tied, the one would be read for both.
        for config in {id(c): c for c in (merged.config, merged.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    return merged


def _is_wider(one: Any, other: Any) -> bool:
    """Whether a number format has more binary digits than another."""
    import torch

    return torch.finfo(one).eps < torch.finfo(other).eps


def _cast(model: Any, dtype: Any, *, whole: bool) -> None:
    """Round the weights that are exported. Buffers stay as they are."""
    for parameter in _exported(model, whole=whole):
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _exported(model: Any, *, whole: bool) -> list[Any]:
    """The parameters that are exported, tied ones once: all of a `whole` model, or the adapters'."""
    if whole:
        return list(model.parameters())
    from peft import get_peft_model_state_dict

    adapters = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model).values()}
    return [parameter for parameter in model.parameters() if parameter.data_ptr() in adapters]


def _save(model: Any, staged: Path) -> None:
    try:
        model.save_pretrained(staged)
    except OSError:
        raise
    except Exception as error:
        raise OutlastError(f"it can't be saved: {error!r}") from error


def _as_received(staged: Path, base: str | None, dtype: str, *, causal: bool) -> Any:
    """Load the directory as a receiver does: by itself, or with PEFT on its base model, which is loaded in `dtype`."""
    from . import model

    if base is None:
        return model.pretrained(str(staged), "auto")
    return model.with_adapters(model.pretrained(base, dtype, causal=causal), staged)


def _write_card(
    source: Source, manifest: Manifest, staged: Path, base: str | None, merged: bool, dtype: str, apart: float | None
) -> None:
    from .card import card

    check = "loaded again; each weight is the one that was written"
    check += "" if apart is None else f", and logits differ from the run's model by {apart:.1e} of the largest at most"
    text = card(source, manifest, base, merged=merged, dtype=dtype, check=check)
    (staged / "README.md").write_text(text)


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Wait while another export writes beside the same place; then refuse a place that it has taken."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        refuse_taken(target)
        yield
    finally:
        os.close(fd)


def refuse_taken(target: Path) -> None:
    """Refuse a target that exists, unless it is an empty directory.

    Raises:
        ConfigError: it is a file, or holds something.
    """
    if target.is_dir() and not any(target.iterdir()):
        return
    if os.path.lexists(target):
        raise ConfigError("--to", str(target), "valid: a directory that is not there yet, or an empty one")
