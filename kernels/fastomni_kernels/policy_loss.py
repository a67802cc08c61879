"""The policy loss of packed completions, for every variant that `LossOptions` names.

The operator returns the gradient of the loss beside the loss, so that its backward is one product
and a fused caller can go on from there. What depends on lengths alone, the weight of a sequence's
tokens, is computed outside of it, so that a part of a batch can be given to it.

Shapes: S sequences (completions) of the micro-batch, M completion tokens of all of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastomni_kernels import dispatch, loss_definition
from fastomni_kernels.checks import check_float, check_kind, check_shape, require
from fastomni_kernels.layout import GroupLayout
from fastomni_kernels.library import define
from fastomni_kernels.loss_definition import KL_ESTIMATORS, METRICS, LossSettings
from fastomni_kernels.options import LossOptions

_DEFAULT_OPTIONS = LossOptions()


def kl_penalty(logprobs: Tensor, reference_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Estimate KL(policy || reference) of each token from one sample.

    The estimators are those of Schulman, "Approximating KL divergence" (2020).

    Args:
        logprobs: [M] of the policy that sampled the tokens, nats, any float dtype.
        reference_logprobs: [M], nats.
        estimator: "k1" = -d, "k2" = d^2 / 2, "k3" = exp(d) - d - 1, where d = reference - policy.

    Returns:
        [M] fp32 (fp64 for fp64), nats; k2 and k3 are never negative.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an unknown estimator.
    """
    name = "kl_penalty"
    if not torch.compiler.is_compiling():
        check_shape(name, "logprobs", logprobs, ("M",))
        check_shape(name, "reference_logprobs", reference_logprobs, tuple(logprobs.shape))
        check_float(name, logprobs=logprobs, reference_logprobs=reference_logprobs)
        known = ", ".join(KL_ESTIMATORS)
        require(
            estimator in KL_ESTIMATORS, f"{name}: estimator={estimator!r} is unknown; use {known}"
        )
    return loss_definition.kl_penalty(logprobs, reference_logprobs, estimator)


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    layout: GroupLayout,
    options: LossOptions = _DEFAULT_OPTIONS,
    *,
    reference_logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    num_sequences: int | None = None,
    num_tokens: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss and metrics of one (micro-)batch; `LossOptions` says which loss.

    Gradients reach `logprobs` and, where `entropy_coef` is not 0, `entropy`; everything else is a
    constant. There is no second derivative.

    Args:
        logprobs: [M] of the policy, nats, any float dtype.
        advantages: [S], one per completion.
        layout: which token belongs to which completion.
        options: settings of the loss.
        reference_logprobs: [M] of the reference model; needed where beta is not 0, otherwise only
            for the metric "kl".
        old_logprobs: [M] of the trainer's policy when the rollout was made, for more than one
            update per rollout; without it the ratio is 1 and carries the gradient.
        rollout_logprobs: [M] as the rollout engine sampled, NaN where it gave none (no
            correction there); needed by `mismatch`, otherwise only for metrics.
        entropy: [M] of the policy; needed where entropy_coef is not 0, otherwise for a metric.
        num_sequences: completions of the whole batch where `layout` is one of its micro-batches,
            so that losses and metrics of the micro-batches add up to the batch's.
        num_tokens: completion tokens of the whole batch, the same.
        backend: "auto", "triton" or "reference".

    Returns:
        The loss, a scalar, fp32 (fp64 for fp64 log-probs), and detached scalars:
        "policy_loss" and "kl" are reduced as the loss is, so that loss = policy_loss + beta * kl -
        entropy_coef * entropy. All other means are over tokens: "entropy"; "clip_ratio/low_mean",
        "/high_mean" and "/region_mean" (tokens whose ratio lies beyond the bound that matters for
        their advantage, and either); "ratio/mean"; and of the rollout's mismatch
        "sampling/sampling_logp_difference/mean" (absolute), "sampling/importance_sampling_ratio
        /mean" (before it is truncated or masked; of the sequence where `mismatch` is by sequence)
        and "rollout_kl" (k3). Keys ending in "/min" and "/max" are extremes: over micro-batches
        they combine by min and max, all others by adding up. "kl", "entropy" and the mismatch's
        are there only where what they need is given. Without any token ratios' extremes are 1 and
        everything else is 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, totals smaller than the layout's, or
            options that need a tensor which is missing.
    """
    optional = {
        "reference_logprobs": reference_logprobs,
        "old_logprobs": old_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "entropy": entropy,
    }
    if not torch.compiler.is_compiling():
        check_loss("grpo_loss", logprobs, advantages, layout, options, optional)
        check_totals("grpo_loss", layout, num_sequences, num_tokens)
    num_sequences = num_sequences or layout.num_sequences
    num_tokens = num_tokens or layout.num_completion_tokens
    # Constants are detached, so that the loss has a backward only where there is one to give.
    if entropy is not None and options.entropy_coef == 0:
        entropy = entropy.detach()
    constants = (reference_logprobs, old_logprobs, rollout_logprobs)
    loss, vector, _ = _grpo_loss(
        logprobs,
        entropy,
        *(None if x is None else x.detach() for x in constants),
        advantages.detach(),
        layout.cu_completions,
        sequence_weights(layout, options, num_sequences, num_tokens, logprobs),
        *loss_settings(options, num_tokens),
        backend,
    )
    return loss, named_metrics(vector, reference_logprobs, rollout_logprobs, entropy)


def sequence_weights(
    layout: GroupLayout, options: LossOptions, num_sequences: int, num_tokens: int, like: Tensor
) -> Tensor:
    """Return the weight in the loss of each token of a sequence, [S].

    Args:
        layout: the micro-batch.
        options: whose `reduction` decides.
        num_sequences: completions of the whole batch.
        num_tokens: completion tokens of the whole batch.
        like: a float tensor whose device is taken, and whose dtype widened to fp32.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    sequences = layout.num_sequences
    if options.reduction == "grpo":
        # An empty completion owns no token: it counts, with a mean of 0. The lengths are on the
        # device already, once per layout.
        lengths = layout.completion_length_tensor.clamp(min=1)
        return (lengths * num_sequences).to(dtype).reciprocal()
    if options.reduction == "bnpo":
        tokens = max(layout.num_completion_tokens, 1)
        weight = sequences / max(num_sequences, 1) / tokens
    elif options.reduction == "dr_grpo":
        assert options.max_completion is not None  # LossOptions refuses that
        weight = 1 / (max(num_sequences, 1) * options.max_completion)
    else:
        weight = 1 / max(num_tokens, 1)
    return torch.full((sequences,), weight, dtype=dtype, device=like.device)


