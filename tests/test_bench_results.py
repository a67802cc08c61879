"""What is kept of the kernel benchmark: the report is sound, and its page says the same.

And no bar of its picture is missing without a word.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CPU_GOAL = "CPU: linear_grpo_loss at 512 x 896 x 151,936"


@pytest.fixture(scope="module")
def part(repository: Path) -> Iterator[Any]:
    """A function that gives a module of the benchmark by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository))
        yield lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture(scope="module")
def kept(repository: Path) -> dict[str, Any]:
    """The report that is kept."""
    path = repository / "bench" / "results" / "kernels_cpu.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def swept(repository: Path) -> dict[str, Any]:
    """The report of the sweep over shared prompts that is kept."""
    path = repository / "bench" / "results" / "prefix_sweep_cpu.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "bench" / "results" / "README.md").read_text(encoding="utf-8")


def ours(report: dict[str, Any], case: int) -> dict[str, Any]:
    """Our first timed row of a case."""
    rows = report["cases"][case]["rows"]
    return next(row for row in rows if row["ours"] and row["status"] == "timed")


def test_the_report_that_is_kept_is_sound(part: Any, kept: dict[str, Any]) -> None:
    assert part("record").problems(kept) == []
    assert {case.name for case in part("kernels").CASES} == {case["name"] for case in kept["cases"]}
    measured = [goal for goal in kept["goals"] if goal["verdict"] != "not measured"]
    assert [goal["goal"].startswith("CPU: ") for goal in measured] == [True] * 4


def test_the_sweep_that_is_kept_is_sound(part: Any, swept: dict[str, Any], page: str) -> None:
    assert part("record").problems(swept) == []
    sizes = [tuple(result["sizes"].values()) for result in swept["cases"]]
    assert sizes == list(part("cases_prefix").CPU_SWEEP)
    assert part("record").sharing_table(swept) in page, "see: python -m bench.record FILE"


@pytest.mark.parametrize("status", ["failed", "refused"])
def test_a_row_of_ours_without_a_time_is_found(
    part: Any, kept: dict[str, Any], status: str
) -> None:
    doctored = copy.deepcopy(kept)
    ours(doctored, 3).update(status=status, reason="the reason")
    found = part("record").problems(doctored)
    name = kept["cases"][3]["name"]
    assert found == [
        f"{name} (small): fastomni reference {status}: the reason",
        f"{name} (small): no row of ours was timed",
    ]


def test_a_verdict_that_its_rows_do_not_bear_out_is_found(part: Any, kept: dict[str, Any]) -> None:
    problems = part("record").problems
    slower = copy.deepcopy(kept)
    (big,) = (
        i
        for i, case in enumerate(kept["cases"])
        if (case["function"], case["size_name"]) == ("linear_grpo_loss", "cpu")
    )
    ours(slower, big)["median_s"] *= 100
    (found,) = problems(slower)
    assert "its rows say missed" in found and "the file says met" in found
    claimed = copy.deepcopy(kept)
    claimed["goals"][0]["verdict"] = "met"
    (found,) = problems(claimed)
    assert "H100: group_advantages" in found and "its rows say not measured" in found
    lenient = copy.deepcopy(kept)
    goal = next(goal for goal in lenient["goals"] if goal["goal"].startswith(CPU_GOAL))
    goal["limit"] = 1.0
    assert len(problems(lenient)) == 1
    dropped = copy.deepcopy(kept)
    dropped["goals"][1] = {**dropped["goals"][1], "goal": "to be fast"}
    found = problems(dropped)
    assert len(found) == 2 and found[1] == "goal 'to be fast': there is no such goal"


def test_peers_that_are_faster_are_named(part: Any) -> None:
    def row(provider: str, median: float, ours: bool = False) -> dict[str, Any]:
        return {"provider": provider, "ours": ours, "status": "timed", "median_s": median}

    rows = [row("a", 3.0, ours=True), row("b", 2.0, ours=True), row("z", 1.0), row("y", 1.9),
            row("x", 2.5), {"provider": "w", "ours": False, "status": "failed"}]  # fmt: skip
    cases = [
        {"name": "first/forward", "size_name": "small", "rows": rows},
        {"name": "second/forward", "size_name": "cpu", "rows": rows[:2]},
    ]
    found = part("record").faster({"cases": cases})
    assert found == {"first/forward (small)": ["y", "z"], "second/forward (cpu)": []}


