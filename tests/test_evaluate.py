"""Evaluation: scores by hand, swapped voices, unreadable clips, kept results, the command."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastomni import evaluate
from fastomni.config import EvaluateConfig
from fastomni.data.manifest import ManifestRow
from fastomni.evaluate import answer, evaluate_rows, main, measure, voice_donors
from fastomni.model.omni import OmniModel, PromptBatch
from fastomni.prompts import PromptSource
from fastomni.report.summary import in_percent
from fastomni.runs import Run

SETTINGS = EvaluateConfig(manifests=["dfew_test.jsonl"], batch_size=4, max_new_tokens=3)


@pytest.fixture
def toy_copy(finished_toy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_toy, tmp_path / "run"))


@pytest.fixture
def finished(load_toy: Callable[..., Any], toy_copy: Path, reproducible: None) -> Run:
    run = Run(load_toy(toy_copy))
    run.model_directory = toy_copy / "rlvr" / "model"
    return run


@pytest.fixture
def source(finished: Run) -> PromptSource:
    model, tokenizer = finished.load()
    return finished.source(model, tokenizer, finished.rows("dfew_test.jsonl"))


def said(label: str) -> str:
    return f"<think>so</think><answer>{label}</answer>"


def test_results_are_those_worked_out_by_hand(
    source: PromptSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = ["sad", "sad", "happy", "angry"]
    kinds = ["face", "voice", "face", None]
    source.rows = [
        ManifestRow(str(i), Path("x.mp4"), None, None, label, kind=kind)
        for i, (label, kind) in enumerate(zip(labels, kinds, strict=True))
    ]
    own = [said("Sad."), said("happy"), said("happy"), "angry"]
    swapped = [said("sad"), said("sad"), said("sad"), said("angry")]
    calls: list[Mapping[int, int] | None] = []

    def prepared(*arguments: Any) -> dict[int, str]:
        calls.append(arguments[3])
        return dict(enumerate(swapped if arguments[3] else own))

    monkeypatch.setattr(evaluate, "answer", prepared)
    results, answers = evaluate_rows(source.model, source, SETTINGS)
    donors = calls[1]
    assert calls[0] is None and donors is not None
    assert all(labels[donors[i]] != labels[i] for i in range(4))
    assert results == {
        "clips": 4,
        "war": 0.5,
        "uar": pytest.approx((0.5 + 1.0 + 0.0) / 3),
        "recalls": {"angry": 0.0, "happy": 1.0, "sad": 0.5},
        "format_rate": 0.75,
        "invalid": 1,
        "skipped": 0,
        "by_kind": {
            "face": {"clips": 2, "war": 1.0, "war_swapped_voice": 0.5},
            "voice": {"clips": 1, "war": 0.0, "war_swapped_voice": 1.0},
        },
    }
    assert [line["answer"] for line in answers] == ["sad", "happy", "happy", None]
    assert [line["swapped"] for line in answers] == ["sad", "sad", "sad", "angry"]


def test_a_donor_is_of_another_label_and_always_the_same(source: PromptSource) -> None:
    rows = source.rows
    donors = voice_donors(rows)
    assert donors == voice_donors(rows)
    assert all(rows[donor].label != row.label for row, donor in zip(rows, donors, strict=True))
    assert len(set(donors)) > len(rows) // 3
    alike = [row for row in rows if row.label == rows[0].label]
    assert voice_donors(alike) == [*range(len(alike))]  # nobody else to borrow from


def test_a_swapped_clip_keeps_its_picture_and_hears_the_donor(
    source: PromptSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((_, whole),) = source.batches([range(len(source.rows))])
    assert whole.features is not None
    vision, audio = whole.features.vision, whole.features.audio
    assert vision is not None and audio is not None
    encode = OmniModel.encode
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(model: OmniModel, batch: PromptBatch) -> Any:
        features = batch.features
        assert features and features.vision is not None and features.audio is not None
        seen.append((features.vision, features.audio))
        return encode(model, batch)

    monkeypatch.setattr(OmniModel, "encode", watch)
    donors = {index: (index * 3 + 1) % len(source.rows) for index in range(len(source.rows))}
    own = answer(source.model, source, SETTINGS, None)
    assert torch.equal(torch.cat([a for _, a in seen]), audio)
    seen.clear()
    swapped = answer(source.model, source, SETTINGS, donors)
    assert torch.equal(torch.cat([v for v, _ in seen]), vision)
    assert torch.equal(torch.cat([a for _, a in seen]), audio[[donors[i] for i in own]])
    assert own.keys() == swapped.keys()
    assert answer(source.model, source, SETTINGS, {i: i for i in own}) == own


def test_answers_do_not_depend_on_the_batch_size(source: PromptSource) -> None:
    wanted = answer(source.model, source, SETTINGS, None)
    for size in (1, 14):
        settings = dataclasses.replace(SETTINGS, batch_size=size)
        assert answer(source.model, source, settings, None) == wanted


@pytest.mark.parametrize("batch_size", [1, 4])
def test_unreadable_clips_are_left_out_and_lend_no_voice(
    batch_size: int,
    toy_demo: Path,
    toy_copy: Path,
    load_toy: Callable[..., Any],
    reproducible: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "set"
    lines = (toy_demo / "dfew_test.jsonl").read_text().splitlines(keepends=True)[:7]
    for line in lines:
        video = json.loads(line)["video"]
        (folder / video).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(toy_demo / video, folder / video)
    (folder / "test.jsonl").write_text("".join(lines))
    gone = [json.loads(lines[i]) for i in (2, 6)]
    for row in gone:
        (folder / row["video"]).unlink()
    run = Run(load_toy(toy_copy, "data.on_error=skip"))
    run.model_directory = toy_copy / "rlvr" / "model"
    run.data_root = folder
    model, tokenizer = run.load()
    source = run.source(model, tokenizer, run.rows("test.jsonl"))
    lengths = Counter[int]()
    encode = OmniModel.encode

    def watch(model: OmniModel, batch: PromptBatch) -> Any:
        assert batch.features is not None and batch.features.audio is not None
        lengths[len(batch.input_ids) - len(batch.features.audio)] += 1
        return encode(model, batch)

    monkeypatch.setattr(OmniModel, "encode", watch)
    settings = EvaluateConfig(manifests=["test.jsonl"], batch_size=batch_size, max_new_tokens=2)
    results, answers = evaluate_rows(model, source, settings)
    assert (results["clips"], results["skipped"]) == (5, 2)
    ids = [json.loads(line)["id"] for line in lines]
    assert [line["id"] for line in answers] == [i for n, i in enumerate(ids) if n not in (2, 6)]
    assert set(lengths) == {0}
    assert all("swapped" in line for line in answers)


def test_results_are_kept_until_something_they_depend_on_changes(
    finished: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = finished.config.evaluate
    assert settings is not None
    loads: list[int] = []
    load = Run.load

    def counted(run: Run) -> Any:
        loads.append(1)
        return load(run)

    monkeypatch.setattr(Run, "load", counted)
    kept = measure(finished, "rlvr", settings)
    assert loads == []
    assert "rlvr on dfew_test, measured before: WAR" in capsys.readouterr().out
    other = EvaluateConfig(manifests=settings.manifests, max_new_tokens=2, swap_voice=False)
    changed = measure(finished, "rlvr", other)
    assert loads == [1] and "by_kind" not in changed["dfew_test"]
    monkeypatch.setattr(Run, "manifest_digest", lambda run, manifest: "another")
    measure(finished, "rlvr", other)
    assert loads == [1, 1]
    assert kept["dfew_test"]["clips"] == 14


def test_the_model_a_run_starts_from_is_measured_under_its_own_name(
    load_toy: Callable[..., Any], toy_copy: Path, reproducible: None
) -> None:
    path = toy_copy / "base" / "evaluation" / "results.json"
    found = json.loads(path.read_text())
    assert found["fingerprint"]["start"] == {"preset": "tiny", "seed": 0}
    assert found["settings"]["swap_voice"] is False and "by_kind" not in found["results"]
    assert found["seconds"] > 0
    # A run without a base stage measures the checkpoint that it was given.
    given = toy_copy / "base" / "model"
    config = load_toy(toy_copy.parent / "other", f"model.path={given}", "base=null")
    assert config.evaluate is not None
    run = Run(config)
    measure(run, "base", config.evaluate)
    other = json.loads((run.directory / "base" / "evaluation" / "results.json").read_text())
    assert other["fingerprint"]["start"] == {"model": str(given)}
    wanted = dict(found["results"]["dfew_test"])
    assert {key: other["results"]["dfew_test"][key] for key in wanted} == wanted
    # The words it is asked with are part of what decides its answers.
    asked = Run(load_toy(toy_copy.parent / "other", f"model.path={given}", "prompt.question=Who?"))
    assert asked.model_fingerprint() != run.model_fingerprint()


def test_the_command_gives_what_the_run_measured(
    toy_demo: Path, toy_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((toy_copy / "rlvr" / "evaluation" / "results.json").read_text())
    before = sorted(path for path in toy_copy.rglob("*"))
    test_set, report = str(toy_demo / "dfew_test.jsonl"), tmp_path / "report.json"
    model = str(toy_copy / "rlvr" / "model")
    assert main([model, test_set, "--swap-voice", "--json", str(report)]) == 0
    said = capsys.readouterr()
    assert "dfew_test: 14 clips; percent\nWAR " in said.out and said.err == ""
    for word in ("UAR", "format", "recall", "surprise", "with another voice"):
        assert word in said.out
    written = json.loads(report.read_text())
    assert written == {
        "checkpoint": model,
        "manifest": test_set,
        **in_percent(results["results"]["dfew_test"]),
    }
    assert sorted(path for path in toy_copy.rglob("*")) == before
    assert main([model, test_set, "--limit", "3", "--batch-size", "2"]) == 0
    said = capsys.readouterr()
    assert "dfew_test: 3 clips" in said.out and "with another voice" not in said.out


def test_the_limits_of_the_command_reach_the_model(
    toy_demo: Path, toy_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[EvaluateConfig, int, str, str]] = []

    def watch(model: Any, source: PromptSource, settings: EvaluateConfig, title: str) -> Any:
        seen.append((settings, len(source.rows), source._question, title))
        raise ValueError("seen")

    monkeypatch.setattr(evaluate, "evaluate_rows", watch)
    words = [str(toy_copy / "rlvr" / "model"), str(toy_demo / "dfew_test.jsonl")]
    assert main([*words, "--max-new-tokens", "7", "--batch-size", "5", "--limit", "6"]) == 1
    assert main(words) == 1
    ((first, rows, question, title), (second, all_rows, _, _)) = seen
    assert (first.max_new_tokens, first.batch_size, rows) == (7, 5, 6)
    assert (question, title) == ("Which emotion is the most obvious in this clip?", "dfew_test")
    assert (second.max_new_tokens, second.swap_voice, all_rows) == (4, False, 14)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "SET"], "nowhere is neither a directory nor a hub id"),
        (["tiny", "SET"], "tiny is a preset with random weights"),
        (["MODEL", "none.jsonl"], "none.jsonl: cannot be read"),
        (["MODEL", "SET", "--limit", "0"], "limit=0 is too small"),
        (["MODEL", "PLAIN", "--swap-voice"], "no row of"),
        (["DEAF", "SET", "--swap-voice"], "is asked with modal video"),
    ],
)
def test_the_command_says_what_is_missing(
    words: list[str],
    said: str,
    toy_demo: Path,
    toy_copy: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [json.loads(line) for line in (toy_demo / "dfew_test.jsonl").read_text().splitlines()]
    plain = toy_copy / "plain.jsonl"
    plain.write_text("".join(json.dumps({**row, "kind": None}) + "\n" for row in rows))
    deaf = Path(shutil.copytree(toy_copy / "rlvr" / "model", toy_copy / "deaf"))
    settings = json.loads((deaf / "fastomni.json").read_text())
    (deaf / "fastomni.json").write_text(json.dumps({**settings, "modal": "video"}))
    places = {
        "MODEL": toy_copy / "rlvr" / "model",
        "SET": toy_demo / "dfew_test.jsonl",
        "PLAIN": plain,
        "DEAF": deaf,
    }
    assert main([str(places.get(word, word)) for word in words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error


def test_an_interrupted_evaluation_keeps_nothing(
    toy_demo: Path,
    toy_copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate_rows", stop)
    report = toy_copy / "report.json"
    words = [str(toy_copy / "rlvr" / "model"), str(toy_demo / "dfew_test.jsonl")]
    assert main([*words, "--json", str(report)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not report.exists()
