"""`flash_varlen` on the CPU: torch's CPU flash kernel over runs of equally long sequences.

Nothing is padded, repeated or gathered: a run is one call of the kernel on strided views, and a
sequence that differs from its neighbours is a run of its own. The decision that is not obvious: the
forward gives the kernel query and key heads as they are, the backward gives it one key head's
queries at a time, because the kernel's backward has as many parallel tasks as it sees key heads:
with one key head on four cores that took thirty times as long.

Shapes: B sequences, T query rows and U key rows of all sequences, Lq and Lk those of one, Hq query
heads, Hkv key-value heads, R = Hq / Hkv, D head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from fastomni_kernels.chunked_logprobs import widened
from fastomni_kernels.library import define
from fastomni_kernels.varlen_reference import ARGUMENTS, host_offsets


@dataclass(frozen=True)
class _Run:
    """Sequences of equal lengths that lie one after another.

    Attributes:
        count: how many.
        first_query: row of q where they begin.
        first_key: row of k where they begin.
        queries: Lq.
        keys: Lk.
        causal: whether a query sees no later key.
    """

    count: int
    first_query: int
    first_key: int
    queries: int
    keys: int
    causal: bool

    @property
    def blind(self) -> int:
        """How many first queries of each sequence see no key."""
        return max(0, self.queries - self.keys) if self.causal else 0

    @property
    def square(self) -> bool:
        """Whether the kernel's causal mask, aligned to the upper left, is the one wanted."""
        return self.causal and self.queries >= self.keys

    def query_rows(self, x: Tensor) -> Tensor:
        """View x [T, ...] as [count, Lq - blind, ...]."""
        rows = x[self.first_query : self.first_query + self.count * self.queries]
        rows = rows.view(self.count, self.queries, *x.shape[1:])
        return rows[:, self.blind :] if self.blind else rows

    def key_rows(self, x: Tensor) -> Tensor:
        """View x [U, ...] as [count, Lk, ...]."""
        rows = x[self.first_key : self.first_key + self.count * self.keys]
        return rows.view(self.count, self.keys, *x.shape[1:])

    def mask(self, like: Tensor) -> Tensor | None:
        """What is added to the scores [Lq, Lk]; None where `square` or nothing is hidden.

        Some queries over more keys are part of a sequence: a mask costs little beside its product.
        """
        if not self.causal or self.square or self.queries == 1:
            return None
        hidden = like.new_full((self.queries, self.keys), -torch.inf)
        return hidden.triu_(self.keys - self.queries + 1)

    def covers(self, q: Tensor, k: Tensor) -> bool:
        """Whether all rows belong to the run, and no query is blind."""
        rows = (self.count * self.queries, self.count * self.keys)
        return rows == (len(q), len(k)) and not self.blind


def _runs(starts_q: Sequence[int], starts_k: Sequence[int], causal: bool) -> list[_Run]:
    """Return the runs with anything to do, from the offsets [B + 1]."""
    pairs = zip(pairwise(starts_q), pairwise(starts_k), strict=True)
    shapes = [(stop - start, end - begin) for (start, stop), (begin, end) in pairs]
    runs = []
    row = key = 0
    for (queries, keys), alike in groupby(shape for shape in shapes if any(shape)):
        count = len(list(alike))
        if queries and keys:
            runs.append(_Run(count, row, key, queries, keys, causal))
        row += count * queries
        key += count * keys
    return runs


