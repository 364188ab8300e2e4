import json
from typing import Any

import pytest

from outlast.storage.budget import (
    GB,
    MARGIN,
    Footprint,
    by_part,
    gb,
    margin,
    part_of,
    refusal,
    round_up,
    verdict,
    with_margin,
)


def footprint(**changes: Any) -> Footprint:
    """A checkpoint of 1 GB, of which 0.3 are weights; a model of 0.3; 0.1 fixed."""
    parts: dict[str, Any] = {
        "checkpoint": {"weights": 3 * GB // 10, "optimizer": 6 * GB // 10, "random states": GB // 10},
        "final": {"weights": 3 * GB // 10},
        "fixed": {"prepared data": GB // 10},
    }
    return Footprint(**(parts | changes))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.safetensors", "weights"),
        ("model-00001-of-00003.safetensors", "weights"),
        ("model.safetensors.index.json", "weights"),
        ("adapter_model.safetensors", "weights"),
        ("optimizer.pt", "optimizer"),
        ("optimizer.bin", "optimizer"),
        ("global_step7/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "optimizer"),
        ("global_step7/mp_rank_00_model_states.pt", "DeepSpeed's copy of the weights"),
        ("rng_state_3.pth", "random states"),
        ("random_states_0.pkl", "random states"),
        ("scheduler.pt", "schedule"),
        ("tokenizer.json", "tokenizer"),
        ("chat_template.jinja", "tokenizer"),
        ("trainer_state.json", "trainer state"),
        ("manifest.json", "manifest"),
        ("training_args.bin", "small files"),
        ("README.md", "small files"),
        ("config.json", "small files"),
    ],
)
def test_each_file_belongs_to_a_part(name: str, part: str) -> None:
    assert part_of(name) == part


def test_sums() -> None:
    found = footprint()
    assert (found.checkpoint_bytes, found.final_bytes, found.fixed_bytes) == (GB, 3 * GB // 10, GB // 10)
    assert found.light_bytes == 3 * GB // 10


def test_it_comes_back_from_json() -> None:
    found = footprint(notes=("a formula",))
    assert Footprint.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_the_smallest_budget_is_the_first_that_fits() -> None:
    smallest = verdict(footprint(), 10 * GB).smallest_bytes
    assert smallest - margin(smallest) >= 2.4 * GB
    assert verdict(footprint(), smallest).fits
    assert verdict(footprint(), smallest).save_total_limit == 1
    assert not verdict(footprint(), smallest - 1).fits
    assert verdict(footprint(), smallest - 1).save_total_limit == 0


@pytest.mark.parametrize("need", [1, 1000, MARGIN, 13_000_000, 13_041_663, 13_200_000, 10**9, 10**12 + 1])
def test_a_budget_with_margin_has_what_is_needed_and_not_a_byte_more(need: int) -> None:
    assert with_margin(need) - margin(with_margin(need)) >= need
    less = with_margin(need) - 2
    assert less - margin(less) < need


def test_the_limit_grows_with_each_checkpoint_that_fits() -> None:
    """At the budget that a limit of K needs, K fit; with 1 % of a checkpoint less, K - 1."""
    for kept in range(2, 9):
        enough = with_margin(round(0.4 * GB) + (kept + 1) * GB)
        assert verdict(footprint(), enough).save_total_limit == kept
        assert verdict(footprint(), enough - GB // 100).save_total_limit == kept - 1


def test_what_the_limit_allows_stays_below_the_budget() -> None:
    for budget in range(3 * GB, 20 * GB, GB // 7):
        found = verdict(footprint(), budget)
        assert found.peak_bytes == (found.save_total_limit + 1) * GB + round(0.4 * GB)
        assert found.peak_bytes + margin(budget) <= budget


def test_a_limit_that_was_asked_for_is_an_upper_bound() -> None:
    assert verdict(footprint(), 10 * GB, save_total_limit=3).save_total_limit == 3
    assert not verdict(footprint(), 10 * GB, save_total_limit=3).lowered
    found = verdict(footprint(), 4 * GB, save_total_limit=3)
    assert (found.save_total_limit, found.asked_limit, found.lowered) == (2, 3, True)


def test_no_more_checkpoints_than_steps() -> None:
    assert verdict(footprint(), 100 * GB, steps=5).save_total_limit == 5
    assert verdict(footprint(), 100 * GB, steps=5).peak_bytes == 6 * GB + round(0.4 * GB)


def test_a_reserve_is_one_more_checkpoint() -> None:
    with_it, without = (verdict(footprint(), 10 * GB, reserve=reserve) for reserve in (True, False))
    assert with_it.save_total_limit == without.save_total_limit - 1
    assert with_it.smallest_bytes - without.smallest_bytes == pytest.approx(GB, rel=0.01)
    assert "the reserve 1 GB" in with_it.arithmetic


def test_a_refusal_has_the_arithmetic_and_what_would_do() -> None:
    found = verdict(footprint(), 2 * GB)
    error = refusal(found, 2.0, [("peft=lora", GB), ("trainer.optim=adafactor", 2 * GB + 1)])
    assert error.exit_code == 2
    text = str(error)
    assert text.startswith("storage.budget_gb: 2.0 is refused; valid: 2.42 or more")
    assert "2 checkpoints of 1 GB" in text
    assert "finished model of 300 MB" in text
    assert "prepared data 100 MB" in text
    assert "peft=lora (1 GB)" in text
    assert "adafactor" not in text  # would not be enough
    assert verdict(footprint(), int(found.smallest_gb * GB)).fits  # what it says can be typed


@pytest.mark.parametrize(
    ("value", "up"), [(2.4121, 2.42), (0.000341861, 0.000342), (72.9, 72.9), (1234.0, 1240.0), (0.01, 0.01), (1.0, 1.0)]
)
def test_rounding_up(value: float, up: float) -> None:
    assert round_up(value) == up


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_345_678_901, "2.35 GB")])
def test_bytes_in_words(size: int, text: str) -> None:
    assert gb(size) == text


def test_measured_bytes_take_the_place_of_the_estimate() -> None:
    found = footprint(checkpoint={"weights": 300, "optimizer": 600, "manifest": 50})
    files = {"model.safetensors": 310, "optimizer.pt": 900, "config.json": 7}
    measured = found.measured(files)
    assert measured.checkpoint == {"weights": 310, "optimizer": 900, "small files": 7, "manifest": 50}
    assert measured.fixed == found.fixed
    assert found.deviations(files) == {"optimizer": (600, 900)}
    assert found.deviations(files, share=0.001) == {
        "optimizer": (600, 900),
        "weights": (300, 310),
        "small files": (0, 7),
    }


def test_parts_of_files() -> None:
    assert by_part({"rng_state_0.pth": 1, "rng_state_1.pth": 2, "latest": 3}) == {"random states": 3, "small files": 3}