def loss_settings(options: LossOptions, num_tokens: int) -> LossSettings:
    """Return the operator's numbers and words for a batch of `num_tokens` completion tokens."""
    dual_clip = options.dual_clip
    mismatch_min, mismatch_max = options.mismatch_min, options.mismatch_max
    return LossSettings(
        token_weight=1 / max(num_tokens, 1),
        policy=options.policy,
        ratio=options.ratio,
        kl=options.kl,
        beta=options.beta,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        dual_clip=math.inf if dual_clip is None else dual_clip,
        cispo_max=options.cispo_max,
        sapo_positive=options.sapo_temperature_positive,
        sapo_negative=options.sapo_temperature_negative,
        mismatch=options.mismatch,
        mismatch_min=-math.inf if mismatch_min is None else mismatch_min,
        mismatch_max=math.inf if mismatch_max is None else mismatch_max,
        entropy_coef=options.entropy_coef,
    )


def named_metrics(
    vector: Tensor,
    reference_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    entropy: Tensor | None,
) -> dict[str, Tensor]:
    """Return the operator's metrics by name, less those whose tensors were not given."""
    metrics = dict(zip(METRICS, vector.detach().unbind(), strict=True))
    if reference_logprobs is None:
        del metrics["kl"]
    if entropy is None:
        del metrics["entropy"]
    if rollout_logprobs is None:
        metrics = {k: v for k, v in metrics.items() if not k.startswith(("sampling", "rollout"))}
    return metrics


