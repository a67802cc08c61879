"""flash_varlen: values, gradients and refusals."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import causal_lower_right

from fastomni_kernels import reference
from fastomni_kernels.flash_varlen import explain, flash_varlen
from fastomni_kernels.varlen_reference import reference_operator
from fastomni_kernels.varlen_sdpa import sdpa_operator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Those that are operators of ours and run here.
BACKENDS = ("reference", "sdpa") if DEVICE == "cpu" else ("reference",)
OPERATORS = {"reference": reference_operator, "sdpa": sdpa_operator}

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
    # Every input has a gradient, if only zeros.
    return torch.stack(out).view_as(q) + 0 * (q.sum() + k.sum() + v.sum())


TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def assert_is_softmax_attention(arguments: tuple[Any, ...], causal: bool, backend: str) -> None:
    """Output and gradients of a call are those of `by_rows`."""
    q, k, v, cu_q, cu_k = arguments[:5]
    out = flash_varlen(*arguments, causal=causal, scale=0.3, backend=backend)
    assert out.dtype == q.dtype
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = by_rows(*wide, cu_q, cu_k, causal, 0.3)
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=tolerance)
    direction = torch.randn_like(wanted).to(q.dtype)
    found = torch.autograd.grad(out, (q, k, v), direction)
    for x, expected in zip(
        found, torch.autograd.grad(wanted, wide, direction.double()), strict=True
    ):
        assert x.dtype == q.dtype and x.is_contiguous()
        torch.testing.assert_close(x.double(), expected, rtol=0, atol=5 * tolerance)


# Lengths of queries and keys: of all kinds; equal ones in a row, square, cut off and cut short;
# with nothing between them, or keys that nobody asks for.
LAYOUTS = {
    "mixed": (QUERIES, KEYS),
    "equal": ((4, 4, 4), (4, 4, 4)),
    "alone": ((6,), (6,)),
    "longer keys": ((3, 3), (5, 5)),
    "longer queries": ((5, 5, 5), (3, 3, 3)),
    "gaps": ((4, 0, 4, 0, 4), (4, 0, 4, 2, 4)),
    "unasked": ((4, 4, 0), (4, 4, 3)),
    "decoding": ((1, 1, 1), (7, 2, 7)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
def test_values_and_gradients_are_those_of_softmax_attention(
    causal: bool, layout: str, heads: tuple[int, int], backend: str, poisoned_memory: None
) -> None:
    arguments = packed(*LAYOUTS[layout], heads=heads, dtype=torch.float64)
    assert_is_softmax_attention(arguments, causal, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_every_float_type(
    causal: bool, dtype: torch.dtype, backend: str, poisoned_memory: None
) -> None:
    assert_is_softmax_attention(packed(dtype=dtype), causal, backend)
    assert_is_softmax_attention(packed(*LAYOUTS["equal"], dtype=dtype), causal, backend)
    assert_is_softmax_attention(packed(*LAYOUTS["equal"], (2, 2), dtype=dtype), causal, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_layout(data: st.DataObject, backend: str) -> None:
    draw = data.draw
    length = st.integers(0, 6)
    sequence = st.tuples(length, length) | length.map(lambda n: (n, n))
    runs = draw(st.lists(st.tuples(sequence, st.integers(1, 3)), min_size=1, max_size=4))
    pairs = [pair for pair, count in runs for _ in range(count)]
    queries, keys = (tuple(lengths) for lengths in zip(*pairs, strict=True))
    if not sum(queries) or not sum(keys):
        return  # see test_nothing_to_attend_gives_zeros_and_zero_gradients
    key_heads = draw(st.integers(1, 3))
    heads = (key_heads * draw(st.integers(1, 3)), key_heads)
    size = draw(st.sampled_from([1, 3, 8, 20]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    arguments = packed(queries, keys, heads, size, dtype, draw(st.integers(0, 99)))
    assert_is_softmax_attention(arguments, draw(st.booleans()), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(6, 6), (6, 2)], ids=str)
def test_parts_of_one_fused_product(heads: tuple[int, int], backend: str) -> None:
    lengths = [5, 5, 3]
    fused = torch.randn(13, heads[0] + 2 * heads[1], 8, device=DEVICE).requires_grad_()
    cu = offsets(tuple(lengths))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_varlen(q, k, v, cu, cu, 5, 5, causal=True, backend=backend)

    parts = fused.split([heads[0], heads[1], heads[1]], 1)
    assert not any(x.is_contiguous() for x in parts)
    out, wanted = attend(*parts), attend(*(x.contiguous() for x in parts))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)
    found, expected = (torch.autograd.grad(x.square().sum(), fused)[0] for x in (out, wanted))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_the_same_for_all_rows(backend: str) -> None:
    """What a mean over rows sends back has no stride from row to row."""
    q, k, v, *rest = packed()
    weights = torch.randn(6, 8, device=DEVICE)
    out = flash_varlen(q, k, v, *rest, causal=True, backend=backend)
    found = torch.autograd.grad((out.mean(0) * weights).sum(), (q, k, v), retain_graph=True)
    wanted = torch.autograd.grad(out, (q, k, v), (weights / len(q)).repeat(len(q), 1, 1))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (2, 7), (1, 5)])
def test_the_causal_mask_is_the_lower_right_one_of_torch(
    queries: int, keys: int, backend: str
) -> None:
    q, k, v, *rest = packed((queries,), (keys,), heads=(2, 2))
    mask = causal_lower_right(queries, keys)
    batch = (x[None].transpose(1, 2) for x in (q, k, v))
    wanted = F.scaled_dot_product_attention(*batch, attn_mask=mask)[0].transpose(0, 1)
    found = flash_varlen(q, k, v, *rest, causal=True, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def test_sequences_do_not_see_one_another() -> None:
    q, k, v, *rest = packed((2, 3), (2, 3))
    before = flash_varlen(q, k, v, *rest)
    changed = k.detach().clone()
    changed[2:] += 5
    after = flash_varlen(q, changed, v, *rest)
    assert torch.equal(before[:2], after[:2])
    assert not torch.allclose(before[2:], after[2:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal: bool, backend: str) -> None:
    q, k, v, *rest = packed((3, 0, 2, 2), (1, 2, 4, 4), heads=(4, 2), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v: flash_varlen(q, k, v, *rest, causal=causal, backend=backend), (q, k, v)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    operator = OPERATORS[backend]
    torch.library.opcheck(operator, (*packed(), True, 0.3))
    for heads in ((6, 2), (3, 3)):
        arguments = packed(*LAYOUTS["equal"], heads=heads, dtype=torch.bfloat16)
        torch.library.opcheck(operator, (*arguments, False, 0.3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_there_is_no_second_derivative(backend: str) -> None:
    q, k, v, *rest = packed()
    out = flash_varlen(q, k, v, *rest, backend=backend)
    with pytest.raises(RuntimeError, match="its gradient has no gradient; leave create_graph off"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_without_a_break_for_any_lengths_and_sizes(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(flash_varlen, fullgraph=True, backend="aot_eager")
    for queries, keys, size in (((3, 5), (3, 5), 8), ((6, 1), (2, 9), 12), ((2,), (2,), 16)):
        arguments = packed(queries, keys, head_size=size)
        out = compiled(*arguments, causal=True, backend=backend)
        gradients = torch.autograd.grad(out.square().sum(), arguments[:3])
        wanted = flash_varlen(*arguments, causal=True, backend=backend)
        assert torch.equal(out, wanted)
        for a, b in zip(
            gradients, torch.autograd.grad(wanted.square().sum(), arguments[:3]), strict=True
        ):
            assert torch.equal(a, b)


def test_torch_s_own_attention_is_traced_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.delenv("FASTOMNI_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    with FakeTensorMode():  # a GPU of which there are shapes alone
        q, k = (torch.empty(9, h, 64, device="cuda", dtype=torch.bfloat16) for h in (14, 2))
        cu = torch.empty(3, dtype=torch.int32, device="cuda")
        compiled = torch.compile(flash_varlen, fullgraph=True, backend="eager")
        out = compiled(q, k, k, cu, cu, 7, 7, causal=True)
    assert out.shape == q.shape and out.device.type == "cuda"


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_read_as_they_are(backend: str) -> None:
    q, k, v, *rest = packed()
    wide = torch.randn(q.shape[0], q.shape[1], 2 * q.shape[2], device=DEVICE)
    wide[..., ::2] = q.detach()
    flipped = k.detach().transpose(0, 2).contiguous().transpose(0, 2)
    assert not flipped.is_contiguous()
    found = flash_varlen(wide[..., ::2], flipped, v, *rest, backend=backend)
    wanted = flash_varlen(q, k, v, *rest, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("queries", "keys"),
    [((0,), (0,)), ((), ()), ((0, 3), (0, 0)), ((0, 0), (2, 0)), ((0, 3), (2, 0))],
)
def test_nothing_to_attend_gives_zeros_and_zero_gradients(
    queries: tuple[int, ...], keys: tuple[int, ...], backend: str, poisoned_memory: None
) -> None:
    q, k, v = packed((*queries, 0), (*keys, 0))[:3]
    rest = (offsets(queries), offsets(keys), max(queries, default=0), max(keys, default=0))
    out = flash_varlen(q, k, v, *rest, backend=backend)
    assert out.shape == q.shape and not out.any()
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad is not None and x.grad.shape == x.shape and not x.grad.any()


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
