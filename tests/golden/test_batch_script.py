"""The batch script, to the letter."""

import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from outlast.errors import ConfigError
from outlast.launcher.planning.batch_script import batch_script, target_of
from outlast.launcher.planning.compose import compose
from outlast.launcher.planning.sweep import plan_sweep
from outlast.slurm.submit import with_token

EXPECTED = """#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=3
#SBATCH --job-name='my run'
#SBATCH --mem=8000M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output='{root}/my run/logs/{log}'
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --reservation=maintenance
#SBATCH --signal=USR2@120
#SBATCH --time=600

setup_failed() {{
    code=$? why="cluster.setup: exit code $? of: $setup"
    echo "[outlast] $why"
    PYTHONPATH='{root}/my run/code'"${{PYTHONPATH:+:$PYTHONPATH}}" {python} -P -u -m \
outlast.epilogue {arguments} --exit-code "$code" --before "$why"
    exit $?
}}
trap setup_failed EXIT
setup='module load cuda'
module load cuda
code=$?; [ $code = 0 ] || exit $code
trap - EXIT

export OMP_NUM_THREADS=3
. '{root}/my run/code/outlast/shell/prologue.sh'
# The code that was frozen at submission comes before what is installed.
export PYTHONPATH='{root}/my run/code'"${{PYTHONPATH:+:$PYTHONPATH}}"
python=({python} -P -u -m)

code=0
srun --unbuffered --kill-on-bad-exit=1 --cpu-bind=cores '--label-io=a b' "${{OUTLAST_HOLD[@]}}" "${{python[@]}}" \
outlast.rank {arguments} || code=$?
# What the ranks can't see to when they are gone; its exit code is the job's.
"${{python[@]}}" outlast.epilogue {arguments} --exit-code "$code"
"""
OVERRIDES = [
    "job=smoke",
    "run.name='my run'",
    "cluster=slurm",
    "cluster.partition=gpu",
    "cluster.time_min=600",
    "cluster.mem_gb=8",
    "cluster.setup=[module load cuda]",
    "cluster.sbatch.reservation=maintenance",
    "cluster.sbatch.exclusive=false",
    "cluster.srun.cpu_bind=cores",
    "cluster.srun.label-io='a b'",
    "parallel.nodes=2",
    "parallel.ranks_per_node=4",
    "parallel.cpus_per_rank=3",
    "preemption.signal=USR2",
    "preemption.lead_s=120",
]


