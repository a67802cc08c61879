"""The whole training, from the command line too: stages, skips, resumes, interrupts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from fastomni import train as train_module
from fastomni.engine import Engine, Stage
from fastomni.model.omni import OmniModel

TrainToy = Callable[..., Path]
ALONE = ("base=null", "rlvr=null", "evaluate=null")
STEP_METRICS = {"step", "loss", "learning_rate", "grad_norm"}
RLVR_METRICS = {
    "policy_loss",
    "kl",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "ratio/mean",
    "ratio/min",
    "ratio/max",
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/min",
    "sampling/importance_sampling_ratio/max",
    "rollout_kl",
    "reward",
    "reward_std",
    "rewards/toy_rewards:spread/mean",
    "rewards/toy_rewards:spread/std",
    "rewards/format/mean",
    "rewards/format/std",
    "frac_reward_zero_std",
    "rewards/missing",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/tokens",
    "completions/clipped_ratio",
}


@pytest.fixture
def toy_copy(finished_toy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_toy, tmp_path / "run"))


def test_a_run_leaves_models_metrics_and_evaluations(
    finished_toy: Path, metrics_of: Callable[[Path], list[dict[str, float]]]
) -> None:
    for stage, steps in {"base": 2, "coldstart": 3, "rlvr": 3}.items():
        folder = finished_toy / stage
        OmniModel.from_pretrained(folder / "model")
        assert not (folder / "checkpoints").exists()
        assert list((folder / "tensorboard").iterdir())
        metrics = metrics_of(folder)
        assert [line["step"] for line in metrics] == [*range(1, steps + 1)]
        assert metrics[0].keys() == STEP_METRICS | (RLVR_METRICS if stage == "rlvr" else set())
        assert (folder / "evaluation" / "results.json").is_file()
        lines = (folder / "log.txt").read_text().splitlines()
        log = [line for line in lines if not line.startswith("rlvr kernels")]
        assert [line.split()[1] for line in log] == [f"{n + 1}/{steps}" for n in range(steps)]
    samples = (finished_toy / "rlvr" / "completions.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [1, 2, 3]
    assert len(json.loads(samples[0])["completions"]) == 3
    base = [line["loss"] for line in metrics_of(finished_toy / "base")]
    assert base[1] < base[0]
    assert (finished_toy / "summary.json").is_file()
    assert "num_generations: 3" in (finished_toy / "config.yaml").read_text()


def test_each_stage_changes_what_it_trains_and_nothing_else(finished_toy: Path) -> None:
    stages = [finished_toy / name for name in ("init", "base/model", "coldstart/model")]
    models = [dict(OmniModel.from_pretrained(path).named_parameters()) for path in stages]
    models.append(
        dict(OmniModel.from_pretrained(finished_toy / "rlvr" / "model").named_parameters())
    )
    changed = [
        {name.split(".")[0] for name in now if not now[name].equal(before[name])}
        for before, now in pairwise(models)
    ]
    assert changed[0] >= {"vision_tower", "audio_tower", "router", "projector", "decoder"}
    assert changed[1] == {"router", "projector", "audio_projector", "decoder"}
    assert changed[2] == changed[1]
    assert all(models[1][name].equal(models[3][name]) for name in models[1] if "bert_model" in name)


def test_a_second_run_skips_what_is_done_and_says_so(
    toy_copy: Path, train_toy: TrainToy, capsys: pytest.CaptureFixture[str]
) -> None:
    stamps = {p: p.stat().st_mtime_ns for p in toy_copy.glob("*/model/*.safetensors")}
    results = {p: p.stat().st_mtime_ns for p in toy_copy.glob("*/evaluation/results.json")}
    assert len(stamps) == 3 and len(results) == 3
    train_toy(toy_copy)
    said = capsys.readouterr().out
    for stage in ("base", "coldstart", "rlvr"):
        assert f"{stage}: done before, in {toy_copy / stage / 'model'}" in said
    assert "rlvr on dfew_test, measured before: WAR " in said
    assert stamps | results == {p: p.stat().st_mtime_ns for p in stamps | results}


def test_a_changed_setting_is_refused_by_name_with_the_remedy(
    toy_copy: Path, load_toy: Callable[..., object], train_toy: TrainToy
) -> None:
    config = (toy_copy / "config.yaml").read_text()
    for override, named in {
        "rlvr.optimizer.lr=0.0001": r"settings\.optimizer\.lr=0\.0003 \(now 0\.0001\)",
        "seed=4": r"seed=0 \(now 4\)",
        "prompt.question=What?": r"prompt\.question=.*now \"What\?\"",
    }.items():
        with pytest.raises(ValueError, match=f"{named}.*set output_dir to a new folder"):
            train_toy(toy_copy, override)
    assert (toy_copy / "config.yaml").read_text() == config  # still that of the run in the folder


def test_how_often_to_save_and_print_may_change(
    toy_copy: Path, train_toy: TrainToy, capsys: pytest.CaptureFixture[str]
) -> None:
    train_toy(toy_copy, "rlvr.checkpoint_every=3", "rlvr.log_every=2")
    assert "rlvr: done before" in capsys.readouterr().out


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fastomni.train", *arguments]


def test_torchrun_trains_with_one_process(
    toy_config: Path, tmp_path: Path, python_environment: dict[str, str]
) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    trainer = command(str(toy_config), f"output_dir={tmp_path}", *ALONE)[1:]
    child = subprocess.run(
        [sys.executable, *launcher, *trainer],
        env=python_environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert child.returncode == 0, child.stderr
    assert "coldstart 3/3" in child.stdout
    OmniModel.from_pretrained(tmp_path / "coldstart" / "model")


def stop_at(arguments: list[str], line: str, number: int, environment: dict[str, str]) -> str:
    """Starts a training, sends it a signal when it prints a line, returns its output."""
    child = subprocess.Popen(
        command(*arguments),
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert child.stdout is not None
    said = []
    for text in child.stdout:
        said.append(text)
        if line in text:
            child.send_signal(number)
            break
    said.append(child.stdout.read())
    expected = 130 if number == signal.SIGINT else -number
    assert child.wait(timeout=60) == expected, "".join(said)
    return "".join(said)


LONG = (*ALONE, "coldstart.epochs=4", "coldstart.checkpoint_every=1")  # 12 steps


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_command_that_was_stopped_goes_on_bit_for_bit(
    number: int,
    toy_config: Path,
    tmp_path: Path,
    train_toy: TrainToy,
    same_weights: Callable[[Path, Path], bool],
    metrics_of: Callable[[Path], list[dict[str, float]]],
    python_environment: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "stopped"
    arguments = [str(toy_config), f"output_dir={folder}", *LONG]
    said = stop_at(arguments, "coldstart 4/12", number, python_environment)
    assert "Traceback" not in said and not (folder / "coldstart" / "model").exists()
    if number == signal.SIGINT:
        assert f"interrupted; {folder} keeps the last checkpoint, and the same" in said
    capsys.readouterr()
    train_toy(folder, *LONG)
    resumed = capsys.readouterr().out.partition("resuming at step ")[2]
    assert 3 <= int(resumed.split()[0]) < 12
    whole = train_toy(tmp_path / "whole", *LONG) / "coldstart"
    assert same_weights(folder / "coldstart" / "model", whole / "model")
    assert metrics_of(folder / "coldstart") == metrics_of(whole)
    first, second = (whole / "metrics.jsonl").read_text().splitlines()[:2]
    assert "seconds/checkpoint" not in first and "seconds/checkpoint" in second


def test_an_interrupt_ends_the_command_with_a_sentence(
    toy_config: Path,
    tmp_path: Path,
    reproducible: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = Stage.checkpoint

    def stop(self: Stage, engine: Engine) -> None:
        checkpoint(self, engine)
        if engine.steps_done == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Stage, "checkpoint", stop)
    assert train_module.main([str(toy_config), f"output_dir={tmp_path}", *LONG]) == 130
    assert f"interrupted; {tmp_path} keeps the last checkpoint" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "coldstart" / "checkpoints").iterdir()] == [
        "step-000002"
    ]


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ([], "interrupted; no checkpoint was written yet; the same command begins anew"),
        (
            ["base/model/stage.json", "coldstart/model/stage.json"],
            "interrupted; FOLDER keeps what is done (base, coldstart), and the same command goes",
        ),
        (
            ["base/model/stage.json", "coldstart/checkpoints/step-000002/state.json"],
            "interrupted; FOLDER keeps the last checkpoint, and the same command goes on from it",
        ),
        (["coldstart/checkpoints/.step-000002.incomplete-7/state.json"], "no checkpoint was"),
    ],
)
def test_an_interrupt_says_what_there_is_to_go_on_from(
    left: list[str],
    said: str,
    toy_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(run: object) -> None:
        for name in left:
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "run", stop)
    assert train_module.main([str(toy_config), f"output_dir={tmp_path}"]) == 130
    assert said.replace("FOLDER", str(tmp_path)) in capsys.readouterr().err


def test_the_forwards_of_frozen_towers_have_their_own_time(finished_toy: Path) -> None:
    def parts(stage: str) -> list[set[str]]:
        lines = (finished_toy / stage / "metrics.jsonl").read_text().splitlines()
        return [{key for key in json.loads(line) if key.startswith("seconds/")} for line in lines]

    always = {"seconds/step", "seconds/update", "seconds/data"}
    assert parts("base") == [always] * 2  # its towers train: they run in the update
    assert parts("coldstart") == [always | {"seconds/features"}] * 3


def test_more_than_one_process_is_refused_before_torch_is_loaded(
    toy_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_module.main([str(toy_config)]) == 2
    assert "--nproc-per-node=1" in capsys.readouterr().err


def test_a_mistyped_key_ends_the_command_with_the_nearest_name(
    toy_config: Path, python_environment: dict[str, str]
) -> None:
    child = subprocess.run(
        command(str(toy_config), "rlvr.optimiser.lr=1"),
        env=python_environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 2
    assert child.stdout == "" and "Traceback" not in child.stderr
    assert "optimiser" in child.stderr and "did you mean rlvr.optimizer?" in child.stderr


def test_help_needs_no_configuration(python_environment: dict[str, str]) -> None:
    # Workers that draw the demo set import the main module again: it must stay light.
    code = (
        "import sys, fastomni.train as m; status = m.main(['--help']); "
        "assert status == 0 and m.main([]) == 2; "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], env=python_environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert "configs/rlvr.yaml" in child.stdout


def test_the_hub_stays_out_of_a_run(
    toy_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("USE_HUB_KERNELS", raising=False)
    assert train_module.main([str(toy_config), f"output_dir={tmp_path}", "model.path=none"]) == 1
    assert os.environ["USE_HUB_KERNELS"] == "0"
