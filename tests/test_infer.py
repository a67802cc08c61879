"""Answers for clips: what is printed, what is refused, and how a checkpoint is asked."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastomni import infer as infer_module
from fastomni.config import EvaluateConfig
from fastomni.data.manifest import read_manifest
from fastomni.evaluate import answer
from fastomni.infer import Answer, extract_explanation, infer, main
from fastomni.inference_settings import FILE, InferenceSettings, open_checkpoint
from fastomni.model.omni import OmniModel
from fastomni.rollout import Sampling

SAID = "<think>The eyes are wide.</think>\n<answer>surprise</answer>"


@pytest.fixture
def model(finished_toy: Path) -> str:
    return str(finished_toy / "rlvr" / "model")


@pytest.fixture
def clips(toy_demo: Path) -> list[str]:
    rows = read_manifest(toy_demo / "dfew_test.jsonl")[:3]
    return [str(row.video) for row in rows]


@pytest.fixture
def fluent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy model babbles; here every clip gets a well-formed answer."""

    def prepared(checkpoint: Any, clips: list[str], *_: object) -> Any:
        for clip in clips:
            if "bad" in clip:
                yield ValueError(f"{clip}: no such file; check the path")
            else:
                yield Answer(clip, SAID, "The eyes are wide.", "surprise")

    monkeypatch.setattr(infer_module, "infer", prepared)


def test_a_clip_is_answered_as_the_evaluation_answers_it(
    model: str, clips: list[str], toy_demo: Path
) -> None:
    checkpoint = open_checkpoint(model)
    rows = read_manifest(toy_demo / "dfew_test.jsonl")[:3]
    settings = EvaluateConfig(manifests=["x"], max_new_tokens=6)
    source = checkpoint.source(rows, workers=0, use_features=True)
    wanted = answer(checkpoint.model, source, settings, None)
    found = list(infer(checkpoint, clips, Sampling(max_new_tokens=6, temperature=0.0)))
    assert [a.text for a in found if isinstance(a, Answer)] == [wanted[i].strip() for i in range(3)]


def test_draws_follow_from_the_seed_and_the_clip_alone(model: str, clips: list[str]) -> None:
    checkpoint = open_checkpoint(model)

    def texts(chosen: list[str], seed: int) -> list[str]:
        results = infer(checkpoint, chosen, Sampling(max_new_tokens=8), seed)
        return [result.text for result in results if isinstance(result, Answer)]

    first = texts(clips, 5)
    assert len(set(first)) == 3
    assert texts(clips[::-1], 5) == first[::-1]
    assert texts(clips, 6) != first


@pytest.mark.parametrize(
    ("text", "explanation"),
    [
        (SAID, "The eyes are wide."),
        ("<think> a </think> b", "a"),
        ("<think>cut off", None),
        ("</think><think>", None),
        ("no tags", None),
    ],
)
def test_the_explanation_is_what_the_think_block_holds(text: str, explanation: str | None) -> None:
    assert extract_explanation(text) == explanation


