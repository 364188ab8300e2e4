"""The time that a real Slurm gives, against the time that a step and a save take."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ..conftest import SMOKE, Command, RunProbe, wait_for
from .cluster import Cluster

Probe = Callable[[str], RunProbe]

USER_SCRIPT = Path(__file__).parents[1] / "process" / "user_script.py"
MICRO_S, MICRO_BATCHES = 0.5, 60
"""A step of 30 s: as long as the grace time, and finished only long after it could still be saved."""


def slow_script(directory: Path) -> Path:
    """The user's script, whose second step is a long one until the job has been requeued."""
    text = USER_SCRIPT.read_text()
    forward = "        return {"
    slow = "trainer.state.global_step == 1 and 'SLOW' in os.environ and 'SLURM_RESTART_COUNT' not in os.environ"
    assert forward in text
    wait = f"            open('slow', 'a').close(), time.sleep({MICRO_S})"
    text = text.replace(forward, f"        if self.training and {slow}:\n{wait}\n{forward}")
    text = text.replace("start(sys.argv[1])", "start(sys.argv[1], requeue=True)")  # the job is a `--wrap`
    text = text.replace("    max_steps=", f"    gradient_accumulation_steps={MICRO_BATCHES},\n    max_steps=")
    text = text.replace("for _ in range(80)", f"for _ in range({8 * MICRO_BATCHES})")
    script = directory / "slow.py"
    script.write_text(f"import os, time\n{text}")
    return script


def test_a_step_that_does_not_fit_into_the_grace_time_is_left(devcluster: Cluster, tmp_path: Path) -> None:
    """Without that, the job would be killed in mid-step, with nothing saved at all."""
    script, run = slow_script(tmp_path), RunProbe(tmp_path / "r")
    flags = ["-p", "low", "-N1", "-c1", "--requeue", "--open-mode=append", "-o", str(tmp_path / "log")]
    command = f"env SLOW=1 OMP_NUM_THREADS=1 srun {sys.executable} {script} {run.path} 3"
    devcluster.run("sbatch", "--chdir", str(tmp_path), *flags, "--wrap", command)
    try:
        wait_for((tmp_path / "slow").exists, "the long step", 120)
        devcluster.run("sbatch", "-p", "high", "-N", "4", "--exclusive", "-o", "/dev/null", "--wrap", "true")
        wait_for(lambda: run.events("finished"), "the end", 120)
    finally:
        devcluster.cancel_all()
    (signal,), (cut,), (requeued,) = run.events("signal"), run.events("step_cut"), run.events("requeued")
    assert (signal["name"], signal["step"], cut["step"]) == ("TERM", 1, 2)
    assert 0 < cut["micro_batches"] < MICRO_BATCHES
    assert requeued["time"] - signal["time"] < signal["deadline_s"] / 2
    assert [e["step"] for e in run.events("resumed")] == [1]
    assert run.causes() == ["preempted", "finished"]

    twin = RunProbe(tmp_path / "twin")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, twin.path, "3"], cwd=tmp_path, env=env, check=True, timeout=120)
    assert run.weights() == twin.weights()


def test_a_notice_that_is_too_short_is_said_once(devcluster: Cluster, tmp_path: Path) -> None:
    for name, grace in (("short", ["preemption.grace_s=1"]), ("long", [])):
        arguments = [*SMOKE, "cluster=devcluster", "trainer.max_steps=60", f"run.name={name}", *grace]
        train = Command(tmp_path, "train", "--wait", *arguments, OUTLAST_DEVCLUSTER=str(devcluster.directory))
        assert train.wait(120) == 0, train.output
    devcluster.cancel_all()
    run, enough = (RunProbe(tmp_path / "runs" / name) for name in ("short", "long"))
    (short,) = run.events("notice_short")
    assert short["notice_s"] == 1
    assert short["needed_s"] > 3
    assert (run.path / "logs").is_dir()
    said = [path for path in (run.path / "logs").rglob("*") if "gives 1 s (preemption.grace_s)" in path.read_text()]
    assert len(said) == 1
    assert not enough.events("notice_short")
