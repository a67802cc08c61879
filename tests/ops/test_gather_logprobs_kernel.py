"""The kernels on existing logits against log_softmax in float64 and against Liger's and TRL's.

`block` is the number of logits in one step of a kernel: 16 gives a row many steps and a tail, the
shipped size one.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

pytest.importorskip("triton")

from fastomni_kernels import gather_logprobs
from fastomni_kernels.triton_kernels import gather_logprobs as kernels

# Triton's interpreter computes with numpy, which warns of what infinities do.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Sums are made in fp32; a gradient is rounded to the dtype of the logits at the end, which the
# interpreter does to bf16 by cutting.
VALUES = {torch.float64: 1e-12, **dict.fromkeys(DTYPES[1:], 1e-5)}
GRADIENTS = dict(zip(DTYPES, (1e-13, 1e-5, 2e-3, 2e-2), strict=True))

Pair = tuple[Tensor | None, Tensor | None]


@pytest.fixture(params=[16, kernels.BLOCK])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(kernels, "BLOCK", request.param)
    return request.param


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def random_ids(count: int, vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (count,), generator=generator).to(DEVICE)


def expected(logits: Tensor, ids: Tensor, temperature: float, grads: Pair) -> list[Tensor]:
    """Log-probs, entropy, log-sum-exp, and the logits' gradient, of float64 logits."""
    logits = logits.detach().double().requires_grad_()
    log_p = (logits / temperature).log_softmax(-1)
    surprise = -log_p.masked_fill(log_p == -math.inf, 0)
    values = log_p.gather(1, ids[:, None])[:, 0], (log_p.exp() * surprise).sum(-1)
    terms = [(x * g).sum() for x, g in zip(values, grads, strict=True) if g is not None]
    (grad,) = torch.autograd.grad(torch.stack(terms).sum(), logits)
    normaliser = (logits / temperature).logsumexp(-1)
    return [x.detach() for x in (*values, normaliser, grad)]


def both_ways(logits: Tensor, ids: Tensor, temperature: float, grads: Pair) -> list[Tensor]:
    values = kernels.forward(logits, ids, temperature)
    first, second = (None if g is None else g.to(values[0].dtype) for g in grads)
    out = torch.empty_like(logits)
    kernels.backward(logits, ids, values[2], values[1], first, second, temperature, out)
    return [*values, out]


def assert_same(actual: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    for got, want in zip(actual[:3], wanted[:3], strict=True):
        assert got.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(got.double(), want, rtol=VALUES[dtype], atol=VALUES[dtype])
    assert actual[3].dtype == dtype
    limit = GRADIENTS[dtype] * wanted[3].abs().max().item()
    torch.testing.assert_close(actual[3].double(), wanted[3], rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (3, 64), (17, 130)], ids=str)
def test_values_and_gradients(
    poisoned_memory: None, block: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    logits = (4 * normal(*shape)).to(dtype)
    ids, grads = random_ids(*shape), normal(2, shape[0], seed=2)
    given = grads[0], grads[1]
    assert_same(both_ways(logits, ids, 0.7, given), expected(logits, ids, 0.7, given), dtype)


@pytest.mark.parametrize("which", ["logprobs", "entropy"])
def test_one_gradient_may_be_missing(poisoned_memory: None, block: int, which: str) -> None:
    logits, ids, grad = normal(4, 50), random_ids(4, 50), normal(4, seed=2)
    grads = (grad, None) if which == "logprobs" else (None, grad)
    assert_same(both_ways(logits, ids, 3.0, grads), expected(logits, ids, 3.0, grads), logits.dtype)


def test_without_entropy_only_the_entropy_differs(poisoned_memory: None, block: int) -> None:
    logits, ids = normal(4, 50, dtype=torch.float32), random_ids(4, 50)
    logprobs, entropy, normaliser = kernels.forward(logits, ids, 1.0)
    without = kernels.forward(logits, ids, 1.0, with_entropy=False)
    assert torch.equal(without[0], logprobs) and torch.equal(without[2], normaliser)
    assert (without[1] == 0).all() and (entropy > 0).all()
    flags: list[bool] = []
    forward = kernels.forward
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels, "forward", lambda *x: (flags.append(x[3]), forward(*x))[1])
        for with_entropy in (True, False):
            values = gather_logprobs(logits, ids, 1.0, with_entropy, backend="triton")
            assert torch.equal(values[1], entropy if with_entropy else without[1])
    assert flags == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_logits_and_whole_masked_blocks(
    poisoned_memory: None, block: int, dtype: torch.dtype
) -> None:
    logits = (4 * normal(4, 80)).to(dtype)
    logits[0, 1::2] = -math.inf
    logits[1, :48] = -math.inf  # the first blocks of 16
    logits[2, 16:] = -math.inf  # all but the first
    logits[3, :79] = -math.inf  # all but one token
    ids = torch.tensor([2, 79, 3, 79], device=DEVICE)
    # Gradients above 1, because -3e38 * 2 would overflow and 0 * inf is NaN.
    given = 3 + normal(4, seed=2), 3 + normal(4, seed=3)
    actual = both_ways(logits, ids, 0.9, given)
    assert_same(actual, expected(logits, ids, 0.9, given), dtype)
    assert (actual[3][logits == -math.inf] == 0).all()
    assert actual[0][3] == 0 and actual[1][3] == 0
    forbidden = kernels.forward(logits, torch.tensor([1, 0, 16, 0], device=DEVICE), 0.9)
    assert (forbidden[0] == -math.inf).all()


