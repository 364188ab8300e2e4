"""A submission that Slurm refuses: the key, the exit code, and nothing left behind."""

import subprocess
from pathlib import Path

import pytest

from outlast.errors import ConfigError, Exit, RunBusyError, SlurmError
from outlast.launcher.commands import prepare, train
from outlast.launcher.execution.submit import submit
from outlast.launcher.execution.sweep import submit_sweep
from outlast.launcher.planning.compose import compose
from outlast.launcher.planning.plan import plan_run
from outlast.launcher.planning.sweep import plan_sweep
from outlast.rundir.directory import RunDirectory
from outlast.rundir.lock import RunLock
from outlast.slurm.refusal import refusal_of

from .conftest import Slurm
from .runs import start


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("sbatch: Batch job submission failed: Invalid partition name specified", "cluster.partition"),
        ("sbatch: Batch job submission failed: Invalid qos specification", "cluster.qos"),
        ("sbatch: Batch job submission failed: Invalid account or account/partition combination", "cluster.account"),
        ("sbatch: unrecognized option '--gress=1'", "cluster.sbatch"),
        ("sbatch: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
         "cluster.time_min"),
        ("sbatch: Batch job submission failed: Invalid wckey specification", "cluster.sbatch.wckey"),
        ("sbatch: Batch job submission failed: Job violates accounting/QOS policy", "cluster.qos"),
        ("sbatch: something nobody has seen", "cluster"),
    ],
)  # fmt: skip
def test_the_key_of_a_refusal(slurm: Slurm, text: str, key: str) -> None:
    slurm.says("sinfo", "gpu\ncpu\ngpu\n")
    refused = refusal_of(SlurmError(text), {"cluster.partition": "gpuu"})
    assert refused is not None
    assert refused.key == key
    assert text.partition(": ")[2] in str(refused)
    if key == "cluster.partition":
        assert str(refused).startswith("cluster.partition: 'gpuu' is refused; ")
        assert str(refused).endswith("; valid here: cpu, gpu")


def test_a_slurm_that_does_not_answer_refuses_nothing(slurm: Slurm) -> None:
    for text in ("sbatch did not answer within 120 s", "sbatch: Unable to contact slurm controller"):
        assert refusal_of(SlurmError(text), {}) is None


@pytest.fixture
def refusing(slurm: Slurm) -> Slurm:
    """Refuses the partition `gpuu`; an array in another gets the number 8."""
    (slurm.directory / "sbatch").write_text(
        '#!/bin/sh\nfor script; do true; done\ngrep -q partition=gpuu "$script" || { echo 8; exit; }\n'
        "echo 'sbatch: error: invalid partition specified: gpuu' >&2\n"
        "echo 'sbatch: error: Batch job submission failed: Invalid partition name specified' >&2\nexit 1\n"
    )
    for name in ("srun", "squeue"):
        (slurm.directory / name).write_text("#!/bin/sh\n")
        (slurm.directory / name).chmod(0o755)
    return slurm


def test_nothing_is_left_of_a_refused_sweep(refusing: Slurm, tmp_path: Path) -> None:
    overrides = ["job=smoke", "cluster=slurm", f"run.root={tmp_path}/runs", "run.name=s"]
    refused = [*overrides, "cluster.partition=gpuu", "seed=1,2"]
    with pytest.raises(ConfigError, match=r"cluster\.partition: 'gpuu' is refused; Slurm refuses the job"):
        submit_sweep(plan_sweep(refused))
    assert list((tmp_path / "runs").iterdir()) == []

    assert submit_sweep(plan_sweep([*overrides, "seed=1,2"])).submitted == ["seed=1", "seed=2"]
    (refusing.directory / "squeue").write_text("#!/bin/sh\necho '8_0|8|PENDING|None|'; echo '8_1|8|PENDING|None|'\n")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "runs").rglob("*")) if path.is_file()}
    with pytest.raises(ConfigError, match=r"cluster\.partition"):
        submit_sweep(plan_sweep([*refused[:-1], "seed=1,2,3"]))
    after = {path: path.read_bytes() for path in sorted((tmp_path / "runs").rglob("*")) if path.is_file()}
    assert after == before


def test_nothing_is_left_of_a_refused_submission(refusing: Slurm, tmp_path: Path) -> None:
    overrides = ["job=smoke", "cluster=slurm", "cluster.partition=gpuu", f"run.root={tmp_path}/runs", "run.name=r"]
    with pytest.raises(ConfigError, match=r"cluster\.partition: 'gpuu' is refused; Slurm refuses the job") as refused:
        submit(plan_run(compose(overrides)))
    assert refused.value.exit_code == Exit.REFUSED
    assert list((tmp_path / "runs").iterdir()) == []


