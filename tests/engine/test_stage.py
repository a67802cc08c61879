"""A stage's folder: when it is done, what it refuses, and what a crash leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import fastomni.engine.checkpoint as checkpoint_module
from fastomni.config import OptimizerConfig
from fastomni.engine import Engine, Stage
from fastomni.engine.checkpoint import latest_checkpoint, steps
from fastomni.engine.stage import StageError
from fastomni.model.config import CheckpointError
from fastomni.model.omni import OmniModel

FINGERPRINT = {"settings": {"optimizer": {"lr": 0.1}, "epochs": 2}, "seed": 0}


@pytest.fixture
def engine(finished_toy: Path) -> Engine:
    model = OmniModel.from_pretrained(finished_toy / "init")
    model.set_trainable(["gate"])
    return Engine(model, OptimizerConfig(lr=0.01), total_steps=10)


def gate(engine: Engine) -> Tensor:
    return engine.model.get_parameter("router.bert_gate.2.weight")


def take_step(engine: Engine) -> None:
    engine.backward(gate(engine).sum())
    engine.step()


def test_checkpoints_come_at_their_interval_and_one_is_kept(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = Stage(tmp_path, FINGERPRINT, checkpoint_every=2)
    seen = []
    for _ in range(5):
        take_step(engine)
        stage.checkpoint(engine)
        seen.append([path.name for path in steps(tmp_path / "checkpoints")])
    two, four = ["step-000002"], ["step-000004"]
    assert seen == [[], two, two, four, four]
    weight = gate(engine).detach().clone()
    engine.steps_done = 0
    stage.resume(engine)
    assert engine.steps_done == 4
    assert not gate(engine).equal(weight)
    assert "resuming at step 4 from" in capsys.readouterr().out


def test_no_checkpoint_falls_between_the_updates_of_a_step(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = Stage(tmp_path, FINGERPRINT, checkpoint_every=2, updates_per_step=3)
    seen = []
    for _ in range(5):
        for _ in range(3):
            take_step(engine)
        stage.checkpoint(engine)
        seen.append([path.name for path in steps(tmp_path / "checkpoints")])
    two, four = ["step-000006"], ["step-000012"]  # optimiser steps
    assert seen == [[], two, two, four, four]
    stage.resume(engine)
    assert engine.steps_done == 12
    assert "resuming at step 4 from" in capsys.readouterr().out


def test_the_newest_checkpoint_is_the_one_of_most_steps(tmp_path: Path) -> None:
    for name in ("step-1000000", "step-999999", ".step-2000000.incomplete-1"):
        (tmp_path / name).mkdir()
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and latest.name == "step-1000000"
    assert latest_checkpoint(tmp_path / "none") is None


def test_a_finished_stage_is_done_and_keeps_no_checkpoint(engine: Engine, tmp_path: Path) -> None:
    stage = Stage(tmp_path, FINGERPRINT, checkpoint_every=1)
    assert not stage.done
    take_step(engine)
    stage.checkpoint(engine)
    stage.finish(engine.model)
    assert stage.done
    assert not (tmp_path / "checkpoints").exists()
    OmniModel.from_pretrained(stage.model_directory)


@pytest.mark.parametrize("finished", [True, False])
def test_another_setting_is_refused_by_name_and_value(
    finished: bool, engine: Engine, tmp_path: Path
) -> None:
    stage = Stage(tmp_path, FINGERPRINT, checkpoint_every=1)
    take_step(engine)
    stage.checkpoint(engine)
    if finished:
        stage.finish(engine.model)
    changed: dict[str, Any] = {
        "settings": {"optimizer": {"lr": 0.2}, "epochs": 2}, "seed": 0
    }  # fmt: skip
    Stage(tmp_path, FINGERPRINT).check()
    with pytest.raises(StageError) as caught:
        Stage(tmp_path, changed).check()
    message = str(caught.value)
    assert "settings.optimizer.lr=0.1 (now 0.2)" in message
    assert "epochs" not in message and "seed" not in message
    assert "set output_dir to a new folder, or remove" in message
    if not finished:
        with pytest.raises(StageError, match=r"now 0\.2"):
            Stage(tmp_path, changed).resume(engine)


def failing_save(written: Callable[..., None]) -> Callable[..., None]:
    def save(tensors: dict[str, Any], path: Path, **options: Any) -> None:
        written(tensors, path, **options)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    return save


def test_a_crash_inside_a_write_leaves_the_checkpoint_before(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, FINGERPRINT, checkpoint_every=1)
    take_step(engine)
    stage.checkpoint(engine)
    kept = gate(engine).detach().clone()
    take_step(engine)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", failing_save(checkpoint_module.save_file))
        with pytest.raises(OSError, match="No space left"):
            stage.checkpoint(engine)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    stage.resume(engine)
    assert engine.steps_done == 1
    assert gate(engine).equal(kept)


def test_a_damaged_checkpoint_is_named_with_what_to_do(engine: Engine, tmp_path: Path) -> None:
    take_step(engine)
    saved = engine.save(tmp_path)
    path = saved / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors cannot be read.*remove"):
        engine.resume(saved)
