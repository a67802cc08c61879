"""The fused head where tokens are masked by their weights, and at the ends of the temperatures.

Rows of -inf, or of the lowest number there is, give the padding of a vocabulary logits of -inf. In
the interpreter a tile has 64 tokens and a split 128.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastomni_kernels import linear_logprobs
from fastomni_kernels.dispatch import triton_installed

# Triton's interpreter computes with numpy, which warns of what infinities do.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference"] + ["triton"] * triton_installed()
ROWS, SIZE, V = 5, 24, 290
MASKS = {
    "padding": range(270, V),
    "every other": range(0, V, 2),
    "first tile": range(64),
    "first split": range(128),
    "last splits": range(128, V),
    "all but one": range(V - 1),
}


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Positive hidden states, and weights; logits of a standard deviation of about 3."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(ROWS, SIZE, generator=generator) + 0.1
    return hidden.to(DEVICE, dtype), torch.randn(V, SIZE, generator=generator).to(DEVICE, dtype)


def definition(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float) -> list[Tensor]:
    """Log-probs and entropy in float64, by torch's own log_softmax."""
    log_p = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    return [log_p.gather(1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)]


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("low", [-math.inf, -3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_have_no_mass_and_no_gradient(
    backend: str, dtype: torch.dtype, low: float, masked: str, poisoned_memory: None
) -> None:
    hidden, weight = inputs(dtype)
    kept = [v for v in range(V) if v not in MASKS[masked]]
    small = weight[kept].double().requires_grad_()
    weight[list(MASKS[masked])] = low
    weight.requires_grad_()
    if low > -math.inf:  # a probability of 0 times a weight of -inf has no gradient
        hidden.requires_grad_()
    places = torch.arange(ROWS, device=DEVICE) * 7 % len(kept)
    ids = torch.tensor(kept, device=DEVICE)[places]
    wide = hidden.detach().double().requires_grad_()
    wanted = definition(wide, small, places, 0.9)
    found = linear_logprobs(hidden, weight, ids, 0.9, backend=backend)
    torch.testing.assert_close([x.double() for x in found], wanted, rtol=0, atol=3e-5)

    (2 * found[0] - 3 * found[1]).sum().backward()
    (2 * wanted[0] - 3 * wanted[1]).sum().backward()
    assert weight.grad is not None and small.grad is not None and wide.grad is not None
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-5
    scale = float(small.grad.abs().max())
    torch.testing.assert_close(weight.grad[kept].double(), small.grad, rtol=0, atol=limit * scale)
    assert (weight.grad[list(MASKS[masked])] == 0).all()
    if hidden.requires_grad:
        assert hidden.grad is not None
        scale = float(wide.grad.abs().max())
        torch.testing.assert_close(hidden.grad.double(), wide.grad, rtol=0, atol=limit * scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_token_has_log_prob_minus_infinity(backend: str) -> None:
    hidden, weight = inputs()
    weight[270:] = -math.inf
    ids = torch.full((ROWS,), 280, device=DEVICE)
    assert (linear_logprobs(hidden, weight, ids, backend=backend)[0] == -math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_all_tokens_are_masked_there_is_no_distribution(backend: str) -> None:
    hidden, weight = inputs()
    weight[:] = -math.inf
    values = linear_logprobs(hidden, weight, torch.zeros(ROWS).long().to(DEVICE), backend=backend)
    assert all(x.isnan().all() for x in values)


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ends_of_the_temperatures(backend: str, temperature: float) -> None:
    """The last tile has phantom tokens, which must not count where all logits are alike."""
    hidden, weight = inputs()
    ids = torch.arange(ROWS, device=DEVICE)
    found = linear_logprobs(hidden, weight, ids, temperature, backend=backend)
    wanted = definition(hidden, weight, ids, temperature)
    torch.testing.assert_close([x.double() for x in found], wanted, rtol=2e-6, atol=2e-5)
