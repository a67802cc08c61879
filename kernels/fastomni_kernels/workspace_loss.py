"""The loss and its gradients from one sweep over the logits, a slab of rows at a time.

A slab is made by one matrix product, read once for log-probs and entropy, turned into its own
gradient, and used up by two more products. The decision that is not obvious: a slab of a batch is
described to the loss by clipped offsets of its sequences, so the loss needs no second version.

Shapes: M completion tokens, S sequences, H hidden, V vocabulary, R rows of a slab.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor

from fastomni_kernels import chunked_logprobs, dispatch
from fastomni_kernels.checks import check_id_range
from fastomni_kernels.library import define
from fastomni_kernels.loss_definition import LARGEST, METRICS, SMALLEST, LossSettings

_TOTALS = len(METRICS) - len(SMALLEST) - len(LARGEST)


class _Slabs:
    """Memory of one slab, and what is done with it: log-probs first, then gradients."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        temperature: float,
        workspace_bytes: int,
        backend: str,
        need_hidden: bool,
        need_weight: bool,
    ) -> None:
        # Logits stay in fp32: in bf16 a logit of 20 is off by 0.06, and so is its log-prob.
        wide = torch.promote_types(hidden.dtype, torch.float32)
        narrow = hidden.dtype != wide
        self._triton = dispatch.choose("linear_grpo_loss", backend, hidden.device) == "triton"
        self._hidden, self._weight, self._temperature = hidden, weight, temperature
        row_bytes = len(weight) * (wide.itemsize + (hidden.dtype.itemsize if narrow else 0))
        scratch = 0 if self._triton else chunked_logprobs.GATHER_BYTES
        most = max(1, (workspace_bytes - scratch) // row_bytes)
        # Even shares: a short last slab costs more in slow products than it saves.
        count = max(len(hidden), 1)
        rows = ceil(count / ceil(count / most))
        self.rows = min(most, 128 * ceil(rows / 128)) if rows > 128 else rows
        self._logits = hidden.new_empty((self.rows, len(weight)), dtype=wide)
        self._gradients = hidden.new_empty(self._logits.shape) if narrow else self._logits
        self.grad_hidden = torch.empty_like(hidden) if need_hidden else None
        self.grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None

    def logprobs(self, rows: slice, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make the logits of a slab; return log-prob, entropy and log-sum-exp of each row."""
        logits, hidden = self._logits[: len(ids)], self._hidden[rows]
        if logits.dtype == hidden.dtype:
            torch.mm(hidden, self._weight.T, out=logits)
        else:
            torch.mm(hidden, self._weight.T, out_dtype=logits.dtype, out=logits)
        if self._triton:
            from fastomni_kernels.triton_kernels import gather_logprobs as kernel

            return kernel.forward(logits, ids, self._temperature)
        return chunked_logprobs.gather_forward(logits, ids, self._temperature)

    def take_gradients(
        self,
        rows: slice,
        ids: Tensor,
        statistics: tuple[Tensor, Tensor, Tensor],
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
    ) -> None:
        """Turn the logits of the slab into gradients of hidden states and weights."""
        _, entropy, normaliser = statistics
        logits, gradients = self._logits[: len(ids)], self._gradients[: len(ids)]
        backward = chunked_logprobs.gather_backward
        if self._triton:
            from fastomni_kernels.triton_kernels.gather_logprobs import backward
        backward(
            logits, ids, normaliser, entropy, grad_logprobs, grad_entropy, self._temperature,
            gradients,
        )  # fmt: skip
        if self.grad_hidden is not None:
            torch.mm(gradients, self._weight, out=self.grad_hidden[rows])
        if self.grad_weight is not None:
            _add_product(self.grad_weight, gradients.T, self._hidden[rows])


class _ExponentialSlabs(_Slabs):
    """The same where the memory's speed is what counts: a slab is passed over three times.

    With E = exp(Z - max) and its row sums s, the probabilities E / s never have to be made. The
    product U = E W gives both the expected logit, (U h) / s, and so the entropy, and the gradient
    of h; the factors of a row go to the other side of the product with E that gives W's.
    """

    def logprobs(self, rows: slice, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make the exponentials of a slab; return log-prob, entropy, log-sum-exp of each row."""
        self._scaled = self._hidden[rows] / self._temperature
        exponentials = torch.mm(self._scaled, self._weight.T, out=self._logits[: len(ids)])
        largest = exponentials.amax(1, keepdim=True)
        target = exponentials.sub_(largest).gather(1, ids[:, None])[:, 0]
        self._total = exponentials.exp_().sum(1)
        self._product = torch.mm(exponentials, self._weight).div_(self._total[:, None])
        normaliser = self._total.log() + largest[:, 0]
        logprobs = target - self._total.log()
        return logprobs, normaliser - (self._product * self._scaled).sum(1), normaliser

    def take_gradients(
        self,
        rows: slice,
        ids: Tensor,
        statistics: tuple[Tensor, Tensor, Tensor],
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
    ) -> None:
        """Turn the exponentials of the slab into gradients of hidden states and weights."""
        factor = grad_logprobs[:, None]
        if self.grad_hidden is not None:
            towards = torch.sub(self._weight[ids], self._product, out=self.grad_hidden[rows])
            towards.mul_(factor / self._temperature)
        if self.grad_weight is not None:
            pulled = self._scaled * factor
            exponentials = self._logits[: len(ids)]
            self.grad_weight.addmm_(exponentials.T, pulled / self._total[:, None], alpha=-1)
            self.grad_weight.index_add_(0, ids, pulled)


def _implementation(hidden: Tensor, weight: Tensor, ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    advantages, cu, weights = rest[3:6]
    *numbers, temperature, workspace_bytes, need_hidden, need_weight, backend = rest[6:]
    settings = LossSettings(*numbers)
    check_id_range("linear_grpo_loss", ids, len(weight))
    by_entropy = -settings.entropy_coef * settings.token_weight
    wants_gradients = need_hidden or need_weight
    # Exponentials are all that a gradient through log-probs needs; one through the entropy needs
    # the logits, and the sum by index is in a fixed order on a CPU alone.
    plain = hidden.device.type == "cpu" and wants_gradients and not by_entropy
    plain = plain and dispatch.choose("linear_grpo_loss", backend, hidden.device) == "reference"
    slabs = (_ExponentialSlabs if plain else _Slabs)(
        hidden, weight, temperature, workspace_bytes, backend, need_hidden, need_weight
    )
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logprobs, entropy = (hidden.new_empty(len(ids), dtype=wide) for _ in range(2))
    parts = []
    for start in range(0, max(len(ids), 1), slabs.rows):
        rows = slice(start, min(start + slabs.rows, len(ids)))
        statistics = slabs.logprobs(rows, ids[rows])
        logprobs[rows], entropy[rows], _ = statistics
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
        if wants_gradients:
            grad_entropy = torch.full_like(grad_logprobs, by_entropy) if by_entropy else None
            slabs.take_gradients(rows, ids[rows], statistics, grad_logprobs, grad_entropy)
    losses, vectors = (torch.stack(x) for x in zip(*parts, strict=True))
    grad_hidden, grad_weight = slabs.grad_hidden, slabs.grad_weight
    return (
        losses.sum(0),
        _combined(vectors),
        logprobs,
        entropy,
        hidden.new_empty(0) if grad_hidden is None else grad_hidden,
        weight.new_empty(0) if grad_weight is None else grad_weight.to(weight.dtype),
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
    ctx.scaled = False
    ctx.save_for_backward(*output[4:])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    others = [None] * (len(ctx.needs_input_grad) - 2)
    if grad_loss is None:
        return None, None, *others
    if ctx.scaled:
        raise RuntimeError(
            "linear_grpo_loss: in workspace mode the first backward gave the gradients away, so "
            "there can be no second one; use mode='recompute' to go through the graph again"
        )
    grads: list[Tensor | None] = []
    saved = ctx.saved_tensors
    ctx.scaled = all(type(grad) is Tensor for grad in saved)  # see _scaled
    for needed, grad in zip(ctx.needs_input_grad[:2], saved, strict=True):
        grads.append(_scaled(grad, grad_loss) if needed else None)
    return *grads, *others


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """Multiply in place: a second copy of the head's gradient is what this mode is to avoid."""
    if type(grad) is not Tensor:  # a compiler's stand-in: it plans memory itself
        return grad * factor.to(grad.dtype)
    torch.ops.fastomni.scale_(grad, factor)
    torch.autograd.graph.increment_version(grad)
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
