"""A fork is made where it is asked for, of what the other run has saved, whole or not at all, also after a kill."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint.listing import LISTING, write_listing
from outlast.checkpoint.manifest import Manifest, read_manifest, write_manifest
from outlast.checkpoint.writer import adopt
from outlast.config.configuration import dump, load
from outlast.errors import ConfigError, ResumeRefusedError
from outlast.jobs.training import beginning, source
from outlast.launcher.execution import fork as forks
from outlast.launcher.execution.fork import carry_over, compose_fork
from outlast.launcher.execution.freeze import freeze
from outlast.launcher.planning.compose import compose
from outlast.launcher.planning.fork import Fork
from outlast.launcher.planning.plan import Plan, check_run_directory
from outlast.rundir import ancestry
from outlast.rundir.directory import RunDirectory

from .runs import start

STEP = 4
ORIGIN = {"seed": 42, "global_batch": 8, "micro_batch": 8, "dataset": "abc"}


@pytest.fixture
def first(tmp_path: Path) -> RunDirectory:
    """A run with one whole checkpoint, whose frozen configuration names another root."""
    trainer = ["trainer.max_steps=4", "trainer.eval_steps=0.1", "trainer.lr_scheduler_type=constant"]
    config = compose(["run.name=first", "run.root=/no/longer/there", "checkpoint.allow=[seed]", *trainer])
    run = RunDirectory(tmp_path / "elsewhere" / "first")
    run.create()
    run.config.write_text(dump(config))
    (run.prepared / "model").mkdir(parents=True)
    (run.prepared / "model" / "tokenizer.json").write_text("{}")
    checkpoint = run.checkpoints / f"checkpoint-{STEP}"
    checkpoint.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "digests.json"):
        (checkpoint / name).write_text(f"{{}} {name}")
    files: dict[str, dict[str, object]] = {}
    adopt(checkpoint, files)
    write_manifest(checkpoint, Manifest(step=STEP, kind="final", world_size=1, time=1.0, files=files, origin=ORIGIN))
    return run


Compose = Callable[..., tuple[Plan, Fork | None, list[str]]]


@pytest.fixture
def composed(first: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compose:
    monkeypatch.chdir(tmp_path)

    def compose_here(*overrides: str, optimizer: bool = False) -> tuple[Plan, Fork | None, list[str]]:
        arguments = ["run.name=second", *overrides]
        config, fork, said = compose_fork(str(first.path), arguments, config_dir=None, optimizer=optimizer)
        return Plan(config, {}, None, {}, {}, {}, {}, fork=fork), fork, said

    return compose_here


def test_it_lives_under_the_root_of_the_command(composed: Compose, tmp_path: Path) -> None:
    assert composed()[0].directory.path == tmp_path / "runs" / "second"
    assert composed("run.root=there")[0].directory.path == tmp_path / "there" / "second"
    plan, _, _ = composed()
    assert plan.config.checkpoint.allow == [], "what was once accepted is not taken over"
    run = freeze(plan)
    start(run)
    plan, fork, _ = composed("trainer.learning_rate=0.5")
    assert fork is None, "it has begun, with what it begins with"
    assert plan.directory.path == run.path
    freeze(plan)
    assert (run.prepared / "start" / "adapter_model.safetensors").is_file()
    assert (run.prepared / "model" / "tokenizer.json").is_file()
    with pytest.raises(ConfigError, match=r"model.layers.*the weights belong to"):
        check_run_directory(composed("model.layers=3")[0])


def test_changed_data_before_the_first_checkpoint_leaves_the_weights(composed: Compose) -> None:
    run = freeze(composed()[0])
    (run.prepared / "data").mkdir()
    source.keep(run, {"data.train": "old"})
    assert source.clear_changed(run, {"data.train": "new"})
    assert sorted(path.name for path in run.prepared.iterdir()) == ["model", "start"]
    assert beginning._to_load(run, restart=False) == "first@4 (weights)"


@pytest.mark.parametrize("optimizer", [False, True])
def test_a_copy_that_was_cut_short_is_made_again(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, optimizer: bool
) -> None:
    plan, fork, _ = composed(optimizer=optimizer)
    run = plan.directory
    assert fork is not None
    with monkeypatch.context() as patched:
        patched.setattr(forks, "_clear", lambda run: None)  # as a killed process, which clears nothing
        patched.setattr(forks, "check_listing", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            freeze(plan)
    assert not run.config.exists()
    assert run.prepared.is_dir()
    with pytest.raises(ConfigError, match=r"it was to begin with first@4.*repeat that command"):
        check_run_directory(Plan(plan.config, {}, None, {}, {}, {}, {}))
    plan, _, _ = composed(optimizer=optimizer)
    freeze(plan)
    copied = run.checkpoints / "checkpoint-4"
    assert copied.is_dir() is optimizer
    assert (run.prepared / "start").is_dir() is not optimizer
    if optimizer:
        assert read_manifest(copied).files == read_manifest(fork.checkpoints[0].path).files
    assert load(run.config).run.root == str(run.path.parent)


@pytest.mark.parametrize("optimizer", [False, True])
def test_weights_that_have_changed_since_are_not_published(composed: Compose, optimizer: bool) -> None:
    plan, fork, _ = composed(optimizer=optimizer)
    assert fork is not None
    weights = fork.checkpoints[0].path / "adapter_model.safetensors"
    weights.write_text(weights.read_text().swapcase())
    with pytest.raises(ConfigError, match=r"adapter_model.safetensors differs from what was written"):
        freeze(plan)
    run = plan.directory
    assert not [path for path in run.path.rglob("*") if path.is_file()], "nothing is left"
    check_run_directory(plan)


def test_its_own_checkpoints_are_never_replaced(composed: Compose) -> None:
    plan, fork, _ = composed(optimizer=True)
    run = freeze(plan)
    assert fork is not None
    own = run.checkpoints / "checkpoint-6"
    own.mkdir()
    (own / "adapter_model.safetensors").touch()
    write_manifest(own, Manifest(step=6, kind="periodic", world_size=1, time=1.0, files={}))
    with pytest.raises(ConfigError, match="it has begun meanwhile"):
        carry_over(fork, run)
    assert composed(optimizer=True)[1] is None, "also where its ledger is lost"


def test_what_it_begins_with_is_known_or_refused(composed: Compose) -> None:
    run = freeze(composed()[0])
    record, weights = run.path / ancestry.ANCESTRY, run.prepared / "start"
    whole = record.read_text()

    def refused(match: str) -> None:
        with pytest.raises(ResumeRefusedError, match=match):
            beginning._to_load(run, restart=False)

    assert beginning._to_load(run, restart=False) == "first@4 (weights)"
    record.write_text(whole[:-20])
    refused("ancestry.json.* is damaged")
    record.unlink()
    refused("holds weights to begin with, and .*ancestry.json.* is not")
    values: dict[str, Any] = json.loads(whole)
    record.write_text(json.dumps(values | {"weights": "0" * 16}))
    refused("holds other weights than those of first@4")
    record.write_text(whole)
    (weights / "adapter_model.safetensors").write_text("other")
    refused("is not what was copied: adapter_model.safetensors has.* begin anew, outlast train --from .*first@4 run.n")
    (weights / LISTING).unlink()
    write_listing(weights)
    refused("holds other weights than those of first@4")
    own = run.checkpoints / "checkpoint-2"
    own.mkdir()
    write_manifest(own, Manifest(step=2, kind="periodic", world_size=1, time=1.0, files={}))
    assert beginning._to_load(run, restart=False) is None, "a resume needs nothing of it"
    with pytest.raises(ResumeRefusedError):
        beginning._to_load(run, restart=True)


def test_what_the_first_attempt_would_refuse_is_refused_before_anything_is_copied(composed: Compose) -> None:
    for overrides, names in (
        (["seed=7"], "seed is 7, it was 42"),
        (["trainer.per_device_train_batch_size=4"], "global_batch is 4, it was 8"),
        (["data.max_pairs=50"], r"dataset is another by data.max_pairs"),
        (["trainer.packing=false"], r"dataset is another by trainer.packing"),
    ):
        with pytest.raises(ConfigError, match=names):
            composed(*overrides, optimizer=True)
    said = composed("seed=7", "checkpoint.allow=[seed]", optimizer=True)[2]
    assert "not exact: seed differ from first's" in said
    halves = ["trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=2"]
    assert "exact" not in " ".join(composed(*halves, optimizer=True)[2]).replace("not exact", "")


def test_exact_is_said_of_what_is(composed: Compose, first: RunDirectory) -> None:
    said = composed(optimizer=True)[2]
    assert said[-1] == "exact: as if first went on from step 4"
    assert "not exact" in composed("trainer.eval_steps=3", optimizer=True)[2][-1]
    said = composed("trainer.max_steps=9", optimizer=True)[2]
    assert "not exact: with another length (trainer.eval_steps=0.1 is a share of it)" in " ".join(said)
    start(first).append("finished", 1, step=STEP, seconds=1.0)
    for every, exact in ((2, True), (3, False)):
        first.config.write_text(first.config.read_text().replace("eval_steps: 0.1", f"eval_steps: {every}"))
        said = composed("trainer.max_steps=9", optimizer=True)[2]
        assert said[-1].startswith("exact" if exact else "not exact: first has evaluated at its end"), said
        first.config.write_text(first.config.read_text().replace(f"eval_steps: {every}", "eval_steps: 0.1"))


def test_a_run_is_evaluated_where_there_is_data_for_it(composed: Compose, first: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    rows = ["data=jsonl", f"data.train={tmp_path / 'rows.jsonl'}"]
    plan, _, _ = composed(*rows)
    assert plan.config.trainer["eval_strategy"] == "no"
    assert not plan.config.trainer["load_best_model_at_end"]
    first.config.write_text(dump(plan.config))
    with_eval = composed(*rows, f"data.eval={tmp_path / 'rows.jsonl'}")[0].config.trainer
    assert with_eval["eval_strategy"] == compose([]).trainer["eval_strategy"] != "no"
