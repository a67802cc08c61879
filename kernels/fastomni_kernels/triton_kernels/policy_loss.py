"""The policy loss in two launches: one program per sequence, then one per number that comes out.

A program loops over its sequence's tokens, twice where a ratio belongs to the whole sequence. It
leaves one partial result per output; the second launch adds those up over the sequences, always in
the same order, so that there are no atomics and the same input gives the same bits.

Shapes: S sequences, M completion tokens of all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastomni_kernels import loss_definition
from fastomni_kernels.loss_definition import LARGEST, METRICS, SMALLEST, TOTALS, LossSettings
from fastomni_kernels.triton_kernels.arithmetic import (
    expm1_less_argument,
    higher,
    highest_of,
    lower,
    lowest_of,
)
from fastomni_kernels.triton_kernels.variants import Variant

# Tokens, or sequences in the second launch, of one step: 2 per thread (4 spill with triton 3.6).
BLOCK = 512
NUM_WARPS = 8

MAX_LOG_RATIO = tl.constexpr(loss_definition.MAX_LOG_RATIO)

# Rows of partial results: the loss itself, then the metrics.
TOTAL_ROWS = tl.constexpr(1 + len(TOTALS))
SMALLEST_ROWS = tl.constexpr(len(SMALLEST))
LARGEST_ROWS = tl.constexpr(len(LARGEST))
ROWS = tl.constexpr(triton.next_power_of_2(1 + len(METRICS)))

# Sequences begin anywhere, so nothing is gained by knowing how tensors are aligned.
_POINTERS = (
    "logprobs", "entropy", "reference_logprobs", "old_logprobs", "rollout_logprobs", "advantages",
    "cu_completions", "sequence_weights", "grad_logprobs", "partials",
)  # fmt: skip


@triton.jit
def _ratio(log_ratio):
    """Ratio of probabilities, with a bound that keeps it finite."""
    return tl.exp(lower(log_ratio, MAX_LOG_RATIO))


@triton.jit
def _kl(difference, KL: tl.constexpr):
    """Value of the estimator at d = reference - policy, and derivative by the policy's log-prob."""
    if KL == "k1":
        return -difference, tl.zeros_like(difference) + 1.0
    elif KL == "k2":
        return 0.5 * difference * difference, -difference
    else:
        value = expm1_less_argument(difference)
        return value, -(value + difference)


@triton.jit
def _policy_term(
    ratio, logprob, advantage, lowest, highest, dual_clip, sapo_positive, sapo_negative,
    POLICY: tl.constexpr,
):  # fmt: skip
    """Gain of each token and its derivative; `highest` is the cap under "cispo"."""
    if POLICY == "cispo":
        slope = lower(ratio, highest) * advantage
        return slope * logprob, slope
    elif POLICY == "sapo":
        zeros = tl.zeros_like(ratio)  # of ratio's type, which the numbers need not have
        steepness = tl.where(advantage > 0, zeros + sapo_positive, zeros + sapo_negative)
        gate = 1.0 / (1.0 + tl.exp(steepness * (1.0 - ratio)))
        gain = 4.0 / steepness * gate * advantage
        return gain, 4.0 * gate * (1.0 - gate) * advantage * ratio
    else:
        free = lower(ratio, dual_clip) * advantage
        bounded = lower(higher(ratio, lowest), highest) * advantage
        stays = (free > bounded) | (ratio > dual_clip)  # not where NaN
        return lower(free, bounded), tl.where(stays, 0.0, ratio * advantage)


@triton.jit
def _factor(ratio, smallest, largest, MISMATCH: tl.constexpr):
    """Weight of the policy term for the ratio trainer / rollout."""
    if MISMATCH == "truncate":
        return lower(higher(ratio, smallest), largest)
    elif MISMATCH == "mask":
        return tl.where((ratio >= smallest) & (ratio <= largest), ratio, 0.0)
    else:
        return tl.zeros_like(ratio) + 1.0


