"""Advantages, KL and loss against formulas written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastomni_kernels import (
    GroupLayout,
    group_advantages,
    grpo_loss,
    kl_penalty,
)

Groups = list[tuple[int, list[int]]]
groups_strategy = st.lists(
    st.tuples(st.integers(1, 3), st.lists(st.integers(0, 5), min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# What R1-Omni's trainer makes of its own reward values, with ddof 1 and eps 1e-4.


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        (
            [2, 1, 1, 0, 2, 2, 1, 1],
            [1.06051, -0.3535, -0.3535, -1.76752, 1.06051, 1.06051, -0.3535, -0.3535],
        ),
        ([2, 0, 0, 0, 0, 0, 0, 0], [2.47452] + [-0.3535] * 7),
        ([2] * 7 + [1], [0.35345] * 7 + [-2.47417]),
    ],
)
def test_advantages_of_known_groups(rewards: list[float], expected: list[float]) -> None:
    advantages, no_spread = group_advantages(torch.tensor([rewards], dtype=torch.float32))
    torch.testing.assert_close(advantages, torch.tensor([expected]), rtol=0, atol=1e-5)
    assert advantages.dtype == torch.float32
    assert no_spread.tolist() == [False]


def test_groups_without_spread_are_exactly_zero() -> None:
    # The fp32 mean of seven times 0.1 is not 0.1.
    rewards = torch.tensor([[0.1] * 7, [1.0] * 6 + [0.0], [0.0] * 7])
    advantages, no_spread = group_advantages(rewards)
    assert no_spread.tolist() == [True, False, True]
    assert (advantages[[0, 2]] == 0).all()
    assert (advantages[1] != 0).all()


def test_missing_rewards_take_no_part() -> None:
    nan = math.nan
    rewards = torch.tensor([[1.0, nan, 0.0, 1.0], [nan, 1.0, nan, nan], [nan] * 4])
    advantages, no_spread = group_advantages(rewards)
    without, _ = group_advantages(torch.tensor([[1.0, 0.0, 1.0]]))
    assert torch.equal(advantages[0, [0, 2, 3]], without[0])
    assert advantages[0, 1] == 0
    assert (advantages[1:] == 0).all()
    assert no_spread.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (torch.ones(3, 1), "generate 2 or more"),
        (torch.ones(3), r"rewards has shape \[3\]; it must be \[N, G\]"),
        (torch.ones(3, 2, dtype=torch.int64), "must be a float tensor"),
        (torch.tensor([[math.inf, 1.0]]), "infinite"),
    ],
)
def test_rewards_that_cannot_be_compared_are_refused(rewards: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards)


def test_kl_estimators() -> None:
    policy, other = normal(50) - 3, normal(50, seed=1) - 3
    ratio = other.exp() / policy.exp()
    torch.testing.assert_close(kl_penalty(policy, other, "k1"), -ratio.log())
    torch.testing.assert_close(kl_penalty(policy, other, "k2"), ratio.log() ** 2 / 2)
    torch.testing.assert_close(kl_penalty(policy, other), ratio - ratio.log() - 1)
    close = kl_penalty(torch.tensor([-2.0]), torch.tensor([-2.0 + 2**-12]))
    torch.testing.assert_close(close, torch.tensor([2.0**-25]), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="estimator='k4' is unknown"):
        kl_penalty(policy, other, "k4")
    with pytest.raises(ValueError, match=r"reference_logprobs has shape \[1\]; it must be \[50\]"):
        kl_penalty(policy, other[:1])


def padded_grpo_loss(
    layout: GroupLayout, policy: Tensor, advantages: Tensor, other: Tensor, old: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """The released trainer's lines, row by row: mean over a row's tokens, mean over rows."""
    losses, kls = [], []
    token = 0
    for s, length in enumerate(layout.sequence_lengths):
        rows = slice(token, token + length)
        token += length
        if length == 0:
            losses.append(policy.new_zeros(()))
            kls.append(policy.new_zeros(()))
            continue
        log_ratio = other[rows] - policy[rows]
        kl = log_ratio.exp() - log_ratio - 1
        gain = (policy[rows] - old[rows]).exp() * advantages[s] - beta * kl
        losses.append(-gain.sum() / length)
        kls.append(kl.sum() / length)
    return torch.stack(losses).mean(), torch.stack(kls).mean()


@given(groups_strategy, st.booleans())
@settings(max_examples=40, deadline=None)
def test_loss_equals_the_mean_of_row_means(groups: Groups, on_policy: bool) -> None:
    layout = GroupLayout.build([p for p, _ in groups], [c for _, c in groups])
    count = layout.num_completion_tokens
    policy, other = (normal(count) - 2).requires_grad_(), normal(count, seed=1) - 2
    advantages = normal(layout.num_sequences, seed=2)
    old = policy.detach() if on_policy else normal(count, seed=3) - 2
    loss, metrics = grpo_loss(
        policy, advantages, layout, other, 0.04, old_logprobs=None if on_policy else old
    )
    expected, kl = padded_grpo_loss(layout, policy, advantages, other, old, 0.04)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(metrics["kl"], kl.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        metrics["policy_loss"], (expected - 0.04 * kl).detach(), rtol=0, atol=1e-12
    )
    if count:
        grads = [torch.autograd.grad(x, policy)[0] for x in (loss, expected)]
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)


@given(groups_strategy, st.integers(1, 12), st.sampled_from(["grpo", "dapo"]))
@settings(max_examples=40, deadline=None)
def test_micro_batches_add_up(groups: Groups, budget: int, reduction: str) -> None:
    layout = GroupLayout.build([p for p, _ in groups], [c for _, c in groups])
    if not layout.num_completion_tokens:
        return
    policy = (normal(layout.num_completion_tokens) - 2).requires_grad_()
    other = normal(layout.num_completion_tokens, seed=1) - 2
    advantages = normal(layout.num_sequences, seed=2)
    whole, whole_metrics = grpo_loss(policy, advantages, layout, other, 0.04, reduction=reduction)
    loss, kl = torch.zeros(()).double(), torch.zeros(()).double()
    for start, stop in layout.split(budget):
        tokens = slice(layout.token_offsets[start], layout.token_offsets[stop])
        sequences = slice(layout.sequence_offsets[start], layout.sequence_offsets[stop])
        part, metrics = grpo_loss(
            policy[tokens],
            advantages[sequences],
            layout.select_prompts(start, stop),
            other[tokens],
            0.04,
            reduction=reduction,
            num_sequences=layout.num_sequences,
            num_tokens=layout.num_completion_tokens,
        )
        loss, kl = loss + part, kl + metrics["kl"]
    torch.testing.assert_close(loss, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(kl, whole_metrics["kl"], rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(x, policy)[0] for x in (loss, whole)]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)


def test_dapo_is_the_mean_over_tokens() -> None:
    layout = GroupLayout.build([1], [[3, 1]])
    loss, _ = grpo_loss(torch.zeros(4), torch.tensor([1.0, -2.0]), layout, reduction="dapo")
    assert loss.item() == pytest.approx(-(3 * 1.0 + 1 * -2.0) / 4)


def test_without_reference_there_is_no_kl_and_beta_is_refused() -> None:
    layout = GroupLayout.build([1], [[2, 1]])
    policy, advantages = torch.zeros(3, requires_grad=True), torch.tensor([1.0, -1.0])
    loss, metrics = grpo_loss(policy, advantages, layout)
    assert set(metrics) == {"policy_loss"}
    (grad,) = torch.autograd.grad(loss, policy)
    assert grad.tolist() == pytest.approx([-0.25, -0.25, 0.5])
    with pytest.raises(ValueError, match=r"beta=0\.04 asks for a KL penalty"):
        grpo_loss(policy, advantages, layout, beta=0.04)
    with pytest.raises(ValueError, match="reduction='mean' is unknown"):
        grpo_loss(policy, advantages, layout, reduction="mean")
    with pytest.raises(ValueError, match="num_sequences=1 but this micro-batch alone has 2"):
        grpo_loss(policy, advantages, layout, num_sequences=1)
    with pytest.raises(ValueError, match=r"advantages has shape \[3\]; it must be \[2\]"):
        grpo_loss(policy, torch.zeros(3), layout)
