"""DeepSpeed's configuration: derived from the run's, contradicted nowhere; and what its files may not do when read."""

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.config.configuration import Config, build
from outlast.errors import ConfigError
from outlast.jobs import sft, smoke
from outlast.jobs.training import deepspeed
from outlast.rundir.directory import RunDirectory

pytest.importorskip("deepspeed")


def config(kind: str = "zero2", given: dict[str, Any] | None = None, **trainer: Any) -> Config:
    parallel = {"kind": kind, "ranks_per_node": 2, "deepspeed": given or {}}
    return build({"parallel": parallel, "trainer": {"per_device_train_batch_size": 4, **trainer}})


def test_the_derived_configuration() -> None:
    zero3 = deepspeed.configuration(config("zero3"))
    assert zero3["zero_optimization"] == {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    assert deepspeed.configuration(config("zero1"))["zero_optimization"] == {"stage": 1}
    offload = deepspeed.configuration(config("zero3_offload"))["zero_optimization"]
    assert offload["offload_optimizer"] == offload["offload_param"] == {"device": "cpu"}
    said = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert all(zero3[key] == "auto" for key in said)
    assert "train_batch_size" not in zero3


def test_the_plan_shows_what_the_trainer_will_fill_in() -> None:
    found = config("zero3", {"prescale_gradients": True}, gradient_accumulation_steps=3)
    deepspeed.check(found)
    shown = deepspeed.resolved(found)
    assert (shown["train_micro_batch_size_per_gpu"], shown["gradient_accumulation_steps"]) == (4, 3)
    assert (shown["gradient_clipping"], shown["prescale_gradients"]) == (1.0, True)
    assert shown["bf16"] == {"enabled": "auto"}, "by default whatever the machine has"
    assert sft.training(found) == {"micro_batch": 4, "accumulation": 3, "hazards": [], "deepspeed": shown}


def test_what_is_given_is_merged_into_it() -> None:
    given = {"zero_optimization": {"overlap_comm": False, "offload_param": {"pin_memory": True}}, "dump_state": True}
    found = config("zero3_offload", given)
    deepspeed.check(found)
    merged = deepspeed.configuration(found)
    assert merged["dump_state"] is True
    assert merged["zero_optimization"]["overlap_comm"] is False
    assert merged["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}


def test_what_is_said_twice_and_agrees_is_left_to_the_trainer() -> None:
    found = config(given={"gradient_accumulation_steps": 2, "train_batch_size": 16}, gradient_accumulation_steps=2)
    deepspeed.check(found)
    merged = deepspeed.configuration(found)
    assert merged["gradient_accumulation_steps"] == "auto"
    assert "train_batch_size" not in merged


@pytest.mark.parametrize(
    ("given", "both"),
    [
        ({"gradient_accumulation_steps": 4}, ("steps: 4", "trainer.gradient_accumulation_steps is 1")),
        ({"train_micro_batch_size_per_gpu": 1}, ("trainer.per_device_train_batch_size is 4",)),
        ({"train_batch_size": 9}, ("train_batch_size: 9", "* ranks is 8")),
        ({"gradient_clipping": 0.5}, ("trainer.max_grad_norm is 1.0",)),
        ({"zero_optimization": {"stage": 3}}, ("zero_optimization.stage: 3", "parallel=zero2: the stage is 2")),
        ({"bf16": {"enabled": True}}, ("bf16.enabled: True", "trainer.bf16 is None")),
        ({"bf16": True}, ("parallel.deepspeed.bf16: True", "a mapping")),
        ({"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": False}}, ("usable weights",)),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, ("valid: cpu, none",)),
        ({"zero_optimization": {"overlap_com": True}}, ("zero_optimization.overlap_com: True", "DeepSpeed says")),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, ("zero_optimization.reduce_bucket_size: 'many'",)),
        ({"optimizer": {"type": "Adam"}}, ("trainer.optim",)),
        ({"scheduler": {}}, ("trainer.lr_scheduler_type",)),
        ({"checkpoint": {"load_universal": True}}, ("outlast writes and seals",)),
        ({"dump_stat": True}, ("did you mean dump_state?",)),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused_and_names_both_places(given: dict[str, Any], both: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refused:
        deepspeed.check(config(given=given))
    assert "parallel.deepspeed" in str(refused.value)
    for words in both:
        assert words in str(refused.value)


def test_offloading_that_does_not_offload() -> None:
    given = {"zero_optimization": {"offload_param": {"device": "none"}}}
    with pytest.raises(ConfigError, match="parallel=zero3_offload: the device is cpu"):
        deepspeed.check(config("zero3_offload", given))


def test_without_deepspeed_it_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # so Python finds none
    with pytest.raises(ConfigError, match=r"pip install 'outlast\[deepspeed\]'"):
        sft.check(config())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("key", ["trainer.bf16", "parallel.gpus_per_rank"])
def test_what_takes_a_gpu_is_refused_where_the_run_would_start_without_one(key: str) -> None:
    tree: dict[str, Any] = {"parallel": {"kind": "zero2"}, "trainer": {"bf16": True}}
    if key == "parallel.gpus_per_rank":
        tree = {"parallel": {"gpus_per_rank": 1}}
    with pytest.raises(ConfigError, match=rf"^{key}: "):
        sft.check(build(tree))
    sft.check(build(tree | {"cluster": {"kind": "slurm"}}))  # the compute node may have one


def test_the_hand_written_loop_has_no_zero() -> None:
    with pytest.raises(ConfigError, match="parallel: 'zero2' is refused; valid for job=smoke: ddp"):
        smoke.check(build({"job": {"name": "smoke"}, "parallel": {"kind": "zero2"}}))


class _Runs:
    """A pickle that runs something when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_shard_runs_nothing_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    from outlast.attempt import loading
    from outlast.huggingface.deepspeed import classes, loading_shards

    run = RunDirectory(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    shard = run.checkpoints / "shard.pt"
    torch.save({"optimizer_state_dict": _Runs(tmp_path / "ran")}, shard)
    engine = TorchCheckpointEngine()
    engine.load(str(shard))
    (tmp_path / "ran").rmdir()  # what DeepSpeed does by itself
    monkeypatch.setattr(torch, "load", torch.load)
    monkeypatch.setattr(torch.serialization, "load", torch.serialization.load)
    monkeypatch.setattr(loading, "_directories", set())
    loading.guard_loads(run)
    with loading_shards(), pytest.raises(pickle.UnpicklingError, match="mkdir"):
        engine.load(str(shard))
    assert not (tmp_path / "ran").exists()
    scaler = classes()[1](scale=8)
    torch.save({"loss_scaler": scaler}, shard)
    with loading_shards():
        assert engine.load(str(shard))["loss_scaler"].cur_scale == 8
