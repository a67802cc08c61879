"""Group advantages in one program: groups in tiles, each group in one row of registers.

One program and not one per group: N * G is some hundred numbers, and "batch" statistics then need
no second launch. Whatever needs them sweeps the tiles once for the mean, once for the deviation.

Shapes: N prompts, G completions per prompt, K rewards per completion.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastomni_kernels.triton_kernels.variants import Variant

# Numbers in one tile, rows times the next power of two of G: 8 per thread.
TILE = 1024
NUM_WARPS = 4


@triton.jit
def _statistics(values, given, EPS_DOF: tl.constexpr):
    """Mean, std (ddof=1) and spread of the given values of each row, all [rows, 1]."""
    count = tl.sum(given.to(values.dtype), 1)[:, None]
    mean = tl.sum(tl.where(given, values, 0.0), 1)[:, None] / tl.maximum(count, 1.0)
    difference = tl.where(given, values - mean, 0.0)
    variance = tl.sum(difference * difference, 1)[:, None] / tl.maximum(count - EPS_DOF, 1.0)
    largest = tl.max(tl.where(given, values, float("-inf")), 1)[:, None]
    smallest = tl.min(tl.where(given, values, float("inf")), 1)[:, None]
    return count, mean, tl.sqrt(variance), largest > smallest


@triton.jit
def _total(
    rewards,
    first,
    num_groups,
    generations,
    stride_group,
    stride_generation,
    stride_reward,
    eps,
    WEIGHTS: tl.constexpr,
    K: tl.constexpr,
    NORMALIZE_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The weighted sum of each completion's rewards, which exist, and groups with spread [rows]."""
    rows = (first + tl.arange(0, ROWS))[:, None].to(tl.int64)
    columns = tl.arange(0, COLUMNS)[None, :].to(tl.int64)
    inside = (rows < num_groups) & (columns < generations)
    pointers = rewards + rows * stride_group + columns * stride_generation
    total = tl.zeros((ROWS, COLUMNS), COMPUTE)
    scored = tl.zeros((ROWS, COLUMNS), tl.int1)
    spread = tl.zeros((ROWS, 1), tl.int1)
    for k in tl.static_range(K):
        value = tl.load(pointers + k * stride_reward, inside, other=float("nan")).to(COMPUTE)
        given = value == value
        scored = scored | given
        if NORMALIZE_FIRST:
            _, mean, deviation, has_spread = _statistics(value, given, 1.0)
            value = (value - mean) / (deviation + eps)
            given = given & has_spread
            spread = spread | has_spread
        total += tl.where(given, value * WEIGHTS[k], 0.0)
    return total, scored, spread


