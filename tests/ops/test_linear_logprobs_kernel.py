"""The fused head's kernels against log_softmax in float64, and the operator that runs them.

In the interpreter, tiles are 16 rows by 64 tokens by 32 of the hidden size and a split is 128
tokens: the sizes below have tails of each.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

pytest.importorskip("triton")

from fastomni_kernels import linear_logprobs
from fastomni_kernels.triton_kernels import linear_logprobs as kernels
from fastomni_kernels.triton_kernels import linear_logprobs_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SIZES = [(1, 7, 16), (5, 130, 24), (33, 257, 40), (5, 1000, 64), (17, 128, 96)]
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALVES)
# Values are sums of exact products, in fp32 but for fp64.
VALUES = {torch.float64: 1e-11, **dict.fromkeys((torch.float32, *HALVES), 3e-5)}
# Of the largest number of a gradient. Half-precision ones are rounded at the end, bf16 ones as
# gradients of logits too, which the interpreter truncates.
GRADIENTS = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 2e-2,
}

Three = tuple[Tensor, Tensor, Tensor]
Two = tuple[Tensor, Tensor]
Grads = tuple[Tensor | None, Tensor | None]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def random_inputs(rows: int, vocabulary: int, size: int, dtype: torch.dtype) -> Three:
    """Hidden states, weights and ids; logits of a standard deviation of 3."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(vocabulary, (rows,), generator=generator).to(DEVICE)
    hidden = normal(rows, size, dtype=dtype) * 3 / size**0.5
    return hidden, normal(vocabulary, size, seed=1, dtype=dtype), ids


def definition(logits: Tensor, ids: Tensor) -> Three:
    """Log-probs, entropy and normaliser of float64 logits."""
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(1, ids[:, None])[:, 0], entropy, logits.logsumexp(-1)


def expected(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, grads: Grads
) -> tuple[Three, Two]:
    """Values, and gradients of hidden and weight for gradients of log-probs and entropy."""
    left = hidden.detach().double().clone().requires_grad_()
    right = weight.detach().double().clone().requires_grad_()
    values = definition(left @ right.T / temperature, ids)
    terms = [(x * g).sum() for x, g in zip(values, grads, strict=False) if g is not None]
    grad_hidden, grad_weight = torch.autograd.grad(torch.stack(terms).sum(), (left, right))
    logprobs, entropy, normaliser = (x.detach() for x in values)
    return (logprobs, entropy, normaliser), (grad_hidden, grad_weight)


def both_ways(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, grads: Grads
) -> tuple[Three, Two]:
    """The same from the kernels."""
    values = kernels.forward(hidden, weight, ids, temperature, True)
    logprobs, entropy, normaliser = values
    for_logprobs, for_entropy = (None if g is None else g.to(logprobs) for g in grads)
    saved = (hidden, weight, ids, normaliser, entropy, for_logprobs, for_entropy)
    grad_hidden, grad_weight = kernels.backward(*saved, temperature, True, True)
    assert grad_hidden is not None and grad_weight is not None
    return values, (grad_hidden, grad_weight)


def compare(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    grads: Grads | None = None,
) -> None:
    """Values and gradients of the kernels and of the definition, on the same rounded inputs."""
    if grads is None:
        grads = (normal(len(ids), seed=2), normal(len(ids), seed=3))
    values, gradients = both_ways(hidden, weight, ids, temperature, grads)
    right_values, right_gradients = expected(hidden, weight, ids, temperature, grads)
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    for value, right in zip(values, right_values, strict=True):
        assert value.dtype == torch.promote_types(operand, torch.float32)
        torch.testing.assert_close(value.double(), right, rtol=0, atol=VALUES[operand])
    for gradient, right, x in zip(gradients, right_gradients, (hidden, weight), strict=True):
        assert gradient.dtype == x.dtype and gradient.is_contiguous()
        atol = max(GRADIENTS[x.dtype], GRADIENTS[operand]) * float(right.abs().max())
        torch.testing.assert_close(gradient.double(), right, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    compare(*random_inputs(*size, dtype))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("used", ["logprobs", "entropy"])
def test_each_gradient_and_temperature(used: str, temperature: float) -> None:
    grad = normal(5, seed=2)
    grads: Grads = (grad, None) if used == "logprobs" else (None, grad)
    compare(*random_inputs(5, 130, 24, torch.float64), temperature, grads)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_operands_of_two_types_are_promoted(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    hidden, weight, ids = random_inputs(5, 130, 24, torch.float64)
    compare(hidden.to(dtypes[0]), weight.to(dtypes[1]), ids)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 40),
    vocabulary=st.integers(1, 300),
    size=st.integers(1, 70),
    temperature=st.floats(0.25, 4),
    seed=st.integers(0, 100),
)
def test_any_sizes(rows: int, vocabulary: int, size: int, temperature: float, seed: int) -> None:
    ids = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))
    hidden, weight = normal(rows, size, seed=seed), normal(vocabulary, size, seed=seed + 1)
    compare(hidden, weight, ids.to(DEVICE), temperature)


