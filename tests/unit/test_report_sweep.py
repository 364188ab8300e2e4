"""The report of a sweep, and of many runs since a moment."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from outlast.errors import ConfigError
from outlast.files import bytes_used
from outlast.launcher.commands import report
from outlast.launcher.display.report import render_since, render_sweep
from outlast.launcher.display.sweep_page import sweep_page
from outlast.launcher.runs import since, summary
from outlast.launcher.runs.sweep_summary import sort_cells, summarize_sweep
from outlast.rundir.directory import RunDirectory

from .runs import progress, sweep_of

T0 = 1_700_000_000.0
HOUR = 3600.0


def attempt(run: RunDirectory, number: int, start: float, cause: str, *more: tuple[float, str, dict[str, Any]]) -> None:
    """An attempt of one hour on two ranks: 6 min of start, then training, stopped after 54 min if preempted."""
    started = {"job_id": "7", "restart_count": 0, "hosts": ["n0"], "world_size": 2, "versions": {}}
    ready = {"step": 0, "seconds": 300.0} | ({} if number == 1 else {"checkpoint": "checkpoint-50", "step": 50})
    lines = [
        (start, "attempt_started", started | {"process_started": start}),
        (start + 360, "began" if number == 1 else "resumed", ready),
        *more,
        (start + HOUR, "attempt_ended", {"cause": cause, "step": 50 * number}),
    ]
    if cause == "preempted":
        saved = {"step": 50, "kind": "emergency", "bytes": 1000, "stall_s": 300.0, "sealed_s": 360.0}
        lines.insert(-1, (start + HOUR - 360, "signal", {"name": "TERM", "step": 50, "deadline_s": 600.0}))
        lines.insert(-1, (start + HOUR, "checkpoint", saved))
        lines.append((start + HOUR, "requeued", {"cause": cause, "job_id": "7"}))
    with open(run.ledger, "a") as file:
        for time, event, fields in lines:
            file.write(json.dumps({"time": time, "attempt": number, "event": event, **fields}) + "\n")


def evaluated(at: float, loss: float) -> tuple[float, str, dict[str, Any]]:
    return at, "evaluated", {"step": 50, "metrics": {"eval_loss": loss, "eval_runtime": 36.0}}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Six cells of two keys: three finished, one preempted once, one failed, one not begun."""
    path = sweep_of(tmp_path, [], cells=6)
    manifest = json.loads((path / "sweep.json").read_text())
    pairs = [(lr, rank) for lr in ("1e-3", "3e-4", "1e-4") for rank in (8, 16)]
    for cell, (lr, rank) in zip(manifest["cells"], pairs, strict=True):
        cell["overrides"] = [f"trainer.learning_rate={lr}", f"+peft.r={rank}"]
    (path / "sweep.json").write_text(json.dumps(manifest))
    for number, loss in enumerate((3.0, 2.5, 1.5, 1.25)):
        run = RunDirectory(path / f"seed={number}")
        run.config.write_text("trainer: {max_steps: 100}\n")
        if number < 3:
            attempt(run, 1, T0, "finished", evaluated(T0 + 1800, loss))
        else:
            attempt(run, 1, T0, "preempted", evaluated(T0 + 1800, 2.0))
            attempt(run, 2, T0 + 3 * HOUR, "finished", evaluated(T0 + 3.5 * HOUR, loss))
    attempt(RunDirectory(path / "seed=4"), 1, T0, "failed")
    return path


