"""The policy loss: its values by hand, micro-batches and metrics, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastomni_kernels import GroupLayout, LossOptions, grpo_loss, kl_penalty
from fastomni_kernels.policy_loss import METRICS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RATIOS = ("token", "sequence")
MISMATCHES = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
REDUCTIONS = ("grpo", "bnpo", "dapo", "dr_grpo")

Groups = list[tuple[int, list[int]]]
groups_strategy = st.lists(
    st.tuples(st.integers(1, 3), st.lists(st.integers(0, 5), min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def layout_of(groups: Groups) -> GroupLayout:
    return GroupLayout.build([p for p, _ in groups], [c for _, c in groups], DEVICE)


def random_tensors(tokens: int) -> dict[str, Tensor]:
    """Log-probs that drift apart as far as every clipping notices, and entropies."""
    logprobs = 0.4 * normal(tokens) - 2
    old = logprobs + 0.3 * normal(tokens, seed=1)
    return {
        "logprobs": logprobs,
        "old_logprobs": old,
        "reference_logprobs": logprobs + 0.3 * normal(tokens, seed=2),
        "rollout_logprobs": old + 0.3 * normal(tokens, seed=3),
        "entropy": normal(tokens, seed=4).abs(),
    }


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


@given(groups_strategy)
@settings(max_examples=40, deadline=None)
def test_on_policy_the_loss_is_the_mean_of_row_means(groups: Groups) -> None:
    """R1-Omni's trainer makes one update per rollout, so nothing is clipped."""
    layout = layout_of(groups)
    count = layout.num_completion_tokens
    policy, other = (normal(count) - 2).requires_grad_(), normal(count, seed=1) - 2
    advantages = normal(layout.num_sequences, seed=2)
    options = LossOptions(beta=0.04)
    loss, metrics = grpo_loss(policy, advantages, layout, options, reference_logprobs=other)
    expected, kl = padded_grpo_loss(layout, policy, advantages, other, policy.detach(), 0.04)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(metrics["kl"], kl.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        metrics["policy_loss"], (expected - 0.04 * kl).detach(), rtol=0, atol=1e-12
    )
    if count:
        grads = [torch.autograd.grad(x, policy)[0] for x in (loss, expected)]
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)


@given(
    groups_strategy,
    st.integers(1, 12),
    st.sampled_from(REDUCTIONS),
    st.sampled_from(RATIOS),
    st.sampled_from(MISMATCHES),
)
@settings(max_examples=60, deadline=None)
def test_micro_batches_add_up(
    groups: Groups, budget: int, reduction: str, ratio: str, mismatch: str
) -> None:
    """Every loss and metric of micro-batches adds up (extremes: min, max) to the whole batch's.

    "bnpo" divides by the micro-batch's own tokens: it adds up where shares of tokens and of
    completions are the same, as in a batch of equal groups.
    """
    if reduction == "bnpo":
        groups = [groups[0]] * len(groups)
        budget = 1
    layout = layout_of(groups)
    tensors = random_tensors(layout.num_completion_tokens)
    policy = tensors["logprobs"].requires_grad_()
    advantages = normal(layout.num_sequences, seed=5)
    options = LossOptions(
        reduction=reduction,
        ratio=ratio,
        mismatch=mismatch,
        beta=0.04,
        entropy_coef=0.01,
        max_completion=7,
    )

    def loss_of(start: int, stop: int, part: GroupLayout) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = slice(layout.token_offsets[start], layout.token_offsets[stop])
        sequences = slice(layout.sequence_offsets[start], layout.sequence_offsets[stop])
        logprobs, *_ = cut = [x[tokens] for x in tensors.values()]
        return grpo_loss(
            logprobs,
            advantages[sequences],
            part,
            options,
            **dict(zip(list(tensors)[1:], cut[1:], strict=True)),
            num_sequences=layout.num_sequences,
            num_tokens=max(layout.num_completion_tokens, 1),
        )

    whole, whole_metrics = loss_of(0, layout.num_prompts, layout)
    parts = [
        loss_of(start, stop, layout.select_prompts(start, stop))
        for start, stop in layout.split(budget)
        if layout.token_offsets[start] < layout.token_offsets[stop]
    ]
    if not parts:
        assert whole.item() == 0
        return
    total = torch.stack([loss for loss, _ in parts]).sum()
    torch.testing.assert_close(total, whole, rtol=0, atol=1e-12)
    for name in METRICS:
        column = torch.stack([metrics[name] for _, metrics in parts])
        extreme = column.amin() if name.endswith("/min") else column.amax()
        combined = extreme if name.endswith(("/min", "/max")) else column.sum()
        torch.testing.assert_close(combined, whole_metrics[name], rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(x, policy)[0] for x in (total, whole)]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)


