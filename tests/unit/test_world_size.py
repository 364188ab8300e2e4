"""Which rows a rank reads when there are others than the run began with; compared with accelerate's own shards."""

from collections import Counter
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from outlast.errors import ResumeRefusedError
from outlast.jobs import smoke
from outlast.ranks.layout import Layout, RankBatches, derived_seed, layout

ORDER = [7 * i % 100 for i in range(100)]


def first_attempt(order: list[int], ranks: int, micro: int, *, drop_last: bool) -> list[list[list[int]]]:
    """What accelerate gives each rank of a run that has just begun."""
    batches = BatchSampler(order, micro, drop_last)
    if ranks == 1:
        return [list(batches)]
    return [list(BatchSamplerShard(batches, ranks, rank)) for rank in range(ranks)]


def steps(shards: list[list[list[int]]], accumulation: int) -> list[Counter[int]]:
    """The rows of each optimizer step, over all ranks."""
    rounds = [[row for rows in ranks for row in rows] for ranks in zip(*shards, strict=True)]
    begins = range(0, len(rounds), accumulation)
    return [Counter(row for rows in rounds[begin : begin + accumulation] for row in rows) for begin in begins]


MADE = [(1, 4, 2), (2, 2, 2), (2, 4, 1), (4, 1, 2), (3, 2, 2)]
"""Ranks, micro-batch and accumulation of the first attempt."""


@pytest.mark.parametrize(("made", "drop_last"), [*product(MADE, (False, True))])
def test_every_step_has_the_rows_of_the_first_layout(made: tuple[int, int, int], drop_last: bool) -> None:
    ranks, micro, accumulation = made
    rows = ranks * micro * accumulation
    for count in range(1, 41):
        order = ORDER[:count]
        expected = steps(first_attempt(order, ranks, micro, drop_last=drop_last), accumulation)
        for others in (n for n in range(1, 7) if rows % (n * micro) == 0):
            now = Layout(ranks=others, micro_batch=micro, accumulation=rows // (others * micro), first=(ranks, micro))
            shards = [RankBatches(order, now, rank, drop_last=drop_last) for rank in range(others)]
            read = [list(shard) for shard in shards]
            assert [len(shard) for shard in shards] == [len(shard) for shard in read]
            assert all(0 < len(batch) <= micro for shard in read for batch in shard)
            found = steps(read, now.accumulation)
            assert found[:-1] == expected[:-1]
            if expected and expected[-1].total() >= others:
                assert found[-1] == expected[-1]
            assert len(found) == len(expected), "steps in an epoch"


@pytest.mark.parametrize("made", MADE)
def test_at_the_first_layout_the_order_is_that_of_accelerate(made: tuple[int, int, int]) -> None:
    ranks, micro, accumulation = made
    now = Layout(ranks=ranks, micro_batch=micro, accumulation=accumulation, first=(ranks, micro))
    whole = ORDER[: 3 * now.global_batch]
    mine = [list(RankBatches(whole, now, rank, drop_last=False)) for rank in range(ranks)]
    assert mine == first_attempt(whole, ranks, micro, drop_last=False)


def of(made: dict[str, Any], ranks: int, micro: int = 2, accumulation: int = 3) -> Layout:
    return layout(made, ranks=ranks, micro_batch=micro, accumulation=accumulation)


def test_the_accumulation_keeps_the_global_batch() -> None:
    made = {"world_size": 2, "micro_batch": 2, "global_batch": 12}
    assert [of(made, ranks).accumulation for ranks in (1, 2, 3, 6)] == [6, 3, 2, 1]
    assert {of(made, ranks).global_batch for ranks in (1, 2, 3, 6)} == {12}
    assert [of(made, ranks).moved for ranks in (1, 2, 3)] == [True, False, True]
    before_a_checkpoint = of({"world_size": 2}, 1)
    assert (before_a_checkpoint.accumulation, before_a_checkpoint.first) == (6, (2, 2))


def test_the_next_attempt_on_as_many_ranks_adapts_again() -> None:
    made = {"world_size": 1, "micro_batch": 2, "global_batch": 12, "first": [2, 2]}
    assert of(made, 1) == Layout(ranks=1, micro_batch=2, accumulation=6, first=(2, 2))
    assert of(made, 2) == Layout(ranks=2, micro_batch=2, accumulation=3, first=(2, 2))


def test_a_script_that_has_adapted_by_itself_is_left_alone() -> None:
    made = {"world_size": 2, "micro_batch": 2, "global_batch": 12}
    assert of(made, 1, accumulation=6) == Layout(ranks=1, micro_batch=2, accumulation=6, first=(2, 2))


def test_another_global_batch_is_left_to_the_comparison() -> None:
    made = {"world_size": 2, "micro_batch": 2, "global_batch": 12}
    assert of(made, 1, accumulation=5) == Layout(ranks=1, micro_batch=2, accumulation=5, first=(1, 2))


def test_refused_with_the_numbers() -> None:
    made = {"world_size": 2, "micro_batch": 2, "global_batch": 12}
    with pytest.raises(ResumeRefusedError) as refused:
        of(made, 5)
    assert str(refused.value) == (
        "global batch 12 = 2 rows x 3 accumulated x 2 ranks can't be made of 5 ranks x 2 rows; "
        "valid numbers of ranks: 1, 2, 3, 6"
    )
    with pytest.raises(ResumeRefusedError, match=r"global batch 8 can't be made of 3 ranks x 2 rows; .*: 1, 2, 4"):
        of({"world_size": 2}, 3, accumulation=2)


def test_seeds_differ_by_rank_and_step_and_not_by_attempt() -> None:
    seeds = {derived_seed(1, step, rank, 2) for step in range(50) for rank in range(2)}
    assert len(seeds) == 100
    assert derived_seed(1, 3, 1, 2) == derived_seed(1, 3, 1, 2) < 2**32


def test_the_rows_of_smokes_steps() -> None:
    settings = smoke.SmokeTrainer(per_device_train_batch_size=4)

    def step(number: int, ranks: int) -> list[int]:
        now = of({"world_size": 2, "micro_batch": 4, "global_batch": 24}, ranks, micro=4)
        return [
            row
            for micro in range(now.accumulation)
            for rank in range(ranks)
            for row in smoke._batch(
                number * now.accumulation + micro,
                SimpleNamespace(layout=now, rank=rank),
                settings,  # type: ignore[arg-type]
            )
        ]

    for number in (0, 1, 17):
        assert step(number, 1) == step(number, 2) == step(number, 3) == step(number, 6)
