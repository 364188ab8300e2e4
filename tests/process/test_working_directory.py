"""Runs started where `git clone` leaves you: in the directory that holds a checkout called `outlast`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import SMOKE, Command, RunProbe

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.parametrize("launch", ["srun", "accelerate"])
def test_a_checkout_below_is_not_what_the_ranks_import(
    outlast: Callable[..., Command], probe: Callable[[str], RunProbe], tmp_path: Path, launch: str
) -> None:
    (tmp_path / "outlast").symlink_to(CHECKOUT)
    small = ["run.name=r", "parallel.ranks_per_node=2", "trainer.max_steps=3", f"parallel.launch={launch}"]
    command = outlast("train", *SMOKE, *small, forked=False)
    assert command.wait() == 0, command.output
    assert probe("r").causes() == ["finished"]
