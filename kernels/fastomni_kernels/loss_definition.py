"""The policy loss in plain torch: the definition, and what runs on a CPU.

The derivative of each term stands beside its value, and the gradient of every token's log-prob is
made in the forward. Written out, it needs no graph of some thirty small tensors; that it is the
derivative of the loss is what the tests certify by finite differences.

Shapes: S sequences, M completion tokens of all of them, C_s tokens of sequence s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Order of the vector of metrics: totals, then smallest values, then largest.
TOTALS = (
    "policy_loss",
    "kl",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "ratio/mean",
    "sampling/sampling_logp_difference/mean",
    "sampling/importance_sampling_ratio/mean",
    "rollout_kl",
)
SMALLEST = ("ratio/min", "sampling/importance_sampling_ratio/min")
LARGEST = (
    "ratio/max",
    "sampling/importance_sampling_ratio/max",
    "sampling/sampling_logp_difference/max",
)
METRICS = TOTALS + SMALLEST + LARGEST

KL_ESTIMATORS = ("k1", "k2", "k3")

# A ratio of e^60 stays finite in fp32 with everything it is multiplied by; an infinite one would
# make NaN of a token that is clipped or masked, or whose advantage is 0.
MAX_LOG_RATIO = 60.0


class LossSettings(NamedTuple):
    """The operator's arguments that are no tensors, in its order; names are `LossOptions`'.

    Attributes:
        token_weight: weight of each token in means over tokens.
        dual_clip: infinity where off.
        mismatch_min: -infinity where off.
    """

    token_weight: float
    policy: str
    ratio: str
    kl: str
    beta: float
    clip_low: float
    clip_high: float
    dual_clip: float
    cispo_max: float
    sapo_positive: float
    sapo_negative: float
    mismatch: str
    mismatch_min: float
    mismatch_max: float
    entropy_coef: float


def kl_penalty(logprobs: Tensor, reference_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Estimate KL(policy || reference) of each token; see `policy_loss.kl_penalty`."""
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    return _kl(reference_logprobs.to(dtype) - logprobs.to(dtype), estimator)


def _kl(difference: Tensor, estimator: str) -> Tensor:
    """Value of the estimator at d = reference - policy."""
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    # expm1, because exp(d) - 1 loses every digit while policy and reference still agree.
    return difference.expm1() - difference


def _kl_slope(difference: Tensor, estimator: str) -> Tensor:
    """Derivative of the estimator with respect to the policy's log-prob."""
    if estimator == "k1":
        return torch.ones_like(difference)
    return -difference if estimator == "k2" else -difference.expm1()