def test_rows_of_very_negative_and_very_large_logits(block: int) -> None:
    rows = normal(6, 80, dtype=torch.float32)
    offsets = [-1e4, 1e4, -3e4, 0.0]
    logits = torch.stack([row + offset for row, offset in zip(rows, offsets, strict=False)])
    ids = random_ids(4, 80)
    logprobs, entropy, _ = kernels.forward(logits, ids, 1.0)
    exact = expected(logits, ids, 1.0, (torch.ones(4, device=DEVICE), None))
    torch.testing.assert_close(logprobs.double(), exact[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact[1], rtol=0, atol=1e-5)
    extreme = torch.full((3, 80), -3e38, device=DEVICE)
    extreme[1, 70], extreme[2, 0] = 3e38, -3.4e38
    logprobs, entropy, _ = kernels.forward(extreme, torch.tensor([5, 70, 1], device=DEVICE), 1.0)
    uniform = torch.tensor([math.log(80), 0.0, math.log(79)], device=DEVICE)
    torch.testing.assert_close(logprobs, -uniform)
    torch.testing.assert_close(entropy, uniform)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_a_distribution_is_nan_and_others_are_not(block: int, bad: float) -> None:
    logits, ids = normal(3, 40, dtype=torch.float32), random_ids(3, 40)
    logits[1, 20] = bad
    logits[2] = -math.inf
    logprobs, entropy, _ = kernels.forward(logits, ids, 1.0)
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, True]


def test_ids_outside_the_vocabulary_give_nan_and_read_nothing() -> None:
    everything = normal(3, 40, dtype=torch.float32)
    logprobs, _, _ = kernels.forward(
        everything[:, 10:30], torch.tensor([-1, 20, 0], device=DEVICE), 1.0
    )
    assert logprobs.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("layout", ["slice", "transposed", "every second", "expanded"])
