"""What a stage writes and prints, and what a resumed one drops."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from fastomni.data.manifest import ManifestRow
from fastomni.report import StageReport

ROWS = [ManifestRow(name, Path(f"{name}.mp4"), None, None, "happy") for name in "ab"]


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_step_is_written_and_some_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = StageReport(tmp_path, "rlvr", log_every=2)
    report.start(0, 5)
    for step in range(1, 6):
        with report.phase("update"):
            pass
        metrics = {"loss": 0.5 / step, "reward": 1.25, "frac_reward_zero_std": 0.18}
        report.step(step, {**metrics, "entropy": 0.75, "completions/tokens": 30.0})
    report.close()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed] == ["rlvr 2/5", "rlvr 4/5", "rlvr 5/5"]
    assert "loss 0.2500  reward 1.25  zero-std 18%  ent 0.75  tok/s " in printed[0]
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines() == printed
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[2])
    assert record["loss"] == 0.5 / 3
    assert record["tokens_per_second"] == pytest.approx(30.0 / record["seconds/step"])
    assert record["seconds/update"] >= 0
    assert record["seconds/step"] >= record["seconds/update"] + record["seconds/data"] - 1e-9
    assert list((tmp_path / "tensorboard").iterdir())


def test_phases_are_timed_and_begin_anew_each_step(tmp_path: Path) -> None:
    report = StageReport(tmp_path, "base")
    report.start(0, 2)
    with report.phase("update"):
        time.sleep(0.02)
    with report.phase("update"):
        time.sleep(0.01)
    time.sleep(0.02)
    report.step(1, {"loss": 1.0})
    with report.phase("checkpoint"):
        time.sleep(0.01)
    report.step(2, {"loss": 1.0})
    first, second = (
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    )
    assert first["seconds/update"] >= 0.03 and first["seconds/data"] >= 0.02
    assert "seconds/update" not in second and second["seconds/checkpoint"] >= 0.01
    for record in (first, second):
        parts = [v for k, v in record.items() if k.startswith("seconds/") and k != "seconds/step"]
        assert sum(parts) == pytest.approx(record["seconds/step"])
    report.close()


def test_clips_that_are_left_out_are_counted_where_that_may_happen(tmp_path: Path) -> None:
    report = StageReport(tmp_path, "base")
    report.start(0, 2)
    report.step(1, {"loss": 1.0})
    report.count_skipped = lambda: 3
    report.step(2, {"loss": 1.0})
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert "data/skipped" not in json.loads(first)
    assert json.loads(second)["data/skipped"] == 3
    assert "skipped 3" in (tmp_path / "log.txt").read_text().splitlines()[1]
    report.close()


def test_hidden_metrics_are_written_but_not_shown(tmp_path: Path) -> None:
    report = StageReport(tmp_path, "rlvr")
    for hidden, shown in (((), "kl 0.1000  clip 2.5%"), (("clip_ratio/region_mean",), "kl 0.1")):
        report.start(0, 1, hidden)
        report.step(1, {"kl": 0.1, "clip_ratio/region_mean": 0.025})
        line = (tmp_path / "log.txt").read_text().splitlines()[-1]
        assert shown in line and ("clip" in line) == (not hidden)
        record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
        assert record["clip_ratio/region_mean"] == 0.025
    report.close()


def test_kernels_are_told_in_one_line_that_a_resumed_run_tells_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = {
        ("sample", "reference"): "it has no Triton kernel",
        ("grpo_loss", "triton"): "the tensors are on cuda:0",
        ("linear_logprobs", "triton"): "the tensors are on cuda:0",
    }
    report = StageReport(tmp_path, "rlvr")
    report.start(0, 2)
    report.kernels(choices)
    report.close()
    line = (
        "rlvr kernels  reference: sample (it has no Triton kernel); "
        "triton: grpo_loss, linear_logprobs (the tensors are on cuda:0)"
    )
    assert capsys.readouterr().out.splitlines() == [line]
    assert (tmp_path / "log.txt").read_text() == line + "\n"
    report.start(0, 2)
    report.close()
    assert (tmp_path / "log.txt").read_text() == ""


def test_completions_of_the_first_clip_are_kept(tmp_path: Path) -> None:
    report = StageReport(tmp_path, "rlvr")
    scores = {"reward": torch.tensor([[1.0, 0.0], [0.5, 0.5]])}
    report.completions(3, ROWS, ["one", "two", "three", "four"], scores)
    (line,) = (tmp_path / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {
        "step": 3,
        "id": "a",
        "label": "happy",
        "completions": ["one", "two"],
        "rewards": {"reward": [1.0, 0.0]},
    }


def test_a_reward_that_could_not_be_given_is_kept_as_null(tmp_path: Path) -> None:
    report = StageReport(tmp_path, "rlvr")
    report.completions(1, ROWS, ["one", "two"], {"reward": torch.tensor([[float("nan"), 0.5]])})
    assert '"rewards": {"reward": [null, 0.5]}' in (tmp_path / "completions.jsonl").read_text()


@pytest.mark.parametrize("torn", ["", '{"step": 5, "lo', "{"])
def test_a_resumed_stage_drops_later_lines_and_half_of_one(torn: str, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "completions.jsonl"):
        lines = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 5))
        (tmp_path / name).write_text(lines + torn, encoding="utf-8")
    lines = [f"rlvr {step}/4  loss 1.0  0.1s [data 1%]" for step in range(1, 5)]
    (tmp_path / "log.txt").write_text("\n".join([*lines, "rlvr 5/4  lo"]), encoding="utf-8")
    report = StageReport(tmp_path, "rlvr")
    report.start(2, 4)
    report.step(3, {"loss": 1.0})
    report.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert steps_in(tmp_path / "completions.jsonl") == [1, 2]
    log = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split()[1] for line in log] == ["1/4", "2/4", "3/4"] and log[:2] == lines[:2]
