"""What a report says of shared prompts: goals, what sharing gains, panels of sweeps."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def part(repository: Path) -> Iterator[Any]:
    """A function that gives a module of the benchmark by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository))
        yield lambda name: importlib.import_module(f"bench.{name}")


def result_of(name: str, sizes: dict[str, int], **times: float) -> dict[str, Any]:
    """A made-up result whose rows are timed; names of ours begin with "fastomni"."""
    rows = [
        {"provider": provider, "ours": provider.startswith("fastomni"), "status": "timed",
         "reason": "", "median_s": value}
        for provider, value in times.items()
    ]  # fmt: skip
    return {"name": name, "size_name": "cpu-sweep", "sizes": sizes, "rows": rows,
            "repeated_work": 4.0, "dtype": "float32"}  # fmt: skip


SIZES = {"N": 1, "P": 976, "G": 8, "C": 64, "Hq": 14, "Hkv": 2, "D": 64, "shortest": 100}
TRAINING = "prefix_attention/forward+backward"


def verdicts(part: Any, accelerator: str | None, *results: dict[str, Any]) -> dict[str, Any]:
    """What is said of the goals that were measured."""
    where = {"accelerator": None if accelerator is None else {"name": accelerator}}
    judged = part("goals").judge_all({"environment": where, "cases": list(results)})
    return {goal["goal"]: goal for goal in judged if goal["verdict"] != "not measured"}


def test_goals_of_a_cpu_compare_with_the_fastest_sdpa(part: Any) -> None:
    even = result_of(TRAINING, SIZES, **{
        "fastomni reference": 1.0, "repeated: SDPA padded": 3.9, "repeated: SDPA each": 3.8,
        "repeated: flash_varlen": 1.1, "torch eager": 0.9,
    })  # fmt: skip
    (judged,) = verdicts(part, None, even).values()
    assert "at least 3.7 times" in judged["goal"]
    assert (judged["verdict"], judged["measured"]) == ("met", pytest.approx(3.8))
    ragged = {**even, "sizes": {**SIZES, "N": 4, "P": 512, "shortest": 40}, "repeated_work": 5.0}
    (judged,) = verdicts(part, None, ragged).values()
    assert (judged["verdict"], judged["measured"]) == ("missed", pytest.approx(3.8 / 5.0))
    even["rows"][2].update(status="failed")
    assert verdicts(part, None, even).popitem()[1]["measured"] == pytest.approx(3.9)
    assert verdicts(part, "NVIDIA H100", even, ragged) == {}
    even["rows"][0].update(status="failed")
    assert verdicts(part, None, even) == {}


def test_goals_of_an_h100_are_those_of_the_kernels(part: Any) -> None:
    sizes = {**SIZES, "N": 8, "P": 1500, "C": 200}

    def rows(seconds: float, flops: float) -> list[dict[str, Any]]:
        return [
            {"provider": "fastomni triton", "ours": True, "status": "timed", "median_s": seconds,
             "flops_per_s": flops / seconds},
            {"provider": "repeated: torch varlen", "ours": False, "status": "timed",
             "median_s": 3.0e-3},
            {"provider": "repeated: SDPA padded", "ours": False, "status": "timed",
             "median_s": 1.0e-3},
        ]  # fmt: skip

    def made_up(name: str, seconds: float, flops: float, **changed: int) -> dict[str, Any]:
        found = {"name": name, "size_name": "full", "sizes": {**sizes, **changed}}
        return found | {
            "rows": rows(seconds, flops), "needed": {"flops": flops}, "repeated_work": 3.1,
        }  # fmt: skip

    results = [
        made_up("prefix_attention/forward", 0.3e-3, 0.108e12),
        made_up(TRAINING, 1.2e-3, 0.378e12),
        made_up(TRAINING, 1.0e-3, 0.7e12, G=16),
    ]
    found = verdicts(part, "NVIDIA H100 80GB HBM3", *results)
    named = {text: goal for text, goal in found.items() if text.startswith("H100")}
    measured = [(goal["measured"], goal["verdict"]) for goal in named.values()]
    assert measured == [
        (pytest.approx(2.5), "met"),  # flash varlen over ours
        (pytest.approx(3.0), "met"),  # the same with G=16
        (pytest.approx(360e12), "met"),  # 0.108 TFLOP in 0.3 ms
        (pytest.approx(300e12), "met"),  # (0.378 - 0.108) TFLOP in (1.2 - 0.3) ms
    ]
    backward = verdicts(part, "NVIDIA H100", results[1])  # without the forward there is no rest
    assert not any("its backward" in text for text in backward)
    decode = {"name": "prefix_decode/forward", "size_name": "full", "rows": rows(7e-6, 1.0),
              "sizes": dict(zip("NPGCHKD", (8, 1500, 8, 100, 14, 2, 64), strict=True))}  # fmt: skip
    sample = {"name": "sample/forward", "size_name": "full", "rows": rows(40e-6, 1.0),
              "sizes": {"S": 64, "V": 151936}}  # fmt: skip
    found = verdicts(part, "NVIDIA H100", decode, sample)
    assert [goal["verdict"] for text, goal in found.items() if text.startswith("H100")] == [
        "missed", "met",
    ]  # fmt: skip
    assert not any(t.startswith("H100") for t in verdicts(part, "NVIDIA H200", *results))


