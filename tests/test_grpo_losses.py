"""Every loss setting of the RLVR stage: the trainer's own update against formulas written out.

The plain way runs over one completion after the other, as the papers (and TRL) state the losses,
and lets autograd find the gradients.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fastomni.config import GrpoConfig, LossConfig, OptimizerConfig, RolloutConfig
from fastomni.engine import Engine
from fastomni.grpo import Experience, optimise, update
from fastomni.model.omni import OmniModel, PromptBatch
from fastomni.model.presets import build
from fastomni.rollout import Rollout
from fastomni.scoring import completion_logprobs
from fastomni_kernels import GroupLayout

TEMPERATURE, BETA, LONGEST = 0.8, 0.2, 9
COMPLETIONS = [[4, 1, 6], [2, 9, 3]]

# Small clips and thresholds in the middle of the ratios that occur: every branch is taken.
SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo, clip higher": {"clip_low": 0.1, "clip_high": 0.3},
    "dual clip": {"dual_clip": 1.3},
    "gspo": {"ratio": "sequence", "clip_low": 0.02, "clip_high": 0.03},
    "dapo": {"reduction": "dapo", "clip_high": 0.28},
    "dr_grpo": {"reduction": "dr_grpo"},
    "bnpo": {"reduction": "bnpo"},
    "cispo": {"policy": "cispo", "reduction": "dapo", "cispo_max": 1.1},
    "sapo": {"policy": "sapo"},
    "sapo, by sequence": {"policy": "sapo", "ratio": "sequence", "reduction": "dr_grpo"},
    "k1": {"kl": "k1"},
    "k2": {"kl": "k2"},
    "token truncate": {"mismatch": "token_truncate", "mismatch_max": 1.2, "mismatch_min": 0.9},
    "token mask": {"mismatch": "token_mask", "mismatch_max": 1.2, "mismatch_min": 0.8},
    "sequence truncate": {"mismatch": "sequence_truncate", "mismatch_max": 1.05},
    "sequence mask": {"mismatch": "sequence_mask", "mismatch_max": 1.3, "mismatch_min": 0.7},
    "entropy bonus": {"entropy_coef": 0.05},
}


def stage(loss: dict[str, Any], **settings: Any) -> GrpoConfig:
    """The settings of an RLVR stage with this loss."""
    defaults: dict[str, Any] = {"micro_batch_tokens": 10**6, "beta": BETA, **settings}
    return GrpoConfig(
        manifest="none.jsonl",
        epochs=1,
        prompts_per_step=2,
        rollout=RolloutConfig(max_new_tokens=LONGEST, temperature=TEMPERATURE),
        optimizer=OptimizerConfig(lr=2e-3),
        loss=LossConfig(**loss),
        **defaults,
    )


class Batch:
    """A model with two prompts, three completions each, and log-probs that have drifted apart."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.model = build("tiny", ["one two"], seed=3)
        config = self.model.config
        side = 16 * config.patches_per_side
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
            features = self.model.encode_towers(
                torch.randn(2, config.num_frames, 3, side, side, generator=generator),
                torch.randn(
                    (2, config.audio.num_mel_bins, 2 * config.audio.max_source_positions),
                    generator=generator,
                ),
            )
        self.prompts = PromptBatch(
            [(9, -201, 8, -202, 7), (5, -201, -202)], [(2, 4, 3), (2, 5, 5, 3)], features
        )
        self.model.set_trainable(("gate", "projector", "audio_projector", "decoder", "embeddings"))
        with torch.no_grad():
            embeddings, lengths = self.model.encode(self.prompts)
            self.layout = GroupLayout.build(list(lengths), COMPLETIONS)
            size = (self.layout.num_completion_tokens,)
            self.tokens = torch.randint(config.vocab_size, size, generator=generator)
            now, _ = completion_logprobs(
                self.model, embeddings, self.tokens, self.layout, TEMPERATURE
            )
        self.reference, self.old, self.rollout = (
            now + 0.2 * torch.randn(size, generator=generator) for _ in range(3)
        )
        self.advantages = torch.tensor([[1.1, 0.0, -0.9], [-0.7, 1.3, -1.2]])

    def experience(self, with_old: bool = True) -> Experience:
        rollout = Rollout(self.layout, self.tokens, self.rollout, [True] * 6)
        old = self.old if with_old else None
        return Experience(self.prompts, rollout, self.advantages, self.reference, old)

    def ours(self, settings: GrpoConfig) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Metrics and gradients of the trainer's update."""
        self.model.zero_grad()
        engine = Engine(self.model, settings.optimizer, 1)
        embeddings, _ = self.model.encode(self.prompts)
        metrics, _ = update(self.model, engine, embeddings, self.experience(), settings)
        return metrics, gradients(self.model)

    def plain(self, model: OmniModel, settings: GrpoConfig, old: Tensor | None) -> Tensor:
        """The loss, completion by completion, under grad."""
        embeddings, _ = model.encode(self.prompts)
        logprobs, entropy = completion_logprobs(
            model, embeddings, self.tokens, self.layout, TEMPERATURE
        )
        lengths = list(self.layout.sequence_lengths)
        old = logprobs.detach() if old is None else old
        columns = (logprobs, old, self.reference, self.rollout)
        rows = zip(*(column.split(lengths) for column in columns), strict=True)
        losses = [
            token_losses(*row, float(advantage), settings)
            for row, advantage in zip(rows, self.advantages.flatten(), strict=True)
        ]
        reduction = settings.loss.reduction
        if reduction == "grpo":
            loss = torch.stack([each.mean() for each in losses]).mean()
        elif reduction == "dr_grpo":
            loss = torch.cat(losses).sum() / (len(losses) * LONGEST)
        else:  # one micro-batch: bnpo is dapo
            loss = torch.cat(losses).mean()
        return loss - settings.loss.entropy_coef * entropy.mean()


