"""A trainer of prepared data trains as one of raw data does, which `jobs/training/prepared.py` rests on."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outlast.config.configuration import Config, build
from outlast.files import bytes_used
from outlast.jobs.training import data, models, prepared

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch, trl and their dependencies about each other
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

STEPS = 3


def rows_of(form: str, train: Any) -> Any:
    """The documentation pairs in one of the three forms."""
    if form == "prompt":
        return train
    shapes = {
        "text": lambda row: {"text": row["prompt"] + row["completion"]},
        "messages": lambda row: {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        },
    }
    return train.map(shapes[form], remove_columns=["prompt", "completion"])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine cost more than these small models need."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config() -> Config:
    tiny = {"vocab_size": 512, "hidden_size": 32, "layers": 1, "heads": 2, "max_length": 128}
    return build({"model": tiny, "data": {"max_pairs": 60, "eval_fraction": 0.2}, "seed": 3})


@pytest.fixture(scope="module")
def raw(config: Config) -> Any:
    return data.load(config)


@pytest.fixture(scope="module")
def tiny(config: Config, raw: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    models.prepare_tiny(config, data.texts(raw[0]), directory)
    return directory


def train(config: Any, tiny: Path, out: Path, datasets: Any, cached: bool, **arguments: Any) -> dict[str, Any]:
    """Three steps and an evaluation: the trainer, every batch it saw, the trained weights, the evaluation."""
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    settings: dict[str, Any] = {
        "max_length": 128,
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    args = SFTConfig(output_dir=str(out), **(settings | arguments))
    if cached:
        prepared.reuse(args)
    set_seed(config.seed)
    model, tokenizer = models.load(config, tiny)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        processing_class=tokenizer,
        peft_config=models.peft_config(config),
    )
    batches: list[Any] = []
    collate = trainer.data_collator
    trainer.data_collator = lambda examples: batches.append(collate(examples)) or batches[-1]
    trainer.train()
    scores = trainer.evaluate() if datasets[1] is not None else {}
    weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    return {
        "trainer": trainer,
        "batches": batches,
        "weights": weights,
        "losses": [entry.get("loss") for entry in trainer.state.log_history],
        "eval_loss": scores.get("eval_loss"),
    }


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    import torch

    assert len(one["batches"]) == len(two["batches"]) > STEPS
    for mine, theirs in zip(one["batches"], two["batches"], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name])), name
    assert one["weights"].keys() == two["weights"].keys()
    assert all(torch.equal(value, two["weights"][name]) for name, value in one["weights"].items())
    assert one["losses"] == two["losses"]
    assert one["eval_loss"] == two["eval_loss"]


@pytest.mark.parametrize(
    ("form", "arguments"),
    [
        ("prompt", {}),
        ("prompt", {"packing": True}),
        ("prompt", {"packing": True, "eval_packing": False, "shuffle_dataset": True}),
        ("prompt", {"completion_only_loss": False, "truncation_mode": "keep_end"}),
        ("messages", {"packing": True}),
        ("messages", {"assistant_only_loss": True}),
        ("text", {"shuffle_dataset": True}),
        ("text", {"packing": True, "packing_strategy": "wrapped"}),
        ("text", {"padding_free": True, "max_length": None}),
    ],
)
def test_prepared_data_trains_like_raw_data(
    form: str, arguments: dict[str, Any], config: Any, raw: Any, tiny: Path, tmp_path: Path
) -> None:
    datasets = tuple(rows_of(form, split) for split in raw)
    first = train(config, tiny, tmp_path / "first", datasets, cached=False, **arguments)
    directory = tmp_path / "prepared"
    assert prepared.load(directory) is None
    prepared.save(directory, first["trainer"].train_dataset, first["trainer"].eval_dataset)
    expected = prepared.size(first["trainer"].train_dataset, first["trainer"].eval_dataset)
    assert bytes_used(directory) == pytest.approx(expected, rel=0.1, abs=10_000)
    again = prepared.load(directory)
    assert again is not None
    assert set(again[0].column_names) <= set(prepared.COLUMNS)
    assert again[0].cache_files, "memory-mapped, not read into memory"
    assert_same(first, train(config, tiny, tmp_path / "second", again, cached=True, **arguments))


def test_without_reuse_a_trainer_prepares_again(config: Any, raw: Any, tiny: Path, tmp_path: Path) -> None:
    arguments = {"shuffle_dataset": True}
    first = train(config, tiny, tmp_path, raw, cached=False, **arguments)
    prepared.save(tmp_path / "prepared", first["trainer"].train_dataset, None)
    again = prepared.load(tmp_path / "prepared")
    assert again is not None
    assert again[1] is None
    wrong = train(config, tiny, tmp_path, again, cached=False, **arguments)
    assert wrong["losses"] != first["losses"], "if this holds, TRL prepares idempotently and reuse() can go"


def small() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "text": "raw"}] * 5)


def test_what_is_damaged_is_not_loaded_and_is_replaced(tmp_path: Path) -> None:
    directory = tmp_path / "prepared"
    prepared.save(directory, small(), None)
    (arrow,) = (directory / "train").glob("*.arrow")
    whole = arrow.read_bytes()
    for damage in (whole[: len(whole) // 2], whole[:-16], b""):
        arrow.write_bytes(damage)
        loaded = prepared.load(directory)
        assert loaded is None or loaded[0].to_list() == small().select_columns(["input_ids", "labels"]).to_list()
    (directory / "prepared.json").unlink()
    assert prepared.load(directory) is None
    prepared.save(directory, small(), small())
    loaded = prepared.load(directory)
    assert loaded is not None
    assert [len(split) for split in loaded if split is not None] == [5, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]


def test_killed_while_saving_leaves_nothing_to_load(tmp_path: Path) -> None:
    program = """
        import os, signal, sys
        from pathlib import Path
        from outlast.files import staged_directory

        with staged_directory(Path(sys.argv[1])) as staging:
            (staging / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    directory = tmp_path / "prepared"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(directory)], env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    assert prepared.load(directory) is None
    prepared.save(directory, small(), None)
    assert prepared.load(directory) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]
