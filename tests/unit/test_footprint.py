"""The pieces of the estimate, each against a file that is really made. Whole checkpoints: tests/process."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from outlast.config.configuration import Config, build
from outlast.config.model import Lora
from outlast.jobs.estimate import dataset_size, file_sizes, footprint, parameters
from outlast.jobs.training import models

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TINY: dict[str, Any] = {"vocab_size": 300, "hidden_size": 16, "layers": 2, "heads": 2, "max_length": 64}
SHAPES = [(16, 48), (48,), (7, 3, 2), (1,), (300, 16)]


def real(value: Any) -> int:
    """Size of the file, made as a save makes it: into a file object, without the zip's checksums."""
    file = io.BytesIO()
    torch.save(value, file)
    return len(file.getvalue())


def state(name: str, dtype: torch.dtype) -> tuple[int, int]:
    """Estimate and size of an optimizer's state."""
    args = TrainingArguments("unused", use_cpu=True, optim=name, optim_args="momentum=0.9" if name == "sgd" else None)
    cls, arguments = Trainer.get_optimizer_cls_and_kwargs(args)
    groups = [[(shape, dtype) for shape in SHAPES[:3]], [(shape, dtype) for shape in SHAPES[3:]]]
    parameters = [[torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape, dtype in group] for group in groups]
    optimizer = cls([{"params": group, "weight_decay": 0.0} for group in parameters], **arguments)
    for parameter in (p for group in parameters for p in group):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return file_sizes.torch_file(file_sizes.stepped(groups, cls, arguments)), real(optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad"])
def test_the_state_of_an_optimizer(name: str, dtype: torch.dtype) -> None:
    estimated, made = state(name, dtype)
    tensors = 3 * len(SHAPES)
    assert made <= estimated <= made + 16 * tensors + 64


def test_a_plain_file_is_counted_to_the_byte() -> None:
    value = {"a": list(range(1000)), "b": torch.zeros(33, dtype=torch.uint8), "c": "text"}
    assert file_sizes.torch_file(value) == real(value)


@pytest.mark.parametrize("tensors", [1, 9, 300])
def test_a_safetensors_file_is_counted_to_the_byte(tensors: int) -> None:
    values = {f"layers.{i}.weight": torch.zeros(i + 1, 3, dtype=torch.float32) for i in range(tensors)}
    values["half"] = torch.zeros(5, dtype=torch.bfloat16)
    made = len(safetensors.torch.save(values, metadata={"format": "pt"}))
    assert file_sizes.safetensors_file(values) == made


def test_random_states() -> None:
    assert 16 + 14_000 < file_sizes.random_states(gpus=1) < file_sizes.random_states(gpus=2) < 16_000


def test_eight_bits_are_a_quarter_of_thirty_two() -> None:
    groups = [[((4096, 4096), torch.float32)]]
    assert file_sizes.optimizer_8bit("adamw_8bit", groups) == pytest.approx(4096 * 4096 * (2 + 8 / 256), rel=1e-4)
    assert file_sizes.optimizer_8bit("paged_lion_8bit", groups) == pytest.approx(4096 * 4096 * (1 + 4 / 256), rel=1e-4)
    small = [[((100,), torch.float32)]]
    assert file_sizes.optimizer_8bit("adamw_8bit", small) == 600 + 2 * 4 * 100


# Weights --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a Llama as somebody would have."""

    def make(**changes: Any) -> Path:
        directory = tmp_path_factory.mktemp("model") / "model"
        values = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(**(values | {"vocab_size": 500} | changes))).save_pretrained(directory)
        return directory

    return make


