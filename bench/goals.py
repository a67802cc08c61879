"""The goals of the kernels, and what a report says about each: met, missed or not measured.

A goal belongs to a kind of machine and a size; a report from another machine does not measure it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.sharing import SDPA, VARLEN, speed_up

Report = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """One number that is to be reached.

    Attributes:
        text: the goal in words.
        limit: bound of the number.
        at_least: whether the number must not be smaller (else: not larger) than the limit.
        measure: report -> the number; None where the report does not hold it.
    """

    text: str
    limit: float
    at_least: bool
    measure: Callable[[Report], float | None]

    def judge(self, report: Report) -> dict[str, Any]:
        """Text, limit, measured number (None: none) and verdict."""
        value = self.measure(report)
        verdict = "not measured"
        if value is not None:
            met = value >= self.limit if self.at_least else value <= self.limit
            verdict = "met" if met else "missed"
        return {"goal": self.text, "limit": self.limit, "measured": value, "verdict": verdict}


def find_result(report: Report, case: str, sizes: tuple[int, ...]) -> Report | None:
    """Return what was measured of a case at a size; None where nothing was."""
    for result in report["cases"]:
        if result["name"] == case and tuple(result["sizes"].values()) == sizes:
            found: Report = result
            return found
    return None


def find(report: Report, case: str, sizes: tuple[int, ...], provider: str) -> Report | None:
    """Return the timed row of a provider in a case at a size; None where there is none."""
    result = find_result(report, case, sizes)
    for row in [] if result is None else result["rows"]:
        if row["provider"] == provider and row["status"] == "timed":
            found: Report = row
            return found
    return None


def is_h100(report: Report) -> bool:
    """Whether the report is from an H100."""
    accelerator = report["environment"]["accelerator"]
    return accelerator is not None and "H100" in accelerator["name"]


def _on_h100(
    case: str, sizes: tuple[int, ...], provider: str, key: str
) -> Callable[[Report], float | None]:
    def measure(report: Report) -> float | None:
        row = find(report, case, sizes, provider) if is_h100(report) else None
        return None if row is None else row[key]

    return measure


def _nothing_slower(report: Report) -> float | None:
    """Largest ratio of our best time to the best peer's over the GPU's full sizes."""
    if report["environment"]["accelerator"] is None:
        return None
    ratios = []
    for result in report["cases"]:
        timed = [row for row in result["rows"] if row["status"] == "timed"]
        times: list[list[float]] = [
            [row["median_s"] for row in timed if row["ours"] == ours] for ours in (True, False)
        ]
        if result["size_name"] == "full" and all(times):
            ratios.append(min(times[0]) / min(times[1]))
    return max(ratios, default=None)


def _on_cpu(key: str, invert: bool) -> Callable[[Report], float | None]:
    """Ratio of ours to torch eager's (inverted: theirs to ours) of a number of a row."""

    def measure(report: Report) -> float | None:
        if report["environment"]["accelerator"] is not None:
            return None
        case, sizes = "linear_grpo_loss/forward+backward", (512, 896, 151936)
        ours = find(report, case, sizes, "fastomni reference workspace")
        eager = find(report, case, sizes, "torch eager")
        if ours is None or eager is None:
            return None
        return eager[key] / ours[key] if invert else ours[key] / eager[key]

    return measure


def _faster_than_repeated(
    sizes: tuple[int, ...], kind: tuple[str, ...], on_h100: bool, of_allowed: bool = False
) -> Callable[[Report], float | None]:
    """Speed-up of prefix_attention, forward and backward; as a share of what arithmetic allows."""

    def measure(report: Report) -> float | None:
        here = is_h100(report) if on_h100 else report["environment"]["accelerator"] is None
        result = find_result(report, "prefix_attention/forward+backward", sizes) if here else None
        factor = None if result is None else speed_up(result, kind)
        if result is None or factor is None:
            return None
        return factor / result["repeated_work"] if of_allowed else factor

    return measure


def _backward_rate(report: Report) -> float | None:
    """FLOPs of the backward alone over what it adds to the time of the forward."""
    if not is_h100(report):
        return None
    needed, seconds = [], []
    for mode in ("forward", "forward+backward"):
        result = find_result(report, f"prefix_attention/{mode}", _SHARED)
        row = find(report, f"prefix_attention/{mode}", _SHARED, "fastomni triton")
        if result is None or row is None:
            return None
        needed.append(result["needed"]["flops"])
        seconds.append(row["median_s"])
    added = seconds[1] - seconds[0]
    return (needed[1] - needed[0]) / added if added > 0 else None


