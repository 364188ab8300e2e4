import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from outlast.config.configuration import build, dump, load
from outlast.errors import ConfigError, SlurmError
from outlast.launcher.commands import resume
from outlast.launcher.execution.submit import check_same, use_cluster
from outlast.launcher.planning.plan import Plan
from outlast.launcher.planning.resume import changed
from outlast.launcher.runs.queue import Answer
from outlast.launcher.runs.standing import collect
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.rundir.lock import RunLock
from outlast.rundir.submission import Submission


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "runs" / "r")
    run.create()
    parallel = {"nodes": 2, "ranks_per_node": 1, "cpus_per_rank": 1}
    cluster = {"kind": "slurm", "time_min": 60, "setup": ["export A=${B}"]}
    tree = {"run": {"name": "old", "root": "/old"}, "job": {"name": "smoke"}, "parallel": parallel, "cluster": cluster}
    run.config.write_text(dump(build(tree)))
    return run


def test_resources_may_change(run: RunDirectory) -> None:
    overrides = [
        "cluster.time_min=240",
        "cluster.partition=long",
        "cluster.sbatch.reservation='a b'",
        "storage.budget_gb=2",
    ]
    overrides += ["parallel.nodes=1", "parallel.ranks_per_node=2", "parallel.launch=accelerate"]
    config = changed(run, [*overrides, "checkpoint.every=7"])
    assert (config.cluster.time_min, config.cluster.partition, config.cluster.setup) == (240, "long", ["export A=${B}"])
    assert config.cluster.sbatch == {"reservation": "a b"}
    assert (config.storage.budget_gb, config.checkpoint.steps) == (2.0, 7)
    parallel = config.parallel
    assert (parallel.nodes, parallel.ranks_per_node, parallel.launch) == (1, 2, "accelerate")


def test_a_run_is_where_its_directory_is(run: RunDirectory) -> None:
    assert changed(run, []).directory == run.path


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("seed=3", "it decides the weights"),
        ("trainer.max_steps=10", "it decides the weights"),
        ("parallel.cpus_per_rank=2", "it decides the weights"),
        ("model=pretrained", "it decides the weights"),
        ("run.name=other", "a run is its directory"),
        ("cluster=local", "not groups; valid: cluster.<key>="),
        ("cluster.time_min=1,2", "valid: one value"),
        ("~cluster.partition", "valid: one value"),
        ("cluster.time_minutes=3", "did you mean time_min"),
        ("cluster.time_min=-3", "valid: a positive whole number of minutes"),
        ("cluster.time_min.x=3", "has no keys of its own"),
        ("nonsense.x=3", "configuration: 'nonsense' is refused"),
    ],
)
def test_what_may_not_change_is_refused_with_the_reason(run: RunDirectory, override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        changed(run, [override])


SFT = {"max_steps": 40, "lr_scheduler_type": "constant", "logging_steps": 5, "learning_rate": 1e-3}


def test_what_does_not_decide_the_weights_may_change(run: RunDirectory) -> None:
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    run.config.write_text(dump(build({"job": {"name": "sft"}, "trainer": SFT | batch})))
    overrides = ["logging_steps=1", "report_to=none", "per_device_eval_batch_size=2", "dataloader_num_workers=2"]
    overrides += ["eval_steps=7", "gradient_checkpointing=true", "max_steps=90"]
    overrides += ["per_device_train_batch_size=2", "gradient_accumulation_steps=4"]
    config = changed(run, [f"trainer.{text}" for text in overrides])
    assert config.trainer["max_steps"] == 90
    assert (config.trainer["logging_steps"], config.trainer["per_device_train_batch_size"]) == (1, 2)
    assert config.differences(load(run.config)) == {}
    with pytest.raises(ConfigError, match=r"refused; the rows of a step decide the weights; valid: 8, however"):
        changed(run, ["trainer.per_device_train_batch_size=2"])
    for key in ("learning_rate=1", "metric_for_best_model=eval_entropy", "weight_decay=0.1", "optim=adafactor"):
        with pytest.raises(ConfigError, match="it decides the weights"):
            changed(run, [f"trainer.{key}"])


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        (
            {"lr_scheduler_type": "cosine"},
            r"with trainer\.lr_scheduler_type=cosine the rate of each step depends on it",
        ),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, r"warmup_steps=0\.1 is a share of it"),
    ],
)
def test_a_run_is_as_long_as_its_schedule_unless_that_has_no_end(
    run: RunDirectory, schedule: dict[str, object], reason: str
) -> None:
    run.config.write_text(dump(build({"job": {"name": "sft"}, "trainer": SFT | schedule})))
    for key in ("max_steps=90", "num_train_epochs=9"):
        with pytest.raises(ConfigError, match=reason):
            changed(run, [f"trainer.{key}"])
    run.config.write_text(dump(build({"job": {"name": "sft"}, "trainer": SFT | schedule | {"warmup_steps": 5}})))
    if schedule["lr_scheduler_type"] != "cosine":
        assert changed(run, ["trainer.max_steps=90"]).trainer["max_steps"] == 90


