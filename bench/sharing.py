"""How much faster shared rows are than repeated ones, beside how much less arithmetic they need.

What repeated rows need in arithmetic is counted (pairs of a query and a key that it sees); the
comparison is between the fastest row of ours and the fastest peer of a kind on repeated rows. It
may exceed the ratio of the arithmetic: completions see all of their prompt, so that part needs no
mask and runs at a higher rate than the causal squares of repeated rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]

# Beginnings of the names of peers on repeated rows (`bench.prefix_peers`).
SDPA = ("repeated: SDPA",)
VARLEN = ("repeated: flash_varlen", "repeated: torch varlen", "repeated: flash-attn")


def fastest(result: Result, kind: Sequence[str]) -> float | None:
    """Least median time of the timed peers whose names begin with one of `kind`."""
    times = [
        row["median_s"]
        for row in result["rows"]
        if row["status"] == "timed" and row["provider"].startswith(tuple(kind))
    ]
    return min(times, default=None)


def speed_up(result: Result, kind: Sequence[str] = SDPA) -> float | None:
    """How many times as fast as those peers our fastest row is; None where either has no time."""
    ours = [row["median_s"] for row in result["rows"] if row["ours"] and row["status"] == "timed"]
    theirs = fastest(result, kind)
    return theirs / min(ours) if ours and theirs is not None else None


def sentence(result: Result) -> str:
    """One line about a result; empty where nothing is shared or nothing can be compared."""
    factor = speed_up(result) if "repeated_work" in result else None
    if factor is None:
        return ""
    return (
        f"{factor:.2f} times as fast as SDPA on repeated rows, which need "
        f"{result['repeated_work']:.2f} times the arithmetic"
    )
