"""The RLVR step on real clips: micro-batches and sharing modes change nothing but the cost."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastomni.config import GrpoConfig
from fastomni.engine import Engine
from fastomni.grpo import score, update
from fastomni.model.omni import OmniModel, PromptBatch
from fastomni.rollout import Rollout, Sampling, generate, sequence_seeds
from fastomni.runs import Run
from fastomni.scoring import reference_logprobs
from fastomni_kernels import group_advantages


@dataclass
class Step:
    """One step's rollout and all that its update needs."""

    policy: OmniModel
    reference: OmniModel
    prompts: PromptBatch
    rollout: Rollout
    advantages: Tensor
    settings: GrpoConfig

    def computed(self, **changes: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Loss metrics and gradients under changed settings."""
        settings = dataclasses.replace(self.settings, **changes)
        logprobs = reference_logprobs(
            self.reference,
            self.prompts,
            self.rollout.tokens,
            self.rollout.layout,
            settings.micro_batch_tokens,
            settings.rollout.temperature,
            settings.sharing,
        )
        engine = Engine(self.policy, settings.optimizer, total_steps=1)
        embeddings, _ = self.policy.encode(self.prompts)
        metrics = update(
            self.policy,
            engine,
            self.prompts,
            embeddings,
            self.rollout,
            self.advantages,
            logprobs,
            settings,
        )
        found = {n: p.grad.clone() for n, p in self.policy.named_parameters() if p.grad is not None}
        self.policy.zero_grad()
        return metrics, found


@pytest.fixture(scope="module")
def step(load_toy: Callable[..., Any], finished_toy: Path) -> Step:
    """Three clips with three completions each, and a policy that has left its reference."""
    config = load_toy(finished_toy, "rlvr.rollout.temperature=0.9", "rlvr.beta=0.1")
    run = Run(config)
    torch.use_deterministic_algorithms(False)
    policy, tokenizer = run.load()
    assert config.rlvr is not None
    policy.set_trainable(config.rlvr.trainable)
    reference = policy.reference()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    source = run.source(policy, tokenizer, run.rows("few_rlvr.jsonl"), use_features=False)
    ((rows, prompts),) = source.batches([[0, 3, 6]])
    sampling = Sampling(**dataclasses.asdict(config.rlvr.rollout))
    with torch.no_grad():
        embeddings, lengths = policy.encode(prompts)
    seeds = sequence_seeds(0, 1, [row.id for row in rows], sampling.num_generations)
    rollout = generate(policy, embeddings, lengths, sampling, seeds)
    rewards = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0], [2.0, 1.0, 1.0]])
    advantages, _ = group_advantages(rewards, 1e-4)
    return Step(policy, reference, prompts, rollout, advantages, config.rlvr)


def close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name, gradient in right.items():
        gap = float((left[name] - gradient).norm() / gradient.norm().clamp_min(1e-12))
        assert gap < tolerance, (name, gap)


def test_the_step_has_something_to_learn(step: Step) -> None:
    metrics, found = step.computed(micro_batch_tokens=10**6)
    assert metrics["kl"] > 1e-4 and metrics["entropy"] > 1
    assert metrics["rollout_logprob_gap"] < 1e-4
    trained = {name.split(".")[0] for name, tensor in found.items() if tensor.norm() > 0}
    assert trained == {"router", "projector", "audio_projector", "decoder"}
    assert not any("tower" in name or "bert_model" in name for name in found)


@pytest.mark.parametrize("budget", [1, 400])
def test_micro_batches_change_neither_metrics_nor_gradients(step: Step, budget: int) -> None:
    whole_metrics, whole = step.computed(micro_batch_tokens=10**6)
    metrics, found = step.computed(micro_batch_tokens=budget)
    assert metrics == pytest.approx(whole_metrics, abs=1e-6)
    close(found, whole, 1e-5)


@pytest.mark.parametrize("sharing", ["prompt", "released"])
def test_the_three_ways_to_compute_a_step_agree(step: Step, sharing: str) -> None:
    ours_metrics, ours = step.computed(sharing="true")
    metrics, found = step.computed(sharing=sharing)
    assert metrics == pytest.approx(ours_metrics, abs=1e-5)
    close(found, ours, 1e-4)


def test_scores_are_summed_by_weight_and_belong_to_their_label() -> None:
    rewards = {
        "right": lambda text, label: float(text == label),
        "length": lambda text, label: float(len(text)),
    }
    texts, labels = ["a", "bb", "a", "c"], ["a", "c"]
    right, length = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [1.0, 1.0]]
    scores = score(rewards, None, texts, labels)
    assert scores["right"].tolist() == right and scores["length"].tolist() == length
    assert scores["reward"].tolist() == [[2.0, 2.0], [1.0, 2.0]]
    weighted = score(rewards, [1.0, -0.5], texts, labels)
    assert weighted["reward"].tolist() == [[0.5, -1.0], [-0.5, 0.5]]
    assert weighted["right"].tolist() == right


def test_a_run_begins_on_its_reference_and_scores_what_it_says(
    finished_toy: Path, metrics_of: Callable[[Path], list[dict[str, float]]]
) -> None:
    metrics = metrics_of(finished_toy / "rlvr")
    assert metrics[0]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert metrics[-1]["kl"] > metrics[0]["kl"]
    assert all(line["rollout_logprob_gap"] < 1e-4 for line in metrics)
    assert [line["learning_rate"] for line in metrics] == pytest.approx([3e-4, 2e-4, 1e-4])
    for line in (finished_toy / "rlvr" / "completions.jsonl").read_text().splitlines():
        sample = json.loads(line)
        wanted = [sum(map(ord, text)) % 7 / 6 for text in sample["completions"]]
        assert sample["rewards"]["toy_rewards:spread"] == pytest.approx(wanted)


def test_without_a_kl_there_is_no_reference_and_max_steps_ends_the_stage(
    train_toy: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metrics_of: Callable[[Path], list[dict[str, float]]],
) -> None:
    def refuse(self: OmniModel) -> OmniModel:
        raise AssertionError("beta is 0, and the reference was copied")

    monkeypatch.setattr(OmniModel, "reference", refuse)
    options = ("base=null", "coldstart=null", "evaluate=null", "rlvr.beta=0", "rlvr.max_steps=2")
    metrics = metrics_of(train_toy(tmp_path, *options) / "rlvr")
    assert [line["step"] for line in metrics] == [1, 2]
    assert "kl" not in metrics[0] or metrics[0]["kl"] == 0