def test_what_exists_is_a_name_even_with_an_equals_sign(tmp_path: Path) -> None:
    cell = RunDirectory(tmp_path / "s" / "seed=1")
    cell.create()
    cell.config.write_text("")
    names, overrides = resume.sorted_out(["s/seed=1", "cluster.time_min=3"], tmp_path)
    assert (names, overrides) == (["s/seed=1"], ["cluster.time_min=3"])
    with pytest.raises(ConfigError, match="valid: a run or a sweep"):
        resume.sorted_out(["cluster.time_min=3"], tmp_path)


def test_a_devcluster_that_is_not_up_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTLAST_DEVCLUSTER", str(tmp_path))
    with pytest.raises(SlurmError, match=r"no devcluster is up in .*OUTLAST_DEVCLUSTER=DIR says where"):
        use_cluster(build({"cluster": {"kind": "devcluster"}}))


def test_slurm_does_not_answer(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is in the queue can't be known, so nothing is submitted."""
    conf = str(run.path / "slurm.conf")
    submission = Submission(token="t", job_id="3", cluster="slurm", slurm_conf=conf, log="x")
    (run.path / "submitted.json").write_text(json.dumps(asdict(submission)))
    before = sorted(os.listdir(run.path))
    with pytest.raises(SlurmError, match=r"slurm.conf is gone.*Whether r is in the queue can't be known"):
        resume.main(["r"], run.path.parent)
    assert sorted(os.listdir(run.path)) == before


def test_a_job_of_plain_sbatch_is_not_run_here(run: RunDirectory) -> None:
    run.config.write_text(dump(build({"run": {"name": "r"}, "job": {"name": "smoke"}})))
    ledger = Ledger(run.ledger)
    ledger.append("attempt_started", 1, job_id="3", restart_count=0, hosts=["a"], world_size=1, versions={})
    ledger.append("attempt_ended", 1, cause="failed", step=1)
    [row] = collect([run], ask=lambda wanted, users, clusters: Answer())
    with pytest.raises(ConfigError, match="the same `sbatch` again"):
        resume.plan_of(row, [])


def test_a_finished_run_is_left_alone(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    Ledger(run.ledger).append("finished", 1, step=3, seconds=1.0)
    assert resume.main(["r"], run.path.parent) == 0
    assert capsys.readouterr().out == "r has finished already\n"


def test_overrides_without_effect_are_refused(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(run.ledger)
    ledger.append("attempt_started", 1, job_id=None, restart_count=0, hosts=["a"], world_size=1, versions={})
    lock = RunLock(run)
    lock.acquire("a test")
    with pytest.raises(ConfigError, match=r"no effect: r is running already; stop it first: outlast cancel r"):
        resume.main(["r", "storage.budget_gb=9"], run.path.parent)
    with pytest.raises(ConfigError, match=r"learning_rate.*it decides the weights"):
        resume.main(["r", "trainer.learning_rate=0.5"], run.path.parent)
    lock.release()
    ledger.append("finished", 1, step=3, seconds=1.0)
    with pytest.raises(ConfigError, match=r"no effect: r has finished already; another run can go on from its model"):
        resume.main(["r", "storage.budget_gb=9"], run.path.parent)
    assert capsys.readouterr().out == ""


def test_a_job_in_the_queue_keeps_what_it_was_submitted_with(run: RunDirectory) -> None:
    plan = Plan(changed(run, ["parallel.ranks_per_node=2"]), {}, None, {}, {}, {}, {})
    with pytest.raises(ConfigError, match=r"no effect: job 7 is in the queue already: parallel.ranks_per_node is 1"):
        check_same(plan, "7")
    check_same(Plan(changed(run, []), {}, None, {}, {}, {}, {}), "7")