def of(path: Path, peft: str = "none", dtype: str = "auto") -> Config:
    return build({"model": {"kind": "pretrained", "path": str(path), "dtype": dtype}, "peft": {"kind": peft}})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_counted_as_they_are_saved(tied: bool, dtype: str, pretrained: Callable[..., Path]) -> None:
    path = pretrained(tie_word_embeddings=tied)
    found = parameters.collect(of(path, dtype=dtype), 0, None)
    model = LlamaForCausalLM.from_pretrained(path, dtype=dtype)
    model.save_pretrained(path / "again")
    made = (path / "again" / "model.safetensors").stat().st_size
    assert file_sizes.safetensors_file(found.saved) == made
    assert sum(file_sizes.numel(shape) for group in found.groups for shape, _ in group) == model.num_parameters()
    assert {str(kind) for group in found.groups for _, kind in group} == {f"torch.{dtype}"}


def test_the_type_is_that_of_the_file_if_nothing_names_it(pretrained: Callable[..., Path]) -> None:
    path = pretrained()
    model = LlamaForCausalLM.from_pretrained(path, dtype="bfloat16")
    model.save_pretrained(path)
    described = json.loads((path / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        described.pop(key, None)
    (path / "config.json").write_text(json.dumps(described))
    assert {str(t.dtype) for t in parameters.collect(of(path), 0, None).saved.values()} == {"torch.bfloat16"}


@pytest.mark.parametrize("whole", [None, ["lm_head"]])
@pytest.mark.parametrize(("dtype", "adapters"), [("float32", "float32"), ("bfloat16", "float32")])
def test_an_adapter_is_counted_and_what_is_frozen_is_not(
    dtype: str, adapters: str, whole: list[str] | None, pretrained: Callable[..., Path], tmp_path: Path
) -> None:
    """PEFT keeps adapters of a half-precision model in 32 bits."""
    path = pretrained()
    config = of(path, peft="lora", dtype=dtype)
    config.peft = Lora(modules_to_save=whole)
    found = parameters.collect(config, 0, None)
    adapter = models.peft_config(config)
    assert adapter is not None
    model = get_peft_model(LlamaForCausalLM.from_pretrained(path, dtype=dtype), adapter)
    model.save_pretrained(tmp_path)
    made = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert file_sizes.safetensors_file(found.saved) == made
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(file_sizes.numel(shape) for group in found.groups for shape, _ in group) == sum(
        p.numel() for p in trained
    )
    kinds = {adapters} if whole is None else {adapters, dtype}  # what is trained whole keeps its type
    assert {str(kind) for group in found.groups for _, kind in group} == {f"torch.{kind}" for kind in kinds}


def test_nothing_is_allocated_for_a_large_model(tmp_path: Path) -> None:
    """7 billion parameters, of which full fine-tuning in 32 bits keeps 12 bytes each."""
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    LlamaConfig(vocab_size=32000, dtype="float32", **shape).save_pretrained(tmp_path)
    for peft, numel in (("none", 6_738_415_616), ("lora", 39_976_960)):
        key = footprint._key(of(tmp_path, peft=peft))
        saved, optimizer, _, _, notes = footprint._learned(key, 0, None, 1)
        assert notes == ()
        assert saved == pytest.approx(4 * numel, rel=0.001)
        assert optimizer == pytest.approx(8 * numel, rel=0.005)


def test_an_optimizer_that_is_not_here_is_taken_for_adamw_and_that_is_said(tmp_path: Path) -> None:
    config = build({"model": TINY, "peft": {"kind": "none"}, "trainer": {"optim": "grokadamw"}})
    found = footprint.footprint(config)
    numel = found.final["weights"] / 4
    assert found.checkpoint["optimizer"] == pytest.approx(8 * numel, rel=0.1)
    assert any("grokadamw" in note and "AdamW" in note for note in found.notes)


# The whole ------------------------------------------------------------------------------------------------------


def whole(**changes: Any) -> Any:
    return footprint.footprint(build({"model": TINY, "peft": {"kind": "none"}, **changes}))


def test_each_rank_has_its_random_states_and_each_gpu_adds_to_them() -> None:
    one, two = (whole(parallel={"ranks_per_node": ranks}).checkpoint for ranks in (1, 2))
    assert two["random states"] == 2 * one["random states"]
    assert two["weights"] == one["weights"]


def test_the_trainer_state_grows_with_what_is_logged() -> None:
    few, many = (whole(trainer={"max_steps": 1000, "logging_steps": n}).checkpoint["trainer state"] for n in (100, 1))
    assert many - few == pytest.approx(990 * footprint.LOG_ENTRY, rel=0.01)


def test_what_is_prepared_already_is_not_estimated(tmp_path: Path) -> None:
    run = {"root": str(tmp_path), "name": "begun"}
    for name in ("model", "data"):
        (tmp_path / "begun" / "prepared" / name).mkdir(parents=True)
        (tmp_path / "begun" / "prepared" / name / "file").write_bytes(bytes(1234))
    fixed = whole(run=run).fixed
    assert (fixed["prepared model"], fixed["prepared data"]) == (1234, 1234)


def test_a_dataset_on_the_hub_is_not_known_and_that_is_said() -> None:
    found = whole(data={"kind": "hub", "path": "somebody/something"}, trainer={"max_steps": 5})
    assert "prepared data" not in found.fixed
    assert any("prepared data" in note for note in found.notes)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_shards_what_is_trained(zero_stage: int) -> None:
    """12 bytes per parameter over all ranks, whatever their number: a master copy and two moments in 32 bits."""
    for ranks in (2, 8):
        config = build({"model": TINY, "peft": {"kind": "none"}, "parallel": {"ranks_per_node": ranks}})
        numel = footprint.footprint(config).final["weights"] / 4
        found = footprint.footprint(config, zero_stage=zero_stage).checkpoint
        assert found["optimizer"] == pytest.approx(12 * numel, abs=ranks * 12_000)


def test_changes_make_it_smaller() -> None:
    config = build({"model": TINY | {"hidden_size": 64}, "peft": {"kind": "none"}})
    before = footprint.footprint(config).checkpoint_bytes
    changes = footprint.changes(config)
    assert [text for text, _ in changes] == ["trainer.optim=adafactor", "peft=lora"]
    assert all(footprint.footprint(other).checkpoint_bytes < before for _, other in changes)
    adapted = changes[-1][1]
    assert [text for text, _ in footprint.changes(adapted)][1:] == ["peft.modules_to_save=null", "peft.r=8"]


# Data -----------------------------------------------------------------------------------------------------------


def jsonl(tmp_path: Path, rows: int, **trainer: Any) -> Config:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i} " * 50}) + "\n" for i in range(rows)))
    return build({"model": TINY, "data": {"kind": "jsonl", "train": str(path)}, "trainer": trainer})


def test_rows_are_extrapolated_from_the_first(tmp_path: Path) -> None:
    found = dataset_size.estimate(jsonl(tmp_path, 1000))
    assert found is not None
    assert found.rows == pytest.approx(1000, rel=0.1)


def test_tokens_are_counted_with_the_models_tokenizer(tmp_path: Path) -> None:
    class Words:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[str]]:
            return {"input_ids": text.split()}

    config = jsonl(tmp_path, 500, packing=True)
    config.model = of(tmp_path).model
    found = dataset_size.estimate(config, Words())
    assert found is not None
    assert found.tokens == pytest.approx(500 * (100 + dataset_size.PER_ROW), rel=0.05)


def test_without_packing_rows_are_cut(tmp_path: Path) -> None:
    found = dataset_size.estimate(jsonl(tmp_path, 100, max_length=10))
    assert found is not None
    assert found.tokens == found.rows * 10


def test_steps_follow_from_rows_and_batch(tmp_path: Path) -> None:
    config = jsonl(tmp_path, 1000, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=4)
    assert dataset_size.optimizer_steps(config, dataset_size.DatasetSize(1000, 0)) == 500
    assert dataset_size.optimizer_steps(jsonl(tmp_path, 10, max_steps=7), None) == 7
    assert dataset_size.optimizer_steps(config, None) is None
