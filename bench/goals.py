"""The goals of the loss kernels, and what a report says about each: met, missed or not measured.

A goal belongs to a kind of machine and a size; a report from another machine does not measure it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def find(report: Report, case: str, sizes: tuple[int, ...], provider: str) -> Report | None:
    """Return the timed row of a provider in a case at a size; None where there is none."""
    for result in report["cases"]:
        if result["name"] == case and tuple(result["sizes"].values()) == sizes:
            for row in result["rows"]:
                if row["provider"] == provider and row["status"] == "timed":
                    return row
    return None


def _on_h100(
    case: str, sizes: tuple[int, ...], provider: str, key: str
) -> Callable[[Report], float | None]:
    def measure(report: Report) -> float | None:
        accelerator = report["environment"]["accelerator"]
        if accelerator is None or "H100" not in accelerator["name"]:
            return None
        row = find(report, case, sizes, provider)
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


_HEAD = (12800, 896, 151936)

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
)


def judge_all(report: Report) -> list[dict[str, Any]]:
    """The verdict on every goal."""
    return [goal.judge(report) for goal in GOALS]
