"""Scores are read back as they were written, and compared only with those that were made alike."""

import math
from pathlib import Path

import pytest
import torch

from outlast.checkpoint.digests import digest
from outlast.checkpoint.manifest import Manifest, Sealed
from outlast.errors import ConfigError
from outlast.files import to_json
from outlast.huggingface.loaded import different
from outlast.launcher.commands.evaluate import Row, compare, overfits_from
from outlast.results import evaluations
from outlast.results.evaluations import Line, append, path_of, read, weights_digest
from outlast.rundir.directory import RunDirectory

NAN = math.nan


def checkpoint(step: int) -> Sealed:
    files = {"model.safetensors": {"bytes": step, "xxh3_128": "0"}}
    return Sealed(Path(f"checkpoint-{step}"), Manifest(step=step, kind="final", world_size=1, time=1.0, files=files))


def line(model: Sealed, losses: list[float], data: str = "here") -> Line:
    return Line(
        checkpoint=model.path.name, step=model.step, weights=weights_digest(model.manifest.files), data=data,
        name="eval", loss=sum(losses) / len(losses), losses=losses, seconds=1.0, time=1.0,
    )  # fmt: skip


def scored(run: RunDirectory, *losses: list[float]) -> list[Row]:
    """What is shown of checkpoints with these losses, after a round through the record."""
    models = [checkpoint(step + 1) for step in range(len(losses))]
    path = path_of(run, "eval")
    for model, values in zip(models, losses, strict=True):
        append(run, path, line(model, values), 10**6)
    return compare(models, read(path, "here"))


def test_a_model_that_has_diverged_is_never_the_best(tmp_path: Path) -> None:
    good, bad = [1.0, 1.5, 2.0] * 5, [NAN, 1.0, 1.0] * 5
    rows = scored(RunDirectory(tmp_path), good, bad, [math.inf] * 15)
    assert [row.best for row in rows] == [True, False, False]
    assert [row.p for row in rows] == [None, None, None]
    assert rows[0].loss == pytest.approx(1.5)
    assert overfits_from(rows) == 2
    assert '"loss": null' in to_json([vars(row) for row in rows])


def test_nothing_is_the_best_where_all_have_diverged(tmp_path: Path) -> None:
    rows = scored(RunDirectory(tmp_path), [NAN, NAN], [NAN, 1.0])
    assert [row.best for row in rows] == [False, False]
    assert overfits_from(rows) is None


def test_scores_that_were_made_otherwise_are_not_compared(tmp_path: Path) -> None:
    run, (first, second) = RunDirectory(tmp_path), (checkpoint(1), checkpoint(2))
    path = path_of(run, "eval")
    append(run, path, line(first, [1.0, 2.0], "on a GPU"), 10**6)
    with open(path, "a") as record:
        record.write('{"checkpoint": "torn')
    append(run, path, line(second, [1.0, 2.0], "here"), 10**6)
    assert [row.checkpoint for row in compare([first, second], read(path, "here"))] == ["checkpoint-2"]
    assert [row.checkpoint for row in compare([first, second], read(path, "on a GPU"))] == ["checkpoint-1"]
    assert not read(path, "elsewhere")
    with pytest.raises(ConfigError, match=r"storage.budget_gb"):
        append(run, path, line(first, [1.0]), path.stat().st_size)
    assert evaluations.read(path, "here")


def test_weights_in_memory_are_those_that_were_saved() -> None:
    model = torch.nn.Linear(4, 4)
    rounded = model.weight.detach().bfloat16()
    saved = {"weight": digest(rounded), "bias": digest(model.bias)}
    model.weight.data = rounded.float()
    assert different(model, {"model": saved}) == [], "the same numbers in another format"
    assert different(model, {"model": saved, "base": {"gone": digest(rounded)}}) == ["gone"]
    model.bias.data += 1
    assert different(model, {"model": saved}) == ["bias"]
    assert different(model, {"model": saved, "whole": {}}) == [], "each rank has digested its shard"
