"""What `outlast try` gives a model: the prompt as it is, or as a chat, whichever the run was trained on."""

import json
from pathlib import Path
from typing import Any

import pytest

from outlast.config.configuration import dump
from outlast.launcher.planning.compose import compose
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
