"""Attention of packed groups on the CPU: exact, forward and backward, no mask and no padding.

Each group is cut into dense pieces that torch's CPU flash kernel takes as strided views: the prompt
(causal), all completions against their prompt (no mask at all), and the completions against
themselves (causal). The last two meet by log-sum-exp. The decision that is not obvious: the
backward hands every piece the merged output and the merged log-sum-exp, so each piece works with
the probabilities of the whole softmax and its gradients simply add up; the gradient of a prompt's
keys is the sum over its completions without anything being repeated. So the backward may cut
otherwise than the forward, and does where a prompt is long (`dense_backward`).

Shapes: T packed rows, Hq query heads, Hkv key-value heads, R = Hq / Hkv, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from fastomni_kernels import dense_backward
from fastomni_kernels.chunked_logprobs import widened
from fastomni_kernels.layout import GroupLayout

# Completions are batched with others at least half as long, so padding at most doubles their own
# (small) part; below this many tokens a call costs more than the padding.
_SHORT_COMPLETION = 16


@dataclass(frozen=True)
class _Segment:
    """Dense attention in `groups` equally long stretches of rows that lie one after another."""

    first_row: int
    groups: int
    group_rows: int
    queries: tuple[int, int]
    keys: tuple[int, int]
    causal: bool

    def views(self, x: Tensor, span: tuple[int, int], key_heads: int) -> Iterator[Tensor]:
        """Yield x [rows, heads, D] as views [batch, heads per key head, span, D].

        A batch is the key heads of one group or the groups of one key head, whichever makes fewer:
        one view over both would need a copy.
        """
        rows = x[self.first_row : self.first_row + self.groups * self.group_rows]
        block = rows.unflatten(0, (self.groups, self.group_rows)).unflatten(2, (key_heads, -1))
        block = block[:, span[0] : span[1]]
        if self.groups > key_heads:
            for head in range(key_heads):
                yield block[:, :, head].transpose(1, 2)
        else:
            for group in range(self.groups):
                yield block[group].permute(1, 2, 0, 3)


@dataclass(frozen=True)
class _Completions:
    """Completions of similar length, gathered into [groups, group_rows] padded rows."""

    rows: Tensor  # packed row of each padded row; padding repeats the completion's last row
    real: Tensor  # indices of the padded rows that are no padding
    padding: Tensor  # indices of those that are
    segment: _Segment


@dataclass(frozen=True)
class _LongGroup:
    """A group whose prompt is long enough for a backward of its own; see `dense_backward`."""

    rows: slice
    prompt: int


@dataclass(frozen=True)
class _Plan:
    segments: tuple[_Segment, ...]
    completions: tuple[_Completions, ...]
    # What the backward does instead of all segments.
    short: tuple[_Segment, ...]
    long: tuple[_LongGroup, ...]


def _pad_together(layout: GroupLayout, sequences: list[int]) -> _Completions:
    lengths = torch.tensor([layout.sequence_lengths[s] for s in sequences])
    starts = torch.tensor([layout.sequence_rows[s] for s in sequences])
    longest = int(lengths[0])
    column = torch.arange(longest)
    rows = starts[:, None] + column.minimum(lengths[:, None] - 1)
    is_real = (column < lengths[:, None]).flatten()
    whole = (0, longest)
    segment = _Segment(0, len(sequences), longest, whole, whole, causal=True)
    return _Completions(
        rows.flatten(), is_real.nonzero().flatten(), (~is_real).nonzero().flatten(), segment
    )


def _batch_completions(layout: GroupLayout, sequences: list[int]) -> Iterator[_Completions]:
    """Batch completions, longest first, with those more than half as long as the longest."""
    longest_first = sorted(sequences, key=lambda s: -layout.sequence_lengths[s])
    batch: list[int] = []
    for sequence in longest_first:
        if batch:
            longest = layout.sequence_lengths[batch[0]]
            if longest > _SHORT_COMPLETION and 2 * layout.sequence_lengths[sequence] <= longest:
                yield _pad_together(layout, batch)
                batch = []
        batch.append(sequence)
    if batch:
        yield _pad_together(layout, batch)


# Every layer of a model asks for the same layout, twice.
@lru_cache(maxsize=32)
def _plan(layout: GroupLayout) -> _Plan:
    segments: list[_Segment] = []
    short: list[_Segment] = []
    long: list[_LongGroup] = []
    shared: list[int] = []
    shapes = []
    for i, prompt in enumerate(layout.prompt_lengths):
        first = layout.sequence_offsets[i]
        filled = [first + j for j, length in enumerate(layout.completion_lengths[i]) if length]
        rows = layout.group_offsets[i + 1] - layout.group_offsets[i]
        # A prompt with one completion is one plain causal stretch.
        shapes.append((prompt if len(filled) > 1 else rows, rows))
        if len(filled) > 1:
            shared += filled
    first_row = 0
    for (causal_rows, rows), run in groupby(shapes):
        groups = len(list(run))
        causal, rest = (0, causal_rows), (causal_rows, rows)
        pieces = [_Segment(first_row, groups, rows, causal, causal, causal=True)]
        if causal_rows < rows:
            pieces.append(_Segment(first_row, groups, rows, rest, causal, causal=False))
        segments += pieces
        stop = first_row + groups * rows
        if causal_rows < dense_backward.SHORTEST:
            short += pieces
        else:
            starts = range(first_row, stop, rows)
            long += [_LongGroup(slice(start, start + rows), causal_rows) for start in starts]
        first_row = stop
    batches = tuple(_batch_completions(layout, shared))
    return _Plan(tuple(segments), batches, tuple(short), tuple(long))


def _forward_segment(
    segment: _Segment, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> None:
    """Write out [rows, Hq, D] and lse [rows, Hq, 1] of the segment's query rows."""
    heads, shared = k.shape[1], q.shape[1] // k.shape[1]
    pieces = zip(
        *(segment.views(x, segment.queries, heads) for x in (q, out, lse)),
        *(segment.views(x, segment.keys, heads) for x in (k, v)),
        strict=True,
    )
    for query, to_out, to_lse, key, value in pieces:
        part_out, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query,
            key.expand(-1, shared, -1, -1),
            value.expand(-1, shared, -1, -1),
            0.0,
            segment.causal,
            scale=scale,
        )
        to_out.copy_(part_out)
        to_lse.squeeze(-1).copy_(part_lse)