def test_a_tail_of_the_vocabulary_adds_no_phantom_tokens() -> None:
    """Logits of -1e4, beside which a phantom's 0 would be everything; what follows is not read."""
    whole = torch.full((256, 16), float("nan"), device=DEVICE)
    # Whole numbers: logits and differences are exact.
    whole[:130] = torch.randint(-3, 4, (130, 16), generator=torch.Generator().manual_seed(0))
    hidden = torch.ones(5, 16, device=DEVICE)
    hidden[:, 0], whole[:130, 0] = 100, -100
    weight, ids = whole[:130], torch.arange(125, 130, device=DEVICE)
    logprobs, entropy, normaliser = kernels.forward(hidden, weight, ids, 1.0, True)
    right = definition(hidden.double() @ weight.double().T, ids)
    torch.testing.assert_close(logprobs.double(), right[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), right[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(normaliser.double(), right[2], rtol=2e-7, atol=0)
    grads = (normal(5, seed=2), normal(5, seed=3))
    found = both_ways(hidden, weight, ids, 1.0, grads)[1]
    for gradient, exact in zip(found, expected(hidden, weight, ids, 1.0, grads)[1], strict=True):
        # A normaliser of 1e4 is rounded to 5e-4, and probabilities with it.
        found_small, small = gradient.double()[:, 1:], exact[:, 1:]
        torch.testing.assert_close(found_small, small, rtol=0, atol=5e-4 * float(small.abs().max()))


@pytest.mark.parametrize("place", [0, 63, 129])
def test_one_huge_logit_takes_everything(place: int) -> None:
    hidden = torch.ones(3, 16, device=DEVICE)
    weight = torch.zeros(130, 16, device=DEVICE)
    weight[place] = 1000
    ids = torch.tensor([place, 5, 128], device=DEVICE)
    values, gradients = both_ways(hidden, weight, ids, 1.0, (torch.ones(3), torch.ones(3)))
    assert values[0].tolist() == [0, -16_000, -16_000]
    assert values[1].tolist() == [0, 0, 0]
    assert values[2].tolist() == [16_000] * 3
    grad_weight = torch.zeros(130)
    grad_weight[[5, 128]] += 1
    grad_weight[place] -= 2
    assert gradients[1].cpu().equal(grad_weight[:, None].expand(130, 16))


def test_rare_tokens_keep_their_gradient_in_fp16() -> None:
    """A probability of 1e-5 times a gradient of 1e-4 is below what fp16 holds."""
    hidden, weight, ids = random_inputs(5, 130, 24, torch.float16)
    grads = normal(5, seed=2) * 1e-4, None
    weight[0], hidden[:, 0] = 0, 11
    weight[0, 0] = 1
    found = both_ways(hidden, weight, ids * 0, 1.0, grads)[1]
    right = expected(hidden, weight, ids * 0, 1.0, grads)[1]
    assert right[1][1:].abs().max() > 6e-8  # else the gradient itself cannot be held
    torch.testing.assert_close(found[1].double(), right[1], rtol=2e-3, atol=6e-8)


def test_strides_do_not_matter() -> None:
    hidden, weight, ids = random_inputs(9, 70, 24, torch.float32)
    grads = torch.ones(9, device=DEVICE), torch.full((9,), 0.5, device=DEVICE)
    right = both_ways(hidden, weight, ids, 1.0, grads)
    wide = torch.full((9, 50), float("nan"), device=DEVICE)
    wide[:, 7:31] = hidden
    doubled = torch.stack([ids, ids * 0 - 7], 1)
    expanded = (torch.ones((), device=DEVICE).expand(9), torch.tensor(0.5, device=DEVICE).expand(9))
    for left, head in (
        (wide[:, 7:31], weight),
        (hidden.T.contiguous().T, weight.T.contiguous().T),
    ):
        found = both_ways(left, head, doubled[:, 0], 1.0, expanded)
        assert all(
            a.equal(b) for a, b in zip(found[0] + found[1], right[0] + right[1], strict=True)
        )
        assert all(x.is_contiguous() for x in found[1])


def test_addresses_past_31_bits() -> None:
    """Rows of hidden states and weights that lie 2**31 numbers apart; hardly a page is touched."""
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    small = random_inputs(3, 129, 16, torch.float16)
    hidden = memory.as_strided((3, 16), (2**30, 1), 16)
    weight = memory.as_strided((129, 16), (2**24, 1), 32)
    hidden.copy_(small[0])
    weight.copy_(small[1])
    grads = (torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE))
    found = both_ways(hidden, weight, small[2], 1.0, grads)
    right = both_ways(*small, 1.0, grads)
    assert all(a.equal(b) for a, b in zip(found[0] + found[1], right[0] + right[1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    hidden, weight, ids = random_inputs(37, 300, 40, dtype)
    together = torch.stack(kernels.forward(hidden, weight, ids, 0.9, True))
    for rows in ([0], [36], [35, 1, 20], list(range(36, -1, -1))):
        alone = torch.stack(kernels.forward(hidden[rows], weight, ids[rows], 0.9, True))
        assert alone.equal(together[:, rows]), rows


def test_runs_repeat_bit_for_bit() -> None:
    hidden, weight, ids = random_inputs(33, 257, 40, torch.float32)
    grads = (normal(33, seed=2), normal(33, seed=3))
    first, second = (both_ways(hidden, weight, ids, 0.9, grads) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True))


def test_without_entropy_the_rest_is_the_same() -> None:
    inputs = random_inputs(5, 300, 24, torch.float32)
    logprobs, entropy, normaliser = kernels.forward(*inputs, 0.9, True)
    without = kernels.forward(*inputs, 0.9, False)
    assert without[0].equal(logprobs) and without[2].equal(normaliser)
    assert entropy.abs().min() > 0 and without[1].equal(torch.zeros_like(entropy))


def test_no_rows() -> None:
    hidden, weight, ids = random_inputs(0, 7, 16, torch.bfloat16)
    values, gradients = both_ways(hidden, weight, ids, 1.0, (torch.ones(0), None))
    assert [list(x.shape) for x in values + gradients] == [[0], [0], [0], [0, 16], [7, 16]]
    assert values[0].dtype == torch.float32 and gradients[1].dtype == torch.bfloat16
    assert not gradients[1].any()


def test_ids_outside_the_vocabulary_give_nan() -> None:
    hidden, weight, _ = random_inputs(4, 130, 16, torch.float32)
    ids = torch.tensor([3, -100, 130, 2**40], device=DEVICE)
    logprobs, entropy, normaliser = kernels.forward(hidden, weight, ids, 1.0, True)
    assert logprobs.isnan().tolist() == [False, True, True, True]
    assert entropy.isfinite().all() and normaliser.isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_is_not_hidden() -> None:
    hidden, weight, ids = random_inputs(3, 130, 16, torch.float32)
    weight[70, 3] = float("nan")
    hidden[1, 5] = float("nan")
    for value in kernels.forward(hidden, weight, ids, 1.0, True):
        assert value.isnan().all()


def test_all_memory_is_written(poisoned_memory: None) -> None:
    hidden, weight, ids = random_inputs(5, 130, 24, torch.float32)
    values, gradients = both_ways(hidden, weight, ids, 1.0, (normal(5, seed=2), normal(5, seed=3)))
    assert all(x.isfinite().all() for x in values + gradients)
    compare(hidden, weight, ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slabs_add_up(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    monkeypatch.setattr(linear_logprobs_backward, "SLAB_BYTES", 1)
    assert linear_logprobs_backward.slab_columns(5, 2) == 256
    compare(*random_inputs(5, 600, 24, dtype))  # 256 + 256 + 88


def test_gradcheck() -> None:
    hidden, weight, ids = random_inputs(4, 70, 5, torch.float64)
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    for with_entropy in (True, False):
        assert torch.autograd.gradcheck(
            lambda h, w, e=with_entropy: linear_logprobs(
                h, w, ids, 0.8, with_entropy=e, backend="triton"
            )[: 1 + e],
            inputs,
            fast_mode=True,
        )


def test_opcheck() -> None:
    hidden, weight, ids = random_inputs(3, 70, 5, torch.float32)
    values = kernels.forward(hidden, weight, ids, 0.9, True)
    inputs = (hidden.requires_grad_(), weight.requires_grad_(), ids)
    operator = torch.ops.fastomni.linear_logprobs.default
    opcheck(operator, (*inputs, 0.9, True, 2**20, "triton"))
    backward = torch.ops.fastomni.linear_logprobs_backward.default
    given = (
        hidden.detach(),
        weight.detach(),
        ids,
        values[2],
        values[1],
        torch.ones_like(values[0]),
    )
    for needed in ((True, True), (True, False)):
        opcheck(backward, (*given, None, 0.9, *needed, 2**20, "triton"))


def test_compiles_into_one_graph() -> None:
    hidden, weight, ids = random_inputs(5, 70, 12, torch.float32)

    def loss(left: Tensor, right: Tensor) -> Tensor:
        logprobs, entropy = linear_logprobs(left, right, ids, 0.9, backend="triton")
        return (logprobs * 2 + entropy).sum()

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
        value = run(*inputs)
        results.append((value.detach(), *torch.autograd.grad(value, inputs)))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
