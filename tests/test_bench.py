"""The step benchmark: what it computes is what it says, and wrong answers are not timed."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastomni_kernels import GroupLayout

TOY = ["--prompts", "2", "--generations", "3", "--prompt-tokens", "60", "--completion-tokens", "5",
       "--repeats", "2", "--threads", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def step(repository: Path) -> Iterator[ModuleType]:
    """The module bench/step.py."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository))
        yield importlib.import_module("bench.step")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def options(step: ModuleType) -> argparse.Namespace:
    return step.parse(TOY)


@pytest.fixture
def bench(step: ModuleType, options: argparse.Namespace) -> object:
    return step.prepare(options)


def test_the_command_measures_all_modes_from_any_folder(
    repository: Path, python_environment: dict[str, str], tmp_path: Path
) -> None:
    target = tmp_path / "step.json"
    command = [sys.executable, str(repository / "bench" / "step.py"), *TOY, "--json", str(target)]
    done = subprocess.run(
        command, cwd=tmp_path, env=python_environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(target.read_text(encoding="utf-8"))
    assert list(report["results"]) == ["true", "prompt", "released"]
    for result in report["results"].values():
        for phase in ("encode", "rollout", "reference", "update", "training", "step"):
            times = result[phase]
            assert 0 < times["min_s"] <= times["median_s"] <= times["max_s"]
        assert result["step"]["median_s"] > result["training"]["median_s"]
        assert result["peak_mib"] > 100
    for mode in ("prompt", "released"):
        medians = [report["results"][name]["training"]["median_s"] for name in (mode, "true")]
        assert report["ratios"][mode]["training"] == pytest.approx(medians[0] / medians[1], 1e-2)
        assert f"true against {mode}: training" in done.stdout
    assert max(report["gradient_difference"].values()) < 1e-4
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"]["threads"] == 1


def test_prompts_and_completions_have_the_lengths_asked_for(
    step: ModuleType, bench: object
) -> None:
    for mode in ("true", "released"):
        embeddings, rollout = step.encode_and_generate(bench, mode, step.Clock())
        assert len(embeddings) == 2 * 60
        assert rollout.layout.prompt_lengths == (60, 60)
        assert rollout.layout.sequence_lengths == (5,) * 6


def test_the_counts_of_rows_are_those_of_the_layouts(
    step: ModuleType, options: argparse.Namespace
) -> None:
    layout = GroupLayout.build([60, 60], [[5] * 3, [5] * 3])
    shared, repeated, released = (
        step.computed(options, mode) for mode in ("true", "prompt", "released")
    )
    assert shared["decoder_rows"] == layout.num_rows
    assert repeated["decoder_rows"] == released["decoder_rows"] == layout.repeated().num_rows
    assert shared["logit_rows"] == repeated["logit_rows"] == layout.num_completion_tokens
    assert released["logit_rows"] == layout.repeated().num_rows
    assert [c["clips_through_towers"] for c in (shared, repeated, released)] == [0, 0, 6]


def test_modes_that_disagree_are_not_timed(
    step: ModuleType, bench: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = ["true", "prompt", "released"]
    assert max(step.check_agreement(bench, modes).values()) < 1e-4
    right = step.reference_logprobs

    def wrong(*arguments: object) -> torch.Tensor:
        return right(*arguments) + (0.5 if arguments[-1] == "prompt" else 0.0)

    monkeypatch.setattr(step, "reference_logprobs", wrong)
    with pytest.raises(ValueError, match="sharing prompt and true disagree"):
        step.check_agreement(bench, modes)


def test_sizes_that_cannot_be_are_refused(
    step: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step.main(["--prompt-tokens", "10", "--threads", "1"]) == 1
    assert "the clip alone takes 50; ask for at least 52" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        step.parse(["--generations", "1"])
    assert "--generations must be 2 or more" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is reset on Linux only")
def test_the_peak_starts_anew(repository: Path, step: ModuleType) -> None:
    measure = importlib.import_module("bench.measure")
    block = torch.ones(64 * 2**20)  # 256 MiB
    with_block = measure.peak_mib()
    del block
    measure.reset_peak()
    assert measure.peak_mib() < with_block - 200
