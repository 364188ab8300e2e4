"""What may differ between a checkpoint and the run that resumes from it."""

from typing import Any

import pytest
import torch
from datasets import Dataset

from outlast.checkpoint.compatibility import Comparison, check, dataset_digest, trainable_digest
from outlast.checkpoint.compatibility import compare as compare_origins
from outlast.errors import ResumeRefusedError

MADE = {
    "world_size": 2,
    "global_batch": 16,
    "micro_batch": 4,
    "dataset": "a",
    "seed": 1,
    "trainable": "t",
    "config": "c",
}


def compare(now: dict[str, Any], **options: Any) -> Comparison:
    versions = {"versions_made": {"torch": "2.13.0"}, "versions_now": {"torch": "2.13.0"}}
    return compare_origins(MADE, {**MADE, **now}, **{**versions, **options})


def test_no_difference() -> None:
    assert compare({}) == Comparison({}, {})


@pytest.mark.parametrize("name", ["world_size", "global_batch", "dataset", "seed", "trainable"])
def test_refused_with_what_to_do(name: str) -> None:
    found = compare({name: "other"})
    assert list(found.refused) == [name]
    assert f"{name} is other, it was {MADE[name]}" in found.refused[name]
    assert ("checkpoint.allow" in found.refused[name]) == (name != "world_size")
    with pytest.raises(ResumeRefusedError, match="checkpoint-7 can't be resumed from here"):
        check("checkpoint-7", found)


@pytest.mark.parametrize("name", ["global_batch", "dataset", "seed", "trainable"])
def test_accepted_by_name(name: str) -> None:
    found = compare({name: "other"}, allow=[name])
    assert not found.refused
    assert "accepted by checkpoint.allow" in found.noted[name]
    check("checkpoint-7", found)


def test_adapted_and_allowed_are_noted() -> None:
    found = compare({"micro_batch": 8, "config": "d"}, versions_now={"torch": "2.14.0"})
    assert not found.refused
    assert set(found.noted) == {"micro_batch", "config", "torch"}


def test_another_number_of_ranks_is_noted_by_a_loop_that_adapts() -> None:
    found = compare({"world_size": 1}, adapted="as many rows to a step")
    assert found == Comparison({}, {"world_size": "world_size is 1, it was 2: as many rows to a step"})


def test_what_one_side_does_not_say_is_not_compared() -> None:
    assert compare_origins({}, MADE, versions_made={}, versions_now={"torch": "1"}) == Comparison({}, {})


def test_a_dataset_is_its_length_and_its_rows() -> None:
    rows = [{"input_ids": [i, i + 1], "text": str(i)} for i in range(100)]
    same = Dataset.from_list(rows)
    assert dataset_digest(same) == dataset_digest(rows) == dataset_digest(same.select_columns("input_ids"))
    assert dataset_digest(rows[:-1]) != dataset_digest(rows)
    assert dataset_digest(list(reversed(rows))) != dataset_digest(rows)
    assert dataset_digest([{"x": torch.ones(2)}]) != dataset_digest([{"x": torch.zeros(2)}])


def test_a_dataset_that_could_draw_random_numbers_is_not_read() -> None:
    class Augmented(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> int:
            raise AssertionError("read")

    assert dataset_digest(Augmented()) is None
    assert dataset_digest(Dataset.from_list([{"x": 1}]).with_transform(lambda row: row)) is None
    assert dataset_digest(iter([1])) is None


def test_trainable_is_names_shapes_and_types() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    whole = trainable_digest(model)
    model[0].requires_grad_(False)
    part = trainable_digest(model)
    assert len({whole, part, trainable_digest(model.double())}) == 3