def shown(show: Callable[..., None], *values: Any) -> list[str]:
    out = io.StringIO()
    show(*values, Console(file=out, width=200))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_run_directory_is_walked_once(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared file system with hundreds of cells, that is what takes the time."""
    walked: list[Path] = []
    monkeypatch.setattr(summary, "bytes_used", lambda path: walked.append(path) or bytes_used(path))
    cells = summarize_sweep(sweep)["cells"]
    assert walked == [sweep / f"seed={number}" for number in range(5)]
    assert [cell["bytes_used"] for cell in cells] == [*map(bytes_used, walked), None]


def test_the_best_cell_and_what_each_override_did(sweep: Path) -> None:
    summary = summarize_sweep(sweep)
    assert (summary["keys"], summary["metric"]) == (["trainer.learning_rate", "peft.r"], "eval_loss")
    assert summary["best"] == "seed=3"
    assert summary["accelerator_hours"] == pytest.approx(6 * 2.0)
    assert summary["cost"]["preempted"]["accelerator_hours"] == pytest.approx((360 + 360) * 2 / HOUR)
    lr, rank = summary["effects"]
    assert (lr["key"], lr["difference"]) == ("trainer.learning_rate", 2.75 - 1.375)
    assert lr["values"] == [
        {"value": "1e-3", "cells": 2, "median": 2.75, "least": 2.5, "most": 3.0},
        {"value": "3e-4", "cells": 2, "median": 1.375, "least": 1.25, "most": 1.5},
    ]
    assert rank["difference"] == 2.25 - 1.875
    json.dumps(summary)
    lines = shown(render_sweep, summary, sort_cells(summary, None))
    table = lines[next(n for n, line in enumerate(lines) if "peft.r" in line and "state" in line) :]
    assert table[1].split()[:5] == ["*", "seed=3", "3e-4", "16", "finished"]
    assert [line.split()[0 + line.startswith("*")] for line in table[1:5]] == ["seed=3", "seed=2", "seed=1", "seed=0"]


def test_a_key_of_many_values(sweep: Path) -> None:
    """A terminal shows the best of them; what is no finite number is a category, drawn as one."""
    summary = summarize_sweep(sweep)
    (cell,) = (cell for cell in summary["cells"] if cell["cell"] == "seed=3")
    cells = [cell | {"cell": f"c{n}", "metric": cell["metric"] | {"value": float(n)}} for n in range(20)]
    values = ["inf", "nan", "1e999", "1_0", *map(str, range(16))]
    for one, value in zip(cells, values, strict=True):
        one["overrides"] = {"a": value}
    of = [{"value": v, "cells": 1, "median": float(n), "least": 1.0, "most": 1.0} for n, v in enumerate(values)]
    summary |= {"cells": cells, "keys": ["a"], "effects": [{"key": "a", "difference": 1.0, "values": of}], "best": "c0"}
    lines = shown(render_sweep, summary, sort_cells(summary, "a"))
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("a ")] == [
        "inf: 0; nan: 1; 1e999: 2; 1_0: 3; 0: 4; 1: 5; 2: 6; 3: 7; and 12 more"
    ]
    page = sweep_page(summary, cells)
    assert page.count('class="cell') == 20
    assert not re.search(r'="[^"]*\b(nan|inf)\b', page)


@pytest.mark.parametrize(
    ("column", "order"),
    [
        ("trainer.learning_rate", "452301"),
        ("-peft.r", "135024"),
        ("-metric", "012345"),
        ("attempts", "501243"),
        ("-state", "501234"),
    ],
)
def test_cells_are_sorted_by_any_column(sweep: Path, column: str, order: str) -> None:
    """As numbers where they are numbers; cells without a value come last."""
    cells = sort_cells(summarize_sweep(sweep), column)
    assert "".join(cell["cell"].removeprefix("seed=") for cell in cells) == order


def test_what_is_wrong_with_the_options(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = sweep.parent
    with pytest.raises(
        ConfigError, match=r"--sort: 'nothing' is refused; valid: attempts, .*, peft\.r, .*, trainer\.learning_rate"
    ):
        report.main("s", root, as_json=False, sort="nothing")
    with pytest.raises(ConfigError, match=r"--png: '' is refused; valid for a run or a cell; a sweep has --html"):
        report.main("s", root, as_json=False, files={"png": ""})
    with pytest.raises(ConfigError, match=r"--json: '' is refused; valid without --html, --svg, which write files"):
        report.main("s", root, as_json=True, files={"html": "", "svg": "x", "png": None})
    with pytest.raises(ConfigError, match=r"--sort: 'step' is refused; valid for a sweep"):
        report.main("s/seed=0", root, as_json=False, sort="step")
    with pytest.raises(ConfigError, match=r"RUN: '' is refused; valid: a run or a sweep, or --since 7d"):
        report.main(None, root, as_json=False)
    with pytest.raises(ConfigError, match=r"RUN: '' is refused; .*; it comes before --html, which takes a FILE"):
        report.main(None, root, as_json=False, files={"html": "s"})  # outlast report --html s
    with pytest.raises(ConfigError, match=r"--since: 'soon' is refused; valid: 90min, 12h, 7d, 2w, or a date"):
        report.main(None, root, as_json=False, since="soon")
    assert report.main("s", root, as_json=True, sort="-metric") == 0
    assert json.loads(capsys.readouterr().out)["cells"][0]["cell"] == "seed=0"


def test_what_runs_have_cost_since_a_moment(sweep: Path, make: Callable[..., RunDirectory], monkeypatch: Any) -> None:
    """Half of each first attempt lies before it; of users, each has a row."""
    monkeypatch.setattr(since, "owner_name", lambda path: "ada" if path.name == "seed=3" else "bob")
    runs = [RunDirectory(sweep / f"seed={number}") for number in range(6)]
    found = since.summarize_since(runs, T0 + HOUR / 2)
    ada, bob, total = found["users"]["ada"], found["users"]["bob"], found["total"]
    assert (ada["runs"], bob["runs"], total["runs"]) == (1, 4, 5)
    assert ada["accelerator_hours"] == pytest.approx(2 * 1.5)
    assert bob["accelerator_hours"] == pytest.approx(2 * 0.5 * 4)
    assert ada["waited_s"] == {"queued": 2 * HOUR, "stopped": 0.0}
    assert ada["cost"]["preempted"]["accelerator_hours"] == pytest.approx((360 + 360) * 2 / HOUR)
    assert ada["parts"]["evaluating"] == pytest.approx(36 * 2 / HOUR)  # the first ended as the window began
    assert sum(total["parts"].values()) == pytest.approx(total["accelerator_hours"]) == pytest.approx(7.0)
    table = shown(render_since, found)
    assert [line.split()[0] for line in table[2:5]] == ["bob", "ada", "all"]
    training = make("training")  # since before it, with no line in its ledger: what it does stands in its progress
    attempt(training, 1, T0, "failed")
    training.ledger.write_text("".join(training.ledger.read_text().splitlines(keepends=True)[:2]))
    progress(training, step=30, time=T0 + 2.5 * HOUR)
    assert since.summarize_since([training], T0 + 2 * HOUR)["total"]["accelerator_hours"] == pytest.approx(2 * 0.5)
    assert since.summarize_since([training], T0 + 3 * HOUR)["total"]["runs"] == 0
    later = since.summarize_since(runs, T0 + 2 * HOUR)["users"]
    assert later.keys() == {"ada"}
    assert later["ada"]["waited_s"]["queued"] == HOUR
    assert later["ada"]["accelerator_hours"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("text", "ago"), [("90min", 5400.0), ("12h", 12 * HOUR), ("1.5d", 36 * HOUR), ("2w", 14 * 24 * HOUR)]
)
def test_moments(text: str, ago: float) -> None:
    assert since.moment(text, T0) == T0 - ago
    assert since.moment("2023-11-14T22:13:20+00:00", T0) == T0
