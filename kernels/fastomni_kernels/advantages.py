"""Group advantages: rewards of G completions, compared with one another.

The kernel is one launch without a look at the host, because all there is to compute are some
hundred numbers and whoever waits for them pays a hundred times their cost.

Shapes: N prompts, G completions per prompt, K rewards per completion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastomni_kernels import dispatch, reference
from fastomni_kernels.checks import check_float, check_kind, require
from fastomni_kernels.library import define

SCALES = ("group", "batch", "none")
BASELINES = ("mean", "leave_one_out")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")


class GroupAdvantages(NamedTuple):
    """What `group_advantages` returns.

    Attributes:
        advantages: [N, G] fp32 (fp64 for fp64 rewards).
        no_spread: [N] bool, groups whose rewards are all equal (or fewer than two): exactly 0.
        missing: [N] int32, completions without any reward; their advantage is 0.
    """

    advantages: Tensor
    no_spread: Tensor
    missing: Tensor


def group_advantages(
    rewards: Tensor,
    eps: float = 1e-4,
    scale: str = "group",
    baseline: str = "mean",
    weights: Sequence[float] | None = None,
    aggregation: str = "sum_then_normalize",
    backend: str = "auto",
) -> GroupAdvantages:
    """Centre and scale rewards within their group; no gradient flows through it.

    Where a batch lies on several ranks, "batch" and "normalize_then_sum" mean the rewards given
    here: gather them first for statistics of the whole batch.

    Args:
        rewards: [N, G], or [N, G, K] for several rewards, any float dtype. NaN marks a reward that
            could not be given: it takes no part in any mean, counts as 0 beside others that were,
            and a completion that has none at all gets advantage 0.
        eps: added to standard deviations (ddof=1); 1e-4 is what TRL and R1-Omni use.
        scale: "group" divides by the group's standard deviation (GRPO, arXiv:2402.03300), "batch"
            by that of all N * G rewards (arXiv:2508.08221), "none" not at all (Dr. GRPO,
            arXiv:2503.20783).
        baseline: "mean" of the group, or "leave_one_out", the mean of the others (RLOO,
            arXiv:2402.14740).
        weights: one per reward, 1 each by default.
        aggregation: "sum_then_normalize" adds the weighted rewards up first; "normalize_then_sum"
            normalises each reward within its group, adds up, and normalises over the batch (GDPO,
            arXiv:2601.05242); it takes scale "group" and baseline "mean".
        backend: "auto", "triton" or "reference".

    Raises:
        ValueError: not [N, G] or [N, G, K] floats, fewer than two completions per group, unknown
            or contradicting words, weights that do not match, or infinite rewards on the CPU.
    """
    if not torch.compiler.is_compiling():
        _check(rewards, eps, scale, baseline, weights, aggregation)
    given = None if weights is None else [float(weight) for weight in weights]
    constants = rewards.detach()  # advantages carry no gradient
    return GroupAdvantages(
        *_group_advantages(constants, eps, scale, baseline, given, aggregation, backend)
    )


def _check(
    rewards: Tensor,
    eps: float,
    scale: str,
    baseline: str,
    weights: Sequence[float] | None,
    aggregation: str,
) -> None:
    name = "group_advantages"
    check_kind(name, "rewards", rewards, Tensor)
    shape = list(rewards.shape)
    require(
        rewards.dim() in (2, 3),
        f"{name}: rewards has shape {shape}; it must be [N, G] or [N, G, K]",
    )
    check_float(name, rewards=rewards)
    require(
        shape[1] >= 2,
        f"{name}: {shape[1]} completion per prompt leaves nothing to compare, every "
        "advantage would be 0; generate 2 or more (R1-Omni uses 8)",
    )
    require(
        math.isfinite(eps) and eps >= 0,
        f"{name}: eps={eps}; it must be finite and not negative",
    )
    for word, value, known in (
        ("scale", scale, SCALES),
        ("baseline", baseline, BASELINES),
        ("aggregation", aggregation, AGGREGATIONS),
    ):
        require(value in known, f"{name}: {word}={value!r}; use one of {', '.join(known)}")
    columns = shape[2] if rewards.dim() == 3 else 1
    require(columns >= 1, f"{name}: rewards has shape {shape}; there must be a reward")
    require(
        weights is None or (len(weights) == columns and all(map(math.isfinite, weights))),
        f"{name}: weights={weights} for {columns} rewards; give one finite number for each",
    )
    require(
        aggregation == "sum_then_normalize" or (scale == "group" and baseline == "mean"),
        f"{name}: aggregation='normalize_then_sum' has its own scale and baseline; leave "
        f"scale={scale!r} and baseline={baseline!r} at 'group' and 'mean'",
    )


def _implementation(
    rewards: Tensor,
    eps: float,
    scale: str,
    baseline: str,
    weights: list[float] | None,
    aggregation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if rewards.device.type == "cpu":
        require(
            not bool(rewards.isinf().any()),
            "group_advantages: a reward is infinite; mark a completion without a reward with NaN",
        )
    settings = (eps, scale, baseline, weights, aggregation)
    if dispatch.choose("group_advantages", backend, rewards.device) == "triton":
        from fastomni_kernels.triton_kernels import advantages as kernel

        return kernel.forward(rewards, *settings)
    return reference.group_advantages(rewards, *settings)


def _fake(rewards: Tensor, *settings: object) -> tuple[Tensor, Tensor, Tensor]:
    prompts, generations = rewards.shape[:2]
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return (
        rewards.new_empty((prompts, generations), dtype=dtype),
        rewards.new_empty(prompts, dtype=torch.bool),
        rewards.new_empty(prompts, dtype=torch.int32),
    )


_group_advantages = define(
    "group_advantages(Tensor rewards, float eps, str scale, str baseline, float[]? weights, "
    "str aggregation, str backend) -> (Tensor, Tensor, Tensor)",
    _implementation,
    _fake,
)
