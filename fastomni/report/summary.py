"""The end of a run in one place: a table of results, times of the stages, and the curves.

    output_dir/summary.json   for programs: percent, seconds, GiB, versions, seed
    output_dir/summary.md     the printed tables in Markdown
    output_dir/curves.png     see `plots`

Everything is read back from what the stages wrote, so a run that was cut off and resumed, or whose
stages were done by another process, is summed up just the same.
"""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from fastomni.report.plots import draw_curves
from fastomni.report.stage import peak_memory_gib

# Folder of a stage -> its name in summary.json and in print.
STAGES = {
    "pretrain": ("pretrain", "pretrain"),
    "base": ("base", "base"),
    "coldstart": ("cold_start", "cold start"),
    "rlvr": ("rlvr", "RLVR"),
}
PACKAGES = ("fastomni", "torch", "transformers", "av", "numpy")
NARROWEST = 100  # columns: a table that is not on a terminal is not folded to 80


def write_summary(run_directory: Path) -> None:
    """Prints what a run has reached and writes `summary.json`, `summary.md` and `curves.png`.

    Args:
        run_directory: output_dir of the run; stages and evaluations that are absent are left out.
    """
    run_directory = Path(run_directory)
    histories = {
        folder: read_history(run_directory / folder / "metrics.jsonl") for folder in STAGES
    }
    summary = summarize(run_directory, histories)
    tables = [table for table in (_results(summary), _times(summary)) if table["rows"]]
    text = json.dumps(summary, indent=1) + "\n"
    (run_directory / "summary.json").write_text(text, encoding="utf-8")
    (run_directory / "summary.md").write_text(
        "\n".join(_markdown(table) for table in tables), encoding="utf-8"
    )
    drawn = draw_curves(run_directory / "curves.png", histories, summary["evaluation"])
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, NARROWEST))
    for table in tables:
        console.print(_rich(table))
    names = ["summary.json", "summary.md", *(["curves.png"] if drawn else [])]
    paths = ", ".join(str(run_directory / name) for name in names)
    console.print(f"written: {paths}", markup=False, highlight=False, soft_wrap=True)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, oldest first; empty where there is no such file.

    Raises:
        ValueError: a line is not JSON; the message names it.
    """
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}); remove that line"
            ) from None
    return records


def summarize(run_directory: Path, histories: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        run_directory: output_dir of the run.
        histories: stage folder -> lines of its `metrics.jsonl`.

    Returns:
        `evaluation.<stage>.<set>` with war, uar, recalls, lowest_recall and format_rate in percent
        and, where the clips are of known kinds, `by_kind.<kind>.war|war_swapped_voice`; `stages`
        with steps, seconds, seconds per phase and evaluation_seconds (of the model the stage
        left), and skipped, clips left out, where the run goes on without unreadable ones;
        seconds of all that; peak_memory_gib, versions, platform, seed.
    """
    evaluation, stages, peaks = {}, {}, [peak_memory_gib()]
    for folder, (key, _) in STAGES.items():
        results = run_directory / folder / "evaluation" / "results.json"
        history = histories.get(folder, [])
        if history:
            stages[key] = _stage_times(history)
            peaks += [record["peak_memory_gib"] for record in history
                      if "peak_memory_gib" in record]  # fmt: skip
        if results.is_file():
            found = json.loads(results.read_text(encoding="utf-8"))
            evaluation[key] = {
                name: in_percent(result) for name, result in found["results"].items()
            }
            stage = stages.setdefault(key, _stage_times([]))
            stage["evaluation_seconds"] = round(found["seconds"], 2)
    config = run_directory / "config.yaml"
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return {
        "evaluation": evaluation,
        "stages": stages,
        "seconds": round(
            sum(stage["seconds"] + stage["evaluation_seconds"] for stage in stages.values()), 2
        ),
        "peak_memory_gib": round(max(peaks), 3),
        "versions": {"python": platform.python_version(), **_versions()},
        "platform": f"{platform.system()} {platform.machine()}",
        "seed": settings.get("seed"),
    }


def in_percent(result: dict[str, Any]) -> dict[str, Any]:
    """Results of one test set as `summary.json` has them: shares in percent, two digits."""

    def percent(share: float) -> float:
        return round(100 * share, 2)

    recalls = {name: percent(value) for name, value in result["recalls"].items()}
    values: dict[str, Any] = {
        "clips": result["clips"],
        "skipped": result["skipped"],
        "war": percent(result["war"]),
        "uar": percent(result["uar"]),
        "lowest_recall": min(recalls.values()),
        "format_rate": percent(result["format_rate"]),
        "recalls": recalls,
    }
    if "by_kind" in result:
        values["by_kind"] = {
            kind: {
                "clips": part["clips"],
                **{key: percent(part[key]) for key in ("war", "war_swapped_voice")},
            }
            for kind, part in result["by_kind"].items()
        }
    return values