def test_a_result_says_what_sharing_gains(part: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(TRAINING, SIZES, fastomni_reference=0.5)
    assert part("sharing").sentence(result) == ""
    result["rows"].append({**result["rows"][0], "provider": "repeated: SDPA padded",
                           "ours": False, "median_s": 1.75})  # fmt: skip
    said = "3.50 times as fast as SDPA on repeated rows, which need 4.00 times the arithmetic"
    assert part("sharing").sentence(result) == said
    assert part("sharing").sentence({**result, "repeated_work": 4.0} | {"rows": []}) == ""
    report = {"cases": [result], "goals": []}
    table = part("record").sharing_table(report)
    assert f"| {TRAINING} (cpu-sweep 1x976x8x64x14x2x64x100) | 4.00 | 3.50 |\n" in table
    del result["repeated_work"]
    assert part("sharing").sentence(result) == part("record").sharing_table(report) == ""
    result |= {"needed": {"bytes": 1.0, "flops": 1.0, "formula": ""}, "floor_s": 1.0,
               "bound_by": "memory", "repeated_work": 4.0}  # fmt: skip
    for row in result["rows"]:
        row.update(status="failed")
    part("tables").show_case(result)
    assert "ours:" not in capsys.readouterr().out


def test_a_sweep_is_drawn_one_number_at_a_time(part: Any) -> None:
    cases = part("cases_prefix")
    results = []
    for sizes in cases.CPU_SWEEP:
        named = dict(zip(cases.DIMENSIONS, sizes, strict=True))
        result = result_of(TRAINING, named, fastomni_reference=1.0, FlexAttention=2.0)
        result["rows"].append({**result["rows"][1], "provider": "repeated: SDPA padded",
                               "median_s": 3.0})  # fmt: skip
        results.append({**result, "repeated_work": cases.repeated_work(sizes)})
    arms = part("sweep_plots").arms(results)
    points = {arm.dimension: [r["sizes"][arm.dimension] for r in arm.results] for arm in arms}
    assert points == {"P": [512, 1024, 2048], "G": [4, 8, 16, 32], "C": [64, 128, 256, 512]}
    where = {"accelerator": None, "device": "a CPU", "threads": 1, "torch": "2", "date": "today"}
    figure = part("plots").draw({"environment": where, "cases": results})
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_xlabel() for axes in panels] == ["P", "G", "C"]
    lines = {line.get_label(): line for line in panels[0].lines}
    assert list(lines["fastomni"].get_ydata()) == [3.0, 3.0, 3.0]
    assert list(lines["FlexAttention"].get_ydata()) == [1.5, 1.5, 1.5]
    allowed = [cases.repeated_work((1, p, 8, 64, 14, 2, 64, 100)) for p in (512, 1024, 2048)]
    assert list(lines["less arithmetic"].get_ydata()) == pytest.approx(allowed)
    for result in results:
        result["rows"][-1].update(status="failed")
    with pytest.raises(ValueError, match="nothing to draw"):
        part("plots").draw({"environment": where, "cases": results})
