"""What came out of a run is handed out: whole, with the loss that the ledger has, and refused with the way out."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint.manifest import Sealed, read_manifest
from outlast.checkpoint.removal import Remover
from outlast.rundir.directory import RunDirectory

from .. import forked
from ..conftest import OUTLAST, Command, RunProbe, wait_for

LOSS_OF = Path(__file__).with_name("loss_of.py")
BASE = [
    *("job=sft", "parallel.cpus_per_rank=1", "trainer.max_steps=4", "trainer.eval_steps=2", "checkpoint.every=2"),
    *("trainer.packing=false", "trainer.per_device_eval_batch_size=4", "trainer.learning_rate=0.01"),
    "trainer.lr_scheduler_type=constant",
]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TINY = ["model.vocab_size=600", "model.hidden_size=32", "model.layers=2", "model.heads=2", "model.max_length=256"]
DATA = ["data.max_pairs=64", "data.eval_fraction=0.25"]
TIED_BASE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
config = LlamaConfig.from_pretrained(sys.argv[1], tie_word_embeddings=True)
LlamaForCausalLM(config).save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
tokenizer.add_tokens([f"<|new {number}|>" for number in range(100)], special_tokens=True)
tokenizer.save_pretrained(sys.argv[3])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three finished runs: `tiny` and `tied` with adapters, `zero`, whose weights are all trained by two ranks."""
    directory = tmp_path_factory.mktemp("results")

    def train(*arguments: str) -> None:
        command = Command(directory, "train", *BASE, *DATA, *arguments)
        assert command.wait() == 0, command.output

    train(*TINY, "run.name=tiny")
    (directory / "base.py").write_text(TIED_BASE)
    base = [sys.executable, directory / "base.py", directory / "runs/tiny/prepared/model", directory / "base"]
    assert forked.run([*base, directory / "tokens"], directory).returncode == 0
    pretrained = ["model=pretrained", f"model.path={directory / 'base'}", "trainer.per_device_train_batch_size=2"]
    train(*pretrained, "peft.modules_to_save=[lm_head]", "run.name=tied")
    train(*pretrained, "peft=none", "parallel=zero2", "parallel.ranks_per_node=2", "run.name=zero")
    return directory


