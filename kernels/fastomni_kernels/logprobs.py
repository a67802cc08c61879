"""Log-probability and entropy of chosen tokens, with and without logits that exist already.

`linear_logprobs` is fused with the language-model head: it makes the logits of a few rows at a
time, keeps three numbers per row, and makes the same logits again in the backward. The decision
that is not obvious: `gather_logprobs` takes the same two formulas (value and gradient) instead of
leaving its backward to autograd, so the two can never disagree.

Shapes: M completion tokens, n rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bound on the logits of one chunk and their working copy.
DEFAULT_CHUNK_BYTES = 64 * 2**20


def widened(x: Tensor) -> Tensor:
    """Return `x` in fp32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logprob_statistics(
    logits: Tensor, ids: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-prob of `ids`, entropy and log-sum-exp of each row [n, V]; overwrites `logits`."""
    largest = logits.amax(-1, keepdim=True)
    shifted = logits.sub_(largest)
    target = shifted.gather(-1, ids[:, None]).squeeze(-1)
    if with_entropy:
        weights = shifted.exp()
        total = weights.sum(-1)
        # The clamp keeps 0 * -inf of a masked logit from being NaN.
        shifted.clamp_(min=torch.finfo(shifted.dtype).min)
        entropy = total.log() - weights.mul_(shifted).sum(-1) / total
    else:
        total = shifted.exp_().sum(-1)
        entropy = torch.zeros_like(total)
    log_total = total.log()
    return target - log_total, entropy, largest.squeeze(-1) + log_total


def _logit_gradient(
    logits: Tensor,
    ids: Tensor,
    normaliser: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Return the gradient [n, V] of a row's log-prob and entropy; overwrites `logits`.

    d logp_i / d z_j = [j = i] - p_j and d entropy / d z_j = -p_j (log p_j + entropy).
    """
    log_p = logits.sub_(normaliser[:, None])
    grad = log_p.exp()
    if grad_entropy is not None:
        log_p.clamp_(min=torch.finfo(log_p.dtype).min)
        factor = log_p.add_(entropy[:, None]).mul_(-grad_entropy[:, None])
        if grad_logprobs is not None:
            factor.sub_(grad_logprobs[:, None])
        grad.mul_(factor)
    elif grad_logprobs is not None:
        grad.mul_(-grad_logprobs[:, None])
    if grad_logprobs is not None:
        grad.scatter_add_(-1, ids[:, None], grad_logprobs[:, None])
    return grad


class _GatherLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.temperature = temperature
        statistics = _logprob_statistics(widened(logits) / temperature, ids, with_entropy=True)
        logprobs, entropy, normaliser = statistics
        ctx.save_for_backward(logits, ids, normaliser, entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None and grads[1] is None:
            return None, None, None
        logits, ids, normaliser, entropy = ctx.saved_tensors
        tempered = widened(logits) / ctx.temperature
        grad = _logit_gradient(tempered, ids, normaliser, entropy, *grads)
        return grad.div_(ctx.temperature).to(logits.dtype), None, None


def gather_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each id, and the entropy, under softmax(logits / temperature).

    Args:
        logits: [M, V], -inf allowed for tokens that cannot be.
        ids: [M] int64.
        temperature: > 0; divides the logits in fp32.

    Returns:
        (logprobs, entropy), each [M] fp32 (fp64 for fp64 logits), nats; both differentiable.
    """
    return _GatherLogprobs.apply(logits, ids, temperature)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        temperature: float,
        with_entropy: bool,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        scaled, wide_weight = widened(hidden) / temperature, widened(weight)
        saved = torch.empty(3, len(ids), dtype=scaled.dtype, device=scaled.device)
        for start in range(0, len(ids), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = scaled[rows] @ wide_weight.T
            logprobs, entropy, normaliser = _logprob_statistics(logits, ids[rows], with_entropy)
            saved[0, rows], saved[1, rows], saved[2, rows] = logprobs, entropy, normaliser
        # Copies, because outputs that are views of one tensor may not be changed in place.
        logprobs, entropy, normaliser = (x.clone() for x in saved)
        ctx.save_for_backward(hidden, weight, ids, entropy, normaliser)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, entropy, normaliser = ctx.saved_tensors
        unused = (None,) * 4
        if grads[0] is None and grads[1] is None:
            return None, None, *unused
        scaled, wide_weight = widened(hidden) / ctx.temperature, widened(weight)
        grad_hidden = torch.empty_like(scaled) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(wide_weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(ids), ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            logits = scaled[rows] @ wide_weight.T
            chunk_grads = (None if grad is None else grad[rows] for grad in grads)
            grad = _logit_gradient(logits, ids[rows], normaliser[rows], entropy[rows], *chunk_grads)
            if grad_hidden is not None:
                torch.mm(grad, wide_weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, scaled[rows])
        if grad_hidden is not None:
            grad_hidden = grad_hidden.div_(ctx.temperature).to(hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, *unused


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = True,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Return `gather_logprobs(hidden @ weight.T, ids, temperature)` without ever having the logits.

    Args:
        hidden: [M, H] rows that predict the tokens.
        weight: [V, H] of the language-model head.
        ids: [M] int64.
        temperature: > 0; divides the logits in fp32.
        with_entropy: False saves a third of the forward; the entropy returned is then all zeros
            and carries no gradient.
        chunk_bytes: bound on the logits and their one working copy together; a single row is made
            however small it is. It changes speed and memory, results only by rounding.

    Returns:
        (logprobs, entropy), each [M] fp32 (fp64 for fp64 inputs), nats; differentiable in hidden
        and weight, through log-probs and entropy both.
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    chunk_rows = max(1, chunk_bytes // (2 * weight.shape[0] * dtype.itemsize))
    return _LinearLogprobs.apply(hidden, weight, ids, temperature, with_entropy, chunk_rows)