def test_the_page_says_what_the_report_says(part: Any, kept: dict[str, Any], page: str) -> None:
    assert part("record").page(kept) in page, "see: python -m bench.record FILE"
    assert part("record").sharing_table(kept) in page
    kernels = (Path(part("record").__file__).parents[1] / "kernels" / "README.md").read_text()
    assert part("record").times_table(kept) in kernels, "see: python -m bench.record FILE"
    for goal in kept["goals"]:
        assert f"| {goal['goal']} | {goal['verdict']} |\n" in page
    for case in kept["cases"]:
        rows = {row["provider"]: row for row in case["rows"] if row["status"] == "timed"}
        fastest = min(row["median_s"] for row in rows.values() if row["ours"])
        (line,) = re.findall(
            rf"^\| {re.escape(case['name'])} \({case['size_name']}\) \| (.*) \|$", page, re.M
        )
        assert ("torch.compile" in line) == (rows["torch.compile"]["median_s"] < fastest)


def test_every_file_has_a_row_and_commands_are_those_that_made_them(
    repository: Path, part: Any, kept: dict[str, Any], swept: dict[str, Any], page: str
) -> None:
    folder = repository / "bench" / "results"
    first_cells = "".join(re.findall(r"^\|([^|]*)\|", page.split("\n\n")[1], re.M))
    named = set(re.findall(r"`([\w.]+)`", first_cells))
    assert named == {path.name for path in folder.iterdir()} - {"README.md"}
    for name, report in (("kernels_cpu", kept), ("prefix_sweep_cpu", swept)):
        (command,) = re.findall(rf"`(python bench/kernels\.py [^`]*/{name}\.png)`", page)
        options = part("kernels").parse(shlex.split(command)[2:])
        settings = {key: getattr(options, key) for key in report["settings"]}
        assert settings == report["settings"]
        assert options.threads == report["environment"]["threads"]
        assert options.json.name == f"{name}.json" and options.plot.name == f"{name}.png"
    (command,) = re.findall(r"`(python bench/aot\.py[^`]*)`", page)
    assert f"\n    {command}\n" in (folder / "aot.md").read_text(encoding="utf-8")


def test_rows_without_a_time_are_empty_bars_with_a_reason(part: Any, kept: dict[str, Any]) -> None:
    report = copy.deepcopy(kept)
    wrong, broken = ours(report, 0), ours(report, 2)
    wrong.update(status="refused", reason="error of advantages 1.0e-02 over bound 1e-05")
    broken.update(status="failed", reason="RuntimeError: $a_ is no number, " + "WIDE " * 30)
    for row in report["cases"][1]["rows"]:  # a panel without any time
        row.update(status="failed", reason="MemoryError: none left")
    figure = part("plots").draw(report)
    figure.canvas.draw()
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == len(kept["cases"])
    texts = [[text.get_text() for text in axes.texts] for axes in panels]
    assert "refused: error of advantages 1.0e-02 over bound 1e-05" in texts[0]
    assert texts[1] == ["failed: MemoryError: none left"] * len(report["cases"][1]["rows"])
    (cut,) = (text for text in texts[2] if text.startswith("failed: RuntimeError: $a_ is no"))
    assert cut.endswith("...")
    for axes, case in zip(panels, report["cases"], strict=True):
        shown = [row["provider"] for row in case["rows"] if row["status"] != "unavailable"]
        assert [label.get_text() for label in axes.get_yticklabels()][: len(shown)] == shown
        empty = [patch for patch in axes.patches if not patch.get_fill()]
        assert len(empty) == sum(row["status"] in ("failed", "refused") for row in case["rows"])
        for text in axes.texts:
            assert text.get_window_extent().x1 <= axes.get_window_extent().x1 + 1, text
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "no time: failed or refused" in labels
    labels = [text.get_text() for text in part("plots").draw(kept).legends[0].get_texts()]
    assert labels == ["fastomni", "peers", "least time at the ceilings"]


def test_a_picture_of_nothing_is_refused(part: Any, kept: dict[str, Any], tmp_path: Path) -> None:
    report = copy.deepcopy(kept)
    for case in report["cases"]:
        for row in case["rows"]:
            row.update(status="unavailable", reason="not installed")
    with pytest.raises(ValueError, match=r"plot\.png: nothing ran"):
        part("plots").plot(report, tmp_path / "plot.png")


def test_what_is_not_near_any_name_gets_the_list(
    part: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = part("kernels")
    assert kernels.main(["--device", "cpu", "--only", "nonsense"]) == 2
    said = capsys.readouterr().err
    assert "did you mean" not in said
    assert all(case.name in said for case in kernels.CASES)
    assert kernels.main(["--device", "cpu", "--sizes", "nonsense"]) == 2
    said = capsys.readouterr().err
    assert "choose from small, full, cpu, ragged, " in said and ", or give numbers such as" in said


def test_a_reader_that_goes_away_ends_the_command_quietly(
    repository: Path, python_environment: dict[str, str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does after its ten lines
    try:
        done = subprocess.run(
            [sys.executable, str(repository / "bench" / "kernels.py"), "--list"],
            env=python_environment,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
