"""Another number of ranks on resume: the same rows in each step, the same schedule, the optimizer's state carried over.

What the ranks did is written down by themselves (`watcher/sitecustomize.py`), from the tokens that they were given. All
runs are compared with one on two ranks, without ZeRO, that was left alone: on paper they compute the same.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.checkpoint.manifest import read_entry, read_manifest, write_manifest

from ..conftest import SMOKE, Command, RunProbe, wait_for

Start = Callable[..., Command]
Probe = Callable[[str], RunProbe]

WATCHER = Path(__file__).with_name("watcher")
STEPS = 42
SFT = [
    "job=sft",
    "model.vocab_size=512",
    "model.hidden_size=32",
    "model.layers=2",
    "data.max_pairs=255",
    "data.eval_fraction=0.4",
    "peft=none",  # no dropout: a rank that was not there before has no random state to go on with
    "trainer.weight_decay=0.1",  # two groups of parameters
    "parallel.cpus_per_rank=1",
    "checkpoint.every=1000",
    "trainer.packing=false",  # rows of all lengths: the loss of a step depends on how tokens are counted over ranks
    "trainer.max_length=128",
    "trainer.max_steps=-1",
    "trainer.num_train_epochs=2.1",
    "trainer.gradient_accumulation_steps=2",
    "trainer.per_device_train_batch_size=2",
    "trainer.per_device_eval_batch_size=1",
    "trainer.eval_steps=15",
    "trainer.load_best_model_at_end=false",
    "trainer.logging_steps=1",
    "trainer.learning_rate=0.002",
]
LOSS = 5e-6
"""Sums are rounded in another order: 1e-6 was measured, of a loss of about 6."""
MOMENTS = 1e-5
"""The same, relative, of a parameter's moment as a whole: 4e-6 was measured."""


