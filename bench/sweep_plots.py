"""Panels of sweeps over shared prompts: speed against repeated rows, over one size at a time.

A sweep is a star: its first size is the middle, the others differ from it in one number. Each of
these numbers gets a panel; the dashed line is the ratio of the arithmetic, and 1 is the fastest
SDPA on repeated rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from bench.sharing import SDPA, fastest, speed_up

Result = dict[str, Any]

# Of the peers that share rows themselves; the rest lie at 1 or below.
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Arm:
    """Results of a sweep that differ in one number.

    Attributes:
        dimension: which.
        results: by that number, rising.
    """

    dimension: str
    results: list[Result]


def is_sweep(result: Result) -> bool:
    """Whether a result is a point of a panel here rather than a panel of bars."""
    return "repeated_work" in result and result["size_name"].endswith("sweep")


def arms(results: list[Result]) -> list[Arm]:
    """Cut sweeps, case by case, into arms of two points or more that can be compared."""
    found = []
    by_case: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if speed_up(result) is not None:
            by_case.setdefault((result["name"], result["size_name"]), []).append(result)
    for middle, *others in by_case.values():
        for dimension in middle["sizes"]:
            points = [middle]
            for other in others:
                changed = [n for n, value in other["sizes"].items() if value != middle["sizes"][n]]
                if changed == [dimension]:
                    points.append(other)
            points.sort(key=lambda result: int(result["sizes"][dimension]))
            if len(points) > 1:
                found.append(Arm(dimension, points))
    return found


def draw_arm(axes: Axes, arm: Arm, ours: str, peer: str, ceiling: str, ink: str) -> None:
    """Draw one panel.

    Args:
        axes: where.
        arm: what.
        ours: colour of our line.
        peer: colour of the peers'.
        ceiling: colour of the ratio of the arithmetic.
        ink: colour of text.
    """
    places = [int(result["sizes"][arm.dimension]) for result in arm.results]
    allowed = [result["repeated_work"] for result in arm.results]
    measured = [speed_up(result) or 0.0 for result in arm.results]
    axes.plot(places, allowed, "--", color=ceiling, linewidth=1.2, label="less arithmetic")
    axes.plot(places, measured, "-o", color=ours, linewidth=2, label="fastomni", zorder=3)
    for place, value in zip(places, measured, strict=True):
        axes.annotate(
            f"{value:.2f}", (place, value), xytext=(0, -13), textcoords="offset points",
            ha="center", fontsize=8, color=ink,
        )  # fmt: skip
    for marker, name in zip(MARKERS, _sharing_peers(arm), strict=False):
        curve = [_ratio(result, name) for result in arm.results]
        axes.plot(places, curve, ":", marker=marker, markersize=4, color=peer, label=name)
    axes.axhline(1, color=peer, linewidth=1, label="SDPA on repeated rows")
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places], fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylim(0, 1.2 * max(*allowed, *measured))
    middle = arm.results[0]
    others = ", ".join(
        f"{name}={value}"
        for name, value in middle["sizes"].items()
        if name in ("P", "G", "C") and name != arm.dimension
    )
    axes.set_xlabel(arm.dimension, fontsize=9, color=ink)
    axes.set_ylabel("times as fast as SDPA on repeated rows", fontsize=8, color=ink)
    axes.set_title(f"{middle['name']}, {others}", fontsize=10, loc="left", color=ink)
    axes.legend(fontsize=8, frameon=False, loc="best")
    axes.spines[["top", "right"]].set_visible(False)


def _sharing_peers(arm: Arm) -> list[str]:
    """Peers on shared rows that were timed at every point."""
    names = [
        {row["provider"] for row in result["rows"] if row["status"] == "timed" and not row["ours"]}
        for result in arm.results
    ]
    return sorted(name for name in set.intersection(*names) if not name.startswith("repeated:"))


def _ratio(result: Result, provider: str) -> float:
    """The fastest SDPA's time over a provider's."""
    times = {row["provider"]: row["median_s"] for row in result["rows"] if "median_s" in row}
    baseline = fastest(result, SDPA)
    assert baseline is not None  # `arms` left the others out
    return float(baseline / times[provider])