def _backward_segment(
    segment: _Segment, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...], scale: float
) -> None:
    """Write the segment's part of the gradients (q, k, v).

    A causal segment writes the gradient of its keys and values, which nobody wrote before; the
    completions' segment after it adds to that of the prompt's.

    Args:
        segment: which rows.
        inputs: grad of out, q, k, v, out and lse of the whole softmax.
        grads: gradients of q, k and v, changed in place.
        scale: factor of the scores.
    """
    grad_out, q, k, v, out, lse = inputs
    grad_q, grad_k, grad_v = grads
    heads, shared = k.shape[1], q.shape[1] // k.shape[1]
    pieces = zip(
        *(segment.views(x, segment.queries, heads) for x in (grad_out, q, out, lse, grad_q)),
        *(segment.views(x, segment.keys, heads) for x in (k, v, grad_k, grad_v)),
        strict=True,
    )
    for part_grad, query, part_out, part_lse, to_q, key, value, to_k, to_v in pieces:
        part_q, part_k, part_v = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                part_grad,
                query,
                key.expand(-1, shared, -1, -1),
                value.expand(-1, shared, -1, -1),
                part_out,
                part_lse.squeeze(-1),
                0.0,
                segment.causal,
                scale=scale,
            )
        )
        to_q.copy_(part_q)
        for total, part in ((to_k, part_k), (to_v, part_v)):
            if segment.causal:
                torch.sum(part, 1, keepdim=True, out=total)
            else:
                total.add_(part.sum(1, keepdim=True))


def _merge(batch: _Completions, own: tuple[Tensor, Tensor], out: Tensor, lse: Tensor) -> None:
    """Join the completions' own part to the prompt's part that `out` and `lse` hold."""
    rows = batch.rows[batch.real]
    own_out, own_lse = (x[batch.real] for x in own)
    prompt_lse = lse[rows]
    merged = torch.logaddexp(prompt_lse, own_lse)
    own_out.mul_((own_lse - merged).exp_())
    out.index_copy_(0, rows, own_out.addcmul_(out[rows], (prompt_lse - merged).exp_()))
    lse.index_copy_(0, rows, merged)


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend within each group; equal to `reference.prefix_attention`, on CPU tensors.

    Args:
        q: [T, Hq, D] queries of the packed rows, any strides.
        k: [T, Hkv, D] keys; Hkv divides Hq.
        v: [T, Hkv, D] values.
        layout: the rows.
        scale: factor of the scores.

    Returns:
        out [T, Hq, D] in q's dtype (half precision is computed in fp32), and the log-sum-exp of the
        scaled scores [T, Hq], nats, fp32 (fp64 for fp64).
    """
    dtype = q.dtype
    q, k, v = map(_side_by_side, (q, k, v))
    plan = _plan(layout)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty_like(out[..., :1])
    for segment in plan.segments:
        _forward_segment(segment, q, k, v, out, lse, scale)
    for batch in plan.completions:
        query, key, value = (x[batch.rows] for x in (q, k, v))
        own = torch.empty_like(query), torch.empty_like(query[..., :1])
        _forward_segment(batch.segment, query, key, value, *own, scale)
        _merge(batch, own, out, lse)
    return out.to(dtype), lse.squeeze(-1)


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

    Args:
        grad_out: [T, Hq, D] gradient of the output, any strides.
        q, k, v: what the forward was given.
        out, lse: what it returned.
        layout: the rows.
        scale: factor of the scores.
    """
    plan = _plan(layout)
    # Contiguous, because the gradient often is an expanded view.
    wide = (widened(grad_out).contiguous(), *map(_side_by_side, (q, k, v, out)))
    inputs = (*wide, lse[..., None])
    contiguous = torch.contiguous_format
    grads = tuple(torch.empty_like(x, memory_format=contiguous) for x in inputs[1:4])
    for segment in plan.short:
        _backward_segment(segment, inputs, grads, scale)
    for group in plan.long:
        given = tuple(x[group.rows] for x in inputs)
        dense_backward.backward(given, tuple(x[group.rows] for x in grads), group.prompt, scale)
    for batch in plan.completions:
        gathered = tuple(x[batch.rows] for x in inputs)
        # No gradient reaches a padded query, and causality hides padded keys from real ones.
        gathered[0][batch.padding] = 0
        own = tuple(torch.empty_like(x) for x in gathered[1:4])
        _backward_segment(batch.segment, gathered, own, scale)
        rows = batch.rows[batch.real]
        grads[0].index_add_(0, rows, own[0][batch.real])
        for total, part in zip(grads[1:], own[1:], strict=True):
            total.index_copy_(0, rows, part[batch.real])
    grad_q, grad_k, grad_v = (grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True))
    return grad_q, grad_k, grad_v


def _side_by_side(x: Tensor) -> Tensor:
    """Return x widened, with the elements of a head side by side as the flash kernel needs them."""
    x = widened(x)
    return x if x.stride(-1) == 1 else x.contiguous()
