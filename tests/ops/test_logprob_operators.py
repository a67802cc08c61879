"""The operators under the log-probability functions: memory, autograd, autocast, the compiler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fastomni_kernels import gather_logprobs, linear_logprobs
from fastomni_kernels.dispatch import triton_installed

# Triton's interpreter computes with numpy, which warns of what infinities do.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

BACKENDS = ["reference"] + ["triton"] * triton_installed()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def random_ids(count: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inplace_backward_gives_the_same_gradient_in_the_logits_memory(
    backend: str, dtype: torch.dtype
) -> None:
    ids = random_ids(6, 40)
    grads: dict[bool, Tensor] = {}
    for inplace in (False, True):
        leaf = normal(6, 40).to(dtype).requires_grad_()
        logits = leaf * 1
        before = logits.detach().clone()
        logprobs, entropy = gather_logprobs(logits, ids, 0.7, True, inplace, backend)
        assert torch.equal(logits, before)
        seen: list[int] = []
        logits.register_hook(lambda grad, seen=seen: seen.append(grad.data_ptr()))
        (logprobs.sum() + entropy.square().sum()).backward()
        assert (seen == [logits.data_ptr()]) == inplace
        assert torch.equal(logits.detach(), before) != inplace
        assert leaf.grad is not None
        grads[inplace] = leaf.grad
    assert torch.equal(grads[True], grads[False])
    assert grads[True].abs().max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_were_overwritten_are_not_used_again(backend: str) -> None:
    leaf, ids = normal(3, 8).requires_grad_(), random_ids(3, 8)
    logits = leaf * 1
    logprobs, _ = gather_logprobs(logits, ids, inplace_backward=True, backend=backend)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="use inplace_backward=False"):
        logprobs.sum().backward()
    # Whoever else saved them is stopped by torch.
    logits = leaf * 1
    squares = logits.square().sum()
    gather_logprobs(logits, ids, inplace_backward=True, backend=backend)[0].sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_logits_that_must_not_be_overwritten_are_refused() -> None:
    leaf, ids = torch.randn(3, 8, requires_grad=True), random_ids(3, 8)
    with pytest.raises(ValueError, match="a leaf of the graph"):
        gather_logprobs(leaf, ids, inplace_backward=True)
    with pytest.raises(ValueError, match=r"expanded \(strides \[0, 1\]\)"):
        gather_logprobs((leaf[:1] * 1).expand(3, 8), ids, inplace_backward=True)
    with torch.no_grad():  # nothing will be written
        gather_logprobs(leaf, ids, inplace_backward=True)
    gather_logprobs(leaf.detach(), ids, inplace_backward=True)


def test_a_gradient_that_nobody_sends_is_none() -> None:
    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, *xs: Tensor) -> Tensor:
            return torch.stack([x.sum() for x in xs]).sum()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> tuple[None, None]:
            return None, None

    hidden, weight, ids = normal(4, 3).requires_grad_(), normal(5, 3), random_ids(4, 5)
    Silent.apply(*linear_logprobs(hidden, weight, ids)).backward()
    Silent.apply(*gather_logprobs(hidden @ weight.T, ids, inplace_backward=True)).backward()
    assert hidden.grad is None


def test_there_is_no_second_derivative() -> None:
    hidden, weight, ids = normal(4, 3).requires_grad_(), normal(5, 3), random_ids(4, 5)
    for values in (linear_logprobs(hidden, weight, ids), gather_logprobs(hidden @ weight.T, ids)):
        with pytest.raises(RuntimeError, match="its gradient has no gradient"):
            torch.autograd.grad(values[0].sum(), hidden, create_graph=True)


def test_autocast_changes_nothing() -> None:
    hidden, weight, ids = torch.randn(20, 8), torch.randn(30, 8), random_ids(20, 30)
    hidden.requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values = linear_logprobs(hidden, weight, ids)
        results.append((*values, *torch.autograd.grad(values[0].sum() + values[1].sum(), hidden)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("with_entropy", [True, False])
def test_opcheck_of_the_head(with_entropy: bool) -> None:
    hidden = torch.randn(6, 3, requires_grad=True)
    weight = torch.randn(3, 40).T.requires_grad_()  # gradients are contiguous all the same
    ids, operators = random_ids(6, 40), torch.ops.fastomni
    settings = (0.8, with_entropy, 500, "reference")
    opcheck(operators.linear_logprobs.default, (hidden, weight, ids, *settings))
    with torch.no_grad():
        _, entropy, normaliser = operators.linear_logprobs(hidden, weight, ids, *settings)
    saved = (hidden.detach(), weight.detach(), ids, normaliser, entropy)
    grads = torch.randn(6), torch.randn(6) if with_entropy else None
    for needed in ((True, True), (True, False), (False, True)):
        arguments = (*saved, *grads, 0.8, *needed, 500, "reference")
        opcheck(operators.linear_logprobs_backward.default, arguments)
        sizes = [x.numel() for x in operators.linear_logprobs_backward(*arguments)]
        assert sizes == [18 * needed[0], 120 * needed[1]]


@pytest.mark.parametrize("with_entropy", [True, False])
def test_torch_compile_of_the_head_gives_the_same(with_entropy: bool) -> None:
    hidden, weight = (torch.randn(n, 3, requires_grad=True) for n in (6, 40))
    ids = random_ids(6, 40)

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        logprobs, entropy = linear_logprobs(2 * hidden, weight, ids, 0.7, with_entropy)
        return (logprobs + entropy.square()).sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, weight), total(hidden, weight))
    actual = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    assert all(
        map(torch.equal, actual, torch.autograd.grad(total(hidden, weight), (hidden, weight)))
    )