def test_code_that_the_budget_has_no_room_for_is_refused_before_it_is_copied(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm.directory / "srun").write_text("#!/bin/sh\n")
    (slurm.directory / "srun").chmod(0o755)
    project = tmp_path / "project"
    project.mkdir()
    subprocess.run(["git", "init", "-q", project], check=True)
    with open(project / "big.bin", "wb") as file:
        file.truncate(50_000_000)
    monkeypatch.chdir(project)
    slurm.says("sbatch", "Submitted batch job 7")
    overrides = ["job=smoke", "cluster=slurm", f"run.root={tmp_path}/runs", "run.name=r", "storage.budget_gb=0.02"]
    with pytest.raises(ConfigError, match=r"storage\.budget_gb: 0\.02 is refused; .* code 5[\d.]+ MB") as refused:
        submit(plan_run(compose(overrides)))
    assert refused.value.exit_code == Exit.REFUSED
    assert list((tmp_path / "runs").iterdir()) == []
    assert not slurm.calls("sbatch --parsable")
    sweep = ["storage.sweep_budget_gb=0.04", "seed=1,2", *overrides[:-1]]
    with pytest.raises(ConfigError, match=r"storage\.sweep_budget_gb: 0\.04 is refused; .* and their code"):
        submit_sweep(plan_sweep(sweep))
    assert not slurm.calls("sbatch --parsable")


def test_a_run_that_a_plain_sbatch_works_on_is_left_as_it_is(
    refusing: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only its ledger names the job. While it is on its way out it is waited for, and it may be gone after that."""
    overrides = ["job=smoke", f"run.root={tmp_path}/runs", "run.name=r"]
    prepare.main(overrides, None, sweep=False, cell=0)
    run = RunDirectory(tmp_path / "runs" / "r")
    start(run, job_id="7")
    before = run.config.read_bytes()
    squeue = refusing.directory / "squeue"
    squeue.write_text("#!/bin/sh\necho '7|7|RUNNING|None|'\n")
    with pytest.raises(ConfigError, match="no effect: job 7 is in the queue already"):
        submit(plan_run(compose([*overrides, "cluster=slurm"])))
    lock = RunLock(run)
    lock.acquire("an attempt")
    try:
        with pytest.raises(ConfigError, match=r"trainer\.max_steps: 77 is refused; an attempt is alive on"):
            prepare.main([*overrides, "trainer.max_steps=77"], None, sweep=False, cell=0)
        assert prepare.main(overrides, None, sweep=False, cell=0) == 0
        squeue.write_text("#!/bin/sh\n")
        with pytest.raises(RunBusyError, match="in use by a process of this machine, and not by a job"):
            submit(plan_run(compose([*overrides, "cluster=slurm"])))
    finally:
        lock.release()
    assert run.config.read_bytes() == before

    left = refusing.directory / "left"
    squeue.write_text(f"#!/bin/sh\n[ -e {left} ] || echo '7|7|COMPLETING|None|'\ntouch {left}\n")
    capsys.readouterr()
    assert submit(plan_run(compose([*overrides, "cluster=slurm"]))).job_id == "8"
    assert "waiting for job 7, which is on its way out" in capsys.readouterr().err


def test_a_job_that_does_not_leave_is_no_success(
    refusing: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["job=smoke", "cluster=slurm", f"run.root={tmp_path}/runs", "run.name=r"]
    assert submit(plan_run(compose(overrides))).job_id == "8"
    (refusing.directory / "squeue").write_text("#!/bin/sh\necho '8|8|COMPLETING|None|'\n")
    monkeypatch.setattr("outlast.launcher.execution.submit.LEAVING_S", 0.1)
    with pytest.raises(
        RunBusyError, match=r"job 8 is on its way out, and has not left within 0.1 s. Nothing was"
    ) as busy:
        submit(plan_run(compose(overrides)))
    assert busy.value.exit_code == Exit.REFUSED


def test_a_model_that_is_gone_is_not_said_to_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["job=smoke", f"run.root={tmp_path}/runs", "run.name=r"]
    prepare.main(overrides, None, sweep=False, cell=0)
    run = RunDirectory(tmp_path / "runs" / "r")
    start(run).append("finished", 1, step=5, seconds=1.0)
    for there in ("is no longer in", "is in"):
        assert train.train(overrides, None, waiting=False, as_json=False) == 0
        assert f"at step 5; its model {there} {run.final}" in " ".join(capsys.readouterr().out.split())
        run.final.mkdir(exist_ok=True)
