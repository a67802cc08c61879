"""Arithmetic of losses: extremes that keep NaN, and exp(x) - 1 - x without cancellation.

The decision that is not obvious: comparisons instead of Triton's own minimum, maximum, min and max.
Those drop NaN, their option that keeps it is not there for reductions, and NaN must come out.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Terms of exp(x) - x - 1: at |x| = 1/2 the next one is below fp64's precision.
SERIES = tl.constexpr(15)


@triton.jit
def lower(a, b):
    """The lower of two numbers, NaN where one is."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def higher(a, b):
    """The higher of two numbers, NaN where one is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def lowest_of(block):
    """The lowest number of a block, NaN where one is."""
    return tl.min(block) + tl.sum(tl.where(block == block, 0.0, block))


@triton.jit
def highest_of(block):
    """The highest number of a block, NaN where one is."""
    return tl.max(block) + tl.sum(tl.where(block == block, 0.0, block))


@triton.jit
def expm1_less_argument(x):
    """exp(x) - 1 - x without cancellation around 0."""
    series = tl.zeros_like(x) + 1.0
    for i in tl.static_range(SERIES, 2, -1):
        series = 1.0 + series * x * (1.0 / i)
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, tl.exp(x) - 1.0 - x)
