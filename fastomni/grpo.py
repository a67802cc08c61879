"""Reinforcement learning from verifiable rewards: GRPO over groups that share one encoding.

One step, in order: encode the clips once -> roll out G completions per prompt -> score -> group
advantages -> reference log-probs -> policy forward, loss, backward -> step. The prompts' embeddings
are made under grad once; rollout and micro-batches use a detached leaf that collects its gradient,
and one last backward takes that through projectors and gate.

Shapes: N prompts, G completions each, S = N * G sequences, M completion tokens, H hidden.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastomni.config import GrpoConfig
from fastomni.engine import Engine, Stage
from fastomni.model.omni import OmniModel, PromptBatch
from fastomni.prompts import PromptSource
from fastomni.report import StageReport, group_metrics, loss_metrics
from fastomni.rewards import Reward, resolve
from fastomni.rollout import Rollout, Sampling, generate, sequence_seeds
from fastomni.scoring import (
    completion_logprobs,
    micro_batches,
    reference_logprobs,
    released_logprobs,
)
from fastomni_kernels import GroupLayout, group_advantages, grpo_loss


def train(
    policy: OmniModel,
    source: PromptSource,
    settings: GrpoConfig,
    stage: Stage,
    report: StageReport,
    seed: int,
) -> None:
    """Trains `policy` in place on the labelled rows of `source`, resuming where it was."""
    policy.set_trainable(settings.trainable)
    reference = policy.reference() if settings.beta > 0 else None
    steps_per_epoch = math.ceil(len(source.rows) / settings.prompts_per_step)
    total_steps = math.ceil(settings.epochs * steps_per_epoch)
    engine = Engine(policy, settings.optimizer, min(total_steps, settings.max_steps or total_steps))
    stage.resume(engine)
    report.start(engine.steps_done, engine.total_steps)
    rewards = dict(zip(settings.rewards, resolve(settings.rewards), strict=True))
    sampling = Sampling(**dataclasses.asdict(settings.rollout))
    for step, rows, prompts in source.steps(
        engine.steps_done, engine.total_steps, settings.prompts_per_step, seed
    ):
        with report.phase("rollout"):
            with torch.set_grad_enabled(settings.sharing != "released"):  # which encodes again
                embeddings, lengths = policy.encode(prompts)  # [sum P, H]
            seeds = sequence_seeds(seed, step, [row.id for row in rows], sampling.num_generations)
            rollout = generate(policy, embeddings.detach(), lengths, sampling, seeds)
        with report.phase("score"):
            texts = [source.tokenizer.decode(ids) for ids in rollout.completions()]
            scores = score(rewards, settings.reward_weights, texts, [row.label for row in rows])
            advantages, no_spread = group_advantages(scores["reward"], settings.advantage_eps)
            advantages = advantages.to(policy.device)
        with report.phase("reference"):
            reference_logps = None
            if reference is not None:
                reference_logps = reference_logprobs(
                    reference,
                    prompts,
                    rollout.tokens,
                    rollout.layout,
                    settings.micro_batch_tokens,
                    sampling.temperature,
                    settings.sharing,
                )
        with report.phase("update"):
            metrics = update(
                policy, engine, prompts, embeddings, rollout, advantages, reference_logps, settings
            )
            learning_rate = engine.learning_rate
            grad_norm = engine.step()
        metrics |= group_metrics(scores, no_spread, rollout.stopped, rollout.layout)
        metrics |= {"learning_rate": learning_rate, "grad_norm": grad_norm}
        report.step(step, metrics)
        report.completions(step, rows, texts, scores)
        stage.checkpoint(engine)


def score(
    rewards: Mapping[str, Reward],
    weights: Sequence[float] | None,
    texts: Sequence[str],
    labels: Sequence[str],
) -> dict[str, Tensor]:
    """Scores of S completions, prompt by prompt.

    Args:
        rewards: name -> function of (text, label).
        weights: one per reward, or None for 1 each.
        texts: S completions.
        labels: N labels; completions s * G .. belong to label s.

    Returns:
        name -> [N, G] fp32 for each reward, and "reward", their weighted sum.
    """
    generations = len(texts) // len(labels)
    scores = {
        name: torch.tensor(
            [reward(text, labels[i // generations]) for i, text in enumerate(texts)],
            dtype=torch.float32,
        ).view(len(labels), generations)
        for name, reward in rewards.items()
    }
    weighted = zip(weights or [1.0] * len(scores), scores.values(), strict=True)
    return scores | {"reward": torch.stack([w * values for w, values in weighted]).sum(dim=0)}


def update(
    policy: OmniModel,
    engine: Engine,
    prompts: PromptBatch,
    embeddings: Tensor,
    rollout: Rollout,
    advantages: Tensor,
    reference_logps: Tensor | None,
    settings: GrpoConfig,
) -> dict[str, float]:
    """Adds the gradients of one batch; returns its loss metrics.

    Args:
        policy: the model in training.
        engine: receives the gradients.
        prompts: the N prompts (needed again only where `sharing` is "released").
        embeddings: [sum P, H] of the prompts, under grad.
        rollout: the S completions.
        advantages: [N, G].
        reference_logps: [M] or None where beta is 0.
        settings: sharing, beta, temperature, budget.
    """
    if settings.sharing == "released":
        return _released_update(
            policy, engine, prompts, rollout, advantages, reference_logps, settings
        )
    layout, leaf = rollout.layout, embeddings.detach().requires_grad_()
    parts = []
    budget, temperature = settings.micro_batch_tokens, settings.rollout.temperature
    for part, rows, tokens, sequences in micro_batches(layout, budget, settings.sharing):
        logprobs, entropy = completion_logprobs(
            policy, leaf[rows], rollout.tokens[tokens], part, temperature, settings.sharing
        )
        loss, metrics = grpo_loss(
            logprobs,
            advantages.flatten()[sequences],
            part,
            reference_logprobs=None if reference_logps is None else reference_logps[tokens],
            beta=settings.beta,
            num_sequences=layout.num_sequences,
        )
        engine.backward(loss)
        gap = (rollout.logprobs[tokens] - logprobs.detach()).abs()
        parts.append(loss_metrics(loss, metrics, entropy, gap, len(rollout.tokens)))
    if embeddings.requires_grad:  # not where the decoder alone trains
        embeddings.backward(leaf.grad)
    return {key: sum(part[key] for part in parts) for key in parts[0]}


def _released_update(
    policy: OmniModel,
    engine: Engine,
    prompts: PromptBatch,
    rollout: Rollout,
    advantages: Tensor,
    reference_logps: Tensor | None,
    settings: GrpoConfig,
) -> dict[str, float]:
    """The same gradients the released way: towers and prompt again for every completion."""
    layout, parts = rollout.layout, []
    spans = torch.arange(len(rollout.tokens)).split(list(layout.sequence_lengths))
    for sequence, span in enumerate(spans):
        index = int(layout.prompt_of_sequence[sequence])
        logprobs, entropy = released_logprobs(
            policy, prompts.select([index]), rollout.tokens[span], settings.rollout.temperature
        )
        loss, metrics = grpo_loss(
            logprobs,
            advantages.flatten()[sequence : sequence + 1],
            GroupLayout.build([layout.prompt_lengths[index]], [[len(span)]], layout.device),
            reference_logprobs=None if reference_logps is None else reference_logps[span],
            beta=settings.beta,
            num_sequences=layout.num_sequences,
        )
        engine.backward(loss)
        gap = (rollout.logprobs[span] - logprobs.detach()).abs()
        parts.append(loss_metrics(loss, metrics, entropy, gap, len(rollout.tokens)))
    return {key: sum(part[key] for part in parts) for key in parts[0]}
