"""The policy loss straight from hidden states: head, log-probs and loss in one function.

Two ways to the same numbers. "recompute" puts `linear_logprobs` and `grpo_loss` together: the
backward makes the logits a second time, memory stays flat, and any option works. "workspace" makes
the logits once, a slab of rows at a time, and turns each slab into gradients while it is there:
three matrix products instead of four, but the coefficient of a token must not depend on tokens of
other slabs, and gradients are made in the forward.

Shapes: M completion tokens, S sequences, H hidden, V vocabulary, R rows of a slab.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastomni_kernels import dispatch
from fastomni_kernels.checks import (
    check_float,
    check_ids,
    check_shape,
    check_temperature,
    require,
)
from fastomni_kernels.chunked_logprobs import DEFAULT_CHUNK_BYTES, GATHER_BYTES
from fastomni_kernels.layout import GroupLayout
from fastomni_kernels.logprobs import linear_logprobs
from fastomni_kernels.options import LossOptions
from fastomni_kernels.policy_loss import (
    check_loss,
    check_totals,
    grpo_loss,
    loss_settings,
    named_metrics,
    sequence_weights,
)
from fastomni_kernels.workspace_loss import workspace_loss

MODES = ("auto", "recompute", "workspace")

# On a GPU 1,180 rows of Qwen2.5's vocabulary at six bytes a logit; on a CPU 64 MiB of logits and
# room to work on them.
CUDA_WORKSPACE_BYTES = 2**30
CPU_WORKSPACE_BYTES = 64 * 2**20 + GATHER_BYTES

_DEFAULT_OPTIONS = LossOptions()
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class LinearLoss(NamedTuple):
    """What `linear_grpo_loss` returns.

    Attributes:
        loss: scalar, fp32 (fp64 for fp64 inputs).
        metrics: detached scalars, those of `grpo_loss`.
        logprobs: [M] of the policy, detached, nats.
        entropy: [M], detached, nats.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logprobs: Tensor
    entropy: Tensor


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    advantages: Tensor,
    layout: GroupLayout,
    options: LossOptions = _DEFAULT_OPTIONS,
    *,
    temperature: float = 1.0,
    reference_logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    num_sequences: int | None = None,
    num_tokens: int | None = None,
    mode: str = "auto",
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> LinearLoss:
    """Policy loss of packed completions from hidden states, without all logits at once.

    Gradients reach `hidden` and `weight`. There is no second derivative, and in workspace mode a
    second backward through the same loss is refused with a RuntimeError.

    Args:
        hidden: [M, H] rows that predict the tokens (`layout.predictor_rows` of the decoder's).
        weight: [V, H] of the language-model head.
        ids: [M] int64 completion tokens.
        advantages: [S].
        layout: which token belongs to which completion.
        options: settings of the loss.
        temperature: 1e-6 to 1e6; divides the logits in fp32.
        reference_logprobs: [M]; as for `grpo_loss`, like the next four.
        old_logprobs: [M].
        rollout_logprobs: [M].
        num_sequences: completions of the whole batch where `layout` is a micro-batch.
        num_tokens: completion tokens of the whole batch.
        mode: "recompute", "workspace", or "auto": workspace on a CPU where it can be had, otherwise
            recompute.
        workspace_bytes: bound on what the slab of logits and its working copies take in workspace
            mode, and on a tile's in recompute mode on a CPU; 72 MiB on a CPU and 1 GiB elsewhere by
            default. Where it cannot hold a single row, one row is made. Beyond it, workspace mode
            holds the gradients of hidden and weight, on a GPU the latter in fp32.
        backend: "auto", "triton" or "reference".

    Raises:
        ValueError: what `linear_logprobs` and `grpo_loss` refuse, an unknown mode, or workspace
            mode with options or dtypes it cannot do.
    """
    optional = (reference_logprobs, old_logprobs, rollout_logprobs)
    if not torch.compiler.is_compiling():
        _check(hidden, weight, ids, temperature, workspace_bytes, backend)
        # A column of hidden stands for what will be computed: log-probs and entropy, [M] floats.
        given = {
            "reference_logprobs": reference_logprobs,
            "old_logprobs": old_logprobs,
            "rollout_logprobs": rollout_logprobs,
            "entropy": hidden[:, 0],
        }
        check_loss("linear_grpo_loss", hidden[:, 0], advantages, layout, options, given)
        check_totals("linear_grpo_loss", layout, num_sequences, num_tokens)
    if workspace_bytes is None:
        on_gpu = hidden.device.type == "cuda"
        workspace_bytes = CUDA_WORKSPACE_BYTES if on_gpu else CPU_WORKSPACE_BYTES
    if _resolve(mode, options, hidden, weight) == "recompute":
        chunk_bytes = min(workspace_bytes, DEFAULT_CHUNK_BYTES)
        logprobs, entropy = linear_logprobs(
            hidden, weight, ids, temperature, chunk_bytes=chunk_bytes, backend=backend
        )
        loss, metrics = grpo_loss(
            logprobs,
            advantages,
            layout,
            options,
            reference_logprobs=reference_logprobs,
            old_logprobs=old_logprobs,
            rollout_logprobs=rollout_logprobs,
            entropy=entropy if options.entropy_coef else entropy.detach(),
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            backend=backend,
        )
        return LinearLoss(loss, metrics, logprobs.detach(), entropy.detach())
    sequences = num_sequences or layout.num_sequences
    tokens = num_tokens or layout.num_completion_tokens
    wants_gradients = torch.is_grad_enabled()
    loss, vector, logprobs, entropy, _, _ = workspace_loss(
        hidden,
        weight,
        ids,
        *optional,
        advantages,
        layout.cu_completions,
        sequence_weights(layout, options, sequences, tokens, hidden),
        *loss_settings(options, tokens),
        temperature,
        workspace_bytes,
        wants_gradients and hidden.requires_grad,
        wants_gradients and weight.requires_grad,
        backend,
    )
    metrics = named_metrics(vector, reference_logprobs, rollout_logprobs, entropy)
    return LinearLoss(loss, metrics, logprobs, entropy)


