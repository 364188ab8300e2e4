"""What `outlast plan` says besides the budget, the script and the checkpoint interval."""

import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from outlast.config.configuration import load
from outlast.errors import ConfigError
from outlast.launcher.commands import train
from outlast.launcher.execution.freeze import freeze
from outlast.launcher.planning.compose import compose
from outlast.launcher.planning.plan import Plan, plan_run
from outlast.launcher.planning.sweep import plan_sweep
from outlast.rundir.ledger import Ledger

STARTED: dict[str, Any] = {"job_id": None, "restart_count": 0, "hosts": ["here"], "world_size": 2, "versions": {}}


def planned(root: Path, *overrides: str) -> Plan:
    return plan_run(compose(["job=smoke", f"run.root={root}", "run.name=r", *overrides]))


def test_the_rows_of_an_optimizer_step(tmp_path: Path) -> None:
    made = planned(tmp_path, "parallel.ranks_per_node=2", "trainer.gradient_accumulation_steps=3")
    assert made.training == {"micro_batch": 8, "accumulation": 3, "global_batch": 48}
    assert (made.resources["parallel"], made.resources["launch"]) == ("ddp", "srun")


def test_a_run_that_has_begun_keeps_them_on_another_number_of_ranks(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    Ledger(tmp_path / "r" / "ledger.jsonl").append("attempt_started", 1, **STARTED)
    assert planned(tmp_path, "parallel.ranks_per_node=2").training["accumulation"] == 1
    made = planned(tmp_path)
    assert made.training == {"micro_batch": 8, "accumulation": 2, "global_batch": 16}
    assert made.hazards == []
    with pytest.raises(ConfigError, match="global batch 16 can't be made of 3 ranks"):
        planned(tmp_path, "parallel.ranks_per_node=3")


def test_several_nodes_on_one_machine_are_pointed_out(tmp_path: Path) -> None:
    assert planned(tmp_path, "parallel.nodes=2", "parallel.ranks_per_node=2").hazards == [
        "parallel.nodes is 2: all 4 ranks run on this one machine"
    ]


def test_train_warns_of_what_the_plan_points_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["job=smoke", f"run.root={tmp_path}", "run.name=r", "parallel.nodes=2"]
    run = freeze(planned(tmp_path, "parallel.nodes=2"))
    Ledger(run.ledger).append("finished", 1, step=9, seconds=1.0)  # so that nothing is started
    train.train(overrides, None, waiting=False, as_json=False)
    warning, finished = capsys.readouterr().out.splitlines()
    assert warning == "warning: parallel.nodes is 2: all 2 ranks run on this one machine"
    assert "has finished already" in finished
    assert plan_sweep([*overrides, "run.name=s", "seed=1,2"]).hazards == [warning.removeprefix("warning: ")]


def test_many_warnings_are_a_few_lines() -> None:
    out = StringIO()
    train._warn([f"hazard {i}" for i in range(train.WARNINGS + 3)], Console(file=out))
    lines = out.getvalue().splitlines()
    assert len(lines) == train.WARNINGS + 1
    assert "and 3 more" in lines[-1]


def test_a_job_that_does_not_import_says_why_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was reported as an unknown job, with its own name as the suggestion."""
    monkeypatch.delitem(sys.modules, "outlast.jobs.sft", raising=False)
    monkeypatch.setitem(sys.modules, "outlast.jobs.training", None)  # as if the package were not there
    with pytest.raises(ModuleNotFoundError, match=r"outlast\.jobs\.training"):
        planned(tmp_path, "job=sft")


def test_a_mistake_of_a_job_of_ours_is_no_property_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "outlast.jobs.estimate", None)
    with pytest.raises(ModuleNotFoundError, match=r"outlast\.jobs\.estimate"):
        planned(tmp_path, "job=sft")


def test_a_run_may_be_redefined_until_it_has_a_checkpoint(tmp_path: Path) -> None:
    run = freeze(planned(tmp_path, "trainer.hidden_size=16"))
    (run.prepared / "model").mkdir(parents=True)
    Ledger(run.ledger).append("attempt_started", 1, **STARTED)
    Ledger(run.ledger).append("attempt_ended", 1, cause="failed", step=0)
    freeze(planned(tmp_path, "trainer.hidden_size=16", "storage.budget_gb=3"))
    assert (run.prepared / "model").is_dir()
    freeze(planned(tmp_path, "trainer.hidden_size=8"))
    assert load(run.config).trainer["hidden_size"] == 8
    assert not list(run.prepared.iterdir())
    Ledger(run.ledger).append("checkpoint", 1, step=5, kind="periodic", bytes=1, stall_s=0.1, sealed_s=0.1)
    with pytest.raises(ConfigError, match=r"another one: trainer\.hidden_size is 16, the run was made with 8"):
        freeze(planned(tmp_path, "trainer.hidden_size=16"))
