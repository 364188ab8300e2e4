"""Captures and restores the random state of Python, NumPy, torch and every GPU."""

import random
from typing import Any

import numpy as np
import torch


def capture(*, devices: bool = True) -> dict[str, Any]:
    """The current state of all generators; without `devices`, of those that draw on the CPU."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if devices and torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state_all()
    return state


def restore(state: dict[str, Any]) -> None:
    """Go back to a state that :func:`capture` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.random.set_rng_state_all(state["cuda"])