def _check(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float,
    workspace_bytes: int | None,
    backend: str,
) -> None:
    name = "linear_grpo_loss"
    check_shape(name, "hidden", hidden, ("M", "H"))
    check_shape(name, "weight", weight, ("V", hidden.shape[1]))
    check_shape(name, "ids", ids, (hidden.shape[0],))
    check_float(name, hidden=hidden, weight=weight)
    check_ids(name, ids, hidden)
    check_temperature(name, temperature)
    positive = workspace_bytes is None or workspace_bytes > 0
    require(positive, f"{name}: workspace_bytes={workspace_bytes}; it must be positive")
    dispatch.explain(name, backend, hidden.device)  # raises under this name, not an inner one


def _resolve(mode: str, options: LossOptions, hidden: Tensor, weight: Tensor) -> str:
    """Return "recompute" or "workspace"."""
    require(mode in MODES, f"linear_grpo_loss: mode={mode!r}; use one of {', '.join(MODES)}")
    obstacle = ""
    if options.ratio == "sequence":
        obstacle = "ratio='sequence' needs whole sequences"
    elif options.mismatch.startswith("sequence"):
        obstacle = f"mismatch={options.mismatch!r} needs whole sequences"
    elif hidden.dtype != weight.dtype:
        obstacle = f"hidden is {hidden.dtype} but weight is {weight.dtype}"
    elif hidden.dtype not in _DTYPES:
        # Its gradients are made before any loss scaling, and 1e-8 is 0 in fp16.
        obstacle = f"{hidden.dtype} is too narrow for the gradients of logits"
    elif hidden.device.type != "cuda" and hidden.dtype == torch.bfloat16:
        obstacle = "products of bfloat16 with a result in float32 are there on CUDA alone"
    require(
        mode != "workspace" or not obstacle,
        f"linear_grpo_loss: mode='workspace' cannot be had: {obstacle}; use mode='recompute'",
    )
    if mode == "auto":
        return "workspace" if hidden.device.type == "cpu" and not obstacle else "recompute"
    return mode
