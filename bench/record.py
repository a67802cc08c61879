"""Judges a report of `bench/kernels.py` that is kept, and writes what its page says of it.

    python -m bench.record bench/results/kernels_cpu.json

Prints the parts of bench/results/README.md and of kernels/README.md (the times) that depend on the
report. Exit status 1 where the report is not fit to be kept: a row of ours failed or was refused,
or a verdict is not what its own rows say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from bench import sharing
from bench.goals import judge_all
from bench.tables import seconds

Report = dict[str, Any]


def problems(report: Report) -> list[str]:
    """Return why a report is not fit to be kept, one line each; none where it is.

    Args:
        report: of `bench/kernels.py`.
    """
    found = []
    for result in report["cases"]:
        ours = [row for row in result["rows"] if row["ours"]]
        found += [
            f"{_at(result)}: {row['provider']} {row['status']}: {row['reason']}"
            for row in ours
            if row["status"] not in ("timed", "unavailable")
        ]
        if not any(row["status"] == "timed" for row in ours):
            found.append(f"{_at(result)}: no row of ours was timed")
    kept = {goal["goal"]: goal for goal in report["goals"]}
    for goal in judge_all(report):
        said = kept.pop(goal["goal"], None)
        if said != goal:
            wanted = f"{goal['verdict']} ({goal['measured']}, limit {goal['limit']})"
            has = f"{said['verdict']} ({said['measured']}, limit {said['limit']})" if said else None
            found.append(f"goal {goal['goal']!r}: its rows say {wanted}, the file says {has}")
    return found + [f"goal {name!r}: there is no such goal" for name in kept]


def page(report: Report) -> str:
    """Return the goals with their verdicts, and where a peer is faster than all of ours."""
    lines = ["| goal | verdict |", "| --- | --- |"]
    lines += [f"| {goal['goal']} | {goal['verdict']} |" for goal in report["goals"]]
    lines += [
        "",
        "| case (size) | peers that take less time than any row of ours |",
        "| --- | --- |",
    ]
    lines += [f"| {at} | {', '.join(names) or 'none'} |" for at, names in faster(report).items()]
    return "\n".join(lines) + "\n"


def sharing_table(report: Report) -> str:
    """Return what sharing prompts gains, case by case; empty where none was compared."""
    shared = [result for result in report["cases"] if sharing.sentence(result)]
    lines = [
        "| shared prompts: case (sizes) | arithmetic of repeated rows over ours | times as fast "
        "as SDPA on repeated rows |",
        "| --- | --- | --- |",
    ]
    lines += [
        f"| {_with_sizes(result)} | {result['repeated_work']:.2f} | "
        f"{sharing.speed_up(result):.2f} |"
        for result in shared
    ]
    return "\n".join(lines) + "\n" if shared else ""


def times_table(report: Report) -> str:
    """Return the median times of our fastest row and of the fastest peer, case by case."""
    lines = ["| case (sizes) | fastomni | fastest peer |", "| --- | --- | --- |"]
    for result in report["cases"]:
        timed = [row for row in result["rows"] if row["status"] == "timed"]
        ours, peer = (
            min((row for row in timed if row["ours"] == own), key=lambda row: row["median_s"])
            for own in (True, False)
        )
        numbers = "x".join(str(number) for number in result["sizes"].values())
        lines.append(
            f"| {result['name']} ({numbers}) | {seconds(ours['median_s'])} | "
            f"{seconds(peer['median_s'])}, {peer['provider']} |"
        )
    return "\n".join(lines) + "\n"


def faster(report: Report) -> dict[str, list[str]]:
    """Return by case the peers whose median time is below that of our fastest row."""
    found: dict[str, list[str]] = {}
    names = Counter(_at(result) for result in report["cases"])
    for result in report["cases"]:
        timed = [row for row in result["rows"] if row["status"] == "timed"]
        ours = min((row["median_s"] for row in timed if row["ours"]), default=float("inf"))
        peers = {row["provider"]: row["median_s"] for row in timed if not row["ours"]}
        at = _at(result) if names[_at(result)] == 1 else _with_sizes(result)
        found[at] = sorted(name for name, taken in peers.items() if taken < ours)
    return found


def _at(result: Report) -> str:
    """Case and size: "grpo_loss/forward (small)"."""
    return f"{result['name']} ({result['size_name']})"


def _with_sizes(result: Report) -> str:
    """Case, size and numbers: "prefix_attention/forward (cpu-sweep 1x512x8x64x14x2x64x100)"."""
    numbers = "x".join(str(number) for number in result["sizes"].values())
    return f"{result['name']} ({result['size_name']} {numbers})"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path, help="JSON of bench/kernels.py")
    report = json.loads(parser.parse_args(arguments).report.read_text(encoding="utf-8"))
    parts = (page(report), sharing_table(report), times_table(report))
    print("\n".join(filter(None, parts)), end="")
    found = problems(report)
    for problem in found:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
