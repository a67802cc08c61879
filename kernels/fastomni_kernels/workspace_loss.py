"""The loss and its gradients from one sweep over the logits, a slab of rows at a time.

A slab is made by one matrix product, read once for log-probs and entropy, turned into its own
gradient, and used up by two more products. The decision that is not obvious: a slab of a batch is
described to the loss by clipped offsets of its sequences, so the loss needs no second version.

Shapes: M completion tokens, S sequences, H hidden, V vocabulary, R rows of a slab.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastomni_kernels import chunked_logprobs, dispatch
from fastomni_kernels.checks import check_id_range
from fastomni_kernels.library import define
from fastomni_kernels.loss_definition import LARGEST, METRICS, SMALLEST, LossSettings

_TOTALS = len(METRICS) - len(SMALLEST) - len(LARGEST)


class _Slabs:
    """Memory of one slab, and the products with it."""

    def __init__(self, hidden: Tensor, weight: Tensor, workspace_bytes: int, backend: str) -> None:
        self._hidden, self._weight = hidden, weight
        self._triton = dispatch.choose("gather_logprobs", backend, hidden.device) == "triton"
        # Logits stay in fp32: in bf16 a logit of 20 is off by 0.06, and so is its log-prob.
        wide = torch.promote_types(hidden.dtype, torch.float32)
        narrow = hidden.dtype != wide
        row_bytes = len(weight) * (wide.itemsize + (hidden.dtype.itemsize if narrow else 0))
        scratch = 0 if self._triton else chunked_logprobs.GATHER_BYTES
        rows = max(1, (workspace_bytes - scratch) // row_bytes)
        self.rows = min(rows - rows % 128 if rows > 128 else rows, max(len(hidden), 1))
        self._logits = hidden.new_empty((self.rows, len(weight)), dtype=wide)
        self._gradients = hidden.new_empty(self._logits.shape) if narrow else self._logits

    def logits(self, rows: slice) -> Tensor:
        """Return logits [R, V] in fp32 or wider."""
        hidden = self._hidden[rows]
        out = self._logits[: len(hidden)]
        if out.dtype == hidden.dtype:
            return torch.mm(hidden, self._weight.T, out=out)
        return torch.mm(hidden, self._weight.T, out_dtype=out.dtype, out=out)

    def statistics(
        self, logits: Tensor, ids: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-prob, entropy and log-sum-exp of each row."""
        if self._triton:
            from fastomni_kernels.triton_kernels import gather_logprobs as kernel

            return kernel.forward(logits, ids, temperature)
        return chunked_logprobs.gather_forward(logits, ids, temperature)

    def gradients(
        self,
        logits: Tensor,
        ids: Tensor,
        normaliser: Tensor,
        entropy: Tensor,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
        temperature: float,
    ) -> Tensor:
        """Return the gradient of the logits [R, V] in the dtype of hidden; logits are gone."""
        out = self._gradients[: len(logits)]
        backward = chunked_logprobs.gather_backward
        if self._triton:
            from fastomni_kernels.triton_kernels.gather_logprobs import backward
        backward(logits, ids, normaliser, entropy, grad_logprobs, grad_entropy, temperature, out)
        return out


def _implementation(hidden: Tensor, weight: Tensor, ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    advantages, cu, weights = rest[3:6]
    *numbers, temperature, workspace_bytes, need_hidden, need_weight, backend = rest[6:]
    settings = LossSettings(*numbers)
    check_id_range("linear_grpo_loss", ids, len(weight))
    slabs = _Slabs(hidden, weight, workspace_bytes, backend)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logprobs, entropy = (hidden.new_empty(len(ids), dtype=wide) for _ in range(2))
    grad_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else weight.new_empty(0)
    by_entropy = -settings.entropy_coef * settings.token_weight
    parts = []
    for start in range(0, max(len(ids), 1), slabs.rows):
        rows = slice(start, min(start + slabs.rows, len(ids)))
        logits = slabs.logits(rows)
        statistics = slabs.statistics(logits, ids[rows], temperature)
        logprobs[rows], entropy[rows], normaliser = statistics
        given = (None if x is None else x[rows] for x in rest[:3])
        loss, metrics, grad_logprobs = torch.ops.fastomni.grpo_loss(
            statistics[0],
            statistics[1],
            *given,
            advantages,
            cu.clamp(rows.start, rows.stop) - rows.start,
            weights,
            *settings,
            backend,
        )
        parts.append((loss, metrics))
        if not (need_hidden or need_weight):
            continue
        grad_entropy = torch.full_like(grad_logprobs, by_entropy) if by_entropy else None
        gradients = slabs.gradients(
            logits, ids[rows], normaliser, statistics[1], grad_logprobs, grad_entropy, temperature
        )
        if need_hidden:
            torch.mm(gradients, weight, out=grad_hidden[rows])
        if need_weight:
            _add_product(grad_weight, gradients.T, hidden[rows])
    losses, vectors = (torch.stack(x) for x in zip(*parts, strict=True))
    return (
        losses.sum(0),
        _combined(vectors),
        logprobs,
        entropy,
        grad_hidden,
        grad_weight.to(weight.dtype),
    )


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, which is at least as wide."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _combined(vectors: Tensor) -> Tensor:
    """Metrics of all slabs [slabs, len(METRICS)] in one vector."""
    least = _TOTALS + len(SMALLEST)
    totals, smallest, largest = vectors.tensor_split((_TOTALS, least), 1)
    return torch.cat((totals.sum(0), smallest.amin(0), largest.amax(0)))


def _fake(hidden: Tensor, weight: Tensor, ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    need_hidden, need_weight = rest[-3:-1]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(len(METRICS), dtype=wide),
        hidden.new_empty(ids.shape, dtype=wide),
        hidden.new_empty(ids.shape, dtype=wide),
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    others = [None] * (len(ctx.needs_input_grad) - 2)
    if grad_loss is None:
        return None, None, *others
    grads: list[Tensor | None] = []
    for needed, grad in zip(ctx.needs_input_grad[:2], ctx.saved_tensors, strict=True):
        grads.append(_scaled(grad, grad_loss) if needed else None)
    return *grads, *others


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """Multiply in place: a second copy of the head's gradient is what this mode is to avoid."""
    if type(grad) is not Tensor:  # a compiler's stand-in: it plans memory itself
        return grad * factor.to(grad.dtype)
    torch.ops.fastomni.scale_(grad, factor)
    torch.autograd.graph.increment_version(grad)  # a second backward finds a changed tensor
    return grad.detach()


def _scale(x: Tensor, factor: Tensor) -> None:
    if x.device.type != "cpu" or factor.item() != 1:
        x.mul_(factor)


define("scale_(Tensor(a!) x, Tensor factor) -> ()", _scale, lambda *_: None)

workspace_loss = define(
    "linear_grpo_loss(Tensor hidden, Tensor weight, Tensor ids, Tensor? reference_logprobs, "
    "Tensor? old_logprobs, Tensor? rollout_logprobs, Tensor advantages, Tensor cu_completions, "
    "Tensor sequence_weights, float token_weight, str policy, str ratio, str kl, float beta, "
    "float clip_low, float clip_high, float dual_clip, float cispo_max, float sapo_positive, "
    "float sapo_negative, str mismatch, float mismatch_min, float mismatch_max, "
    "float entropy_coef, float temperature, int workspace_bytes, bool need_hidden, "
    "bool need_weight, str backend) -> (Tensor loss, Tensor metrics, Tensor logprobs, "
    "Tensor entropy, Tensor grad_hidden, Tensor grad_weight)",
    _implementation,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
