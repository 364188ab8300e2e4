"""The estimate against real bytes, and what `outlast plan` makes of it."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .. import forked
from ..conftest import OUTLAST, Command, RunProbe

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "footprint.py"
CASES = (
    *("one lora fp32 adamw_torch", "one none bf16 adamw_torch", "one none fp32 adafactor"),
    *("zero1 none bf16 adamw_torch", "zero2 lora fp32 adamw_torch", "zero3 none bf16 sgd"),
)
"""One of each kind; the benchmark without arguments has them all."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Estimates and real checkpoints of small models, trained for a step: `{case: row}`."""
    there = importlib.util.find_spec("deepspeed") is not None
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(BENCHMARK), "--json", *(c for c in CASES if there or "zero" not in c)],
        cwd=tmp_path_factory.mktemp("footprint"),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)}


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_three_percent(case: str, rows: dict[str, dict[str, Any]]) -> None:
    if case.startswith("zero"):
        pytest.importorskip("deepspeed")
    for key in ("checkpoint", "final"):
        estimate, real = (sum(rows[case][name][key].values()) for name in ("estimate", "real"))
        assert estimate == pytest.approx(real, rel=0.03), rows[case]


@pytest.mark.parametrize("case", CASES)
def test_so_are_the_parts_that_matter(case: str, rows: dict[str, dict[str, Any]]) -> None:
    if case.startswith("zero"):
        pytest.importorskip("deepspeed")
    estimate, real = (rows[case][name]["checkpoint"] for name in ("estimate", "real"))
    for part, size in real.items():
        if size > 0.1 * sum(real.values()):
            assert estimate[part] == pytest.approx(size, rel=0.03), part
    assert set(estimate) == set(real)  # no part was forgotten


def plan(cwd: Path, *overrides: str) -> dict[str, Any]:
    done = forked.run([OUTLAST, "plan", "--json", *overrides], cwd)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def refused(cwd: Path, *overrides: str) -> str:
    done = forked.run([OUTLAST, "plan", *overrides], cwd)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


def test_a_run_is_as_large_as_its_plan_says(
    tmp_path: Path, outlast: Callable[..., Command], probe: Callable[[str], RunProbe]
) -> None:
    """The tiny model, which does not exist when it is planned, with its tokenizer; and the plan that is stored."""
    overrides = ["run.name=small", "trainer.max_steps=2", "checkpoint.every=1", "data.max_pairs=200"]
    overrides += ["model.vocab_size=1000", "trainer.eval_steps=1"]
    planned = plan(tmp_path, *overrides)["storage"]
    command = outlast("train", *overrides)
    assert command.wait() == 0, command.output
    run = probe("small")
    sizes = [event["bytes"] for event in run.events("checkpoint") if event["kind"] == "periodic"]
    assert planned["checkpoint_bytes"] == pytest.approx(sizes[-1], rel=0.03)
    final = sum(path.stat().st_size for path in (run.path / "final").iterdir())
    assert planned["final_bytes"] == pytest.approx(final, rel=0.03)
    stored = json.loads((run.path / "plan.json").read_text())["storage"]
    assert stored["checkpoint_bytes"] == pytest.approx(
        planned["checkpoint_bytes"], abs=500
    )  # of random states, pickled
    assert stored["parts"]["fixed"] == planned["parts"]["fixed"]
    beside = sum(p.stat().st_size for p in run.path.rglob("*") if p.is_file() and "checkpoint-" not in str(p)) - final
    assert beside <= planned["fixed_bytes"]


def test_the_hand_written_loop_too(
    tmp_path: Path, outlast: Callable[..., Command], probe: Callable[[str], RunProbe]
) -> None:
    overrides = ["run.name=loop", "job=smoke", "trainer.max_steps=4", "checkpoint.every=2", "trainer.hidden_size=500"]
    planned = plan(tmp_path, *overrides)["storage"]
    command = outlast("train", *overrides)
    assert command.wait() == 0, command.output
    sizes = [event["bytes"] for event in probe("loop").events("checkpoint") if event["kind"] == "periodic"]
    assert planned["checkpoint_bytes"] == pytest.approx(sizes[-1], rel=0.03)


def test_the_verdict_is_in_the_plan(tmp_path: Path) -> None:
    smoke = ["job=smoke", "trainer.hidden_size=5000", "run.name=x"]
    storage = plan(tmp_path, *smoke)["storage"]
    assert set(storage) == {
        *("budget_gb", "smallest_budget_gb", "save_total_limit", "checkpoint_bytes", "light_bytes", "final_bytes"),
        *("fixed_bytes", "peak_bytes", "parts", "arithmetic", "file_system"),
    }
    assert storage["file_system"][0]["kind"] == "free space"
    smallest = storage["smallest_budget_gb"]
    assert plan(tmp_path, *smoke, f"storage.budget_gb={smallest}")["storage"]["save_total_limit"] == 1
    error = refused(tmp_path, *smoke, f"storage.budget_gb={smallest * 0.9}")
    assert error.startswith("outlast: storage.budget_gb: ")
    assert f"valid: {smallest:g} or more" in error
    assert len(error.strip().splitlines()) == 1
    error = refused(tmp_path, *smoke, f"storage.budget_gb={smallest}", "storage.reserve=true")
    assert "storage.reserve=false" in error
    assert not (tmp_path / "runs").exists()


def test_a_file_system_too_small_is_refused_and_a_full_one_is_a_hazard(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], capture_output=True).returncode:
        pytest.skip("this may not mount a file system")
    try:
        smoke = ["job=smoke", f"run.root={place}", "run.name=x", "storage.budget_gb=0.1"]
        error = refused(tmp_path, *smoke, "trainer.hidden_size=50000")
        assert error.startswith("outlast: run.root: ")
        assert "the file system there has 4.19 MB in all" in error
        assert plan(tmp_path, *smoke, "trainer.max_steps=5")["hazards"] == []
        (place / "other").write_bytes(bytes(4_100_000))
        hazards = plan(tmp_path, *smoke, "trainer.max_steps=5")["hazards"]
        assert ["free space" in hazard and "needs at least" in hazard for hazard in hazards] == [True]
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_full_fine_tuning_in_too_small_a_budget_is_told_of_lora(tmp_path: Path) -> None:
    changes = ["run.name=x", "peft=none", "model.hidden_size=256", "data.max_pairs=100", "storage.budget_gb=0.12"]
    error = refused(tmp_path, *changes)
    assert "2 checkpoints of" in error
    assert "peft=lora (" in error


def test_a_model_that_cannot_be_read_is_a_hazard(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    found = plan(tmp_path, "run.name=x", "model=pretrained", f"model.path={tmp_path / 'model'}")
    assert any("can't be estimated" in hazard for hazard in found["hazards"])
    assert "smallest_budget_gb" not in found["storage"]