def _stage_times(history: list[dict[str, Any]]) -> dict[str, Any]:
    phases: dict[str, float] = {}
    for record in history:
        for key, value in record.items():
            if key.startswith("seconds/"):
                phases[key.removeprefix("seconds/")] = phases.get(key[8:], 0.0) + value
    seconds = phases.pop("step", 0.0)
    times = {
        "steps": history[-1]["step"] if history else 0,
        "seconds": round(seconds, 2),
        "phases": {name: round(value, 2) for name, value in phases.items()},
        "evaluation_seconds": 0.0,
    }
    if history and "data/skipped" in history[-1]:
        times["skipped"] = history[-1]["data/skipped"]
    return times


def show_results(name: str, result: dict[str, Any]) -> None:
    """Prints the results of one test set.

    Args:
        name: of the set.
        result: from `in_percent`.
    """
    console = Console()
    clips = f"{name}: {result['clips']} clips"
    skipped = f", {result['skipped']} unreadable ones left out" if result["skipped"] else ""
    shares = "  ".join(
        f"{label} {result[key]:.1f}"
        for label, key in (("WAR", "war"), ("UAR", "uar"), ("format", "format_rate"))
    )
    rows = [[label, f"{share:.1f}"] for label, share in result["recalls"].items()]
    tables = [("class", ["recall"], rows)]
    if "by_kind" in result:
        kinds = [
            [kind, *(f"{part[key]:.1f}" for key in ("war", "war_swapped_voice"))]
            for kind, part in result["by_kind"].items()
        ]
        tables.append(("decided by", ["WAR", "with another voice"], kinds))
    console.print(f"{clips}{skipped}; percent", markup=False, highlight=False, soft_wrap=True)
    console.print(shares, markup=False, highlight=False, soft_wrap=True)
    for first, others, lines in tables:
        console.print(_rich({"title": None, "note": None, "head": [first, *others],
                             "rows": lines, "texts": 1}))  # fmt: skip


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a checkout on the path, not installed
            continue
    return versions


def _results(summary: dict[str, Any]) -> dict[str, Any]:
    """Test set x stage, so that before and after stand under each other."""
    evaluation = summary["evaluation"]
    results = [result for sets in evaluation.values() for result in sets.values()]
    kinds = sorted({kind for result in results for kind in result.get("by_kind", {})})
    names = list(dict.fromkeys(name for sets in evaluation.values() for name in sets))
    rows = []
    for name in names:
        for key, label in STAGES.values():
            result = evaluation.get(key, {}).get(name)
            if result is None:
                continue
            parts = result.get("by_kind", {})
            rows.append(
                [name, label]
                + [f"{result[key]:.1f}" for key in ("war", "uar", "lowest_recall", "format_rate")]
                + [_kind(parts.get(kind)) for kind in kinds]
            )
    skipped = sum(result["skipped"] for result in results)
    notes = ["Percent."]
    if kinds:
        notes.append("By what decides the clip; in brackets with another clip's voice put in.")
    if skipped:
        notes.append(f"{skipped} unreadable clips were left out.")
    head = ["test set", "after", "WAR", "UAR", "lowest recall", "format", *kinds]
    return {"title": "Evaluation", "head": head, "rows": rows, "texts": 2, "note": " ".join(notes)}


def _kind(part: dict[str, Any] | None) -> str:
    return "" if part is None else f"{part['war']:.1f} ({part['war_swapped_voice']:.1f})"


def _times(summary: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for key, label in STAGES.values():
        stage = summary["stages"].get(key)
        if stage is None:
            continue
        seconds = stage["seconds"]
        shares = ", ".join(
            f"{name} {value / seconds:.0%}"
            for name, value in sorted(stage["phases"].items(), key=lambda item: -item[1])
            if value >= 0.005 * seconds
        )
        steps = [""] * 3  # an evaluation of a model that was trained elsewhere
        if stage["steps"]:
            steps = [str(stage["steps"]), _clock(seconds), f"{seconds / stage['steps']:.2f} s"]
        rows.append([label, shares, *steps, _clock(stage["evaluation_seconds"])])
    note = f"All stages {_clock(summary['seconds'])}; peak {summary['peak_memory_gib']:.1f} GiB."
    skipped = sum(stage.get("skipped", 0) for stage in summary["stages"].values())
    if skipped:
        note += f" {skipped} unreadable clips were left out of training."
    head = ["stage", "where the time went", "steps", "time", "per step", "evaluation"]
    return {"title": "Time", "head": head, "rows": rows, "texts": 2, "note": note}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _rich(table: dict[str, Any]) -> Table:
    shown = Table(title=table["title"], caption=table["note"], title_justify="left",
                  caption_justify="left")  # fmt: skip
    for index, name in enumerate(table["head"]):
        shown.add_column(name, justify="left" if index < table["texts"] else "right")
    previous = None
    for row in table["rows"]:
        first = "" if row[0] == previous else row[0]
        if first and previous is not None and table["title"] == "Evaluation":
            shown.add_section()
        previous = row[0]
        shown.add_row(first, *row[1:])
    return shown


def _markdown(table: dict[str, Any]) -> str:
    rule = [":--" if index < table["texts"] else "--:" for index in range(len(table["head"]))]
    lines = [f"| {' | '.join(cells)} |" for cells in (table["head"], rule, *table["rows"])]
    return "\n".join([f"## {table['title']}", "", *lines, "", table["note"], ""])
