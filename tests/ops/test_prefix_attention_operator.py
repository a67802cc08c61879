"""The operators under `prefix_attention`: autograd, autocast, the compiler, and who runs when."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from fastomni_kernels import GroupLayout, dispatch, prefix_attention, prefix_reference, reference
from fastomni_kernels.dispatch import triton_installed

# Triton's interpreter computes with numpy, which warns of what infinities do.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

BACKENDS = ["reference"] + ["triton"] * triton_installed()
NEEDS_TRITON = pytest.mark.skipif(not triton_installed(), reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Operators = torch.ops.fastomni
Groups = list[tuple[int, list[int]]]
MIXED: Groups = [(3, [2, 0, 1]), (2, [2]), (4, [])]


def build(groups: Groups) -> GroupLayout:
    return GroupLayout.build([p for p, _ in groups], [c for _, c in groups], DEVICE)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def random_inputs(
    layout: GroupLayout,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float32,
    head_size: int = 16,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = normal(layout.num_rows, heads[0] + 2 * heads[1], head_size, dtype=dtype).split(
        [heads[0], heads[1], heads[1]], 1
    )
    return tuple(x.contiguous().requires_grad_() for x in (q, k, v))  # type: ignore[return-value]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    layout = build(MIXED)
    rows = layout.num_rows
    q, k, v = normal(rows, 8, 16).requires_grad_().split([4, 2, 2], 1)  # views of one projection
    other_order = normal(4, 16, rows).permute(2, 0, 1).requires_grad_()
    settings = (layout.lengths, 0.3, backend)
    for query in (q, other_order):
        opcheck(Operators.prefix_attention.default, (query, k, v, *settings))
    with torch.no_grad():
        out, lse = Operators.prefix_attention(q, k, v, *settings)
    saved = (q.detach(), k.detach(), v.detach(), out, lse)
    for grad in (normal(rows, 4, 16), normal(1, 1, 16).expand(rows, 4, 16)):
        opcheck(Operators.prefix_attention_backward.default, (grad, *saved, *settings))


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_contiguous_whatever_comes_in(backend: str) -> None:
    layout = build(MIXED)
    rows, settings = layout.num_rows, (layout.lengths, 0.3, backend)
    q, k, v = (normal(heads, 16, rows).permute(2, 0, 1) for heads in (4, 2, 2))
    out, lse = Operators.prefix_attention(q, k, v, *settings)
    grads = Operators.prefix_attention_backward(q, q, k, v, out, lse, *settings)
    assert lse.shape == (rows, 4) and lse.dtype == torch.float32
    assert all(x.is_contiguous() for x in (out, lse, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    if (backend, DEVICE) == ("triton", "cuda"):
        pytest.skip("compiled, the kernel takes no fp64")
    layout = build(MIXED)
    inputs = random_inputs(layout, (2, 1), torch.float64)

    def attend(*inputs: Tensor) -> Tensor:
        return prefix_attention(*inputs, layout, 0.4, backend)

    # Fast: the interpreter takes minutes for the whole Jacobian.
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_log_sum_exp_is_that_of_the_scores(backend: str) -> None:
    layout = build([(2, [1, 2])])
    q, k, v = random_inputs(layout, (2, 1))
    _, lse = Operators.prefix_attention(q, k, v, layout.lengths, 0.3, backend)
    seen = [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4]]
    scores = 0.3 * torch.einsum("qhd,kd->qhk", q, k[:, 0])
    expected = torch.stack([scores[i][:, keys].logsumexp(-1) for i, keys in enumerate(seen)])
    torch.testing.assert_close(lse, expected, rtol=0, atol=1e-5)
    assert not lse.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_backward_gives_the_same(backend: str) -> None:
    layout = build(MIXED)
    inputs = random_inputs(layout)
    out = prefix_attention(*inputs, layout, backend=backend)
    upstream = normal(*out.shape)
    first = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    second = torch.autograd.grad(out, inputs, upstream)
    assert all(map(torch.equal, first, second))
    assert all(grad.abs().max() > 0.1 for grad in first)


def test_there_is_no_second_derivative() -> None:
    layout = build(MIXED)
    inputs = random_inputs(layout)
    out = prefix_attention(*inputs, layout)
    with pytest.raises(RuntimeError, match="its gradient has no gradient"):
        torch.autograd.grad(out.sum(), inputs, create_graph=True)


def test_a_gradient_that_nobody_sends_is_none() -> None:
    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> None:
            return None

    layout = build(MIXED)
    q, k, v = random_inputs(layout)
    Silent.apply(prefix_attention(q, k, v, layout)).backward()
    assert q.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    layout = build(MIXED)
    inputs = random_inputs(layout)
    results = []
    for enabled in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            out = prefix_attention(*inputs, layout, backend=backend)
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert all(map(torch.equal, *results))


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    layout = build(MIXED)
    kept: list[bool] = []
    for grad in (True, False):
        q, k, v = random_inputs(layout)
        q = q * 1
        alive = weakref.ref(q)
        with torch.set_grad_enabled(grad):
            out = prefix_attention(q, k, v, layout)
        del q
        gc.collect()
        kept.append(alive() is not None)
        assert out.requires_grad == grad
    assert kept == [True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_gives_the_same(backend: str) -> None:
    layout = build(MIXED)
    inputs = random_inputs(layout)

    def total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return prefix_attention(2 * q, k, v, layout, backend=backend).square().sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), total(*inputs))
    actual = torch.autograd.grad(compiled(*inputs), inputs)
    assert all(map(torch.equal, actual, torch.autograd.grad(total(*inputs), inputs)))


def test_torch_compile_does_not_compile_for_every_layout() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout) -> Tensor:
        return prefix_attention(q, k, v, layout).sin()

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for i in range(12):
        groups = [
            (3 + i + n, [1 + (i + n + g) % 5 for g in range(i % 4)]) for n in range(1 + i % 3)
        ]
        layout = build(groups)
        inputs = random_inputs(layout)
        actual, expected = compiled(*inputs, layout), attend(*inputs, layout)
        assert torch.equal(actual, expected)
        grads = (torch.autograd.grad(x.sum(), inputs) for x in (actual, expected))
        assert all(map(torch.equal, *grads))
    assert counter.frame_count <= 2  # sizes of the first layout, then any


def test_other_devices_run_plain_torch_through_the_same_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["fastomni_kernels.prefix_attention"]
    devices: list[str] = []

    def elsewhere(device: torch.device) -> object:
        devices.append(device.type)
        return prefix_reference

    assert module._plain_torch(torch.device("cuda")) is prefix_reference
    assert module._plain_torch(torch.device("cpu")) is not prefix_reference
    monkeypatch.setattr(module, "_plain_torch", elsewhere)
    layout = build(MIXED)
    inputs = random_inputs(layout, dtype=torch.bfloat16)
    wide = tuple(x.detach().double().requires_grad_() for x in inputs)
    out = prefix_attention(*inputs, layout, backend="reference")
    expected = reference.prefix_attention(*wide, layout)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-2)
    upstream = normal(*out.shape)
    grads = torch.autograd.grad(out, inputs, upstream.bfloat16())
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    for actual, want in zip(grads, wanted, strict=True):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual.double(), want, rtol=0, atol=5e-2)
    assert devices == [DEVICE] * 2


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernel's launchers, as they are called; choices are forgotten before."""
    from fastomni_kernels.triton_kernels import prefix_attention as kernels

    monkeypatch.setattr(dispatch, "choices", {})
    calls: list[str] = []

    def spied(name: str) -> Callable[..., object]:
        launch = getattr(kernels, name)

        def call(*arguments: object) -> object:
            calls.append(name)
            return launch(*arguments)

        return call

    for name in ("forward", "backward"):
        monkeypatch.setattr(kernels, name, spied(name))
    return calls


