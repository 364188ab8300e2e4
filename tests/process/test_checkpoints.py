"""Checkpoints of real training: when they are made, what becomes of them, who can read them, what resumes from them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from outlast.checkpoint.manifest import verify

from .. import forked
from ..conftest import SMOKE, Command, RunProbe, wait_for
from .test_library import SCRIPT, STOP_AT, run_script

Start = Callable[..., Command]
Probe = Callable[[str], RunProbe]

SFT = [
    "job=sft",
    "model.vocab_size=300",
    "model.hidden_size=16",
    "model.layers=1",
    "data.max_pairs=60",
    "data.eval_fraction=0.2",
    "parallel.cpus_per_rank=1",
    "trainer.max_length=64",
    "trainer.per_device_train_batch_size=2",
    "trainer.eval_steps=6",
    "trainer.max_steps=30",
    "trainer.learning_rate=0.02",
]
PLAIN = """
trainer.train(resume_from_checkpoint=sys.argv[3])
trainer.save_model(sys.argv[4])
"""


def steps(run: RunProbe, state: str = "*") -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in (run.path / "checkpoints").glob(f"checkpoint-{state}"))


def test_plain_hugging_face_resumes_from_a_sealed_checkpoint(tmp_path: Path) -> None:
    run = RunProbe(tmp_path / "r")
    assert run_script(tmp_path, run.path, 50).returncode == 0
    script = tmp_path / "plain.py"
    text = SCRIPT.read_text().replace("run = outlast.start(sys.argv[1])", "").replace("import outlast", "")
    script.write_text(text.replace("run.train(trainer)", PLAIN))
    sealed = run.path / "checkpoints" / "checkpoint-30"
    done = forked.run([sys.executable, script, "unused", "50", sealed, tmp_path / "out"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trained to step 50" in done.stdout
    # Other rows from here on: the order of a run's rows is its own, see "Random numbers of the data pipeline".
    ours, plain = load_file(run.path / "final" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in plain.items()}
    verify(sealed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("range(80)", "range(81)"), "dataset is "),
        (("per_device_train_batch_size=4", "per_device_train_batch_size=2"), "global_batch is 2, it was 4"),
        (("use_cpu=True", "use_cpu=True, seed=7"), "seed is 7, it was 42; set seed=42"),
        (("Dropout(0.2)", "Linear(16, 16)"), "trainable is "),
        (
            ("use_cpu=True", "use_cpu=True, save_only_model=True"),
            "valid: false; a checkpoint without the optimizer's state",
        ),
    ],
)
def test_another_run_does_not_resume_from_it(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    run = RunProbe(tmp_path / "r")
    assert run_script(tmp_path, run.path, 50, [13]).returncode == 75
    other = tmp_path / "other.py"
    other.write_text(SCRIPT.read_text().replace(*change))

    def again(script: Path) -> subprocess.CompletedProcess[str]:
        return forked.run([sys.executable, script, run.path, "50"], tmp_path)

    refused = again(other)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert message in refused.stderr
    assert run.causes() == ["preempted", "failed"]
    assert steps(run) == [10, 13], "nothing was changed"
    if "allow" in refused.stderr:
        name = message.split()[0]
        accepting = f"outlast.start(sys.argv[1], allow=[{name!r}])"
        other.write_text(other.read_text().replace("outlast.start(sys.argv[1])", accepting))
        if name != "trainable":
            assert again(other).returncode == 0
            assert name in run.events("resumed")[-1]["differences"]


def test_by_time_two_ranks_save_the_same_steps_and_come_back_exactly(outlast: Start, probe: Probe) -> None:
    base = [*SMOKE[:2], "checkpoint.every=1s", "parallel.ranks_per_node=2", "trainer.max_steps=60"]
    twin = outlast("train", *base, "run.name=twin")
    command, run = outlast("train", *base, "run.name=r", "trainer.step_s=0.08"), probe("r")
    wait_for(lambda: run.events("checkpoint"), "the first save by time")
    run.reach(run.events("checkpoint")[-1]["step"] + 3)
    command.signal(signal.SIGUSR1)
    assert command.wait() == 0, command.output
    assert twin.wait() == 0, twin.output
    periodic = [e for e in run.events("checkpoint") if e["kind"] == "periodic" and e["step"] < 60]  # the last always is
    assert len(periodic) >= 2
    assert all(b["time"] - a["time"] > 0.9 for a, b in pairwise(periodic))
    assert run.steps_repeated() == 0
    assert run.weights() == probe("twin").weights()


def test_settings_that_were_changed_are_named(tmp_path: Path) -> None:
    """Also the length of data whose rows can't be read, which is refused: it moves the rows."""
    run, changed = RunProbe(tmp_path / "r"), tmp_path / "changed.py"
    assert run_script(tmp_path, run.path, 50, [13]).returncode == 75
    changed.write_text(SCRIPT.read_text().replace("use_cpu=True", "use_cpu=True, learning_rate=1e-4, max_grad_norm=2"))
    done = forked.run([sys.executable, changed, run.path, "50"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "WARNING: resuming although learning_rate is 0.0001, it was 5e-05" in done.stdout
    assert {"learning_rate", "max_grad_norm"} <= run.events("resumed")[-1]["differences"].keys()

    other, text = RunProbe(tmp_path / "other"), SCRIPT.read_text()
    text = text.replace("train_dataset=data", "train_dataset=torch.utils.data.Subset(data, range(80))")
    stop = "import os; trainer.add_callback(StopAt()) if os.environ.get('STOP') else None"
    text = text.replace("run.train(", f"{stop}\nrun.train(")
    changed.write_text(f"stops = [13]\n{STOP_AT}\n{text}")
    stopping = {**os.environ, "STOP": "1"}
    assert forked.run([sys.executable, changed, other.path, "50"], tmp_path, env=stopping).returncode == 75
    changed.write_text(changed.read_text().replace("range(80))", "range(60))"))
    refused = forked.run([sys.executable, changed, other.path, "50"], tmp_path)
    assert refused.returncode == 2
    assert "dataset is of 60 rows, it was of 80 rows" in refused.stderr


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's own
def test_milestones_become_light_and_load_and_each_new_best_is_saved(outlast: Start, probe: Probe) -> None:
    command = outlast(
        "train",
        *SFT,
        "run.name=r",
        "checkpoint.every=1000",
        "checkpoint.milestone_every=8",
        "trainer.save_total_limit=1",
    )
    assert command.wait() == 0, command.output
    run = probe("r")
    metrics = {e["step"]: e["metrics"]["eval_loss"] for e in run.events("evaluated")}
    best = min(metrics, key=lambda step: metrics[step])
    light = [step for step in (8, 16) if step != best]
    for step in light:
        path = run.path / "checkpoints" / f"checkpoint-{step}"
        assert verify(path).light
        assert not list(path.glob("optimizer*"))
        assert AutoPeftModelForCausalLM.from_pretrained(path) is not None
    assert best in steps(run)
    assert {e["checkpoint"] for e in run.events("lightened")} >= {f"checkpoint-{step}" for step in light}
    kept = load_file(run.path / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    final = load_file(run.path / "final" / "adapter_model.safetensors")
    assert all((kept[name] == final[name]).all() for name in final), "final/ is the best"


def test_a_trainers_own_checkpoints_are_not_begun_beside(tmp_path: Path) -> None:
    """In the run directory they are refused; in the Trainer's own, said. One of a run is to lie where it belongs."""
    run, plain = RunProbe(tmp_path / "r"), tmp_path / "plain.py"
    text = SCRIPT.read_text().replace("TrainingArguments(", "TrainingArguments(output_dir='r',")
    without = text.replace("run = outlast.start(sys.argv[1])", "").replace("run.train(trainer)", "trainer.train()")
    plain.write_text(without)
    assert forked.run([sys.executable, plain, "-", "10"], tmp_path).returncode == 0
    for place in (run.path, run.path / "checkpoints"):
        refused = run_script(tmp_path, run.path, 20)
        assert refused.returncode == 2, refused.stdout
        assert f"outlast: {place / 'checkpoint-10'} was made by a Trainer without outlast" in refused.stderr
        (run.path / "checkpoints").mkdir(exist_ok=True)
        if place == run.path:
            (place / "checkpoint-10").rename(place / "checkpoints" / "checkpoint-10")
    assert not run.events()
    assert not (run.path / "quarantine").exists()
    (run.path / "checkpoints" / "checkpoint-10").rename(tmp_path / "checkpoint-10")

    said = tmp_path / "said.py"
    said.write_text(text.replace("output_dir='r'", "output_dir='.'"))
    done = forked.run([sys.executable, said, run.path, "10"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "WARNING: this run begins at step 0. checkpoint-10, which a Trainer has made without it" in done.stdout

    other = tmp_path / "other"
    other.mkdir()
    (run.path / "checkpoints" / "checkpoint-10").rename(other / "checkpoint-10")
    misplaced = run_script(tmp_path, other, 20)
    assert misplaced.returncode == 2
    assert f"is a run's: move it into {other / 'checkpoints'} to go on from it" in misplaced.stderr