@pytest.fixture(autouse=True)
def srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit asks only whether there is an `srun`."""
    if shutil.which("srun") is None:
        (tmp_path / "srun").touch(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def expected(root: Path, log: str, arguments: str) -> str:
    return EXPECTED.format(root=root, log=log, arguments=arguments, python=sys.executable)


def test_of_a_run(tmp_path: Path) -> None:
    config = compose([*OVERRIDES, f"run.root={tmp_path}"])
    assert batch_script(config, target_of(config)) == expected(tmp_path, "%j.log", f"'{tmp_path}/my run'")


def test_with_an_agent_each_node_has_one_task_with_the_cores_of_all_its_ranks(tmp_path: Path) -> None:
    config = compose([*OVERRIDES, f"run.root={tmp_path}", "parallel.launch=accelerate"])
    by_ranks = expected(tmp_path, "%j.log", f"'{tmp_path}/my run'")
    by_agents = by_ranks.replace("--ntasks-per-node=4", "--ntasks-per-node=1").replace("per-task=3", "per-task=12")
    assert batch_script(config, target_of(config)) == by_agents


def test_of_a_sweep(tmp_path: Path) -> None:
    sweep = plan_sweep([*OVERRIDES, f"run.root={tmp_path}", "seed=1,2"])
    assert sweep.script() == expected(tmp_path, "%A_%a.log", f"--sweep '{tmp_path}/my run'")
    beyond = batch_script(sweep.cells[0].plan.config, sweep.target(offset=1001))
    assert f"outlast.epilogue --sweep '{tmp_path}/my run' --offset 1001 --exit-code" in beyond


@pytest.mark.parametrize("name", ["it's", "$(touch x)", "`touch x`", 'a"b', "ä ö", "a;b", "!!", "#x", "*"])
def test_no_name_is_read_by_the_shell(name: str, tmp_path: Path) -> None:
    """The lines after the header, run by a real shell with everything in them replaced by `printf`."""
    config = compose(["job=smoke", "cluster=slurm", f"run.root={tmp_path}"])
    config.run.name = name
    script = batch_script(config, target_of(config))
    printed = subprocess.run(
        ["bash", "-c", f"srun() {{ printf '%s\\n' \"$@\"; }}; python=true\n{script.replace(sys.executable, 'true')}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert printed.stdout.splitlines()[-1] == str(tmp_path / name)
    assert not (tmp_path / "x").exists()
    header = next(line for line in script.splitlines() if line.startswith("#SBATCH --output="))
    assert shlex.split(header.removeprefix("#SBATCH "))[0] == f"--output={tmp_path / name}/logs/%j.log"


def test_a_percent_sign_in_the_root_is_no_pattern_of_slurm(tmp_path: Path) -> None:
    config = compose(["job=smoke", "cluster=slurm", f"run.root='{tmp_path}/100%j'", "run.name=r"])
    assert "/100%%j/r/logs/%j.log" in batch_script(config, target_of(config))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cluster.sbatch.requeue=false", "cluster.sbatch.requeue: .* outlast sets this flag itself"),
        ("cluster.sbatch.job_name=x", "cluster.sbatch.job_name: .* outlast sets this flag itself"),
        ("cluster.sbatch.licenses=[a,b]", "cluster.sbatch.licenses: .* a text, a number, or true"),
        ("run.root='/tmp/a\\b'", "run.root: .* no backslash"),
    ],
)
def test_what_a_batch_script_can_not_have_is_refused(override: str, said: str, tmp_path: Path) -> None:
    config = compose(["job=smoke", "cluster=slurm", f"run.root={tmp_path}", "run.name=r", override])
    with pytest.raises(ConfigError, match=said):
        batch_script(config, target_of(config))


def test_a_flag_that_is_no_flag_is_refused(tmp_path: Path) -> None:
    config = compose(["job=smoke", "cluster=slurm", f"run.root={tmp_path}", "run.name=r"])
    for section in ("sbatch", "srun"):
        for flags in ({"a b": 1}, {"x;y": 1}, {"partition": "a\nb"}):
            values = {"sbatch": {}, "srun": {}, section: flags}
            bad = replace(config, cluster=replace(config.cluster, **values))
            with pytest.raises(ConfigError, match=rf"cluster\.{section}\..*: .* is refused; valid: one line"):
                batch_script(bad, target_of(bad))


def test_a_comment_and_a_wckey_of_the_users_are_kept(tmp_path: Path) -> None:
    overrides = [*OVERRIDES, "cluster.sbatch.comment='preemption=yes;requeue=true'", "cluster.sbatch.wckey=lab"]
    config = compose([*overrides, f"run.root={tmp_path}"])
    text = batch_script(config, target_of(config))
    assert "#SBATCH --comment='preemption=yes;requeue=true'\n" in text
    assert "#SBATCH --wckey=lab\n" in text
    script = tmp_path / "job.sbatch"
    script.write_text(text)
    assert with_token(script, "outlast:7") == "preemption=yes;requeue=true;outlast:7"
    script.write_text("#!/bin/sh\n")
    assert with_token(script, "outlast:7") == "outlast:7"


@pytest.mark.parametrize(
    ("setup", "code", "told"),
    [
        (["export A=1  # kept", "echo $A; no_such_module 2>/dev/null", "echo never"], 127, "echo $A; no_such_module"),
        (["A=1", "if true; then", "  echo $A; false", "fi"], 1, "A=1\nif true; then"),
        (["echo 1", "set -e", "false", "echo never"], 1, "false"),
        (["echo 1 \\", "; exit 3"], 3, "echo 1 \\\n; exit 3"),
        (["echo 1; exit 0"], 0, "echo 1; exit 0"),
        (["echo 1", "false || true"], None, ""),
    ],
)
def test_a_line_of_the_setup_that_fails_ends_the_job(
    setup: list[str], code: int | None, told: str, tmp_path: Path
) -> None:
    """Run by a real shell, in which `srun` and Python only print what they are told."""
    config = compose(["job=smoke", "cluster=slurm", f"run.root={tmp_path}", "run.name=r"])
    config = replace(config, cluster=replace(config.cluster, setup=setup))
    says = tmp_path / "says"
    says.write_text("#!/bin/sh\nprintf '%s|' \"$@\"\nexit 9\n")
    says.chmod(0o755)
    text = batch_script(config, target_of(config)).replace(sys.executable, str(says))
    run = subprocess.run(
        ["bash", "-c", f"srun() {{ echo SRUN; }}\n{text}"], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 9
    assert run.stdout.startswith("1\n")
    assert "never" not in run.stdout
    assert ("SRUN" in run.stdout) == (code is None)
    if code is not None:
        assert (
            f"outlast.epilogue|{tmp_path}/r|--exit-code|{code}|--before|cluster.setup: exit code {code} of: {told}"
            in run.stdout
        )