def test_metrics_of_a_worked_example() -> None:
    """Two completions of two tokens; ratios 0.5, 1, 2 and 1.5 and mismatches 2, 1, 1 and 0.5."""
    layout = GroupLayout.build([1], [[2, 2]], DEVICE)
    log = [math.log(x) for x in (0.5, 1.0, 2.0, 1.5)]
    drift = [math.log(x) for x in (2.0, 1.0, 1.0, 0.5)]
    logprobs = torch.tensor(log, dtype=torch.float64, device=DEVICE)
    old = torch.zeros_like(logprobs)
    rollout = old - torch.tensor(drift, dtype=torch.float64, device=DEVICE)
    rollout[1] = math.nan
    advantages = torch.tensor([-1.0, 1.0], dtype=torch.float64, device=DEVICE)
    given = {"old_logprobs": old, "rollout_logprobs": rollout, "reference_logprobs": old}
    options = LossOptions(clip_low=0.25, clip_high=0.25, mismatch="token_mask", mismatch_max=1.5)
    loss, metrics = grpo_loss(
        logprobs, advantages, layout, options, **given, entropy=torch.ones_like(old)
    )
    # Token losses max(r A, clip(r) A): 0.75 (masked), 1, -1.25, -1.25 (half weight).
    assert loss.item() == pytest.approx((0 + 1 - 1.25 - 0.625) / 4)
    k3 = [1 / r - 1 + math.log(r) for r in (0.5, 1.0, 2.0, 1.5)]
    rollout_kl = [m - 1 - math.log(m) for m in (2.0, 1.0, 1.0, 0.5)]
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(
        {
            "policy_loss": loss.item(),
            "kl": sum(k3) / 4,
            "entropy": 1.0,
            "clip_ratio/low_mean": 0.25,
            "clip_ratio/high_mean": 0.5,
            "clip_ratio/region_mean": 0.75,
            "ratio/mean": 5 / 4,
            "ratio/min": 0.5,
            "ratio/max": 2.0,
            "sampling/sampling_logp_difference/mean": 2 * math.log(2) / 4,
            "sampling/sampling_logp_difference/max": math.log(2),
            "sampling/importance_sampling_ratio/mean": 4.5 / 4,
            "sampling/importance_sampling_ratio/min": 0.5,
            "sampling/importance_sampling_ratio/max": 2.0,
            "rollout_kl": sum(rollout_kl) / 4,
        }
    )
    bare, metrics = grpo_loss(logprobs, advantages, layout)
    assert bare.item() == pytest.approx(0)  # on policy: ratios of 1
    assert set(metrics) == {name for name in METRICS if name.startswith(("p", "clip", "ratio"))}
    capped, metrics = grpo_loss(
        logprobs, advantages, layout, LossOptions(policy="cispo", cispo_max=1.75), old_logprobs=old
    )
    expected = [0.5 * log[0], 0, -1.75 * log[2], -1.5 * log[3]]
    assert capped.item() == pytest.approx(sum(expected) / 4)
    assert metrics["clip_ratio/high_mean"].item() == 0.25


def test_reductions_of_a_worked_example() -> None:
    layout = GroupLayout.build([1], [[3, 1, 0]], DEVICE)
    advantages = torch.tensor([1.0, -2.0, 5.0], device=DEVICE)
    for reduction, expected in (
        ("grpo", (-1 + 2 + 0) / 3),
        ("dapo", (-3 + 2) / 4),
        ("bnpo", (-3 + 2) / 4),
        ("dr_grpo", (-3 + 2) / (3 * 10)),
    ):
        options = LossOptions(reduction=reduction, max_completion=10)
        loss, _ = grpo_loss(torch.zeros(4, device=DEVICE), advantages, layout, options)
        assert loss.item() == pytest.approx(expected), reduction
    loss, _ = grpo_loss(
        torch.zeros(4, device=DEVICE), advantages, layout, LossOptions(reduction="bnpo"),
        num_sequences=12,
    )  # fmt: skip
    assert loss.item() == pytest.approx((-3 + 2) / 4 * 3 / 12)


def test_what_does_not_fit_is_refused() -> None:
    layout = GroupLayout.build([1], [[2, 1]], DEVICE)
    policy, advantages = torch.zeros(3, device=DEVICE), torch.ones(2, device=DEVICE)

    def refused(message: str, *changed: Any, **given: Any) -> None:
        with pytest.raises(ValueError, match=f"^grpo_loss: {message}"):
            grpo_loss(*(changed or (policy, advantages, layout)), **given)

    refused(r"beta=0\.04 needs reference_logprobs", options=LossOptions(beta=0.04))
    refused(r"entropy_coef=0\.1 needs entropy", options=LossOptions(entropy_coef=0.1))
    refused(
        "mismatch='token_mask' needs rollout_logprobs", options=LossOptions(mismatch="token_mask")
    )
    refused("num_sequences=1 but this micro-batch alone has 2", num_sequences=1)
    refused("num_tokens=2 but this micro-batch alone has 3", num_tokens=2)
    refused(r"advantages has shape \[3\]; it must be \[2\]", policy, policy, layout)
    flat = r"advantages has shape \[1, 2\]; it must be \[2\], .* pass advantages\.flatten\(\)"
    refused(flat, policy, advantages[None], layout)
    refused(r"advantages has shape \[1, 3\]; it must be \[2\]$", policy, policy[None], layout)
    refused("advantages is of type list; it must be a Tensor", policy, [1.0, 1.0], layout)
    refused("layout is of type list; it must be a GroupLayout", policy, advantages, [2, 1])
    refused("options is of type dict; it must be a LossOptions", options={"beta": 0.04})
    refused("old_logprobs is of type list; it must be a Tensor", old_logprobs=[0.0] * 3)
    refused(r"logprobs has shape \[4\]; it must be \[3\]", policy.new_zeros(4), advantages, layout)
    refused("logprobs is torch.int64", policy.long(), advantages, layout)
    for name in ("reference_logprobs", "old_logprobs", "rollout_logprobs", "entropy"):
        refused(rf"{name} has shape \[2\]; it must be \[3\]", **{name: advantages})
        refused(f"{name} is torch.bool", **{name: policy.bool()})
        refused(f".*{name} lie on", **{name: policy.to("meta")})
    elsewhere = GroupLayout.build([1], [[2, 1]], "meta")
    refused("the layout lies on meta, logprobs on", policy, advantages, elsewhere)
    refused("backend 'cuda' is unknown", backend="cuda")
