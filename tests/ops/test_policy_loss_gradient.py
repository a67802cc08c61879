"""The policy loss's gradient: the closed form against finite differences, and whom it reaches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastomni_kernels import GroupLayout, LossOptions, grpo_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICIES = ("clip", "cispo", "sapo")
RATIOS = ("token", "sequence")
ESTIMATORS = ("k1", "k2", "k3")
MISMATCHES = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
REDUCTIONS = ("grpo", "bnpo", "dapo", "dr_grpo")


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def random_tensors(tokens: int) -> dict[str, Tensor]:
    """Log-probs and entropies."""
    names = ("logprobs", "reference_logprobs", "old_logprobs", "rollout_logprobs")
    tensors = {name: 0.4 * normal(tokens, seed=i) - 2 for i, name in enumerate(names)}
    return tensors | {"entropy": normal(tokens, seed=4).abs()}


# Log-ratios of each token to the old policy, and of the old policy to the rollout: inside and
# outside of each bound below, on both signs of the advantage, and at none of them.
LOG_RATIOS = [-0.5, 0.1, 0.35, 0.7, -0.45, -0.05]
DRIFTS = [0.3, -0.8, 0.05, 0.6, -0.1, 0.45]
ADVANTAGES = [1.5, -0.7, -1.25]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_closed_form_is_the_derivative(policy: str, ratio: str) -> None:
    """Gradcheck of every combination.

    A ratio that is a constant must stay one while a log-prob is shifted by the check: the old
    log-probs are shifted with it under "cispo", the rollout's always with the old ones.
    """
    layout = GroupLayout.build([1], [[2, 0, 4]], DEVICE)
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64, device=DEVICE)
    log_ratios, drifts = (
        torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (LOG_RATIOS, DRIFTS)
    )
    start = normal(6) - 2
    reference = start + 0.3 * normal(6, seed=2)

    for kl, mismatch, reduction in itertools.product(ESTIMATORS, MISMATCHES, REDUCTIONS):
        options = LossOptions(
            policy=policy,
            ratio=ratio,
            kl=kl,
            mismatch=mismatch,
            reduction=reduction,
            beta=0.3,
            max_completion=5,
            **{"clip": {"dual_clip": 1.9}, "cispo": {"cispo_max": 1.25}}.get(policy, {}),
            **({} if mismatch == "none" else {"mismatch_min": 0.7, "mismatch_max": 1.4}),
        )

        def loss(logprobs: Tensor, options: LossOptions = options) -> Tensor:
            base = logprobs.detach() if options.policy == "cispo" else start
            old = base - log_ratios
            return grpo_loss(
                logprobs,
                advantages,
                layout,
                options,
                reference_logprobs=reference,
                old_logprobs=old,
                rollout_logprobs=old - drifts,
            )[0]

        assert torch.autograd.gradcheck(loss, start.clone().requires_grad_()), options


def test_the_check_of_derivatives_crosses_every_bound() -> None:
    """A token on each side of each bound, none near it; sequences' ratios too."""
    by_sequence = [(-0.5 + 0.1) / 2, (0.35 + 0.7 - 0.45 - 0.05) / 4]
    mismatch_by_sequence = [0.3 - 0.8, 0.05 + 0.6 - 0.1 + 0.45]
    for values, bounds in (
        ([*LOG_RATIOS, *by_sequence], (0.8, 1.2, 1.25, 1.9)),
        ([*DRIFTS, *mismatch_by_sequence], (0.7, 1.4)),
    ):
        for bound in bounds:
            sides = [math.exp(x) - bound for x in values]
            assert min(sides) < 0 < max(sides)
            assert min(map(abs, sides)) > 1e-3


def test_entropy_gets_its_share_of_the_gradient() -> None:
    layout = GroupLayout.build([1], [[2, 1]], DEVICE)
    given = random_tensors(3)
    entropy = given["entropy"].requires_grad_()
    logprobs = given["logprobs"].requires_grad_()
    advantages = normal(2)
    options = LossOptions(entropy_coef=0.5)
    loss, metrics = grpo_loss(logprobs, advantages, layout, options, entropy=entropy, num_tokens=5)
    (grad,) = torch.autograd.grad(3 * loss, entropy)
    torch.testing.assert_close(grad, torch.full_like(grad, -3 * 0.5 / 5))
    torch.testing.assert_close(metrics["entropy"], entropy.detach().sum() / 5)
    torch.testing.assert_close(loss.detach(), metrics["policy_loss"] - 0.5 * metrics["entropy"])
    unused, _ = grpo_loss(logprobs, advantages, layout, LossOptions(), entropy=entropy)
    assert torch.autograd.grad(unused, entropy, allow_unused=True) == (None,)


def test_everything_else_is_a_constant() -> None:
    layout = GroupLayout.build([1], [[2, 1]], DEVICE)
    given = {name: x.requires_grad_() for name, x in random_tensors(3).items()}
    advantages = normal(2).requires_grad_()
    options = LossOptions(beta=0.04, mismatch="token_truncate")
    logprobs = given.pop("logprobs")
    loss, metrics = grpo_loss(logprobs, advantages, layout, options, **given)
    constants = [advantages, *given.values()]
    assert torch.autograd.grad(loss, constants, allow_unused=True) == (None,) * 5
    assert not any(x.requires_grad for x in metrics.values())
    loss, _ = grpo_loss(logprobs.detach(), advantages, layout, options, **given)
    assert not loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_inputs_are_computed_in_fp32(dtype: torch.dtype) -> None:
    layout = GroupLayout.build([1], [[2, 1]], DEVICE)
    logprobs = random_tensors(3)["logprobs"].to(dtype).requires_grad_()
    advantages = normal(2).to(dtype)
    loss, metrics = grpo_loss(logprobs, advantages, layout)
    wide, _ = grpo_loss(logprobs.double(), advantages.double(), layout)
    assert loss.dtype == metrics["ratio/mean"].dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), wide.detach())
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.dtype == dtype
