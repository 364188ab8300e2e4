"""What is in memory after a load is what was there at the save; if it is not, the run refuses, by name."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from outlast.checkpoint.manifest import read_manifest

from .. import forked
from ..conftest import RunProbe
from . import architectures

SCRIPT = Path(__file__).with_name("family_script.py")


def train(run: Path, name: str, stop: int = 0, *more: str) -> subprocess.CompletedProcess[str]:
    return forked.run([sys.executable, SCRIPT, run, name, str(stop), *more], run.parent)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_neox", "vit", "llama", "gpt2", "t5"])
def test_a_full_fine_tune_is_exact(name: str, tmp_path: Path) -> None:
    """Interrupted between two checkpoints; the best, not the last, becomes the model; `from_pretrained` reads it."""
    twin, run = RunProbe(tmp_path / "twin"), RunProbe(tmp_path / "run")
    done = train(twin.path, name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert train(run.path, name, 5).returncode == 75
    done = train(run.path, name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(e["checkpoint"], e["differences"]) for e in run.events("resumed")] == [("checkpoint-5", {})]
    assert run.weights() == twin.weights()
    # The last step has a checkpoint, though no save was due there; final/ says which step it is.
    state = json.loads((run.path / "checkpoints/checkpoint-10/trainer_state.json").read_text())
    best = state["best_global_step"]
    assert best < 10
    manifest = read_manifest(run.path / "final")
    assert (manifest.step, manifest.best_step, manifest.kind) == (best, best, "final")
    (finished,) = run.events("finished")
    assert (finished["step"], finished["model_step"]) == (10, best)
    assert run.events("checkpoint")[-1]["step"] == best
    weights = "model.safetensors"
    assert manifest.files[weights] == read_manifest(run.path / f"checkpoints/checkpoint-{best}").files[weights]


def test_every_architecture_loads_what_it_saves(tmp_path: Path) -> None:
    names = (*architectures.TEXT, *architectures.IMAGES)
    done = forked.run([sys.executable, SCRIPT, "roundtrip", *names], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} is what it was" for name in names]


@pytest.mark.parametrize(
    ("broken", "name", "reason"),
    [
        ("names", "mixtral", r"what was loaded is not what was saved: model model\.layers\.0\.mlp\.experts\.down_proj"),
        ("weights", "llama", r"saved: model model\.norm\.weight\."),
        ("optimizer", "llama", r"saved: optimizer group 0, group 1, lm_head\.weight and \d+ more"),
        ("schedule", "llama", r"saved: schedule _last_lr, _step_count, last_epoch"),
        ("random", "llama", r"saved: random cpu\."),
        ("adapter", "llama", r"saved: model base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_A"),
        ("base", "llama", r"the base model is not the one .*: base base_model\.model\.lm_head\.weight\."),
        ("buffer", "llama", r"saved: buffers scale\."),
    ],
)
def test_what_is_not_restored_is_refused_by_name(broken: str, name: str, reason: str, tmp_path: Path) -> None:
    run = RunProbe(tmp_path / "run")
    before = {"adapter": "adapter-whole", "base": "adapter-whole", "buffer": "buffer-first"}.get(broken, broken)
    first = train(run.path, name, 5, *([before] if broken in ("names", "adapter", "base", "buffer") else []))
    assert first.returncode == 75, first.stdout + first.stderr
    if broken == "buffer":
        assert "training changes buffers (seen) that the finished model will not hold" in first.stdout
    kept = sorted((run.path / "checkpoints").iterdir())
    again = train(run.path, name, 0, broken)
    assert again.returncode == 2, again.stdout + again.stderr
    assert re.search(rf"^outlast: checkpoint-5: .*{reason}", again.stderr, re.MULTILINE), again.stderr
    assert "Traceback" not in again.stderr
    assert "checkpoint.allow=[state]" in again.stderr
    assert run.events("attempt_ended")[-1]["refused"]
    assert sorted((run.path / "checkpoints").iterdir()) == kept


def test_a_best_model_that_is_not_loaded_is_not_published(tmp_path: Path) -> None:
    run = RunProbe(tmp_path / "run")
    failed = train(run.path, "llama", 0, "best")
    assert failed.returncode == 2
    assert re.search(r"checkpoint-\d: what was loaded is not what was saved: model lm_head.weight", failed.stderr)
    assert not (run.path / "final").exists()
    accepted = train(run.path, "llama", 0, "best", "state")
    assert accepted.returncode == 0, accepted.stderr
    assert "WARNING: going on although checkpoint-" in accepted.stdout
    assert (run.path / "final/model.safetensors").exists()