def outlast(place: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return forked.run([OUTLAST, *map(str, arguments)], place, env={**os.environ, **ONE_THREAD})


def export(place: Path, run: str, to: Path, *options: str) -> dict[str, Any]:
    done = outlast(place, "export", run, "--to", to, "--json", *options)
    assert done.returncode == 0, done.stderr
    files = [file.name for file in to.rglob("*")]
    assert {"README.md", "tokenizer.json", "chat_template.jinja"} <= set(files)
    assert not [name for name in files if re.search(r"\.(bin|pt|pth|pkl)$|manifest|digests|trainer_state", name)]
    assert not list(to.parent.glob(".*")), "nothing is left beside it"
    return dict(json.loads(done.stdout))


def received(place: Path, run: str, exported: Path) -> dict[str, float]:
    """What a receiver finds, in a directory of its own."""
    rows = place / "runs" / run / "prepared/data/eval"
    env = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = forked.run([sys.executable, LOSS_OF, exported, rows, "4"], exported.parent, env=env)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def recorded(place: Path, run: str, step: int | None = None) -> float:
    """The loss that the ledger has of a step; of the finished model, if left out."""
    probe = RunProbe(place / "runs" / run)
    step = probe.events("finished")[-1]["model_step"] if step is None else step
    return float(next(e["metrics"]["eval_loss"] for e in probe.events("evaluated") if e["step"] == step))


def test_adapters_on_the_embedded_model_are_merged(place: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.staging").mkdir()
    (tmp_path / ".out.staging" / "of-a-killed-export").touch()
    (tmp_path / "out").mkdir()
    done = export(place, "tiny", tmp_path / "out")
    assert done["merged"]
    assert done["base"] is None
    shutil.move(place / "runs/tiny", tmp_path / "away")  # the receiver has no run
    try:
        rows = tmp_path / "away/prepared/data/eval"
        answer = forked.run([sys.executable, LOSS_OF, tmp_path / "out", rows, "4"], tmp_path)
    finally:
        shutil.move(tmp_path / "away", place / "runs/tiny")
    assert json.loads(answer.stdout)["loss"] == pytest.approx(recorded(place, "tiny"), rel=1e-5), answer.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("embedded tiny model", "data=python_docs", "eval_loss", "**Attempts**: 1", "Verified", "max_steps: 4"):
        assert text in card
    assert str(place) not in card, "no path of this machine"


@pytest.mark.parametrize("options", [(), ("--merge",)], ids=["adapters", "merged"])
def test_adapters_on_a_tied_base(place: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """The output layer is trained apart from the embeddings that it was tied to."""
    done = export(place, "tied", tmp_path / "out", *options)
    assert done["merged"] is bool(options)
    assert done["base"] == (None if options else str(place / "base"))
    found = received(place, "tied", tmp_path / "out")
    assert found["loss"] == pytest.approx(recorded(place, "tied"), rel=1e-5)
    assert found["template"]
    if options:
        assert not found["tied"]


def test_all_weights_of_two_ranks(place: Path, tmp_path: Path) -> None:
    step = 2
    export(place, "zero", tmp_path / "out", "--checkpoint", str(step))
    found = received(place, "zero", tmp_path / "out")
    assert found["loss"] == pytest.approx(recorded(place, "zero", step), rel=1e-5)
    assert found["tied"]
    half = export(place, "zero", tmp_path / "half", "--dtype", "bfloat16")
    assert half["dtype"] == "bfloat16"
    assert 0 < half["apart"] < 0.1
    found = received(place, "zero", tmp_path / "half")
    assert found["dtype"] == "torch.bfloat16"
    assert found["loss"] == pytest.approx(recorded(place, "zero"), rel=0.02)


def test_adapters_with_new_tokens_on_a_base_of_16_bits(place: Path, tmp_path: Path) -> None:
    base, tokens = place / "runs/tiny/prepared/model", place / "tokens"
    model = ["model=pretrained", f"model.path={base}", "model.dtype=bfloat16", f"trainer.chat_template_path={tokens}"]
    train(place, *BASE, *DATA, *model, "run.name=half", "trainer.per_device_train_batch_size=2")
    wide = ("--merge", "--dtype", "float32")
    for name, options in (("out", ()), ("merged", ("--merge",)), ("wide", wide)):
        done = export(place, "half", tmp_path / name, *options)
        formats = {"out": "bfloat16, float32", "merged": "bfloat16", "wide": "float32"}  # adapters have 32 bits
        assert done["dtype"] == formats[name]
        found = received(place, "half", tmp_path / name)
        assert found["loss"] == pytest.approx(recorded(place, "half"), rel=0.01)
        assert found["vocabulary"] > 600


SHARDS = """
import sys
from pathlib import Path

from safetensors.torch import load_file

from outlast.results.model import load
from outlast.results.source import Source
from outlast.rundir.directory import RunDirectory

whole = load_file(sys.argv[2] + "/model.safetensors")
Path(sys.argv[2], "model.safetensors").unlink()
source = Source(RunDirectory(Path(sys.argv[1])), Path(sys.argv[2]))
source.check()
assert source.shards
state = load(source).state_dict()
assert whole and all((state[name] == tensor).all() for name, tensor in whole.items())
"""


def test_shards_alone_are_put_together(place: Path, tmp_path: Path) -> None:
    """As a Trainer saves them that does not gather the weights of ZeRO 3."""
    shutil.copytree(place / "runs/zero", tmp_path / "zero")
    script = tmp_path / "shards.py"
    script.write_text(SHARDS)
    run = tmp_path / "zero"
    done = forked.run([sys.executable, script, run, run / "checkpoints/checkpoint-2"], tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    copy, to = tmp_path / "runs" / "tied", tmp_path / "out"
    shutil.copytree(place / "runs/tied", copy)
    (copy / "quarantine/checkpoint-3").mkdir(parents=True)
    (copy / "quarantine/checkpoint-3.reason.txt").write_text("a bit has flipped\n")
    weights = copy / "checkpoints/checkpoint-2/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine").touch()
    (tmp_path / "file").touch()

    def refused(*arguments: str | Path, run: str = "tied", target: Path = to) -> str:
        done = outlast(tmp_path, "export", run, "--to", target, *arguments)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert not to.exists()
        return done.stderr

    assert "valid: tied" in refused(run="other")
    assert "checkpoint-3 is in quarantine: a bit has flipped" in refused("--checkpoint", "3")
    message = refused("--checkpoint", "2")
    assert "adapter_model.safetensors differs" in message
    assert "valid: final, best, newest, 2, 4" in message
    assert "valid: final, best, newest, 2, 4" in refused("--checkpoint", "latest")
    assert "outside of the run's own" in refused(target=copy / "out")
    for name in ("taken", "file"):
        assert "not there yet, or an empty one" in refused(target=tmp_path / name)
    assert (tmp_path / "taken/mine").exists()
    shutil.copytree(place / "runs/zero", tmp_path / "runs/zero")
    assert "is a whole model, without adapters" in refused("--merge", run="zero")
    (tmp_path / "runs/zero/final/manifest.json").unlink()
    assert "final is no sealed checkpoint" in refused(run="zero")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(place / "base"), str(place / "runs/zero/final")))
    assert "valid: the base model that the adapters were trained on" in refused()
    config.write_text(config.read_text().replace(str(place / "runs/zero/final"), "/not/there"))
    assert "'/not/there' is refused; valid: a directory that exists" in refused()


def test_a_few_tokens(place: Path, outlast_here: Callable[..., str]) -> None:
    greedy = [outlast_here("try", "tied", "def", "--max-tokens", "5", "--json") for _ in range(2)]
    assert greedy[0] == greedy[1]
    found = json.loads(greedy[0])
    assert 0 < found["tokens"] <= 5
    assert found["text"]
    assert not found["chat"], "this run was trained on prompts without a template"
    drawn = outlast_here("try", "tied", "def", "--max-tokens", "5", "--temperature", "5", "--checkpoint", "2")
    assert drawn.strip() != found["text"].strip()


@pytest.fixture
def outlast_here(place: Path) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        done = outlast(place, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def evaluate(place: Path, run: str, *options: str | Path, code: int = 0) -> dict[str, Any]:
    done = outlast(place, "evaluate", run, "--json", *options)
    assert done.returncode == code, done.stderr
    return dict(json.loads(done.stdout))


def test_every_checkpoint_is_scored_once(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/tiny"
    shutil.copytree(place / "runs/tiny", run)
    first = run / "checkpoints/checkpoint-2"
    remover = Remover(RunDirectory(run), lambda *_, **__: None, print)
    assert remover.lighten(Sealed(first, read_manifest(first)), "no room")
    found = evaluate(tmp_path, "tiny")
    assert found["rows"] == 16
    assert [row["step"] for row in found["models"]] == [2, 4]
    for row in found["models"]:
        assert row["loss"] == pytest.approx(recorded(place, "tiny", row["step"]), rel=1e-6)
    assert [row["best"] for row in found["models"]] == [row["final"] for row in found["models"]], "final/ is the best"
    record = Path(found["record"])
    assert record.is_relative_to(run), "where the budget counts it"
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert len(lines) == 2, "the finished model has the weights of a checkpoint"
    assert all(sum(line["losses"]) / 16 == pytest.approx(line["loss"]) for line in lines)
    before = record.read_bytes()
    assert evaluate(tmp_path, "tiny") == found
    assert record.read_bytes() == before, "nothing is scored twice"
    shown = outlast(tmp_path, "evaluate", "tiny").stdout
    assert re.search(r"checkpoint-\d, final +\d\.\d+ +best", shown)
    assert "±" in shown


def test_an_evaluation_that_is_stopped_goes_on(place: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    texts = [{"prompt": f"what is {number}?", "completion": f"it is {number}"} for number in range(300)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    arguments = ("evaluate", "zero", "--data", str(rows))
    command = Command(place, *arguments, **ONE_THREAD)

    def lines() -> list[str]:
        records = list((place / "runs/zero/evaluations").glob("rows-*.jsonl"))
        return records[0].read_text().splitlines() if records else []

    try:
        wait_for(lines, "the first score")
        command.signal(signal.SIGUSR1)
        assert command.wait() == 75, command.output
        assert "the same command goes on" in command.output
        stopped = lines()
        assert len(stopped) < 2
        found = evaluate(place, "zero", "--data", rows)
    finally:
        command.end()
    assert lines()[: len(stopped)] == stopped
    assert [row["step"] for row in found["models"]] == [2, 4]
    assert found["rows"] == 300


def test_what_can_not_be_scored(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/tiny"
    shutil.copytree(place / "runs/tiny", run)

    def refused(*options: str) -> str:
        done = outlast(tmp_path, "evaluate", "tiny", *options)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "valid: a JSON Lines file" in refused("--data", "not-there.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"question": "?"}\n')
    assert re.search(r"--data: '.*bad\.jsonl, line 1' is refused", refused("--data", "bad.jsonl"))
    weights = run / "checkpoints/checkpoint-2/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = outlast(tmp_path, "evaluate", "tiny")
    assert done.returncode == 1
    assert "checkpoint-2 is left out: adapter_model.safetensors differs" in done.stderr
    assert "checkpoint-4" in done.stdout
    config = run / "config.yaml"
    shutil.rmtree(run / "evaluations")
    used = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
    config.write_text(config.read_text().replace("budget_gb: 10.0", f"budget_gb: {used / 1e9:.9f}"))
    assert "storage.budget_gb" in refused()
    config.unlink()
    assert "valid: a run of `outlast train job=sft`" in refused()


def train(place: Path, *arguments: str, code: int = 0) -> str:
    command = Command(place, "train", *arguments, **ONE_THREAD)
    try:
        assert command.wait() == code, command.output
    finally:
        command.end()
    return command.output


def test_a_finished_run_goes_on_as_if_it_had_been_longer(place: Path) -> None:
    longer = "trainer.max_steps=7"
    train(place, *BASE, *TINY, *DATA, "run.name=twin", longer)
    runs = RunProbe(place / "runs/twin"), RunProbe(place / "runs/longer")
    arguments = ["--from", "tiny", "--optimizer", "run.name=longer", longer]
    said = train(place, *arguments)
    assert "exact: as if tiny went on from step 4" in said
    assert [event["step"] for event in runs[1].events("resumed")] == [4]
    assert runs[1].weights() == runs[0].weights()
    assert "has finished already" in train(place, *arguments), "the same command again"
    hint = f"to go on from it: outlast train --from {place / 'runs/tiny'} --optimizer"
    assert hint in train(place, *BASE, *TINY, *DATA, "run.name=tiny", longer)
    report = json.loads(outlast(place, "report", "longer", "--json").stdout)
    assert report["began_with"] == "tiny@4 (weights, optimizer and position)"


@pytest.mark.parametrize("run", ["tied", "zero"])
def test_a_new_run_begins_with_the_weights(place: Path, run: str) -> None:
    name, options = f"{run}-fork", ["trainer.eval_on_start=true", "trainer.max_steps=2", "trainer.learning_rate=0.001"]
    said = train(place, "--from", f"{run}@2", f"run.name={name}", *options)
    assert "the data begin anew, at step 0" in said
    assert recorded(place, name, 0) == pytest.approx(recorded(place, run, 2), rel=1e-6)
    shutil.rmtree(place / "runs" / name / "prepared/start")
    for path in (place / "runs" / name / "checkpoints").iterdir():
        shutil.rmtree(path)
    lines = (place / "runs" / name / "ledger.jsonl").read_text().splitlines(keepends=True)
    (place / "runs" / name / "ledger.jsonl").write_text(lines[0])  # as after a kill before the first checkpoint
    assert "is gone, with the weights" in train(place, "--from", f"{run}@2", f"run.name={name}", *options, code=2)


def test_what_can_not_be_forked(place: Path) -> None:
    before = sorted(path.name for path in (place / "runs").iterdir())

    def refused(*arguments: str) -> str:
        return train(place, *arguments, code=2)

    assert "valid: a name for the new run" in refused("--from", "tiny")
    assert "valid: " in refused("--from", "other", "run.name=x")
    assert "--from: '3' is refused; no checkpoint of step 3 is kept" in refused("--from", "tiny@3", "run.name=x")
    assert "it has no optimizer; valid" in refused("--from", "tiny@final", "--optimizer", "run.name=x")
    assert "model.layers: 3" in refused("--from", "tiny", "run.name=x", "model.layers=3")
    small = refused("--from", "zero", "run.name=x", "storage.budget_gb=0.001")
    assert "weights to begin with" in small, "they count in the arithmetic"
    assert "that run began by itself" in refused("--from", "tiny", "run.name=tied")
    assert "valid: with --from RUN" in refused("--optimizer", "run.name=x")
    assert "for one run, without -m" in refused("--from", "tiny", "-m", "run.name=x", "seed=1,2")
    assert "a fork has the job of its run" in refused("--from", "tiny", "run.name=x", "job=smoke")
    assert sorted(path.name for path in (place / "runs").iterdir()) == before, "nothing is made of what is refused"