def test_any_strides(poisoned_memory: None, block: int, layout: str) -> None:
    logits = {
        "slice": lambda: normal(6, 60)[1:, 3:50],
        "transposed": lambda: normal(47, 5).T,
        "every second": lambda: normal(10, 94)[::2, ::2],
        "expanded": lambda: normal(1, 47).expand(5, 47),
    }[layout]()
    assert not logits.is_contiguous()
    ids = random_ids(10, 47)[::2]
    grads = normal(5, 2, seed=2)[:, 0], torch.ones((), device=DEVICE, dtype=logits.dtype).expand(5)
    actual = both_ways(logits, ids, 0.7, grads)
    wanted = both_ways(logits.contiguous(), ids, 0.7, grads)
    assert all(map(torch.equal, actual, wanted))
    assert_same(actual, expected(logits, ids, 0.7, grads), logits.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_may_overwrite_the_logits(block: int, dtype: torch.dtype) -> None:
    everything = normal(5, 60, dtype=dtype)
    before, logits = everything.clone(), everything[:, 10:47]
    ids, grads = random_ids(5, 37), normal(2, 5, seed=2)
    *values, grad = both_ways(logits, ids, 0.7, (grads[0], grads[1]))
    wide = grads.to(values[0].dtype)
    kernels.backward(logits, ids, values[2], values[1], wide[0], wide[1], 0.7, logits)
    assert torch.equal(logits, grad)
    outside = [*range(10), *range(47, 60)]
    assert torch.equal(everything[:, outside], before[:, outside])


@pytest.mark.parametrize("shape", [(0, 40), (0, 1)])
def test_no_token_at_all(shape: tuple[int, int]) -> None:
    logits, ids = normal(*shape).requires_grad_(), random_ids(*shape)
    logprobs, entropy = gather_logprobs(logits, ids, backend="triton")
    assert logprobs.shape == entropy.shape == (0,)
    (grad,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)
    assert grad.shape == shape


def test_offsets_past_two_to_the_31() -> None:
    stride, vocabulary = 2**30 + 128, 50
    try:
        memory = torch.empty(2 * stride + vocabulary, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space are not to be had: {error}")
    logits = memory.as_strided((3, vocabulary), (stride, 1))
    logits.copy_(normal(3, vocabulary))
    ids, grads = random_ids(3, vocabulary), normal(2, 3, seed=2)
    near = logits.contiguous()
    wanted = both_ways(near, ids, 0.7, (grads[0], grads[1]))
    values = kernels.forward(logits, ids, 0.7)
    assert all(map(torch.equal, values, wanted[:3]))
    wide = grads.float()
    kernels.backward(logits, ids, values[2], values[1], wide[0], wide[1], 0.7, logits)
    assert torch.equal(logits.contiguous(), wanted[3])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_same_as_liger(temperature: float) -> None:
    liger = pytest.importorskip("liger_kernel.ops.grpo_loss")
    logits = 5 * normal(2, 6, 3000, dtype=torch.float32)  # the last position predicts nothing
    ids = random_ids(10, 3000).view(2, 5)
    wanted = liger.fused_selective_log_softmax(logits, ids, temperature)
    for backend in ("triton", "reference"):
        flat = logits[:, :-1].reshape(10, 3000)
        logprobs, _ = gather_logprobs(flat, ids.flatten(), temperature, backend=backend)
        torch.testing.assert_close(logprobs, wanted.flatten(), rtol=0, atol=1e-5)


def test_the_same_as_trl() -> None:
    trl = pytest.importorskip("trl.trainer.utils")
    logits, ids = (5 * normal(10, 3000, dtype=torch.float32)).requires_grad_(), random_ids(10, 3000)

    def gradient(values: tuple[Tensor, Tensor]) -> Tensor:
        total = (values[0] * normal(10, seed=2)).sum() + (values[1] * normal(10, seed=3)).sum()
        return torch.autograd.grad(total, logits, retain_graph=True)[0]

    wanted = trl.selective_log_softmax(logits, ids), trl.entropy_from_logits(logits)
    for backend in ("triton", "reference"):
        actual = gather_logprobs(logits, ids, backend=backend)
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(gradient(actual), gradient(wanted), rtol=0, atol=1e-5)


def test_gradcheck_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 8)
    logits, ids = normal(3, 20).requires_grad_(), random_ids(3, 20)
    assert torch.autograd.gradcheck(
        lambda x: gather_logprobs(x, ids, 0.8, backend="triton"), (logits,)
    )


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_opcheck(backend: str) -> None:
    logits, ids = normal(4, 37, dtype=torch.float32), random_ids(4, 37)
    operators = torch.ops.fastomni
    for flags in itertools.product((False, True), repeat=2):  # with_entropy, inplace_backward
        arguments = (logits.clone().requires_grad_(), ids, 0.8, *flags, backend)
        opcheck(operators.gather_logprobs.default, arguments)
    _, entropy, normaliser = operators.gather_logprobs(logits, ids, 0.8, True, False, backend)
    first, second = normal(2, 4, seed=2, dtype=torch.float32)
    for grads in ((first, second), (first, None), (None, second)):
        arguments = (logits, ids, normaliser, entropy, *grads, 0.8, backend)
        opcheck(operators.gather_logprobs_backward.default, arguments)
        opcheck(operators.gather_logprobs_backward_.default, arguments)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_torch_compile_gives_the_same(backend: str, with_entropy: bool, inplace: bool) -> None:
    logits, ids = normal(4, 37, dtype=torch.float32).requires_grad_(), random_ids(4, 37)

    def total(x: Tensor) -> Tensor:
        logprobs, entropy = gather_logprobs(2 * x, ids, 0.8, with_entropy, inplace, backend)
        return (logprobs + entropy.square()).sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), total(logits))
    (actual,) = torch.autograd.grad(compiled(logits), logits)
    (wanted,) = torch.autograd.grad(total(logits), logits)
    assert torch.equal(actual, wanted)