def check_loss(
    name: str,
    logprobs: Tensor,
    advantages: Tensor,
    layout: GroupLayout,
    options: LossOptions,
    optional: dict[str, Tensor | None],
) -> None:
    """Refuse tensors that do not fit the layout or one another, or that options miss."""
    check_kind(name, "layout", layout, GroupLayout)
    check_kind(name, "options", options, LossOptions)
    tokens = (layout.num_completion_tokens,)
    check_shape(name, "logprobs", logprobs, tokens)
    check_kind(name, "advantages", advantages, Tensor)
    require(
        advantages.dim() != 2 or advantages.numel() != layout.num_sequences,
        f"{name}: advantages has shape {list(advantages.shape)}; it must be "
        f"[{layout.num_sequences}], one per completion: pass advantages.flatten()",
    )
    check_shape(name, "advantages", advantages, (layout.num_sequences,))
    given = {label: x for label, x in optional.items() if x is not None}
    for label, x in given.items():
        check_shape(name, label, x, tokens)
    check_float(name, logprobs=logprobs, advantages=advantages, **given)
    where = layout.cu_completions.device
    require(
        where == logprobs.device,
        f"{name}: the layout lies on {where}, logprobs on {logprobs.device}; build the layout with "
        f"device={str(logprobs.device)!r}",
    )
    for setting, value, off, needed, what in (
        ("beta", options.beta, 0, "reference_logprobs", "the reference model's log-probs"),
        ("entropy_coef", options.entropy_coef, 0, "entropy", "the policy's entropy of each token"),
        ("mismatch", options.mismatch, "none", "rollout_logprobs", "what the rollout recorded"),
    ):
        require(
            value == off or needed in given,
            f"{name}: {setting}={value!r} needs {needed}, which is missing; pass {what}, or set "
            f"{setting} to {off!r}",
        )


def check_totals(
    name: str, layout: GroupLayout, num_sequences: int | None, num_tokens: int | None
) -> None:
    """Refuse totals of a whole batch that are smaller than its part."""
    for label, total, part in (
        ("num_sequences", num_sequences, layout.num_sequences),
        ("num_tokens", num_tokens, layout.num_completion_tokens),
    ):
        require(
            total is None or total >= max(part, 1),
            f"{name}: {label}={total} but this micro-batch alone has {part}; pass the total "
            "over all micro-batches",
        )


def _implementation(
    logprobs: Tensor,
    entropy: Tensor | None,
    reference_logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    advantages: Tensor,
    cu_completions: Tensor,
    sequence_weights: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *numbers, backend = settings
    tensors = (
        logprobs,
        entropy,
        reference_logprobs,
        old_logprobs,
        rollout_logprobs,
        advantages,
        cu_completions,
        sequence_weights,
    )
    if dispatch.choose("grpo_loss", backend, logprobs.device) == "triton":
        from fastomni_kernels.triton_kernels import policy_loss as kernel

        return kernel.forward(*tensors, LossSettings(*numbers))
    return loss_definition.grpo_loss(*tensors, LossSettings(*numbers))


def _fake(logprobs: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    return (
        logprobs.new_empty((), dtype=dtype),
        logprobs.new_empty(len(METRICS), dtype=dtype),
        logprobs.new_empty(logprobs.shape, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprobs, entropy = inputs[:2]
    _, metrics, grad_logprobs = output
    ctx.mark_non_differentiable(metrics, grad_logprobs)
    ctx.save_for_backward(grad_logprobs)
    ctx.logprobs_dtype = logprobs.dtype
    ctx.entropy = None if entropy is None else (entropy.shape, entropy.dtype)
    settings = LossSettings(*inputs[8:-1])
    ctx.entropy_slope = -settings.entropy_coef * settings.token_weight


def _backward(ctx: Any, grad_loss: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    (grad_logprobs,) = ctx.saved_tensors
    by_logprobs = by_entropy = None
    if ctx.needs_input_grad[0]:
        by_logprobs = (grad_loss * grad_logprobs).to(ctx.logprobs_dtype)
    if ctx.needs_input_grad[1] and ctx.entropy_slope != 0:
        shape, dtype = ctx.entropy
        by_entropy = (grad_loss * ctx.entropy_slope).to(dtype).expand(shape).clone()
    return by_logprobs, by_entropy, *([None] * (len(ctx.needs_input_grad) - 2))


_grpo_loss = define(
    "grpo_loss(Tensor logprobs, Tensor? entropy, Tensor? reference_logprobs, Tensor? old_logprobs, "
    "Tensor? rollout_logprobs, Tensor advantages, Tensor cu_completions, Tensor sequence_weights, "
    "float token_weight, str policy, str ratio, str kl, float beta, float clip_low, "
    "float clip_high, float dual_clip, float cispo_max, float sapo_positive, float sapo_negative, "
    "str mismatch, float mismatch_min, float mismatch_max, float entropy_coef, str backend) -> "
    "(Tensor loss, Tensor metrics, Tensor grad_logprobs)",
    _implementation,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
