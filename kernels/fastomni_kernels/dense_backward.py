"""Backward of a long prompt and its completions on the CPU, in pieces that share out evenly.

torch's CPU flash kernel gives each head of a batch to one core, so 14 query heads on 4 cores are 4
rounds of work for 3.5. Here the prompt's keys are cut into a few blocks. Its own queries see a
block causally, and all of these triangles are one call; the rows after it see all of it, so for
them a row is a row, whichever token and query head it is of, and they are cut into equal tasks of
any number. The decision that is not obvious: rows are gathered once, for each key head its R query
heads together, so that all pieces are views and a task sums over query heads by itself.

Shapes: P prompt rows and n rows of a group, Hq query heads, Hkv key-value heads, R = Hq / Hkv,
D head size, W numbers per row and head (D, or 1 for the log-sum-exp).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from fastomni_kernels.lazily import lazily

# Below it, gathering the rows costs what even shares gain.
SHORTEST = 384
# A prompt's keys are cut into blocks of at least so many rows, the fewest with which the kernel has
# tiles of 64 queries and not of 32 (FlashAttentionKernel.cpp of torch), and into so few, because
# each is one more pass over the gradient of q.
_BLOCK_ROWS = 192
_MOST_BLOCKS = 3
# Tasks of a call over rows that see a whole block where each has so many rows (four of the kernel's
# largest tiles), else half of them. Not the number of cores: the gradients are the same on any.
_TASKS = 16
_TASK_ROWS = 1024


@dataclass(frozen=True)
class _Gathered:
    """Where the rows of a group lie once they are gathered: [Hkv, `end`, W].

    A key head has the prompt's blocks, each [R, `block_rows`], and then the other rows, [R] of each
    token. The last block and the end are filled up with zeros, which have no gradient and give
    none.
    """

    prompt: int
    rows: int
    key_heads: int
    shared: int

    @lazily
    def blocks(self) -> int:
        """Blocks of the prompt's keys."""
        return min(_MOST_BLOCKS, self.prompt // _BLOCK_ROWS)

    @lazily
    def most_tasks(self) -> int:
        """Tasks of one key head in one call."""
        return _TASKS // gcd(_TASKS, self.key_heads)

    @lazily
    def block_rows(self) -> int:
        """Keys of a block; R times as many rows make whole tasks."""
        unit = self.most_tasks // gcd(self.most_tasks, self.shared)
        return _round_up(-(-self.prompt // self.blocks), unit)

    @lazily
    def prompt_end(self) -> int:
        """Where the prompt's blocks end."""
        return self.blocks * self.shared * self.block_rows

    @lazily
    def rest_end(self) -> int:
        """Where the other rows end."""
        return self.prompt_end + self.shared * (self.rows - self.prompt)

    @lazily
    def end(self) -> int:
        """Where the zeros after them end."""
        return self.prompt_end + _round_up(self.rest_end - self.prompt_end, self.most_tasks)

    def gather(self, x: Tensor) -> Tensor:
        """Return x [n, Hq, W] as [Hkv, end, W]."""
        gathered = x.new_empty(self.key_heads, self.end, x.shape[2])
        filled = self.prompt - (self.blocks - 1) * self.block_rows
        self._blocks(gathered)[:, -1, :, filled:] = 0
        gathered[:, self.rest_end :] = 0
        for rows, place in self.pairs(x, gathered):
            place.copy_(rows)
        return gathered

    def pairs(self, x: Tensor, gathered: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield views of x [n, Hq, W] and of gathered [Hkv, end, W] that are of the same rows."""
        x = x.unflatten(1, (self.key_heads, self.shared))
        whole, left = divmod(self.prompt, self.block_rows)
        rows = x[: whole * self.block_rows].unflatten(0, (whole, -1))
        yield rows.permute(2, 0, 3, 1, 4), self._blocks(gathered)[:, :whole]
        if left:
            rows = x[self.prompt - left : self.prompt]
            yield rows.permute(1, 2, 0, 3), self._blocks(gathered)[:, whole, :, :left]
        rest = gathered[:, self.prompt_end : self.rest_end].unflatten(1, (-1, self.shared))
        yield x[self.prompt :].transpose(0, 1), rest

    def _blocks(self, gathered: Tensor) -> Tensor:
        return gathered[:, : self.prompt_end].unflatten(1, (self.blocks, self.shared, -1))

    def triangles(self, gathered: Tensor) -> Tensor:
        """Return the prompt's rows as a view [Hkv, blocks * R, block rows, W]."""
        return self._blocks(gathered).flatten(1, 2)

    def repeat(self, x: Tensor) -> Tensor:
        """Return keys or values [P, Hkv, D] of the triangles, [Hkv, blocks * R, block rows, D]."""
        filled = x.new_zeros(self.key_heads, self.blocks * self.block_rows, x.shape[2])
        filled[:, : self.prompt] = x.transpose(0, 1)
        blocks = filled.unflatten(1, (self.blocks, 1, -1))
        return blocks.expand(-1, -1, self.shared, -1, -1).flatten(1, 2)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def backward(
    inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...], prompt: int, scale: float
) -> None:
    """Write the gradients of one group, but for what completions do to themselves.

    Args:
        inputs: grad of out, q, k, v, out and lse [n, heads, W] of the group's rows, of the whole
            softmax.
        grads: gradients of q [n, Hq, D] and of k and v [n, Hkv, D], written in place: all rows of
            the first, the prompt's of the others.
        prompt: P, at least `SHORTEST`; all later rows see all of it.
        scale: factor of the scores.
    """
    grad_out, q, k, v, out, lse = inputs
    group = _Gathered(prompt, q.shape[0], k.shape[1], q.shape[1] // k.shape[1])
    queries = tuple(group.gather(x) for x in (grad_out, q, out, lse))
    grad_q = torch.empty_like(queries[1])

    keys = tuple(x[:prompt] for x in (k, v))
    triangles = tuple(map(group.triangles, queries))
    part_q, *parts = _flash_backward(triangles, tuple(map(group.repeat, keys)), True, scale)
    group.triangles(grad_q).copy_(part_q)
    grad_q[:, group.prompt_end :] = 0
    # [Hkv, blocks * block rows, D]
    totals = [x.unflatten(1, (-1, group.shared)).sum(2).flatten(1, 2) for x in parts]

    for i in range(group.blocks):
        block = slice(i * group.block_rows, min((i + 1) * group.block_rows, prompt))
        later = slice((i + 1) * group.shared * group.block_rows, group.end)
        rows = later.stop - later.start
        if rows:
            half = rows < group.most_tasks * _TASK_ROWS and group.most_tasks > 1
            tasks = group.most_tasks // 2 if half else group.most_tasks
            *seeing, to_q = (x[:, later].unflatten(1, (tasks, -1)) for x in (*queries, grad_q))
            seen = (x[block].transpose(0, 1)[:, None].expand(-1, tasks, -1, -1) for x in keys)
            part_q, *parts = _flash_backward(tuple(seeing), tuple(seen), False, scale)
            to_q.add_(part_q)
            for total, part in zip(totals, parts, strict=True):
                total[:, block].add_(part.sum(1))
    for to_rows, place in group.pairs(grads[0], grad_q):
        to_rows.copy_(place)
    for grad, total in zip(grads[1:], totals, strict=True):
        grad[:prompt].copy_(total[:, :prompt].transpose(0, 1))


def _flash_backward(
    queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of q, k and v, from (grad of out, q, out, lse) and (k, v), each [B, H]."""
    grad_out, q, out, lse = queries
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, *keys, out, lse.squeeze(-1), 0.0, causal, scale=scale
    )
