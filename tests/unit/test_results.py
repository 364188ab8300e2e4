"""What `outlast try` gives a model: the prompt as it is, or as a chat, whichever the run was trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from outlast.config.configuration import dump
from outlast.launcher.planning.compose import compose
from outlast.results.card import _without_place
from outlast.results.generate import _is_plain
from outlast.results.source import Source
from outlast.rundir.directory import RunDirectory

MESSAGES = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]


@pytest.mark.parametrize(
    ("row", "plain"),
    [
        ({"prompt": "a", "completion": "b"}, True),
        ({"text": "a"}, True),
        ({"messages": MESSAGES}, False),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, False),
    ],
)
def test_the_form_of_the_rows_decides(tmp_path: Path, row: dict[str, Any], plain: bool) -> None:
    rows, run = tmp_path / "rows.jsonl", RunDirectory(tmp_path / "run")
    rows.write_text(json.dumps(row) + "\n")
    run.create()
    run.config.write_text(dump(compose(["data=jsonl", f"data.train={rows}"])))
    assert _is_plain(Source(run, run.final)) is plain
    rows.unlink()
    assert not _is_plain(Source(run, run.final)), "where nothing is known, a chat template is used"


def test_weights_of_several_formats_are_read_in_one_that_holds_them_all(tmp_path: Path) -> None:
    def dtype(**tensors: torch.dtype) -> str:
        values = {name: torch.zeros(2, dtype=dtype) for name, dtype in tensors.items()}
        save_file(values, tmp_path / "model.safetensors")
        return Source(RunDirectory(tmp_path), tmp_path).dtype

    assert dtype(a=torch.bfloat16, b=torch.bfloat16, count=torch.int64) == "bfloat16"
    assert dtype(a=torch.bfloat16, b=torch.bfloat16, c=torch.float32) == "float32"
    assert dtype(a=torch.bfloat16, b=torch.float16) == "float32"


def test_a_card_tells_no_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    trainer = {"chat_template_path": "/home/me/chat", "more": [{"file": "~/secret/x"}], "rate": 0.1}
    values = {"path": "models/mine", "name": "org/model", "trainer": trainer}
    assert _without_place(values) == {
        "path": "mine",
        "name": "org/model",
        "trainer": {"chat_template_path": "chat", "more": [{"file": "x"}], "rate": 0.1},
    }
