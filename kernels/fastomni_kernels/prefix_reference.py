"""Attention of packed groups in plain torch on any device, with its backward written out.

It is what runs on a GPU that cannot run the kernel; on a CPU `dense_attention` is faster. Prompts
and completions take their turn, each against all the keys that it sees: the largest thing that
exists at a time is the scores of one prompt. As in the kernel, the backward makes probabilities
again from the log-sum-exp, and the gradient of a prompt's keys is added up in fp32 or wider.

Shapes: T packed rows, L query rows and U key rows of a stretch, Hq query heads, Hkv key-value
heads, R = Hq / Hkv, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastomni_kernels.chunked_logprobs import widened
from fastomni_kernels.layout import GroupLayout


def _stretches(layout: GroupLayout) -> Iterator[tuple[slice, tuple[slice, ...]]]:
    """Yield the rows of each prompt and completion, and the rows of the keys that they see.

    The last query sees all those keys, the one before it all but one, and so on.
    """
    for i, length in enumerate(layout.prompt_lengths):
        first = layout.group_offsets[i]
        prompt = slice(first, first + length)
        yield prompt, (prompt,)
        for s in range(layout.sequence_offsets[i], layout.sequence_offsets[i + 1]):
            first = layout.sequence_rows[s]
            own = slice(first, first + layout.sequence_lengths[s])
            if own.start < own.stop:
                yield own, (prompt, own)


def _queries(x: Tensor, rows: slice, key_heads: int) -> Tensor:
    """Return rows of x [T, Hq, ...], widened, as [Hkv, R, L, ...]."""
    return widened(x[rows]).unflatten(1, (key_heads, -1)).movedim(0, 2)


def _keys(x: Tensor, parts: tuple[slice, ...]) -> Tensor:
    """Return rows of x [T, Hkv, D], widened, as [Hkv, 1, U, D]."""
    return torch.cat([widened(x[part]) for part in parts]).transpose(0, 1)[:, None]


def _packed(x: Tensor) -> Tensor:
    """Return x [Hkv, R, L, ...] as [L, Hq, ...]."""
    return x.movedim(2, 0).flatten(1, 2)


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return scores [Hkv, R, L, U], -inf where a query does not see a key."""
    scores = scale * query @ key.transpose(2, 3)
    rows, keys = scores.shape[2:]
    seen = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril_(keys - rows)
    return scores.masked_fill_(~seen, -torch.inf)


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend within each group; equal to `reference.prefix_attention`.

    Args:
        q: [T, Hq, D] queries of the packed rows.
        k: [T, Hkv, D] keys; Hkv divides Hq.
        v: [T, Hkv, D] values.
        layout: the rows.
        scale: factor of the scores.

    Returns:
        out [T, Hq, D] in q's dtype, and the log-sum-exp of the scaled scores [T, Hq], nats, fp32
        (fp64 for fp64).
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty_like(widened(out[..., 0]))
    for rows, parts in _stretches(layout):
        scores = _scores(_queries(q, rows, k.shape[1]), _keys(k, parts), scale)
        total = scores.logsumexp(-1)
        weights = scores.sub_(total[..., None]).exp_()
        out[rows] = _packed(weights @ _keys(v, parts)).to(q.dtype)
        lse[rows] = _packed(total)
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: GroupLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, contiguous and in their dtypes.

    With P = exp(S - lse) and dP = dO V^T: dS = P (dP - sum(dO O)), dV = P^T dO
    (arXiv:2205.14135, appendix B.2).

    Args:
        grad_out: [T, Hq, D] gradient of the output.
        q, k, v: what the forward was given.
        out, lse: what it returned.
        layout: the rows.
        scale: factor of the scores.
    """
    heads = k.shape[1]
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (widened(x[:0]).new_zeros(x.shape) for x in (k, v))
    for rows, parts in _stretches(layout):
        query, grad, result = (_queries(x, rows, heads) for x in (q, grad_out, out))
        key, value = _keys(k, parts), _keys(v, parts)
        normaliser = _queries(lse, rows, heads)[..., None]
        weights = _scores(query, key, scale).sub_(normaliser).exp_()
        part_v = (weights.transpose(2, 3) @ grad).sum(1)
        mean = (grad * result).sum(-1, keepdim=True)
        grad_scores = (grad @ value.transpose(2, 3)).sub_(mean).mul_(weights).mul_(scale)
        grad_q[rows] = _packed(grad_scores @ key).to(q.dtype)
        part_k = (grad_scores.transpose(2, 3) @ query).sum(1)
        lengths = [part.stop - part.start for part in parts]
        for total, part in ((grad_k, part_k), (grad_v, part_v)):
            for rows_of_keys, piece in zip(parts, part.transpose(0, 1).split(lengths), strict=True):
                total[rows_of_keys] += piece
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