def token_losses(
    logp: Tensor,
    old: Tensor,
    reference: Tensor,
    rollout: Tensor,
    advantage: float,
    settings: GrpoConfig,
) -> Tensor:
    """Losses [C] of one completion's tokens."""
    loss = settings.loss
    ratio = (logp - old).exp()
    if loss.ratio == "sequence":
        ratio = (logp - old).mean().exp().expand(len(logp))
    if loss.policy == "cispo":
        term = -ratio.clamp(max=loss.cispo_max).detach() * advantage * logp
    elif loss.policy == "sapo":
        positive = advantage > 0
        steep = loss.sapo_temperature_positive if positive else loss.sapo_temperature_negative
        term = -advantage * 4 / steep * torch.sigmoid(steep * (ratio - 1))
    else:
        clipped = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
        free = ratio if loss.dual_clip is None else ratio.clamp(max=loss.dual_clip)
        term = -torch.minimum(free * advantage, clipped * advantage)
    if loss.mismatch != "none":
        difference = old - rollout
        weight = difference.exp()
        if loss.mismatch.startswith("sequence"):
            weight = difference.sum().exp().expand(len(logp))
        low, high = loss.mismatch_min or 0.0, loss.mismatch_max
        if loss.mismatch.endswith("truncate"):
            weight = weight.clamp(low, high)
        else:
            weight = torch.where((weight < low) | (weight > high), 0.0, weight)
        term = term * weight.detach()
    gap = reference - logp
    kl = {"k1": -gap, "k2": gap**2 / 2, "k3": gap.exp() - gap - 1}[loss.kl]
    return term + settings.beta * kl


def gradients(model: OmniModel) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    scale = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm()
        assert error <= tolerance * (gradient.norm() + 0.01 * scale), name


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch()


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients_are_those_of_the_formulas(batch: Batch, name: str) -> None:
    settings = stage(SETTINGS[name])
    metrics, found = batch.ours(settings)
    loss = batch.plain(batch.model, settings, batch.old)
    loss.backward()
    assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=2e-6)
    close(found, gradients(batch.model), 1e-4)
    bonus = settings.loss.entropy_coef * metrics["entropy"]
    whole = metrics["policy_loss"] + BETA * metrics["kl"] - bonus
    assert metrics["loss"] == pytest.approx(whole, abs=1e-5)


def test_no_two_settings_give_the_same_gradients(batch: Batch) -> None:
    """Else a setting could be lost on its way without a test noticing."""
    norms = {}
    for name, loss in SETTINGS.items():
        _, found = batch.ours(stage(loss))
        norms[name] = float(torch.stack([g.norm() for g in found.values()]).norm())
    assert len(set(norms.values())) == len(norms)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "bnpo"])
def test_micro_batches_change_nothing(batch: Batch, name: str) -> None:
    whole_metrics, whole = batch.ours(stage(SETTINGS[name]))
    metrics, found = batch.ours(stage(SETTINGS[name], micro_batch_tokens=1))
    assert metrics == pytest.approx(whole_metrics, abs=2e-6)
    close(found, whole, 1e-5)


def test_bnpo_takes_its_mean_within_micro_batches(batch: Batch) -> None:
    parts = []
    for index in range(2):
        one = copy.copy(batch)
        one.prompts = batch.prompts.select([index])
        one.layout = batch.layout.select_prompts(index, index + 1)
        tokens = slice(*batch.layout.token_offsets[index : index + 2])
        for name in ("tokens", "reference", "old", "rollout"):
            setattr(one, name, getattr(batch, name)[tokens])
        one.advantages = batch.advantages[index : index + 1]
        parts.append(float(one.plain(one.model, stage(SETTINGS["dapo"]), one.old).detach()))
    loss = {"reduction": "bnpo", "clip_high": 0.28}
    metrics, _ = batch.ours(stage(loss, micro_batch_tokens=1))
    assert metrics["loss"] == pytest.approx(sum(parts) / 2, abs=2e-6)


