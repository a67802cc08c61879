"""The plain torch implementation of `flash_varlen`: one sequence at a time, in fp32 or wider.

It is an operator, because a loop over lengths that lie in a tensor cannot be traced. The forward
takes torch's scaled_dot_product_attention, so that long sequences need no score matrix on a CPU;
the backward makes the scores again, one sequence at a time.

Shapes: B sequences, T query rows and U key rows of all sequences, Lq and Lk those of one, Hq query
heads, Hkv key-value heads, R = Hq / Hkv, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastomni_kernels.checks import require
from fastomni_kernels.chunked_logprobs import widened
from fastomni_kernels.library import define


def host_offsets(name: str, cu_seqlens: Tensor, rows: int, largest: int) -> list[int]:
    """Return the offsets as host integers, or refuse those that do not describe `rows` rows."""
    offsets = cu_seqlens.tolist()
    require(
        offsets[0] == 0 and offsets[-1] == rows,
        f"flash_varlen: cu_seqlens_{name} goes from {offsets[0]} to {offsets[-1]} but there are "
        f"{rows} rows; it must go from 0 to their number",
    )
    lengths = [end - start for start, end in pairwise(offsets)]
    require(
        min(lengths, default=0) >= 0,
        f"flash_varlen: cu_seqlens_{name} decreases; it must hold the ends of the sequences",
    )
    require(
        max(lengths, default=0) <= largest,
        f"flash_varlen: max_seqlen_{name}={largest} but the longest sequence has "
        f"{max(lengths, default=0)} rows; a fast backend would leave the rest out",
    )
    return offsets


def _sequences(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Yield (query rows, key rows, what may be seen) of each sequence with anything to do.

    Queries that see no key are left out of their rows, so no softmax is over nothing.
    """
    starts_q = host_offsets("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    starts_k = host_offsets("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    for i in range(len(starts_q) - 1):
        first, last = starts_q[i : i + 2]
        keys = slice(starts_k[i], starts_k[i + 1])
        length = keys.stop - keys.start
        if causal:
            first = max(first, last - length)
        if first == last or length == 0:
            continue
        seen = None
        if causal:
            seen = torch.ones(last - first, length, dtype=torch.bool, device=q.device)
            seen = seen.tril_(length - (last - first))
        yield slice(first, last), keys, seen


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> Tensor:
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    repeats = q.shape[1] // k.shape[1]
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    for rows, keys, seen in _sequences(q, k, *lengths, causal):
        query, key, value = (widened(x).transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
        attended = F.scaled_dot_product_attention(query, key, value, seen, scale=scale)
        out[rows] = attended[0].transpose(0, 1).to(q.dtype)
    return out


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v.

    With P = softmax(S) and dP = dO V^T: dS = P (dP - sum(P dP)), dV = P^T dO (arXiv:2205.14135,
    appendix B.2).
    """
    grads = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    shared = (k.shape[1], q.shape[1] // k.shape[1])
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    for rows, keys, seen in _sequences(q, k, *lengths, causal):
        # [Hkv, R, Lq, D] against [Hkv, 1, Lk, D]
        query, grad_out = (
            widened(x[rows]).unflatten(1, shared).permute(1, 2, 0, 3) for x in (q, grad)
        )
        key, value = (widened(x[keys]).transpose(0, 1)[:, None] for x in (k, v))
        scores = scale * query @ key.transpose(2, 3)
        if seen is not None:
            scores = scores.masked_fill_(~seen, -torch.inf)
        weights = scores.softmax(-1)
        grad_value = (weights.transpose(2, 3) @ grad_out).sum(1)
        grad_weights = grad_out @ value.transpose(2, 3)
        mean = (grad_weights * weights).sum(-1, keepdim=True)
        grad_scores = grad_weights.sub_(mean).mul_(weights).mul_(scale)
        grads[0][rows] = (grad_scores @ key).permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
        grads[1][keys] = (grad_scores.transpose(2, 3) @ query).sum(1).transpose(0, 1).to(k.dtype)
        grads[2][keys] = grad_value.transpose(0, 1).to(v.dtype)
    return grads[0], grads[1], grads[2]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward_operator(grad, *ctx.saved_tensors, *ctx.settings)
    return *grads, *[None] * 6


# Of both operators of ours, as torch's schema language has them.
ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float scale"
)

_backward_operator = define(
    f"flash_varlen_backward(Tensor grad, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda grad, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v)),
    reads_host=True,
)

# Without the argument `backend` of other operators: it is the reference.
reference_operator = define(
    f"flash_varlen({ARGUMENTS}) -> Tensor",
    _forward,
    lambda q, *rest: q.new_empty(q.shape),
    setup_context=_setup_context,
    backward=_gradients,
    reads_host=True,
)
