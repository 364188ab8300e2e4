"""The weights of plain modules, as safetensors takes them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outlast.huggingface.plain_modules import apart


def test_shared_memory_is_written_apart_under_each_name(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    state = {
        "tied": whole.view(3, 4),
        "same": whole.view(3, 4),
        "slice": whole[4:8],
        "turned": torch.arange(6.0).view(2, 3).t(),
        "empty": torch.empty(0),
        "alone": torch.ones(2),
    }
    with pytest.raises(RuntimeError, match="share memory"):
        save_file(state, tmp_path / "refused.safetensors")
    save_file(apart(state), tmp_path / "whole.safetensors")
    loaded = load_file(tmp_path / "whole.safetensors")
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert apart(state)["alone"] is state["alone"]
