"""What becomes of data that is cut, refused by a template, or changed between two attempts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import Command, RunProbe

Start = Callable[..., Command]
Probe = Callable[[str], RunProbe]

SFT = (
    "job=sft", "model.vocab_size=300", "model.hidden_size=16", "model.layers=1", "model.heads=2", "data=jsonl",
    "parallel.cpus_per_rank=1", "trainer.packing=false", "trainer.per_device_train_batch_size=2",
    "trainer.gradient_accumulation_steps=1",
)  # fmt: skip


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pairs(count: int, long: int = 0) -> list[dict[str, str]]:
    """Rows, the first `long` of which have a prompt that leaves no room for a completion."""
    return [{"prompt": "word " * (200 if n < long else 1), "completion": f"it is {n}"} for n in range(count)]


def test_rows_that_are_cut_away_are_counted_and_said(tmp_path: Path, outlast: Start, probe: Probe) -> None:
    write(tmp_path / "train.jsonl", [row | {"id": 1} for row in pairs(12, long=4)])
    arguments = (*SFT, "data.train=train.jsonl", "trainer.max_length=64", "trainer.max_steps=2")
    command = outlast("train", *arguments, "run.name=r")
    assert command.wait() == 0, command.output
    [told] = probe("r").events("data")
    assert told["rows"] == 12
    assert told["notes"] == [
        "data.train: not used, of 12 rows: 'id' in 12",
        "data.train: 4 of 12 rows are left out: with trainer.max_length=64, nothing of what is to be learned is left "
        "of them",
    ]
    report = outlast("report", "r")
    assert report.wait() == 0
    assert told["notes"][1] in report.output.replace("\n", " ")

    write(tmp_path / "train.jsonl", pairs(12, long=12))
    command = outlast("train", *arguments, "run.name=none")
    assert command.wait() == 2, command.output
    assert (
        "trainer.max_length: 64 is refused; nothing of what is to be learned is left of the 12 rows" in command.output
    )
    assert "Traceback" not in command.output


def test_changed_data_is_refused_by_name_or_accepted(tmp_path: Path, outlast: Start, probe: Probe) -> None:
    path, run = tmp_path / "train.jsonl", tmp_path / "runs" / "r"
    write(path, pairs(40))
    arguments = (*SFT, "data.train=train.jsonl", "trainer.max_steps=400", "checkpoint.every=5", "run.name=r")
    command = outlast("train", *arguments)
    probe("r").reach(10)
    command.process.terminate()
    assert command.wait() == 75, command.output
    saved = probe("r").saved()
    prepared = (run / "prepared" / "data" / "prepared.json").read_text()

    write(path, pairs(30))
    for words in (("resume", "r"), ("train", *arguments)):
        refused = outlast(*words)
        assert refused.wait() == 2, refused.output
        assert f"data.train ({path}): changed since the run's last checkpoint was made" in refused.output
        assert "checkpoint.allow=[dataset]" in refused.output
    assert len(probe("r").events("attempt_started")) == 1
    assert (run / "prepared" / "data" / "prepared.json").read_text() == prepared

    model = (run / "prepared" / "model" / "tokenizer.json").read_bytes()
    command = outlast("resume", "r", "checkpoint.allow=[dataset]")
    probe("r").reach(saved + 2, attempt=2)
    command.process.terminate()
    assert command.wait() == 75, command.output
    [resumed] = probe("r").events("resumed")
    assert resumed["step"] == saved
    assert {"dataset", "source"} <= resumed["differences"].keys()
    assert json.loads((run / "prepared" / "data" / "prepared.json").read_text())["train"] == 30
    assert (run / "prepared" / "model" / "tokenizer.json").read_bytes() == model

    path.unlink()  # what was prepared from it is whole, and is all that an attempt needs
    saved = probe("r").saved(attempt=2)
    command = outlast("resume", "r")
    probe("r").reach(saved + 2, attempt=3)
    command.process.terminate()
    assert command.wait() == 75, command.output
    assert probe("r").events("resumed")[-1]["step"] == saved
    said = (run / "logs" / "attempt-003.rank-0.log").read_text()
    assert "files of the data are gone: the run goes on with what was prepared from them" in said
    shutil.rmtree(run / "prepared" / "data")
    refused = outlast("resume", "r")
    assert refused.wait() == 2, refused.output
    assert f"data.train: '{path}' is refused; valid: a file that exists" in refused.output
