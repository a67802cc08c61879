"""Log-probability and entropy in plain torch, in tiles, with the gradients written out by hand.

The decision that is not obvious: the fused head cuts the vocabulary, not only the rows. A tile of
many rows by a part of the vocabulary reads each weight once a pass and writes each weight's
gradient once, where tiles of whole rows would move all of both once a tile. The softmax of a row is
therefore put together from parts (Milakov and Gimelshein, "Online normalizer calculation for
softmax", arXiv:1805.02867).

Shapes: M completion tokens, n rows and v vocabulary entries of a tile, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, isqrt
from typing import NamedTuple

import torch
from torch import Tensor

# Bound on all that a tile of the fused head needs: logits, working copies and widened weights.
DEFAULT_CHUNK_BYTES = 64 * 2**20
# Rows that start at odd addresses make the product nearly half as fast on a CPU.
_ALIGNMENT = 64
# The working copy of a tile is made of a quarter of its rows at a time, or of this many bytes.
_SCRATCH_SHARE = 4
_SCRATCH_BYTES = 2**20
# Bound on the working copies of logits that exist already: they stay in a cache.
GATHER_BYTES = 8 * 2**20
# exp(-1000) is 0 in fp64 too: what stands beside such a probability counts for nothing. Without a
# floor it would be -inf for a masked logit (or overflow to it), and 0 * -inf is NaN.
_FLOOR = -1000.0


def widened(x: Tensor) -> Tensor:
    """Return `x` in fp32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Partial(NamedTuple):
    """What is known of softmaxes [n] after a part of the vocabulary."""

    largest: Tensor  # logit; never below the smallest finite number
    total: Tensor  # sum of exp(logit - largest)
    moment: Tensor | None  # sum of exp(logit - largest) * (logit - largest), for the entropy
    target: Tensor  # logit of the row's id; -inf where it is in another part


