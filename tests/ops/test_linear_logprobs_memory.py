"""What the fused head needs beside its inputs and results, and how slabs are cut."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from fastomni_kernels.triton_kernels import (
    linear_logprobs,
    linear_logprobs_backward,
    linear_tiles,
)


@pytest.mark.parametrize("rows", [1, 127, 12_800, 25_600, 200_000])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_slabs_are_as_large_as_allowed(rows: int, itemsize: int) -> None:
    columns = linear_logprobs_backward.slab_columns(rows, itemsize)
    bytes_of = (rows + 127) // 128 * 128 * itemsize
    assert columns % 256 == 0
    assert columns * bytes_of <= 384 * 2**20 < (columns + 256) * bytes_of


def test_tiles_fit_together() -> None:
    for tiles in linear_tiles.TILES.values():
        for tile in tiles.values():
            assert linear_logprobs_backward.SLAB_ROWS % tile.rows == 0
            assert linear_logprobs_backward.SLAB_COLUMNS % tile.columns == 0


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations make, now and at most."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = {x.untyped_storage()._cdata for x in inputs}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known:
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        identity, size = storage._cdata, storage.nbytes()
        self.known.add(identity)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, identity, size)

    def _release(self, identity: int, size: int) -> None:
        self.known.discard(identity)
        self.live -= size


class NotLaunched:
    """A kernel that does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: None


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=str)
def test_memory_at_full_size(needed: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """12,800 tokens of Qwen2.5-0.5B: at most 0.5 GB beside the gradients; on meta tensors."""
    monkeypatch.setattr(linear_logprobs_backward, "linear_logprobs_backward_kernel", NotLaunched())
    monkeypatch.setattr(linear_logprobs, "linear_logprobs_kernel", NotLaunched())
    monkeypatch.setattr(linear_logprobs, "linear_logprobs_combine_kernel", NotLaunched())
    for module in (linear_logprobs, linear_logprobs_backward):
        monkeypatch.setattr(module, "architecture", lambda: "sm_90")
    rows, vocabulary, size = 12_800, 151_936, 896
    hidden = torch.empty(rows, size, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(vocabulary, size, dtype=torch.bfloat16, device="meta")
    ids = torch.empty(rows, dtype=torch.int64, device="meta")
    grads = (torch.empty(rows, device="meta"), torch.empty(rows, device="meta"))

    with Allocations((hidden, weight, ids)) as forward:
        values = linear_logprobs.forward(hidden, weight, ids, 1.0, True)
    assert forward.live == sum(x.nbytes for x in values)
    assert forward.peak < 25e6

    arguments = (hidden, weight, ids, values[2], values[1], *grads)
    with Allocations(arguments) as backward:
        gradients = linear_logprobs.backward(*arguments, 1.0, *needed)
    results = sum(x.nbytes for x in gradients if x is not None)
    assert backward.live == results
    # The slab, and without the hidden states' gradient nothing else.
    assert 0.38e9 < backward.peak - results < (0.45e9 if needed[0] else 0.41e9)


def test_a_gradient_that_is_not_needed_is_not_made() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, weight = torch.randn(5, 24, device=device), torch.randn(130, 24, device=device)
    ids, ones = torch.arange(5, device=device), torch.ones(5, device=device)
    _, entropy, normaliser = linear_logprobs.forward(hidden, weight, ids, 1.0, True)
    saved = (hidden, weight, ids, normaliser, entropy, ones, None, 1.0)
    both = linear_logprobs.backward(*saved, True, True)
    for needed in ((True, False), (False, True), (False, False)):
        found = linear_logprobs.backward(*saved, *needed)
        assert [x is not None for x in found] == list(needed)
        for gradient, full in zip(found, both, strict=True):
            assert gradient is None or (full is not None and gradient.equal(full))