def test_the_answer_is_printed_under_the_file(
    model: str, fluent: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([model, "a.mp4", "b.mp4"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out == "".join(
        f"{name}\n  explanation: The eyes are wide.\n  answer: surprise\n"
        for name in ("a.mp4", "b.mp4")
    )


def test_each_clip_is_a_line_of_json(
    model: str, fluent: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([model, "a.mp4", "bad.mp4", "b.mp4", "--json"]) == 1
    said = capsys.readouterr()
    rest = {"text": SAID, "explanation": "The eyes are wide.", "answer": "surprise"}
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert lines == [{"clip": name, **rest} for name in ("a.mp4", "b.mp4")]
    assert said.err == "error: bad.mp4: no such file; check the path\n"


def test_bad_clips_are_named_and_the_others_answered(
    model: str, clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(Path(clips[0]).read_bytes()[:200])
    gone = str(tmp_path / "gone.mp4")
    words = [model, gone, clips[0], str(torn), clips[0], "--max-new-tokens", "2"]
    assert main(words) == 1
    said = capsys.readouterr()
    assert said.out.count(f"{clips[0]}\n  no well-formed answer: ") == 2
    missing, damaged = said.err.splitlines()
    assert missing == f"error: {gone}: no such file; check the path"
    assert damaged.startswith(f"error: {torn}: ")


def test_the_question_and_the_limits_reach_the_model(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Sampling, int]] = []

    def watch(checkpoint: Any, clips: list[str], sampling: Sampling, seed: int) -> Any:
        seen.append((checkpoint.settings.prompt.question, sampling, seed))
        return iter(())

    monkeypatch.setattr(infer_module, "infer", watch)
    words = ["--question", "Who?", "--max-new-tokens", "9", "--temperature", "0.5", "--seed", "7"]
    assert main([model, "a.mp4", *words]) == 0
    assert main([model, "a.mp4"]) == 0
    assert seen == [
        ("Who?", Sampling(max_new_tokens=9, temperature=0.5), 7),
        (
            "Which emotion is the most obvious in this clip?",
            Sampling(max_new_tokens=4, temperature=0.0),  # what the run evaluated with
            0,
        ),
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "3"], "--seed has no effect without --temperature"),
        (["--temperature", "-1"], "--temperature must be 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_the_model_is_read(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["nowhere", "a.mp4", *words])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "question", "said"),
    [
        ("nowhere", "Who?", "nowhere is neither a directory nor a hub id"),
        ("tiny", "Who?", "tiny is a preset with random weights"),
        ("MODEL", "What is in <video>?", "holds <video>, which the template places itself"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(
    name: str, question: str, said: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([model if name == "MODEL" else name, "a.mp4", "--question", question]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error


def test_an_interrupt_ends_with_a_word(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(infer_module, "infer", stop)
    assert main([model, "a.mp4"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_every_stage_leaves_how_its_model_is_asked(
    finished_toy: Path, load_toy: Callable[..., Any], tmp_path: Path
) -> None:
    config = load_toy(tmp_path)
    found = {}
    for stage in ("base", "coldstart", "rlvr"):
        directory = finished_toy / stage / "model"
        model = OmniModel.from_pretrained(directory)
        found[stage] = InferenceSettings.read(model, directory)
    wanted = InferenceSettings(
        prompt=config.prompt, modal="video_audio", aspect="pad", num_frames=4, max_new_tokens=4
    )
    assert found["coldstart"] == found["rlvr"] == wanted
    # The base learned the rows' own question, and no instruction behind it.
    prompt = dataclasses.replace(
        config.prompt, question="Describe the face and the voice.", think_instruction=""
    )
    assert found["base"] == dataclasses.replace(wanted, prompt=prompt)


def test_the_settings_go_where_the_model_goes(model: str, tmp_path: Path) -> None:
    loaded = OmniModel.from_pretrained(model)
    settings = InferenceSettings(modal="audio", num_frames=2, max_new_tokens=11)
    settings.attach(loaded)
    loaded.save_pretrained(tmp_path / "copy")
    opened = open_checkpoint(str(tmp_path / "copy"))
    assert opened.settings == settings
    assert opened.model.config.num_frames == 2


def test_a_checkpoint_that_does_not_say_is_asked_the_released_way(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / FILE).unlink()
    settings = open_checkpoint(str(folder)).settings
    assert f"note: {folder} has no {FILE}" in capsys.readouterr().err
    # R1-Omni's inference command: two blanks before the instruction, no placeholder, squashed.
    assert settings.prompt.separator == "  " and settings.prompt.video_placeholder is False
    assert settings.prompt.question.startswith("As an emotional recognition expert")
    assert (settings.aspect, settings.num_frames, settings.max_new_tokens) == ("squash", 4, 2048)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", r"fastomni\.json is not JSON"),
        ("[]", r"fastomni\.json holds no object"),
        ('{"num_frames": 4, "modl": "video"}', r"fastomni\.json: .*did you mean modal"),
        ('{"num_frames": 0}', r"fastomni\.json: num_frames=0 is too small"),
        ("{}", r"fastomni\.json: num_frames: is missing"),
    ],
)
def test_damaged_settings_are_refused_by_name(
    content: str, said: str, model: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / FILE).write_text(content)
    with pytest.raises(ValueError, match=said):
        open_checkpoint(str(folder))