@triton.jit
def _of_tokens(logprobs, old_logprobs, rollout_logprobs, tokens, inside, DTYPE: tl.constexpr):
    """Log-prob, log-ratio to the old policy, and the old policy's to the rollout."""
    logprob = tl.load(logprobs + tokens, inside, other=0.0).to(DTYPE)
    old = logprob
    if old_logprobs is not None:
        old = tl.load(old_logprobs + tokens, inside, other=0.0).to(DTYPE)
    drift = tl.zeros_like(logprob)
    if rollout_logprobs is not None:
        rollout = tl.load(rollout_logprobs + tokens, inside, other=0.0).to(DTYPE)
        drift = tl.where(rollout == rollout, old - rollout, 0.0)
    return logprob, logprob - old, drift


@triton.jit
def _of_sequence(
    logprobs, old_logprobs, rollout_logprobs, first, last, mismatch_min, mismatch_max,
    MISMATCH: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean log-ratio to the old policy, sum of the old policy's to the rollout, mean factor."""
    log_ratios = tl.zeros((BLOCK,), DTYPE)
    drifts = tl.zeros((BLOCK,), DTYPE)
    factors = tl.zeros((BLOCK,), DTYPE)
    for start in range(first, last, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < last
        _, log_ratio, drift = _of_tokens(
            logprobs, old_logprobs, rollout_logprobs, tokens, inside, DTYPE
        )
        factor = _factor(_ratio(drift), mismatch_min, mismatch_max, MISMATCH)
        log_ratios += log_ratio
        drifts += drift
        factors += tl.where(inside, factor, 0.0)
    count = tl.maximum(last - first, 1).to(DTYPE)
    return tl.sum(log_ratios) / count, tl.sum(drifts), tl.sum(factors) / count


@triton.jit
def _no_tokens(rows, DTYPE: tl.constexpr):
    """Results before the first token: 0 for totals, infinities for extremes."""
    result = tl.where(rows >= TOTAL_ROWS, float("inf"), tl.zeros((ROWS,), DTYPE))
    return tl.where(rows >= TOTAL_ROWS + SMALLEST_ROWS, float("-inf"), result)


@triton.jit
def _with_block(
    result, rows, inside, loss, policy_loss, kl, entropies, low, high, ratio, mismatch, drift,
    token_weight,
):  # fmt: skip
    """Results with those of one block of tokens taken in."""
    difference = tl.abs(drift)
    zeros = tl.zeros_like(ratio)
    low = tl.where(low, zeros + token_weight, 0.0)
    high = tl.where(high, zeros + token_weight, 0.0)
    totals = (
        loss, policy_loss, kl, token_weight * entropies, low, high, low + high,
        token_weight * ratio, token_weight * difference, token_weight * mismatch,
        token_weight * expm1_less_argument(lower(drift, MAX_LOG_RATIO)),
    )  # fmt: skip
    smallest = (ratio, mismatch)
    largest = (ratio, mismatch, difference)
    for i in tl.static_range(TOTAL_ROWS):
        total = tl.sum(tl.where(inside, totals[i], 0.0))
        result += tl.where(rows == i, total, 0.0)
    for i in tl.static_range(SMALLEST_ROWS):
        value = lowest_of(tl.where(inside, smallest[i], float("inf")))
        result = tl.where(rows == TOTAL_ROWS + i, lower(result, value), result)
    for i in tl.static_range(LARGEST_ROWS):
        value = highest_of(tl.where(inside, largest[i], float("-inf")))
        row = TOTAL_ROWS + SMALLEST_ROWS + i
        result = tl.where(rows == row, higher(result, value), result)
    return result


@triton.jit(do_not_specialize=["num_sequences"], do_not_specialize_on_alignment=_POINTERS)
def sequence_loss_kernel(
    logprobs, entropy, reference_logprobs, old_logprobs, rollout_logprobs, advantages,
    cu_completions, sequence_weights, grad_logprobs, partials, num_sequences, token_weight, beta,
    ratio_lowest, ratio_highest, dual_clip, sapo_positive, sapo_negative, mismatch_min,
    mismatch_max, entropy_coef, POLICY: tl.constexpr, SEQUENCE_RATIO: tl.constexpr,
    KL: tl.constexpr, MISMATCH: tl.constexpr, SEQUENCE_MISMATCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = grad_logprobs.dtype.element_ty
    sequence = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_completions + sequence).to(tl.int64)
    last = tl.load(cu_completions + sequence + 1).to(tl.int64)
    zeros = tl.zeros((BLOCK,), DTYPE)
    advantage = zeros + tl.load(advantages + sequence).to(DTYPE)
    weight = tl.load(sequence_weights + sequence).to(DTYPE)
    if SEQUENCE_RATIO or SEQUENCE_MISMATCH:
        mean_log_ratio, total_drift, mean_factor = _of_sequence(
            logprobs, old_logprobs, rollout_logprobs, first, last, mismatch_min, mismatch_max,
            MISMATCH, DTYPE, BLOCK,
        )  # fmt: skip
    rows = tl.arange(0, ROWS)
    result = _no_tokens(rows, DTYPE)
    for start in range(first, last, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < last
        logprob, log_ratio, drift = _of_tokens(
            logprobs, old_logprobs, rollout_logprobs, tokens, inside, DTYPE
        )
        log_ratio = zeros + mean_log_ratio if SEQUENCE_RATIO else log_ratio
        ratio = _ratio(log_ratio)
        gain, slope = _policy_term(
            ratio, logprob, advantage, ratio_lowest, ratio_highest, dual_clip, sapo_positive,
            sapo_negative, POLICY,
        )  # fmt: skip
        mismatch = _ratio(zeros + total_drift if SEQUENCE_MISMATCH else drift)
        factor = _factor(mismatch, mismatch_min, mismatch_max, MISMATCH)
        policy_loss = -weight * factor * gain
        if SEQUENCE_RATIO and POLICY != "cispo" and not SEQUENCE_MISMATCH:
            factor = zeros + mean_factor  # each token moves the ratio of all tokens by 1 / C_s
        grad = -weight * factor * slope
        loss, kl, entropies = policy_loss, zeros, zeros
        if reference_logprobs is not None:
            reference = tl.load(reference_logprobs + tokens, inside, other=0.0).to(DTYPE)
            kl, kl_slope = _kl(reference - logprob, KL)
            kl = weight * kl
            if beta != 0:
                loss += beta * kl
                grad += beta * weight * kl_slope
        if entropy is not None:
            entropies = tl.load(entropy + tokens, inside, other=0.0).to(DTYPE)
            if entropy_coef != 0:
                loss -= entropy_coef * token_weight * entropies
        tl.store(grad_logprobs + tokens, grad, inside)
        low = (ratio < ratio_lowest) & (advantage < 0)
        high = (ratio > ratio_highest) & (advantage > 0)
        result = _with_block(
            result, rows, inside, loss, policy_loss, kl, entropies, low, high, ratio, mismatch,
            drift, token_weight,
        )  # fmt: skip
    tl.store(partials + rows * num_sequences.to(tl.int64) + sequence, result)


@triton.jit(do_not_specialize=["num_sequences"])
def batch_loss_kernel(partials, cu_completions, loss, metrics, num_sequences, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    DTYPE: tl.constexpr = partials.dtype.element_ty
    totals = tl.zeros((BLOCK,), DTYPE)
    smallest = tl.full((BLOCK,), float("inf"), DTYPE)
    largest = tl.full((BLOCK,), float("-inf"), DTYPE)
    for start in range(0, num_sequences, BLOCK):
        sequences = start + tl.arange(0, BLOCK)
        inside = sequences < num_sequences
        places = partials + row.to(tl.int64) * num_sequences + sequences
        totals += tl.load(places, inside, other=0.0)
        smallest = lower(smallest, tl.load(places, inside, other=float("inf")))
        largest = higher(largest, tl.load(places, inside, other=float("-inf")))
    result = tl.sum(totals)
    if row >= TOTAL_ROWS:
        result = highest_of(largest)
        if row < TOTAL_ROWS + SMALLEST_ROWS:
            result = lowest_of(smallest)
        tokens = tl.load(cu_completions + num_sequences) - tl.load(cu_completions)
        if tokens == 0:  # ratios are 1, but the last row is a difference
            result = tl.where(row == tl.num_programs(0) - 1, 0.0, 1.0).to(DTYPE)
    if row == 0:
        tl.store(loss, result)
    else:
        tl.store(metrics + row - 1, result)


def _constexprs(policy: str, ratio: str, kl: str, mismatch: str) -> dict[str, Any]:
    level, _, correction = mismatch.rpartition("_")
    return {
        "POLICY": policy,
        "SEQUENCE_RATIO": ratio == "sequence",
        "KL": kl,
        "MISMATCH": correction,
        "SEQUENCE_MISMATCH": level == "sequence",
        "BLOCK": BLOCK,
    }


def forward(
    logprobs: Tensor, entropy: Tensor | None, reference_logprobs: Tensor | None,
    old_logprobs: Tensor | None, rollout_logprobs: Tensor | None, advantages: Tensor,
    cu_completions: Tensor, sequence_weights: Tensor, settings: LossSettings,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch; arguments and returns are those of `loss_definition.grpo_loss`."""
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    sequences = len(advantages)
    highest = settings.cispo_max if settings.policy == "cispo" else 1 + settings.clip_high
    shapes = ((), (len(METRICS),), logprobs.shape, (ROWS.value, sequences))
    loss, metrics, grad_logprobs, partials = (
        torch.empty(shape, dtype=dtype, device=logprobs.device) for shape in shapes
    )
    tensors = (
        logprobs, entropy, reference_logprobs, old_logprobs, rollout_logprobs, advantages,
        cu_completions, sequence_weights,
    )  # fmt: skip
    if sequences:
        sequence_loss_kernel[(sequences,)](
            *(None if x is None else x.contiguous() for x in tensors), grad_logprobs, partials,
            sequences, settings.token_weight, settings.beta, 1 - settings.clip_low, highest,
            settings.dual_clip, settings.sapo_positive, settings.sapo_negative,
            settings.mismatch_min, settings.mismatch_max, settings.entropy_coef,
            **_constexprs(settings.policy, settings.ratio, settings.kl, settings.mismatch),
            num_warps=NUM_WARPS,
        )  # fmt: skip
    batch_loss_kernel[(1 + len(METRICS),)](
        partials, cu_completions.contiguous(), loss, metrics, sequences, BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return loss, metrics, grad_logprobs


def shipped(target: str) -> list[Variant]:
    """The variants that are compiled ahead of time; the kernels are the same on every target.

    There are some thousand combinations; these hold every branch of the code at least once.
    """
    entropy, reference, old, rollout = optional = _POINTERS[1:5]
    cases: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {
        "clip": ("clip", "token", "k3", "none", ()),
        "clip-kl": ("clip", "token", "k3", "none", (entropy, reference, old)),
        "clip-truncate": ("clip", "token", "k3", "token_truncate", optional),
        "clip-sequence-truncate": ("clip", "token", "k2", "sequence_truncate", optional),
        "gspo": ("clip", "sequence", "k1", "none", (reference, old)),
        "gspo-mask": ("clip", "sequence", "k3", "token_mask", optional),
        "gspo-sequence-mask": ("clip", "sequence", "k3", "sequence_mask", optional),
        "cispo": ("cispo", "token", "k3", "none", (old,)),
        "cispo-truncate": ("cispo", "token", "k3", "token_truncate", (old, rollout)),
        "cispo-sequence": ("cispo", "sequence", "k3", "token_mask", optional),
        "sapo": ("sapo", "token", "k3", "none", (entropy, old)),
        "sapo-sequence": ("sapo", "sequence", "k3", "sequence_mask", (rollout,)),
    }
    arguments = [name for name in sequence_loss_kernel.arg_names if name.islower()]
    types = dict.fromkeys(arguments, "fp32") | dict.fromkeys(_POINTERS, "*fp32")
    types |= {"cu_completions": "*i32", "num_sequences": "i32"}
    found = []
    for name, (*words, given) in cases.items():
        absent = sorted({*optional} - {*given})
        found.append(
            Variant(
                name=f"sequence_loss-fp32-{name}",
                kernel=sequence_loss_kernel,
                signature={key: types[key] for key in arguments if key not in absent},
                constexprs=dict.fromkeys(absent) | _constexprs(*words),
                num_warps=NUM_WARPS,
            )
        )
    types = dict.fromkeys(("partials", "loss", "metrics"), "*fp32") | {"cu_completions": "*i32"}
    total = Variant(
        name="batch_loss-fp32", kernel=batch_loss_kernel, num_warps=NUM_WARPS,
        signature=types | {"num_sequences": "i32"}, constexprs={"BLOCK": BLOCK},
        divisible_by_16=tuple(types),
    )  # fmt: skip
    return [*found, total]