def statistics(
    logits: Tensor, ids: Tensor, with_entropy: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-prob of `ids`, entropy and log-sum-exp of whole rows; overwrites `logits`.

    Args:
        logits: [n, V] fp32 or fp64, divided by the temperature already.
        ids: [n] int64.
        with_entropy: False leaves the entropy 0.

    Returns:
        (logprobs, entropy, normaliser), each [n] in the dtype of `logits`, nats.
    """
    return _finish(_part(logits, ids, torch.empty_like(logits) if with_entropy else None))


def logit_gradient(
    logits: Tensor,
    ids: Tensor,
    normaliser: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    scratch: Tensor | None = None,
) -> Tensor:
    """Overwrite logits with the gradient of their rows' log-prob and entropy, and return them.

    d logp_i / d z_j = [j = i] - p_j and d entropy / d z_j = -p_j (log p_j + entropy).

    Args:
        logits: [n, v] fp32 or fp64 z, divided by the temperature already.
        ids: [n] int64, counted from the first of the v entries; may lie outside them.
        normaliser: [n] log-sum-exp of the whole row.
        entropy: [n]; read where `grad_entropy` is given.
        grad_logprobs: [n] incoming gradient, or None.
        grad_entropy: [n] incoming gradient, or None.
        scratch: [n, v] to work in; allocated where missing and needed.
    """
    log_p = logits.sub_(normaliser[:, None])
    if grad_entropy is None:
        grad = log_p.exp_()
        factor = 0.0 if grad_logprobs is None else -grad_logprobs[:, None]
    else:
        p = torch.exp(log_p, out=torch.empty_like(log_p) if scratch is None else scratch)
        grad = log_p.clamp_(min=_FLOOR).add_(entropy[:, None])
        grad.mul_(-grad_entropy[:, None])
        if grad_logprobs is not None:
            grad.sub_(grad_logprobs[:, None])
        factor = p
    grad.mul_(factor)
    if grad_logprobs is not None:
        index, inside = _within(ids, grad.shape[1])
        grad.scatter_add_(-1, index[:, None], (grad_logprobs * inside)[:, None])
    return grad


def gather_forward(
    logits: Tensor, ids: Tensor, temperature: float, with_entropy: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, normaliser), each [M], of logits [M, V] of any float dtype."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logprobs, entropy, normaliser = (logits.new_empty(len(ids), dtype=dtype) for _ in range(3))
    for rows in _row_blocks(logits):
        part = statistics(_tempered(logits[rows], temperature), ids[rows], with_entropy)
        logprobs[rows], entropy[rows], normaliser[rows] = part
    return logprobs, entropy, normaliser


def gather_backward(
    logits: Tensor,
    ids: Tensor,
    normaliser: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Write the gradient of logits [M, V] to `out`, which may be `logits` itself."""
    # The gradient is linear in these: dividing them saves a pass over the logits.
    incoming = [None if x is None else x / temperature for x in (grad_logprobs, grad_entropy)]
    for rows in _row_blocks(logits):
        part = _tempered(logits[rows], temperature, out[rows])
        grads = (None if x is None else x[rows] for x in incoming)
        logit_gradient(part, ids[rows], normaliser[rows], entropy[rows], *grads)
        if part.dtype != out.dtype:
            out[rows] = part


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float,
    with_entropy: bool = True,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, normaliser), each [M], of logits hidden @ weight.T."""
    tiles = _Tiles(hidden, weight, temperature, chunk_bytes, widened_copies=1)
    whole: _Partial | None = None
    for columns, wide_weight in tiles.columns():
        parts = []
        for rows in tiles.rows():
            logits = tiles.logits(rows, wide_weight)
            for part, block, scratch in tiles.blocks(rows, logits):
                local = ids[part] - columns.start
                parts.append(_part(block, local, scratch if with_entropy else None))
        whole = _joined(whole, parts)
    assert whole is not None
    return _finish(whole)


def linear_backward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    normaliser: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    need_hidden: bool = True,
    need_weight: bool = True,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of hidden [M, H] and weight [V, H], None where not needed."""
    tiles = _Tiles(hidden, weight, temperature, chunk_bytes, widened_copies=1 + need_weight)
    grad_hidden = tiles.scaled.new_zeros(hidden.shape) if need_hidden else None
    grad_weight = weight.new_empty(weight.shape) if need_weight else None
    for columns, wide_weight in tiles.columns():
        grad_part = None if grad_weight is None else tiles.summed_in(grad_weight[columns])
        for rows in tiles.rows():
            logits = tiles.logits(rows, wide_weight)
            for part, block, scratch in tiles.blocks(rows, logits):
                grads = [None if x is None else x[part] for x in (grad_logprobs, grad_entropy)]
                local = ids[part] - columns.start
                given = (block, local, normaliser[part], entropy[part], *grads, scratch)
                logit_gradient(*given)
            if grad_hidden is not None:
                grad_hidden[rows].addmm_(logits, wide_weight)
            if grad_part is not None:
                # beta=0 writes without reading.
                grad_part.addmm_(logits.T, tiles.scaled[rows], beta=float(rows.start > 0))
        if grad_weight is not None and grad_part is not None and grad_part.dtype != weight.dtype:
            grad_weight[columns] = grad_part
    if grad_hidden is not None:
        grad_hidden = grad_hidden.div_(temperature).to(hidden.dtype)
    return grad_hidden, grad_weight