def _readable(*tensors: Tensor) -> Iterator[Tensor]:
    """Yield tensors in fp32 or wider, each head's elements side by side: what the kernel reads."""
    for x in map(widened, tensors):
        yield x if x.stride(-1) == 1 else x.contiguous()


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
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp of the scores [T, Hq], -inf where there is none."""
    runs = _runs(
        host_offsets("q", cu_seqlens_q, q.shape[0], max_seqlen_q),
        host_offsets("k", cu_seqlens_k, k.shape[0], max_seqlen_k),
        causal,
    )
    query, key, value = _readable(q, k, v)
    if len(runs) == 1 and runs[0].covers(q, k):
        rows, rows_lse = _attend(runs[0], query, key, value, scale)
        return rows.flatten(0, 1).to(q.dtype), rows_lse.flatten(0, 1)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = query.new_full(q.shape[:2], -torch.inf)
    for run in runs:
        rows, rows_lse = _attend(run, query, key, value, scale)
        run.query_rows(out).copy_(rows)
        run.query_rows(lse).copy_(rows_lse)
    return out, lse


def _attend(run: _Run, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return output [count, Lq - blind, Hq, D] and log-sum-exp [count, Lq - blind, Hq]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        run.query_rows(q).transpose(1, 2),
        run.key_rows(k).transpose(1, 2),
        run.key_rows(v).transpose(1, 2),
        0.0,
        run.square,
        attn_mask=run.mask(q),
        scale=scale,
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    runs = _runs(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), causal)
    queries = [*_readable(grad, q, out), lse[..., None]]
    keys = [*_readable(k, v)]
    shared = q.shape[1] != k.shape[1]
    if len(runs) == 1 and runs[0].covers(q, k) and not shared:
        (block,) = _blocks(runs[0], queries, keys)
        parts = _differentiate(runs[0], *block, scale)
        grad_q, grad_k, grad_v = (x.transpose(1, 2).flatten(0, 1).to(q.dtype) for x in parts)
        return grad_q, grad_k, grad_v
    grad_q, grad_k, grad_v = (
        torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)
    )
    queries, keys = [*queries, grad_q], [*keys, grad_k, grad_v]
    if shared:
        queries, keys = ([x.unflatten(1, (k.shape[1], -1)) for x in xs] for xs in (queries, keys))
    for run in runs:
        for (*of_queries, to_q), (key, value, *to_keys) in _blocks(run, queries, keys):
            part_q, *parts = _differentiate(run, of_queries, [key, value], scale)
            to_q.copy_(part_q)
            for total, part in zip(to_keys, parts, strict=True):
                total.copy_(part.sum(1, keepdim=True) if shared else part)
    return grad_q, grad_k, grad_v


def _blocks(
    run: _Run, queries: Sequence[Tensor], keys: Sequence[Tensor]
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Yield views [batch, heads, rows of a sequence, *] of a run.

    A block is all of the run, or where heads are shared the key heads of one sequence or the
    sequences of one key head, whichever makes fewer blocks: one view over both would need a copy.

    Args:
        run: which rows.
        queries: [T, Hq, *] each, or where heads are shared [T, Hkv, R, *].
        keys: [U, Hkv, *] each, or where heads are shared [U, Hkv, 1, *].
    """
    views = [*map(run.query_rows, queries), *map(run.key_rows, keys)]
    if keys[0].dim() == 3:
        blocks: Iterable[Sequence[Tensor]] = [[x.transpose(1, 2) for x in views]]
    elif run.count > keys[0].shape[1]:
        blocks = zip(*(x.transpose(1, 3).unbind(2) for x in views), strict=True)
    else:
        blocks = zip(*(x.permute(0, 2, 3, 1, 4).unbind(0) for x in views), strict=True)
    for block in blocks:
        yield block[: len(queries)], block[len(queries) :]


def _differentiate(
    run: _Run, of_queries: Sequence[Tensor], of_keys: Sequence[Tensor], scale: float
) -> Sequence[Tensor]:
    """Return gradients of a block's queries, keys and values, all with the queries' heads.

    Args:
        run: which the block belongs to.
        of_queries: the output's gradient, queries, output [batch, heads, rows, D], log-sum-exp
            [batch, heads, rows, 1].
        of_keys: keys and values [batch, heads or 1, rows, D].
        scale: factor of the scores.
    """
    grad, query, out, lse = of_queries
    heads = (-1, query.shape[1], -1, -1)
    key, value = (x.expand(heads) for x in of_keys)
    grads: Sequence[Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad,
        query,
        key,
        value,
        out,
        lse.squeeze(-1),
        0.0,
        run.square,
        attn_mask=run.mask(query),
        scale=scale,
    )
    return grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, _, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward_operator(grad, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *grads, *[None] * 6


_backward_operator = define(
    "flash_varlen_sdpa_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, bool causal, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    lambda grad, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)

# CPU tensors only. Its second output is the log-sum-exp [T, Hq], for the backward.
sdpa_operator = define(
    f"flash_varlen_sdpa({ARGUMENTS}) -> (Tensor, Tensor)",
    _forward,
    lambda q, *rest: (
        q.new_empty(q.shape),
        q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32)),
    ),
    setup_context=_setup_context,
    backward=_gradients,
)