_HEAD = (12800, 896, 151936)
_QWEN = (14, 2, 64)  # heads, key heads, size of a head
_SHARED, _SHARED_16 = (8, 1500, 8, 200, *_QWEN, 100), (8, 1500, 16, 200, *_QWEN, 100)

GOALS = (
    Goal(
        "H100: group_advantages of 64 x 8 rewards in at most 4 us",
        4e-6,
        False,
        _on_h100("group_advantages/forward", (64, 8), "fastomni triton", "median_s"),
    ),
    Goal(
        "H100: linear_logprobs with entropy, 12,800 x 896 x 151,936, in at most 6.3 ms",
        6.3e-3,
        False,
        _on_h100("linear_logprobs/forward", _HEAD, "fastomni triton", "median_s"),
    ),
    Goal(
        "H100: linear_grpo_loss forward and backward at that size in at most 22 ms",
        22e-3,
        False,
        _on_h100(
            "linear_grpo_loss/forward+backward", _HEAD, "fastomni triton recompute", "median_s"
        ),
    ),
    Goal(
        "linear_grpo_loss in recompute mode at that size: at most 0.5 GB beyond inputs and "
        "gradients",
        0.5e9,
        False,
        _on_h100(
            "linear_grpo_loss/forward+backward", _HEAD, "fastomni triton recompute", "extra_bytes"
        ),
    ),
    Goal(
        "GPU: nothing slower than its best peer at full sizes (largest ratio of times)",
        1.0,
        False,
        _nothing_slower,
    ),
    Goal(
        "CPU: linear_grpo_loss at 512 x 896 x 151,936: memory beyond inputs and gradients, torch "
        "eager's over ours, at least 6",
        6.0,
        True,
        _on_cpu("extra_bytes", invert=True),
    ),
    Goal(
        "CPU: time at that size, ours over torch eager's, at most 1.1",
        1.1,
        False,
        _on_cpu("median_s", invert=False),
    ),
    Goal(
        "CPU: prefix_attention forward and backward at P=976, G=8, C=64: at least 3.7 times as "
        "fast as SDPA on repeated rows",
        3.7,
        True,
        _faster_than_repeated((1, 976, 8, 64, *_QWEN, 100), SDPA, on_h100=False),
    ),
    Goal(
        "CPU: at 4 groups of ragged lengths (P 249 to 512, C 26 to 64): at least 0.8 of the "
        "speed-up that its arithmetic allows",
        0.8,
        True,
        _faster_than_repeated((4, 512, 8, 64, *_QWEN, 40), SDPA, on_h100=False, of_allowed=True),
    ),
    Goal(
        "H100: prefix_attention forward and backward at P=1500, G=8, C=200: at least 2.5 times as "
        "fast as flash varlen on repeated rows",
        2.5,
        True,
        _faster_than_repeated(_SHARED, VARLEN, on_h100=True),
    ),
    Goal(
        "H100: with G=16: at least 3 times as fast",
        3.0,
        True,
        _faster_than_repeated(_SHARED_16, VARLEN, on_h100=True),
    ),
    Goal(
        "H100: prefix_attention forward with G=8: at least 350 TFLOP/s, counted on shared rows",
        350e12,
        True,
        _on_h100("prefix_attention/forward", _SHARED, "fastomni triton", "flops_per_s"),
    ),
    Goal(
        "H100: its backward: at least 250 TFLOP/s, counted on shared rows",
        250e12,
        True,
        _backward_rate,
    ),
    Goal(
        "H100: prefix_decode of 64 sequences, P=1500, 100 own tokens, in at most 6 us a layer",
        6e-6,
        False,
        _on_h100("prefix_decode/forward", (8, 1500, 8, 100, *_QWEN), "fastomni triton", "median_s"),
    ),
    Goal(
        "H100: sample from 64 x 151,936 logits in at most 40 us",
        40e-6,
        False,
        _on_h100("sample/forward", (64, 151936), "fastomni triton", "median_s"),
    ),
)


def judge_all(report: Report) -> list[dict[str, Any]]:
    """The verdict on every goal."""
    return [goal.judge(report) for goal in GOALS]
