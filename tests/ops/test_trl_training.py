"""Whole trainings with the drop-in for TRL's GRPOTrainer: the same as TRL's, and the example."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


def test_a_whole_training_is_trls(trl_tools: SimpleNamespace, tmp_path: Path) -> None:
    from transformers import set_seed

    trl_tools.tiny().save_pretrained(tmp_path)
    settings = dict(
        max_steps=4,
        learning_rate=1e-2,
        beta=0.1,
        num_iterations=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        loss_type="dapo",
        entropy_coef=0.01,
        model_init_kwargs={"dtype": "float32"},
    )
    histories, weights = [], []
    for kind in (trl_tools.GRPOTrainer, trl_tools.Trainer):
        trainer = trl_tools.build(kind, str(tmp_path), **settings)
        set_seed(0)
        trainer.train()
        histories.append(trainer.state.log_history[:-1])  # the last is of times
        weights.append(dict(trainer.model.named_parameters()))
    theirs, ours = histories
    assert len(ours) == len(theirs) == 4
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in other.keys() - {"step_time"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    assert any(entry["kl"] > 1e-4 for entry in ours)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)


def test_the_example_teaches_a_tiny_model(repository: Path) -> None:
    pytest.importorskip("trl")
    example = repository / "examples" / "trl_grpo.py"
    assert len(example.read_text(encoding="utf-8").splitlines()) < 60
    before, after = runpy.run_path(str(example))["main"]()
    assert before < 0.3
    assert after > 0.8
