"""What is plain is compared in place: to the bit, and without a copy."""

import random
from typing import Any

import pytest
import torch

from outlast.attempt.values import decode, encode, is_still, same
from outlast.huggingface import objects
from outlast.huggingface.objects import Objects

VALUES: dict[str, Any] = {
    "number": 1,
    "text": "a",
    "nothing": None,
    "nested": [1, ({"a": torch.ones(3), 2: (b"x", 1.5)}, [])],
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "scalar": torch.tensor(1),
    "empty": torch.zeros(0),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "complex": torch.ones(2, dtype=torch.complex128),
    "parameter-like": torch.ones(3, requires_grad=True),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_still_what_it_was_encoded_as(name: str) -> None:
    assert is_still(VALUES[name], encode(VALUES[name]))
    assert same(encode(VALUES[name]), encode(decode(encode(VALUES[name]))))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(1, True, id="another type"),
        pytest.param(1, 1.0, id="another number type"),
        pytest.param([1], (1,), id="another container"),
        pytest.param([1], [1, 2], id="longer"),
        pytest.param({"a": 1, "b": 2}, {"b": 2, "a": 1}, id="another order"),
        pytest.param([torch.zeros(1)], [-torch.zeros(1)], id="another sign of zero"),
        pytest.param(torch.zeros(2), torch.zeros(2, 1), id="another shape"),
        pytest.param(torch.zeros(2), torch.zeros(2, dtype=torch.int32), id="another dtype"),
    ],
)
def test_any_difference_counts(before: Any, after: Any) -> None:
    assert not is_still(after, encode(before))
    assert not same(encode(before), encode(after))


def test_what_is_known_is_not_walked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"x": torch.ones(2), "seen": [0]} for _ in range(5)]
    drawn = {"rng": random.Random(0)}
    found = Objects(lambda: {"rows": rows, "drawn": drawn}, list)
    found.note()
    copied: list[Any] = []
    monkeypatch.setattr(objects, "encode", lambda value: copied.append(value) or encode(value))
    first = found.capture()
    assert not [value for value in copied if isinstance(value, list | torch.Tensor)]
    assert list(first) == ["drawn"], "a generator is always kept"
    rows[3]["seen"].append(1)
    rows[4]["x"].numpy()[0] = 7  # which counts no version
    assert {"rows[3]['seen']", "rows[4]"} <= set(found.capture())
    found.restore(first)
    assert rows[3]["seen"] == [0]
    assert rows[4]["x"].tolist() == [1, 1]
