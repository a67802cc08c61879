"""flash_varlen on a CPU: what torch's CPU flash kernel is given, and what it is not asked to do.

Values and gradients on all kinds of layouts are in test_flash_varlen.py.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from fastomni_kernels import dispatch, reference
from fastomni_kernels.flash_varlen import explain, flash_varlen
from fastomni_kernels.varlen_sdpa import sdpa_operator

KERNEL = "aten::_scaled_dot_product_flash_attention_for_cpu"


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def packed(
    queries: tuple[int, ...],
    keys: tuple[int, ...] | None = None,
    heads: tuple[int, int] = (6, 2),
    head_size: int = 8,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, ...]:
    """Arguments of one call; as many keys as queries where nothing is said."""
    keys = queries if keys is None else keys
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(lengths), count, head_size, generator=generator).to(dtype).requires_grad_()
        for lengths, count in ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]))
    )
    return q, k, v, offsets(*queries), offsets(*keys), max(queries), max(keys)


def operations(function: Callable[[], Any]) -> list[str]:
    """Names of the torch functions that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function()
    return [event.name for event in profiler.events()]


@pytest.mark.parametrize("causal", [False, True])
def test_lengths_beyond_the_blocks_of_the_kernel(causal: bool) -> None:
    """Its blocks are 32 to 256 queries and 512 keys."""
    q, k, v, cu_q, cu_k, *longest = packed(
        (700, 700, 33, 900, 1), (700, 700, 1100, 600, 1030), (4, 2), 16
    )
    out = flash_varlen(q, k, v, cu_q, cu_k, *longest, causal=causal, backend="sdpa")
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = reference.flash_varlen(*wide, cu_q, cu_k, causal, 16**-0.5)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=2e-6)
    direction = torch.randn_like(out)
    for found, expected in zip(
        torch.autograd.grad(out, (q, k, v), direction),
        torch.autograd.grad(wanted, wide, direction.double()),
        strict=True,
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_is_computed_in_fp32(causal: bool) -> None:
    q, k, v, *rest = packed((3, 5, 5), (4, 5, 5), dtype=torch.bfloat16)
    out = flash_varlen(q, k, v, *rest, causal=causal, backend="sdpa")
    wide = (x.detach().float() for x in (q, k, v))
    assert torch.equal(out, flash_varlen(*wide, *rest, causal=causal, backend="sdpa").bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_operator_gives_the_log_sum_exp(dtype: torch.dtype) -> None:
    q, k, v, *rest = packed((2, 4, 3), (2, 1, 0), dtype=dtype)
    _, lse = sdpa_operator(q, k, v, *rest, True, 0.3)
    assert lse.dtype == torch.promote_types(dtype, torch.float32) and not lse.requires_grad
    keys = k.detach().double().repeat_interleave(3, 1)
    scores = 0.3 * torch.einsum("qhd,khd->qhk", q.detach().double(), keys)
    wanted = torch.full((9, 6), -torch.inf, dtype=torch.float64)
    wanted[0], wanted[1] = scores[0, :, 0], scores[1, :, :2].logsumexp(-1)
    wanted[5] = scores[5, :, 2]  # rows 2 to 4 and 6 to 8 see nothing
    torch.testing.assert_close(lse.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lengths", [(12, 12, 12, 12), (12, 12, 0, 24, 0), (48,)])
def test_a_run_of_equally_long_sequences_is_one_call_on_views(lengths: tuple[int, ...]) -> None:
    runs = len(set(lengths) - {0})
    fused = torch.randn(48, 3, 6, 8, requires_grad=True)  # as one product leaves them
    cu = offsets(*lengths)
    out: list[Tensor] = []

    def attend() -> None:
        q, k, v = fused.unbind(1)
        out.append(flash_varlen(q, k, v, cu, cu, 48, 48, backend="sdpa"))

    names = operations(attend)
    assert names.count(KERNEL) == runs
    # Of several runs output and log-sum-exp are copied to their rows, of one nothing is.
    assert names.count("aten::copy_") == (2 * runs if runs > 1 else 0)
    parts = tuple(x.detach().requires_grad_() for x in fused.unbind(1))
    out[0] = flash_varlen(*parts, cu, cu, 48, 48, backend="sdpa")
    direction = torch.randn(48, 6, 8)
    names = operations(lambda: torch.autograd.grad(out[0], parts, direction))
    assert names.count(f"{KERNEL}_backward") == runs
    assert names.count("aten::copy_") == (3 * runs if runs > 1 else 0)


@pytest.mark.parametrize(("heads", "count", "calls"), [(6, 4, 1), (2, 4, 2), (2, 1, 1), (1, 4, 1)])
def test_shared_heads_are_not_repeated(heads: int, count: int, calls: int) -> None:
    q, k, v, *rest = packed((12,) * count, heads=(6, heads))
    names = operations(lambda: flash_varlen(q, k, v, *rest, causal=True, backend="sdpa"))
    assert names.count(KERNEL) == 1 and "aten::repeat_interleave" not in names
    out = flash_varlen(q, k, v, *rest, causal=True, backend="sdpa")
    names = operations(lambda: torch.autograd.grad(out.sum(), (q, k, v)))
    assert names.count(f"{KERNEL}_backward") == calls
    assert "aten::repeat_interleave" not in names


@pytest.mark.parametrize(
    ("queries", "keys", "masks"),
    [((4, 4), (4, 4), 0), ((5, 5), (3, 3), 0), ((1, 1), (7, 3), 0), ((2, 2), (7, 7), 1)],
)
def test_a_mask_is_made_only_for_some_queries_over_more_keys(
    queries: tuple[int, ...], keys: tuple[int, ...], masks: int
) -> None:
    arguments = packed(queries, keys)
    names = operations(lambda: flash_varlen(*arguments, causal=True, backend="sdpa"))
    assert names.count("aten::triu_") == masks
    names = operations(lambda: flash_varlen(*arguments, causal=False, backend="sdpa"))
    assert "aten::triu_" not in names


def test_it_is_what_runs_on_a_cpu_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTOMNI_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "choices", {})
    flash_varlen(*packed((3, 2)), causal=True)
    assert list(dispatch.choices) == [("flash_varlen", "sdpa")]
    for compiling in (False, True):
        cpu = explain("auto", torch.device("cpu"), torch.bfloat16, 64, compiling)
        assert cpu == ("sdpa", dispatch.choices["flash_varlen", "sdpa"])
    message = "backend 'sdpa' cannot run, because the tensors are on cuda; it is torch's CPU flash"
    with pytest.raises(ValueError, match=message):
        explain("sdpa", torch.device("cuda"), torch.bfloat16, 64)
    with pytest.raises(ValueError, match="cannot run, because the tensors are on meta"):
        explain("sdpa", torch.device("meta"), torch.float32, 64)
    monkeypatch.setenv("FASTOMNI_KERNELS", "reference")
    assert explain("auto", torch.device("cpu"), torch.float32, 64)[0] == "reference"
    assert explain("sdpa", torch.device("cpu"), torch.float32, 64)[0] == "sdpa"


def test_on_a_cpu_the_backends_of_a_gpu_are_refused() -> None:
    for wish in ("flash-attn", "torch"):
        with pytest.raises(
            ValueError, match=f"{wish!r} cannot run, because the tensors are on cpu"
        ):
            explain(wish, torch.device("cpu"), torch.bfloat16, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": offsets(3, 3)}, "from 0 to 6 but there are 5 rows"),
        ({"cu_seqlens_k": offsets(6, -1)}, "cu_seqlens_k decreases"),
        ({"max_seqlen_k": 2}, "max_seqlen_k=2 but the longest sequence has 3 rows"),
    ],
)
def test_lengths_are_looked_at_inside_the_operator(change: dict[str, Any], message: str) -> None:
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    arguments = dict(zip(names, packed((3, 2)), strict=True)) | change
    with pytest.raises(ValueError, match=f"^flash_varlen: .*{message}"):
        flash_varlen(**arguments, backend="sdpa")