class _Tiles:
    """Cuts hidden @ weight.T into tiles that fit `chunk_bytes`, all made in one buffer."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        temperature: float,
        chunk_bytes: int,
        widened_copies: int,
    ) -> None:
        """`widened_copies`: arrays like a tile's weight that are needed where it is narrow."""
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        self.scaled = hidden.to(dtype) / temperature
        self._weight = weight
        total_rows, (vocabulary, hidden_size) = len(hidden), weight.shape
        elements = max(1, chunk_bytes // dtype.itemsize)
        # Square tiles move the least memory for their size; few rows leave room for more columns.
        self._rows = min(total_rows, isqrt(elements))
        share = ceil(self._rows / _SCRATCH_SHARE)
        beside = widened_copies * hidden_size if weight.dtype != dtype else 0
        fitting = elements // max(1, self._rows + share + beside)
        if fitting > _ALIGNMENT:
            fitting -= fitting % _ALIGNMENT
        self._columns = max(1, min(vocabulary, fitting))
        # A small tile is worked on at once.
        least = _SCRATCH_BYTES // dtype.itemsize // self._columns
        room = elements // self._columns - self._rows - beside
        self._block = max(1, share, min(self._rows, room, least))
        self._wide = [
            self.scaled.new_empty(self._columns, hidden_size)
            for _ in range(widened_copies if weight.dtype != dtype else 0)
        ]
        self._tile = self.scaled.new_empty(self._rows * self._columns)
        self._scratch = self.scaled.new_empty(self._block * self._columns)

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield parts of the vocabulary and their weights [v, H] in the wide dtype."""
        for columns in _slices(len(self._weight), self._columns):
            part = self._weight[columns]
            yield columns, self._wide[0][: len(part)].copy_(part) if self._wide else part

    def summed_in(self, grad: Tensor) -> Tensor:
        """Return `grad` [v, H], a part of the weight's gradient, or wide memory of its shape."""
        return self._wide[1][: len(grad)] if self._wide else grad

    def rows(self) -> Iterator[slice]:
        return _slices(len(self.scaled), self._rows)

    def logits(self, rows: slice, wide_weight: Tensor) -> Tensor:
        """Return one tile [n, v], in memory that the next call uses again."""
        hidden = self.scaled[rows]
        shape = len(hidden), len(wide_weight)
        tile = self._tile[: shape[0] * shape[1]].view(shape)
        return torch.mm(hidden, wide_weight.T, out=tile)

    def blocks(self, rows: slice, logits: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield parts of a tile: their place among all rows, their logits, memory as large."""
        for block in _slices(len(logits), self._block):
            part = logits[block]
            place = slice(rows.start + block.start, rows.start + block.stop)
            yield place, part, self._scratch[: part.numel()].view_as(part)


def _slices(length: int, step: int) -> Iterator[slice]:
    """Cut 0 .. length; nothing is cut into one empty slice, so that sums over it are made too."""
    for start in range(0, max(1, length), max(1, step)):
        yield slice(start, min(start + step, length))


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    """Cut existing logits [M, V] so that two wide copies of a block fit `GATHER_BYTES`."""
    itemsize = torch.promote_types(logits.dtype, torch.float32).itemsize
    return _slices(len(logits), GATHER_BYTES // (2 * itemsize * logits.shape[1]))


def _tempered(logits: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """Return logits / temperature in fp32 or wider; in `out` where that is as wide."""
    wide = widened(logits)
    return torch.div(logits, temperature, out=out) if wide is logits else wide.div_(temperature)


def _part(logits: Tensor, ids: Tensor, scratch: Tensor | None) -> _Partial:
    """Look at a part of the vocabulary [n, v]; overwrites `logits`.

    `ids` count from the part's first entry; without `scratch` the entropy is left out.
    """
    index, inside = _within(ids, logits.shape[1])
    target = logits.gather(-1, index[:, None]).squeeze(-1).masked_fill_(~inside, -torch.inf)
    # Finite, so that a part without any mass subtracts a number: -inf - -inf would be NaN.
    largest = logits.amax(-1).clamp_(min=torch.finfo(logits.dtype).min)
    shifted = logits.sub_(largest[:, None])
    if scratch is None:
        return _Partial(largest, shifted.exp_().sum(-1), None, target)
    weights = torch.exp(shifted, out=scratch)
    total = weights.sum(-1)
    return _Partial(largest, total, shifted.clamp_(min=_FLOOR).mul_(weights).sum(-1), target)


def _joined(left: _Partial | None, blocks: list[_Partial]) -> _Partial:
    """Add the next part of the vocabulary, in blocks of rows, to what is known of all rows."""
    moments = [x.moment for x in blocks if x.moment is not None]
    right = _Partial(
        torch.cat([x.largest for x in blocks]),
        torch.cat([x.total for x in blocks]),
        torch.cat(moments) if moments else None,
        torch.cat([x.target for x in blocks]),
    )
    if left is None:
        return right
    largest = torch.maximum(left.largest, right.largest)
    total, moment = torch.zeros_like(largest), torch.zeros_like(largest)
    for part in (left, right):
        moved = part.largest - largest
        scaled = part.total * moved.exp()
        total += scaled
        if part.moment is not None:
            moment += part.moment * moved.exp() + moved.clamp_(min=_FLOOR) * scaled
    target = torch.maximum(left.target, right.target)
    return _Partial(largest, total, None if left.moment is None else moment, target)


def _finish(whole: _Partial) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, normaliser), each [n] in memory of its own."""
    largest, total, moment, target = whole
    log_total = total.log()
    entropy = torch.zeros_like(total) if moment is None else log_total - moment / total
    return target - largest - log_total, entropy, largest + log_total


def _within(ids: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return ids moved into 0 .. columns - 1, and which lay there already."""
    index = ids.clamp(0, columns - 1)
    return index, index == ids