class Watched:
    """What the ranks of a run have written down, over all attempts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)

    @property
    def env(self) -> dict[str, str]:
        return {"PYTHONPATH": str(WATCHER), "WATCH": str(self.directory)}

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for path in self.directory.glob("rank-*") for line in path.read_text().splitlines()]

    def rows(self) -> dict[int, Counter[str]]:
        """The rows of each optimizer step, over all ranks and micro-batches."""
        steps: dict[int, Counter[str]] = {}
        for line in self._lines():
            if "rows" in line:
                steps.setdefault(line["step"], Counter()).update(line["rows"])
        return steps

    def logged(self, key: str) -> dict[int, float]:
        return {line["step"]: line["logged"][key] for line in self._lines() if key in line.get("logged", {})}

    def epochs(self) -> dict[int, float]:
        return {line["step"]: line["epoch"] for line in self._lines() if "loss" in line.get("logged", {})}

    def moments(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = torch.load(self.directory / "moments.pt")
        return {name.replace("module.", ""): moment for name, moment in found.items()}


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    directory = tmp_path_factory.mktemp("twin")
    watched = Watched(directory / "watched")
    command = Command(directory, "train", *SFT, "run.name=twin", "parallel.ranks_per_node=2", **watched.env)
    try:
        assert command.wait() == 0, command.output
    finally:
        command.end()
    return watched


def test_the_twin_is_what_the_tests_need(twin: Watched) -> None:
    rows, epochs = twin.rows(), twin.epochs()
    assert sorted(rows) == list(range(1, STEPS + 1))
    first = next(step for step, epoch in epochs.items() if epoch == 1)
    assert 8 < first < 24, "the second stop is in another epoch than the first"
    assert rows[first].total() not in (0, 8), "the last step of an epoch has fewer rows than the others"
    assert rows[first + 1].total() == 8
    epoch = sum((rows[step] for step in range(1, first + 1)), Counter[str]())
    assert epoch.total() > len(epoch), "rows are repeated at its end, as two ranks need it"
    assert len(set(twin.logged("learning_rate").values())) == STEPS
    assert len(twin.logged("eval_loss")) == 3


@pytest.mark.parametrize("parallel", ["ddp", "zero2", "zero3"])
def test_two_ranks_one_rank_two_ranks(
    outlast: Start, probe: Probe, tmp_path: Path, twin: Watched, parallel: str
) -> None:
    watched, run = Watched(tmp_path / "watched"), probe("r")
    for ranks, stop, code in ((2, 8, 75), (1, 24, 75), (2, 0, 0)):
        layout = (f"parallel={parallel}", f"parallel.ranks_per_node={ranks}")
        command = outlast("train", *SFT, *layout, "run.name=r", **watched.env, WATCH_STOP=str(stop))
        assert command.wait() == code, command.output
    assert [e["world_size"] for e in run.events("attempt_started")] == [2, 1, 2]
    assert [e["step"] for e in run.events("resumed")] == [8, 24]
    adapted = [e["differences"] for e in run.events("resumed")]
    assert [set(found) for found in adapted] == [{"world_size"}, {"world_size"}]
    assert "gradient accumulation is 4, configured 2 for 2 ranks" in adapted[0]["world_size"]

    assert watched.rows() == twin.rows()
    assert watched.epochs() == twin.epochs()
    assert watched.logged("learning_rate") == twin.logged("learning_rate")
    for key in ("loss", "eval_loss"):
        assert watched.logged(key) == pytest.approx(twin.logged(key), rel=0, abs=LOSS)
    moments, expected = watched.moments(), twin.moments()
    assert moments.keys() == expected.keys()
    for name, moment in moments.items():
        assert (moment - expected[name]).norm() <= MOMENTS * expected[name].norm(), name

    converted = run.events("converted")
    assert [e["ranks"] for e in converted] == ([] if parallel == "ddp" else [1, 2])
    assert not (run.path / "checkpoints" / ".staging").exists()


def test_a_conversion_stays_in_the_budget_and_can_be_killed(outlast: Start, probe: Probe, tmp_path: Path) -> None:
    watched, run = Watched(tmp_path / "watched"), probe("r")
    steps = ["trainer.num_train_epochs=0.2", "trainer.eval_strategy=no"]
    arguments = ["train", *SFT, *steps, "parallel=zero2", "storage.budget_gb=0.02", "run.name=r"]
    first = outlast(*arguments, "parallel.ranks_per_node=2", **watched.env, WATCH_STOP="2")
    assert first.wait() == 75, first.output
    staged = run.path / "checkpoints" / ".staging" / "checkpoint-2"

    filler = run.path / "filler"
    filler.write_bytes(bytes(18_200_000))
    refused = outlast(*arguments, **watched.env)
    assert refused.wait() == 2, refused.output
    log = (run.path / "logs" / "attempt-002.rank-0.log").read_text()
    assert "checkpoint-2 can't be converted for 1 ranks: that takes up to" in log
    assert "set storage.budget_gb=0.02" in log
    assert not staged.exists()
    filler.unlink()

    whole = shutil.move(run.path / "checkpoints" / "checkpoint-2", tmp_path / "whole")
    forge(whole, staged.parents[1] / "checkpoint-2", tmp_path / "executed")
    forged = outlast(*arguments, **watched.env)
    assert forged.wait() != 0, forged.output
    assert "Weights only load failed" in (run.path / "logs" / "attempt-003.rank-0.log").read_text()
    assert not (tmp_path / "executed").exists()
    assert not run.events("resumed")
    shutil.rmtree(staged.parents[1] / "checkpoint-2")
    shutil.copytree(whole, staged.parents[1] / "checkpoint-2")

    killed = outlast(*arguments, **watched.env)
    wait_for(staged.exists, "the conversion")
    killed.ranks()[0].kill()
    assert killed.wait() == 1, killed.output
    assert staged.exists()
    (staged / "global_step2").mkdir(exist_ok=True)
    (staged / "global_step2" / "of-before").touch()

    last = outlast(*arguments, **watched.env)
    assert last.wait() == 0, last.output
    assert run.events("resumed")[0]["step"] == 2
    assert sorted(watched.rows()) == [1, 2, 3, 4]
    assert not staged.exists()


def forge(checkpoint: Path, target: Path, mark: Path) -> None:
    """Copy a checkpoint with a shard that executes code when it is unpickled, and a manifest that agrees."""
    shutil.copytree(checkpoint, target)
    manifest = read_manifest(target)
    name = next(name for name in manifest.files if name.endswith("_optim_states.pt"))
    torch.save(Code(mark), target / name)
    (target / "latest_universal").write_text("../../forged")
    for changed in (name, "latest_universal"):
        manifest.files[changed] = read_entry(target / changed)
    write_manifest(target, manifest)


class Code:
    """Unpickled, it makes a directory."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_number_of_ranks_that_does_not_divide_the_global_batch_is_refused(outlast: Start, probe: Probe) -> None:
    steps = ["trainer.max_steps=2000", "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=3"]
    arguments, run = ["train", *SMOKE, *steps, "trainer.step_s=0.05", "run.name=r"], probe("r")
    first = outlast(*arguments, "parallel.ranks_per_node=2")
    run.reach(3)
    first.process.terminate()
    assert first.wait() == 75, first.output
    before = (run.path / "ledger.jsonl").read_bytes(), (run.path / "config.yaml").read_bytes()
    for again in (
        outlast(*arguments, "parallel.ranks_per_node=5"),
        outlast("resume", "r", "parallel.ranks_per_node=5", "--root", str(run.path.parent)),
    ):
        assert again.wait() == 2, again.output
        said = " ".join(again.output.split())
        assert "parallel.nodes * parallel.ranks_per_node: 5 is refused" in said
        assert "global batch 12 = 2 rows x 3 accumulated x 2 ranks can't be made of 5 ranks x 2 rows" in said
        assert "valid numbers of ranks: 1, 2, 3, 6" in said
    assert before == ((run.path / "ledger.jsonl").read_bytes(), (run.path / "config.yaml").read_bytes())


def test_a_loop_of_ones_own_goes_on_with_as_many_rows_to_a_step(outlast: Start, probe: Probe) -> None:
    arguments, run = ["train", *SMOKE, "trainer.max_steps=120", "trainer.step_s=0.05", "run.name=r"], probe("r")
    for attempt, ranks, stop in ((1, 2, 3), (2, 1, 30), (3, 1, 0)):
        command = outlast(*arguments, f"parallel.ranks_per_node={ranks}")
        if stop:
            run.reach(stop, attempt)
            command.process.terminate()
        assert command.wait() == (75 if stop else 0), command.output
    moved, same = run.events("resumed")
    assert "gradient accumulation is 2, configured 1 for 2 ranks" in moved["differences"]["world_size"]
    assert same["differences"] == {}
    assert run.steps_repeated() == 0
    origin = json.loads((run.path / "checkpoints" / "checkpoint-120" / "manifest.json").read_text())["origin"]
    assert (origin["world_size"], origin["global_batch"], origin["first"]) == (1, 16, [2, 8])
