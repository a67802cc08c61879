"""The fixture that poisons fresh memory does poison it, and leaves torch as it was afterwards."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.usefixtures("poisoned_memory")
def test_fresh_memory_is_poisoned() -> None:
    assert torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert torch.empty_like(torch.zeros(2)).isnan().all()
    assert torch.empty(2, dtype=torch.int32).tolist() == [-128, -128]
    assert torch.empty(2, requires_grad=True).requires_grad
    assert torch.zeros(2).tolist() == [0.0, 0.0]
    assert torch.empty(2, dtype=torch.bool).shape == (2,)


def test_memory_is_poisoned_on_request_alone() -> None:
    assert torch.empty.__name__ == "empty"
    assert torch.empty_like.__name__ == "empty_like"