@pytest.mark.parametrize("name", ["gspo", "cispo", "sequence mask", "entropy bonus"])
@pytest.mark.parametrize("sharing", ["prompt", "released"])
def test_the_other_sharing_modes_compute_the_same(batch: Batch, name: str, sharing: str) -> None:
    ours_metrics, ours = batch.ours(stage(SETTINGS[name]))
    metrics, found = batch.ours(stage(SETTINGS[name], sharing=sharing))
    assert metrics == pytest.approx(ours_metrics, abs=1e-5)
    close(found, ours, 1e-4)


def test_ratios_and_the_gap_to_the_rollout_are_measured(batch: Batch) -> None:
    metrics, _ = batch.ours(stage({"clip_low": 0.1, "clip_high": 0.15}))
    with torch.no_grad():
        embeddings, _ = batch.model.encode(batch.prompts)
        logprobs, entropy = completion_logprobs(
            batch.model, embeddings, batch.tokens, batch.layout, TEMPERATURE
        )
    ratio = (logprobs - batch.old).exp()
    advantages = batch.advantages.flatten()[batch.layout.sequence_of_token]
    low, high = (ratio < 0.9) & (advantages < 0), (ratio > 1.15) & (advantages > 0)
    gap = batch.old - batch.rollout
    assert 0 < low.sum() and 0 < high.sum()
    wanted = {
        "entropy": entropy.mean(),
        "clip_ratio/low_mean": low.float().mean(),
        "clip_ratio/high_mean": high.float().mean(),
        "clip_ratio/region_mean": (low | high).float().mean(),
        "ratio/mean": ratio.mean(),
        "ratio/min": ratio.min(),
        "ratio/max": ratio.max(),
        "sampling/sampling_logp_difference/mean": gap.abs().mean(),
        "sampling/sampling_logp_difference/max": gap.abs().max(),
        "sampling/importance_sampling_ratio/mean": gap.exp().mean(),
        "sampling/importance_sampling_ratio/min": gap.exp().min(),
        "sampling/importance_sampling_ratio/max": gap.exp().max(),
        "rollout_kl": (gap.exp() - gap - 1).mean(),
    }
    assert metrics.keys() == wanted.keys() | {"loss", "policy_loss", "kl"}
    found = {name: metrics[name] for name in wanted}
    assert found == pytest.approx({name: float(value) for name, value in wanted.items()}, abs=1e-5)


@pytest.mark.parametrize("sharing", ["true", "released"])
def test_later_updates_compare_with_the_policy_of_the_rollout(batch: Batch, sharing: str) -> None:
    """Three updates, each after the projectors have moved, against the same loop written out."""
    settings = stage({"clip_low": 0.001, "clip_high": 0.001}, updates_per_rollout=3)
    settings = dataclasses.replace(settings, sharing=sharing)  # type: ignore[arg-type]
    left, right = copy.deepcopy(batch.model), copy.deepcopy(batch.model)
    embeddings, _ = left.encode(batch.prompts)
    experience = batch.experience(with_old=False)
    engine = Engine(left, settings.optimizer, 3)
    metrics = optimise(left, engine, embeddings, experience, settings)
    assert engine.steps_done == 3

    plain, losses, norms, old = Engine(right, settings.optimizer, 3), [], [], None
    with torch.no_grad():
        rows, _ = right.encode(batch.prompts)
        start, _ = completion_logprobs(right, rows, batch.tokens, batch.layout, TEMPERATURE)
    for _ in range(3):
        loss = batch.plain(right, settings, old)
        plain.backward(loss)
        norms.append(plain.step())
        losses.append(float(loss.detach()))
        old = start
    assert experience.old_logprobs is not None
    torch.testing.assert_close(experience.old_logprobs, start, rtol=0, atol=1e-5)
    assert metrics["loss"] == pytest.approx(sum(losses) / 3, abs=1e-4)
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / 3, rel=1e-3)
    assert metrics["learning_rate"] == pytest.approx(2e-3 * (1 + 2 / 3 + 1 / 3) / 3)
    assert 0 < metrics["clip_ratio/region_mean"] <= 2 / 3  # none in the first of the three
    assert metrics["ratio/min"] < 0.999 and metrics["ratio/max"] > 1.001
    for (name, a), (_, b) in zip(left.named_parameters(), right.named_parameters(), strict=True):
        # AdamW's first steps have the size of the rate, whatever the gradient.
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4, msg=name)
        if name.startswith(("audio_projector", "router.bert_gate")):
            assert not a.equal(batch.model.get_parameter(name))
