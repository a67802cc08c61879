"""Draws a report of the kernel benchmark: one panel a case, one bar a provider, sweeps as lines.

A bar is the median time, its whisker goes from the least to the most, and the dashed line is the
least time that the machine's ceilings allow. The axis is logarithmic where the slowest provider
takes over twenty times as long as the line, because the line would be lost in the frame otherwise.
What failed, or was refused for a wrong answer, is an empty bar with the reason in it; what cannot
run on this machine at all (not installed, another device) has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from bench.profiling import FAILED, REFUSED, TIMED
from bench.sharing import speed_up
from bench.sweep_plots import Arm, arms, draw_arm, is_sweep
from bench.tables import SECONDS, seconds, size

OURS, PEER, INK, CEILING = "#0f766e", "#b8c0cc", "#1f2937", "#c2410c"
COLUMNS, WIDTH, BAR_HEIGHT = 2, 14.0, 0.34
SWEEP_COLUMNS, SWEEP_HEIGHT = 3, 3.4
LOGARITHMIC_FROM = 20.0
BAR = 0.66  # of the distance between two bars
MANY_SIZES = 6  # are written without spaces
LONGEST_REASON = 64  # characters of 8 points that fit into a panel


def plot(report: dict[str, Any], path: Path) -> None:
    """Write the picture.

    Args:
        report: of `bench/kernels.py`.
        path: of the PNG.

    Raises:
        ValueError: nothing ran.
    """
    try:
        figure = draw(report)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    figure.savefig(path, dpi=110)


def draw(report: dict[str, Any]) -> Figure:
    """Make the picture.

    Args:
        report: of `bench/kernels.py`.

    Returns:
        A figure with a canvas.

    Raises:
        ValueError: nothing ran.
    """
    shown = (TIMED, FAILED, REFUSED)
    sweeps = arms([result for result in report["cases"] if is_sweep(result)])
    panels = [
        (result, [row for row in result["rows"] if row["status"] in shown])
        for result in report["cases"]
        if not is_sweep(result)
    ]
    panels = [(result, rows) for result, rows in panels if rows]
    if not panels and not sweeps:
        raise ValueError("nothing ran, so there is nothing to draw")
    lines = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    heights = [1.1 + BAR_HEIGHT * max(len(rows) for _, rows in line) for line in lines]
    curves = [sweeps[i : i + SWEEP_COLUMNS] for i in range(0, len(sweeps), SWEEP_COLUMNS)]
    parts = {True: sum(heights), False: SWEEP_HEIGHT * len(curves)}
    parts = {are_bars: height for are_bars, height in parts.items() if height}
    figure = Figure(figsize=(WIDTH, sum(parts.values()) + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    pieces = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=list(parts.values()))
    for piece, are_bars in zip(pieces[:, 0], parts, strict=True):
        if are_bars:
            _bars(piece, lines, heights)
        else:
            _curves(piece, curves)
    where = report["environment"]
    device = where["accelerator"]["name"] if where["accelerator"] else where["device"]
    threads = "" if where["accelerator"] else f", {where['threads']} threads"
    title = (
        f"fastomni_kernels and peers on {device}{threads}; torch {where['torch']}, {where['date']}"
    )
    if panels:
        title += (
            "\nBars: median time, whiskers: least to most; beside them: the median, and + the "
            "memory beyond inputs, outputs and gradients"
        )
        _legend(figure, any(row["status"] != TIMED for _, rows in panels for row in rows))
    figure.suptitle(title, fontsize=12, color=INK)
    return figure


def _bars(piece: SubFigure, lines: list[list[tuple[Any, Any]]], heights: list[float]) -> None:
    """Fill a part of the figure with panels of bars."""
    grid = piece.subplots(
        len(lines), COLUMNS, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for row_of_axes, line in zip(grid, lines, strict=True):
        most = max(len(rows) for _, rows in line)
        for axes, (result, rows) in zip(row_of_axes, line, strict=False):
            _panel(axes, result, rows)
            axes.set_ylim(most - 0.4, -0.6)  # bars of one thickness in all panels
        for axes in row_of_axes[len(line) :]:
            axes.set_visible(False)


def _curves(piece: SubFigure, lines: list[list[Arm]]) -> None:
    """Fill a part of the figure with panels of sweeps."""
    grid = piece.subplots(len(lines), SWEEP_COLUMNS, squeeze=False)
    for row_of_axes, line in zip(grid, lines, strict=True):
        for axes, arm in zip(row_of_axes, line, strict=False):
            draw_arm(axes, arm, OURS, PEER, CEILING, INK)
        for axes in row_of_axes[len(line) :]:
            axes.set_visible(False)


def _legend(figure: Figure, has_empty: bool) -> None:
    """What bars and lines are, below all panels."""
    handles: list[Patch | Line2D] = [
        Patch(color=OURS, label="fastomni"),
        Patch(color=PEER, label="peers"),
        Line2D([], [], color=CEILING, linestyle="--", label="least time at the ceilings"),
    ]
    if has_empty:
        empty = Patch(fill=False, edgecolor=INK, linestyle=":", label="no time: failed or refused")
        handles.append(empty)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _panel(axes: Axes, result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    timed = {place: row for place, row in enumerate(rows) if row["status"] == TIMED}
    medians = [row["median_s"] for row in timed.values()]
    spread = [
        [row["median_s"] - row["min_s"] for row in timed.values()],
        [row["max_s"] - row["median_s"] for row in timed.values()],
    ]
    axes.barh(
        list(timed),
        medians,
        xerr=spread if timed else None,
        color=[OURS if row["ours"] else PEER for row in timed.values()],
        error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2},
        height=BAR,
    )
    floor = result["floor_s"]
    longest = max((row["max_s"] for row in timed.values()), default=floor)
    logarithmic = longest > LOGARITHMIC_FROM * floor
    if logarithmic:
        axes.set_xscale("log")
        left = min(floor, *medians) / 1.6
        axes.set_xlim(left, longest * (longest / left) ** 0.45)
    else:
        axes.set_xlim(0, 1.45 * max(longest, floor))
    axes.axvline(floor, color=CEILING, linestyle="--", linewidth=1.2)
    for place, row in enumerate(rows):
        if row["status"] != TIMED:
            _empty_bar(axes, place, row)
            continue
        axes.annotate(
            f"{seconds(row['median_s'])}, +{size(row['extra_bytes'])}",
            (row["max_s"], place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.set_yticks(range(len(rows)), [row["provider"] for row in rows], fontsize=9)
    numbers = [str(number) for number in result["sizes"].values()]
    shape = (" x " if len(numbers) < MANY_SIZES else "x").join(numbers)
    scale = "   (logarithmic)" if logarithmic else ""
    factor = speed_up(result) if "repeated_work" in result else None
    if factor is not None:
        allowed = result["repeated_work"]
        scale = f"\n{factor:.2f} x SDPA on repeated rows, {allowed:.2f} x the arithmetic" + scale
    axes.set_title(f"{result['name']}   {shape}{scale}", fontsize=10, loc="left", color=INK)
    axes.xaxis.set_major_formatter(lambda value, _: _tick(value))
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _empty_bar(axes: Axes, place: int, row: dict[str, Any]) -> None:
    """An outline across the panel that says why there is no time."""
    across = axes.get_yaxis_transform()  # x from 0 to 1 in the panel
    color = OURS if row["ours"] else INK
    axes.add_patch(
        Rectangle((0, place - BAR / 2), 1, BAR, transform=across, fill=False, edgecolor=color,
                  linestyle=":", linewidth=1.2)
    )  # fmt: skip
    reason = f"{row['status']}: {row['reason']}"
    if len(reason) > LONGEST_REASON:
        reason = reason[: LONGEST_REASON - 3] + "..."
    axes.text(
        0.01, place, reason, transform=across, va="center", fontsize=8, color=color,
        parse_math=False, clip_on=True,
    )  # fmt: skip


def _tick(value: float) -> str:
    """0.01 -> 10 ms."""
    if value <= 0:
        return "0"
    factor, unit = next(((f, u) for f, u in SECONDS if value >= f * 0.999), SECONDS[-1])
    return f"{value / factor:.3g} {unit}"
