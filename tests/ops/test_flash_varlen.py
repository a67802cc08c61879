"""flash_varlen: values, gradients and refusals."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import causal_lower_right

from fastomni_kernels import reference
from fastomni_kernels.flash_varlen import explain, flash_varlen
from fastomni_kernels.varlen_reference import reference_operator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Longer and shorter than their keys, one row, no query, no key, neither.
QUERIES = (3, 0, 5, 1, 7, 2, 0)
KEYS = (4, 2, 0, 1, 3, 9, 0)


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def packed(
    queries: tuple[int, ...] = QUERIES,
    keys: tuple[int, ...] = KEYS,
    heads: tuple[int, int] = (6, 2),
    head_size: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Arguments of one call: q, k, v with gradients, offsets, longest lengths."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(sum(lengths), count, head_size, generator=generator, dtype=torch.float64)
        .to(DEVICE, dtype)
        .requires_grad_()
        for lengths, count in ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]))
    )
    return q, k, v, offsets(queries), offsets(keys), max(queries), max(keys)


def by_rows(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float
) -> Tensor:
    """Softmax attention in float64, one query row and head at a time."""
    q, k, v = (x.double() for x in (q, k, v))
    out = []
    bounds = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    for (start_q, end_q), (start_k, end_k) in bounds:
        for i in range(start_q, end_q):
            # The last query is beside the last key.
            seen = end_k - (end_q - 1 - i) if causal else end_k
            for head in range(q.shape[1]):
                if seen <= start_k:
                    out.append(torch.zeros_like(q[i, head]))
                    continue
                shared = head // (q.shape[1] // k.shape[1])
                scores = scale * k[start_k:seen, shared] @ q[i, head]
                out.append(scores.softmax(0) @ v[start_k:seen, shared])
    return torch.stack(out).view_as(q)


TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_values_and_gradients_are_those_of_softmax_attention(
    causal: bool, dtype: torch.dtype, poisoned_memory: None
) -> None:
    arguments = packed(dtype=dtype)
    q, k, v, cu_q, cu_k = arguments[:5]
    out = flash_varlen(*arguments, causal=causal, scale=0.3, backend="reference")
    assert out.dtype == dtype
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = by_rows(*wide, cu_q, cu_k, causal, 0.3)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=TOLERANCE[dtype])
    direction = torch.randn_like(wanted)
    gradients = torch.autograd.grad(out, (q, k, v), direction.to(dtype))
    for found, expected in zip(
        gradients, torch.autograd.grad(wanted, wide, direction), strict=True
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=5 * TOLERANCE[dtype])


@pytest.mark.parametrize("causal", [False, True])
def test_the_definition_is_softmax_attention_too(causal: bool) -> None:
    q, k, v, cu_q, cu_k = packed(dtype=torch.float64)[:5]
    found = reference.flash_varlen(q, k, v, cu_q, cu_k, causal, 0.3)
    wanted = by_rows(q, k, v, cu_q, cu_k, causal, 0.3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    for a, b in zip(
        *(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (2, 7), (1, 5)])
def test_the_causal_mask_is_the_lower_right_one_of_torch(queries: int, keys: int) -> None:
    q, k, v, *rest = packed((queries,), (keys,), heads=(2, 2))
    mask = causal_lower_right(queries, keys)
    batch = (x[None].transpose(1, 2) for x in (q, k, v))
    wanted = F.scaled_dot_product_attention(*batch, attn_mask=mask)[0].transpose(0, 1)
    found = flash_varlen(q, k, v, *rest, causal=True, backend="reference")
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def test_sequences_do_not_see_one_another() -> None:
    q, k, v, *rest = packed((2, 3), (2, 3))
    before = flash_varlen(q, k, v, *rest)
    changed = k.detach().clone()
    changed[2:] += 5
    after = flash_varlen(q, changed, v, *rest)
    assert torch.equal(before[:2], after[:2])
    assert not torch.allclose(before[2:], after[2:])


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal: bool) -> None:
    q, k, v, *rest = packed((3, 0, 2), (1, 2, 4), heads=(4, 2), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v: flash_varlen(q, k, v, *rest, causal=causal, backend="reference"), (q, k, v)
    )


def test_opcheck() -> None:
    torch.library.opcheck(reference_operator, (*packed(), True, 0.3))


def test_compiled_without_a_break_for_any_lengths_and_sizes() -> None:
    compiled = torch.compile(flash_varlen, fullgraph=True, backend="aot_eager")
    for queries, keys, size in (((3, 5), (3, 5), 8), ((6, 1), (2, 9), 12), ((2,), (2,), 16)):
        arguments = packed(queries, keys, head_size=size)
        out = compiled(*arguments, causal=True, backend="reference")
        gradients = torch.autograd.grad(out.square().sum(), arguments[:3])
        wanted = flash_varlen(*arguments, causal=True, backend="reference")
        assert torch.equal(out, wanted)
        for a, b in zip(
            gradients, torch.autograd.grad(wanted.square().sum(), arguments[:3]), strict=True
        ):
            assert torch.equal(a, b)


def test_torch_s_own_attention_is_traced_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTOMNI_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    with FakeTensorMode():  # a GPU of which there are shapes alone
        q, k = (torch.empty(9, h, 64, device="cuda", dtype=torch.bfloat16) for h in (14, 2))
        cu = torch.empty(3, dtype=torch.int32, device="cuda")
        compiled = torch.compile(flash_varlen, fullgraph=True, backend="eager")
        out = compiled(q, k, k, cu, cu, 7, 7, causal=True)
    assert out.shape == q.shape and out.device.type == "cuda"


def test_views_are_read_as_they_are() -> None:
    q, k, v, *rest = packed()
    wide = torch.randn(q.shape[0], q.shape[1], 2 * q.shape[2], device=DEVICE)
    wide[..., ::2] = q.detach()
    flipped = k.detach().transpose(0, 2).contiguous().transpose(0, 2)
    assert not flipped.is_contiguous()
    found = flash_varlen(wide[..., ::2], flipped, v, *rest)
    torch.testing.assert_close(found, flash_varlen(q, k, v, *rest), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("queries", "keys"), [((0,), (0,)), ((), ()), ((0, 3), (0, 0))])
def test_nothing_to_attend_gives_zeros_and_zero_gradients(
    queries: tuple[int, ...], keys: tuple[int, ...], poisoned_memory: None
) -> None:
    q, k, v = packed((*queries, 0), (*keys, 0))[:3]
    rest = (offsets(queries), offsets(keys), max(queries, default=0), max(keys, default=0))
    out = flash_varlen(q, k, v, *rest)
    assert out.shape == q.shape and not out.any()
    out.sum().backward()
    assert q.grad is not None and not q.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(18, 8)}, r"q has shape \[18, 8\]; it must be \[T, Hq, D\]"),
        ({"k": torch.ones(19, 2, 4)}, r"k has shape \[19, 2, 4\]; it must be \[U, Hkv, 8\]"),
        ({"v": torch.ones(18, 2, 8)}, r"v has shape \[18, 2, 8\]; it must be \[19, 2, 8\]"),
        ({"q": torch.ones(18, 3, 8)}, "3 query heads cannot be shared by 2 key heads"),
        ({"q": torch.ones(18, 6, 8, dtype=torch.int32)}, "it must be a float tensor"),
        ({"q": torch.ones(18, 6, 8).half()}, "q is torch.float16, k is torch.float32"),
        ({"cu_seqlens_q": torch.zeros(8)}, "cu_seqlens_q is torch.float32 on cpu; it must be"),
        ({"cu_seqlens_k": offsets((19,))}, r"cu_seqlens_k has shape \[2\]; it must be \[8\]"),
        ({"cu_seqlens_q": offsets((3, 0, 5, 1, 7, 3, 0))}, "from 0 to 19 but there are 18 rows"),
        ({"cu_seqlens_k": offsets((4, 2, 0, 2, -1, 12, 0))}, "cu_seqlens_k decreases"),
        ({"max_seqlen_q": 6}, "max_seqlen_q=6 but the longest sequence has 7 rows"),
        ({"max_seqlen_k": -1}, "max_seqlen_k=-1; it must be a host integer"),
        ({"max_seqlen_k": 9.0}, "max_seqlen_k=9.0; it must be a host integer"),
        ({"scale": float("inf")}, "scale=inf; it must be a finite number"),
        ({"backend": "triton"}, "backend 'triton' is unknown; use one of auto, flash-attn, torch"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    arguments = dict(zip(names, packed(), strict=True)) | change
    moved = {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in arguments.items()}
    message = message.replace("on cpu", f"on {moved['q'].device}")
    with pytest.raises(ValueError, match=f"^flash_varlen: .*{message}"):
        flash_varlen(**moved)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("wish", ["flash-attn", "torch"])
@pytest.mark.parametrize("causal", [False, True])
def test_fast_backends_agree_with_the_reference(causal: bool, wish: str) -> None:
    try:
        explain(wish, torch.device(DEVICE), torch.bfloat16, 64)
    except ValueError as error:
        pytest.skip(str(error))
    q, k, v, *rest = packed((130, 0, 65, 1), (130, 7, 200, 3), (14, 2), 64, torch.bfloat16)
    pairs = []
    for backend in (wish, "reference"):
        out = flash_varlen(q, k, v, *rest, causal=causal, backend=backend)
        pairs.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    for found, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