class _Segments:
    """Sums and means over the tokens of each sequence, and values of sequences at their tokens."""

    def __init__(self, cu_completions: Tensor, tokens: int, dtype: torch.dtype) -> None:
        self._offsets = cu_completions
        counts = cu_completions.diff()
        self._counts = counts.clamp(min=1).to(dtype)
        sequences = torch.arange(len(counts), device=counts.device)
        self._sequence_of_token = torch.repeat_interleave(sequences, counts, output_size=tokens)

    def at_tokens(self, values: Tensor) -> Tensor:
        return values[self._sequence_of_token]

    def sum(self, values: Tensor) -> Tensor:
        total = torch.segment_reduce(values, "sum", offsets=self._offsets, initial=0, unsafe=True)
        return self.at_tokens(total)

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.at_tokens(self._counts)


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _policy_term(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """Gain of each token, and its derivative: by log r, under "cispo" by the log-prob itself."""
    if settings.policy == "cispo":
        slope = ratio.clamp(max=settings.cispo_max) * advantages
        return slope * logprobs, slope
    if settings.policy == "sapo":
        steepness = torch.full_like(ratio, settings.sapo_negative)
        steepness.masked_fill_(advantages > 0, settings.sapo_positive)
        gate = (steepness * (ratio - 1)).sigmoid()
        return 4 / steepness * gate * advantages, 4 * gate * (1 - gate) * advantages * ratio
    free = ratio.clamp(max=settings.dual_clip) * advantages
    bounded = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantages
    stays = (free > bounded) | (ratio > settings.dual_clip)  # not where NaN
    return torch.minimum(free, bounded), (ratio * advantages).masked_fill(stays, 0)


def _mismatch_weights(ratio: Tensor, settings: LossSettings) -> Tensor:
    """Factor of the policy term for the ratio trainer / rollout; it is a constant."""
    lowest, highest = settings.mismatch_min, settings.mismatch_max
    if settings.mismatch == "none":
        return torch.ones_like(ratio)
    if settings.mismatch.endswith("truncate"):
        return ratio.clamp(lowest, highest)
    return ratio.where((ratio >= lowest) & (ratio <= highest), 0)


def _ratio_metrics(ratio: Tensor, advantages: Tensor, settings: LossSettings) -> dict[str, Tensor]:
    highest = settings.cispo_max if settings.policy == "cispo" else 1 + settings.clip_high
    low = ((ratio < 1 - settings.clip_low) & (advantages < 0)).to(ratio.dtype)
    high = ((ratio > highest) & (advantages > 0)).to(ratio.dtype)
    smallest, largest = ratio.aminmax() if len(ratio) else ratio.new_ones(2)
    return {
        "clip_ratio/low_mean": low.sum() * settings.token_weight,
        "clip_ratio/high_mean": high.sum() * settings.token_weight,
        "clip_ratio/region_mean": (low + high).sum() * settings.token_weight,
        "ratio/mean": ratio.sum() * settings.token_weight,
        "ratio/min": smallest,
        "ratio/max": largest,
    }


def _mismatch_metrics(drift: Tensor, ratio: Tensor, settings: LossSettings) -> dict[str, Tensor]:
    difference = drift.abs()
    smallest, largest = ratio.aminmax() if len(ratio) else ratio.new_ones(2)
    prefix = "sampling/importance_sampling_ratio"
    return {
        "sampling/sampling_logp_difference/mean": difference.sum() * settings.token_weight,
        "sampling/sampling_logp_difference/max": difference.amax() if len(ratio) else drift.sum(),
        f"{prefix}/mean": ratio.sum() * settings.token_weight,
        f"{prefix}/min": smallest,
        f"{prefix}/max": largest,
        "rollout_kl": _kl(drift.clamp(max=MAX_LOG_RATIO), "k3").sum() * settings.token_weight,
    }


def _mismatch(
    old: Tensor, rollout_logprobs: Tensor, segments: _Segments, settings: LossSettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """Factor of the policy term of each token, and metrics of trainer against rollout."""
    drift = (old - rollout_logprobs.to(old.dtype)).masked_fill(rollout_logprobs.isnan(), 0)
    log_ratio = segments.sum(drift) if settings.mismatch.startswith("sequence") else drift
    ratio = _ratio(log_ratio)
    return _mismatch_weights(ratio, settings), _mismatch_metrics(drift, ratio, settings)


def grpo_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    reference_logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    advantages: Tensor,
    cu_completions: Tensor,
    sequence_weights: Tensor,
    settings: LossSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, metrics and gradient of packed completions; see `policy_loss.grpo_loss`.

    Args:
        logprobs, entropy, reference_logprobs: [M].
        old_logprobs: [M]; `logprobs` themselves, as constants, where None.
        rollout_logprobs: [M]; NaN counts as equal to `old_logprobs`.
        advantages: [S].
        cu_completions: [S + 1] int32, tokens before each sequence; it may be a clipped part of a
            batch's where nothing needs whole sequences.
        sequence_weights: [S] weight in the loss of each token of a sequence.
        settings: all that is no tensor.

    Returns:
        loss: scalar, fp32 (fp64 for fp64 log-probs), as all three.
        metrics: [len(METRICS)]; what belongs to tensors that were not given means nothing.
        grad_logprobs: [M], derivative of the loss.
    """
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    logprobs = logprobs.to(dtype)
    old = logprobs if old_logprobs is None else old_logprobs.to(dtype)
    segments = _Segments(cu_completions, len(logprobs), dtype)
    token_advantages = segments.at_tokens(advantages.to(dtype))
    weights = segments.at_tokens(sequence_weights.to(dtype))
    metrics = dict.fromkeys(METRICS, logprobs.new_zeros(()))

    log_ratio = logprobs - old
    ratio = _ratio(segments.mean(log_ratio) if settings.ratio == "sequence" else log_ratio)
    gain, slope = _policy_term(ratio, logprobs, token_advantages, settings)
    metrics |= _ratio_metrics(ratio, token_advantages, settings)
    if rollout_logprobs is not None:
        factor, measured = _mismatch(old, rollout_logprobs, segments, settings)
        gain, slope = gain * factor, slope * factor
        metrics |= measured
    if settings.ratio == "sequence" and settings.policy != "cispo":
        slope = segments.mean(slope)  # each token moves the ratio of all tokens by 1 / C_s
    metrics["policy_loss"] = loss = (-weights * gain).sum()
    grad = -weights * slope

    if reference_logprobs is not None:
        difference = reference_logprobs.to(dtype) - logprobs
        metrics["kl"] = (weights * _kl(difference, settings.kl)).sum()
        if settings.beta != 0:
            loss = loss + settings.beta * metrics["kl"]
            grad = grad + settings.beta * weights * _kl_slope(difference, settings.kl)
    if entropy is not None:
        metrics["entropy"] = entropy.to(dtype).sum() * settings.token_weight
        if settings.entropy_coef != 0:
            loss = loss - settings.entropy_coef * metrics["entropy"]
    return loss, torch.stack([metrics[name] for name in METRICS]), grad