@triton.jit(do_not_specialize=["num_groups", "generations"])
def group_advantages_kernel(
    rewards,
    advantages,
    no_spread,
    missing,
    num_groups,
    generations,
    stride_group,
    stride_generation,
    stride_reward,
    eps,
    WEIGHTS: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    NORMALIZE_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    COMPUTE: tl.constexpr = advantages.dtype.element_ty
    batch_mean = tl.zeros((1, 1), COMPUTE)
    batch_deviation = tl.zeros((1, 1), COMPUTE)
    if SCALE == "batch":
        batch_count = tl.zeros((1, 1), COMPUTE)
        for first in range(0, num_groups, ROWS):
            total, scored, _ = _total(
                rewards, first, num_groups, generations, stride_group, stride_generation,
                stride_reward, eps, WEIGHTS, K, NORMALIZE_FIRST, ROWS, COLUMNS, COMPUTE,
            )  # fmt: skip
            batch_count += tl.sum(tl.sum(scored.to(COMPUTE), 1), 0)
            batch_mean += tl.sum(tl.sum(tl.where(scored, total, 0.0), 1), 0)
        batch_mean = batch_mean / tl.maximum(batch_count, 1.0)
        for first in range(0, num_groups, ROWS):
            total, scored, _ = _total(
                rewards, first, num_groups, generations, stride_group, stride_generation,
                stride_reward, eps, WEIGHTS, K, NORMALIZE_FIRST, ROWS, COLUMNS, COMPUTE,
            )  # fmt: skip
            difference = tl.where(scored, total - batch_mean, 0.0)
            batch_deviation += tl.sum(tl.sum(difference * difference, 1), 0)
        batch_deviation = tl.sqrt(batch_deviation / tl.maximum(batch_count - 1.0, 1.0))

    for first in range(0, num_groups, ROWS):
        total, scored, spread = _total(
            rewards, first, num_groups, generations, stride_group, stride_generation,
            stride_reward, eps, WEIGHTS, K, NORMALIZE_FIRST, ROWS, COLUMNS, COMPUTE,
        )  # fmt: skip
        if NORMALIZE_FIRST:
            value = (total - batch_mean) / (batch_deviation + eps)
        else:
            count, mean, deviation, spread = _statistics(total, scored, 1.0)
            value = total - mean
            if LEAVE_ONE_OUT:  # r - mean of the others = (r - mean of all) * n / (n - 1)
                value = value * (count / tl.maximum(count - 1.0, 1.0))
            if SCALE == "group":
                value = value / (deviation + eps)
            elif SCALE == "batch":
                value = value / (batch_deviation + eps)
        value = tl.where(scored & spread, value, 0.0)
        rows = first + tl.arange(0, ROWS)
        columns = tl.arange(0, COLUMNS)[None, :]
        places = rows[:, None].to(tl.int64) * generations + columns
        inside = (rows[:, None] < num_groups) & (columns < generations)
        tl.store(advantages + places, value, inside)
        without = tl.sum((inside & (scored == 0)).to(tl.int32), 1)
        tl.store(missing + rows, without, rows < num_groups)
        tl.store(no_spread + rows, tl.sum(spread.to(tl.int32), 1) == 0, rows < num_groups)


def _tile(generations: int) -> dict[str, int]:
    columns = triton.next_power_of_2(generations)
    return {"ROWS": max(1, TILE // columns), "COLUMNS": columns}


def forward(
    rewards: Tensor,
    eps: float,
    scale: str,
    baseline: str,
    weights: list[float] | None,
    aggregation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; arguments and returns are those of `reference.group_advantages`."""
    columns = rewards if rewards.dim() == 3 else rewards[..., None]
    prompts, generations, kinds = columns.shape
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    advantages = torch.empty((prompts, generations), dtype=dtype, device=rewards.device)
    no_spread = torch.empty(prompts, dtype=torch.bool, device=rewards.device)
    missing = torch.empty(prompts, dtype=torch.int32, device=rewards.device)
    normalize_first = aggregation == "normalize_then_sum"
    group_advantages_kernel[(1,)](
        columns,
        advantages,
        no_spread,
        missing,
        prompts,
        generations,
        *columns.stride(),
        eps,
        WEIGHTS=tuple(weights or [1.0] * kinds),
        K=kinds,
        SCALE="batch" if normalize_first else scale,
        LEAVE_ONE_OUT=baseline == "leave_one_out",
        NORMALIZE_FIRST=normalize_first,
        **_tile(generations),
        num_warps=NUM_WARPS,
    )
    return advantages, no_spread, missing


def shipped(target: str) -> list[Variant]:
    """The variants that are compiled ahead of time; the kernel is the same on every target."""
    cases = {
        "group": dict(SCALE="group", LEAVE_ONE_OUT=False, NORMALIZE_FIRST=False),
        "none-leave-one-out": dict(SCALE="none", LEAVE_ONE_OUT=True, NORMALIZE_FIRST=False),
        "batch": dict(SCALE="batch", LEAVE_ONE_OUT=False, NORMALIZE_FIRST=False),
        "normalize-then-sum": dict(SCALE="batch", LEAVE_ONE_OUT=False, NORMALIZE_FIRST=True),
    }
    pointers = ("rewards", "advantages", "no_spread", "missing")
    types = ("*fp32", "*fp32", "*i1", "*i32")
    counts = ("num_groups", "generations", "stride_group", "stride_generation", "stride_reward")
    signature = dict(zip(pointers, types, strict=True)) | dict.fromkeys(counts, "i32")
    return [
        Variant(
            name=f"group_advantages-fp32-{name}",
            kernel=group_advantages_kernel,
            signature=signature | {"eps": "fp32"},
            constexprs={"WEIGHTS": (1.0, 0.5), "K": 2, **flags, **_tile(8)},
            num_warps=NUM_WARPS,
            divisible_by_16=pointers,
        )
        for name, flags in cases.items()
    ]