ALONE: Groups = [(3, [2]), (2, []), (4, [0])]


@NEEDS_TRITON
@pytest.mark.parametrize("groups", [MIXED, ALONE])
def test_the_kernel_runs_where_it_is_asked_for(
    groups: Groups, kernel_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = build(groups)
    inputs = random_inputs(layout)
    prefix_attention(*inputs, layout, backend="triton").sum().backward()
    assert kernel_calls == ["forward", "backward"]
    monkeypatch.setenv("FASTOMNI_KERNELS", "triton")
    prefix_attention(*inputs, layout).sum().backward()
    assert kernel_calls == ["forward", "backward"] * 2
    prefix_attention(*inputs, layout, backend="reference").sum().backward()
    assert len(kernel_calls) == 4
    assert set(dispatch.choices) == {(n, b) for n in ["prefix_attention"] for b in BACKENDS}


@NEEDS_TRITON
def test_tensors_that_the_kernel_cannot_take(
    kernel_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = build(MIXED)
    inputs = random_inputs(layout, head_size=8)
    with pytest.raises(ValueError, match=r"cannot take these tensors \(.* not of 8\); use backend"):
        prefix_attention(*inputs, layout, backend="triton")
    monkeypatch.setenv("FASTOMNI_KERNELS", "triton")
    expected = reference.prefix_attention(*inputs, layout)
    torch.testing.assert_close(prefix_attention(*inputs, layout), expected, rtol=0, atol=1e-5)
    assert not kernel_calls
    assert dispatch.choices == {("prefix_attention", "reference"): "it has no Triton kernel"}


def test_only_a_gpu_without_wishes_leaves_causal_sequences_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["fastomni_kernels.prefix_attention"]
    monkeypatch.delenv("FASTOMNI_KERNELS", raising=False)
    fast = True
    monkeypatch.setattr(module, "explain", lambda *_: ("torch" if fast else "reference", ""))

    def goes(device: str, groups: list[Any], backend: str) -> bool:
        # All that is read of a tensor, on a device that may not be here.
        q = SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16, shape=(9, 4, 64))
        return module._goes_to_varlen(q, build(groups), backend)

    assert goes("cuda", ALONE, "auto")
    assert not goes("cuda", MIXED, "auto")
    assert not goes("cpu", ALONE, "auto")
    assert not goes("cuda", ALONE, "triton") and not goes("cuda", ALONE, "reference")
    monkeypatch.setenv("FASTOMNI_KERNELS", "")
    assert goes("cuda", ALONE, "auto")
    fast = False  # fp32, say: our kernel takes it, and theirs do not
    assert not goes("cuda", ALONE, "auto")
    fast = True
    for wish in ("triton", "reference"):
        monkeypatch.setenv("FASTOMNI_KERNELS", wish)
        assert not goes("cuda", ALONE, "auto")


def test_lengths_that_are_of_other_rows_are_refused() -> None:
    layout = build(MIXED)
    q, k, v = (x.detach() for x in random_inputs(layout))
    with pytest.raises(ValueError, match="lengths of 14 rows for 13 queries"):
        Operators.prefix_attention(q[:-1], k[:-1], v[:-1], layout.lengths, 0.3, "reference")


def test_a_layout_is_made_once_for_equal_lengths() -> None:
    module = sys.modules["fastomni_kernels.prefix_attention"]
    for layout in (build(MIXED), build(ALONE), build([(1, [])])):
        numbers = tuple(layout.lengths.tolist())
        made = module._layout_of(numbers, torch.device("cpu"))
        assert made == GroupLayout(layout.prompt_lengths, layout.completion_lengths, made.device)
        assert module._layout_of(tuple(layout.lengths.tolist()), made.device) is made
    assert module._layout_of.cache_info().maxsize <= 64


def test_wrong_words_and_scales_are_refused() -> None:
    layout = build(MIXED)
    inputs = random_inputs(layout)
    with pytest.raises(ValueError, match="backend 'cuda' is unknown"):
        prefix_attention(*inputs, layout, backend="cuda")
    with pytest.raises(ValueError, match="scale=nan; it must be a finite number"):
        prefix_attention(*inputs, layout, float("nan"))
    with pytest.raises(ValueError, match="layout is of type SimpleNamespace"):
        prefix_attention(*inputs, SimpleNamespace())  # type: ignore[arg-type]
    q, k, v = inputs
    with pytest.raises(ValueError, match=r"q has shape \[14, 0, 16\]; Hq and D must be 1 or more"):
        prefix_attention(q[:, :0], k, v, layout)
    with pytest.raises(ValueError, match=r"q has shape \[14, 4, 0\]; Hq and D must be 1 or more"):
        prefix_attention(q[..., :0], k[..., :0], v[..., :0], layout)
