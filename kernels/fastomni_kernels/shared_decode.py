"""One decode step in plain torch, in which sequences read their prompt's keys together.

The query rows of all sequences that read one key head of a prompt are one matrix product over
views, so the prompt's keys are neither copied nor read once per sequence. The decision that is not
obvious: prompts of equal length with equally many sequences, one after another, share that product
as a batch. That is the usual rollout; sequences in another order, or some not in use, are first
gathered in the order of their prompts, which copies their own keys.

Shapes: N prompts, S sequences, U rows of all prompts, P_i prompt tokens, Hq query heads, Hkv
key-value heads, R = Hq / Hkv, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastomni_kernels.chunked_logprobs import widened
from fastomni_kernels.reference import rotated


class _Run(NamedTuple):
    """Prompts one after another that are equally long and have equally many sequences."""

    first_token: int
    tokens: int
    prompts: int
    first_sequence: int
    sequences: int


class _Plan(NamedTuple):
    """Which sequences are in use, in the order of their prompts, and the runs of these prompts."""

    order: tuple[int, ...]
    usual: bool  # all are in use, and in that order already
    runs: tuple[_Run, ...]


# Every layer of a model, and every step, asks for the same one.
@lru_cache(maxsize=32)
def _plan(offsets: tuple[int, ...], prompt_of: tuple[int, ...]) -> _Plan:
    prompts = len(offsets) - 1
    active = [s for s, prompt in enumerate(prompt_of) if 0 <= prompt < prompts]
    order = sorted(active, key=lambda s: prompt_of[s])
    counts = [0] * prompts
    for s in order:
        counts[prompt_of[s]] += 1
    runs: list[_Run] = []
    prompt = first_sequence = 0
    lengths = [stop - start for start, stop in pairwise(offsets)]
    for (tokens, sequences), run in groupby(zip(lengths, counts, strict=True)):
        several = len(list(run))
        if sequences:
            runs.append(_Run(offsets[prompt], tokens, several, first_sequence, sequences))
        prompt += several
        first_sequence += several * sequences
    return _Plan(tuple(order), order == list(range(len(prompt_of))), tuple(runs))


def prefix_decode(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_offsets: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Tensor,
    prompt_of: Tensor,
    new_k: Tensor | None,
    new_v: Tensor | None,
    cosines: Tensor | None,
    sines: Tensor | None,
    scale: float,
) -> Tensor:
    """Equal to `reference.prefix_decode`; see `prefix_decode.prefix_decode` for the arguments.

    Offsets and lengths are read back from the device.
    """
    plan = _plan(tuple(prefix_offsets.tolist()), tuple(prompt_of.tolist()))
    lengths: list[int] = suffix_lengths.tolist()
    if cosines is not None and sines is not None:
        # Together: a small rotation costs as much as a large one.
        heads = q if new_k is None else torch.cat((q, new_k), dim=1)
        turned = rotated(heads, (cosines, sines))
        q, new_k = turned[:, : q.shape[1]], None if new_k is None else turned[:, q.shape[1] :]
    if new_k is not None and new_v is not None:
        _append((suffix_k, suffix_v), (new_k, new_v), plan, lengths)
    places = suffix_k.shape[1]
    largest = max(lengths if plan.usual else [lengths[s] for s in plan.order], default=0)
    longest = max(0, min(largest, places))
    own_k, own_v = suffix_k[:, :longest], suffix_v[:, :longest]
    if plan.usual:
        return _attend(q, prefix_k, prefix_v, own_k, own_v, lengths, plan.runs, scale)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    if plan.order:
        index = torch.tensor(plan.order, device=q.device)
        query, own_k, own_v = (x[index] for x in (q, own_k, own_v))
        lengths = [lengths[s] for s in plan.order]
        out[index] = _attend(query, prefix_k, prefix_v, own_k, own_v, lengths, plan.runs, scale)
    return out


def _append(
    caches: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], plan: _Plan, lengths: list[int]
) -> None:
    """Write new [S, Hkv, D] to place length - 1 of caches [S, C_max, Hkv, D] that have one."""
    places = caches[0].shape[1]
    if plan.usual and lengths and min(lengths) == max(lengths):
        if 1 <= lengths[0] <= places:
            for cache, newest in zip(caches, new, strict=True):
                cache[:, lengths[0] - 1] = newest
        return
    stored = [s for s in plan.order if 1 <= lengths[s] <= places]
    if stored:
        rows = torch.tensor(stored, device=caches[0].device)
        columns = torch.tensor([lengths[s] - 1 for s in stored], device=caches[0].device)
        for cache, newest in zip(caches, new, strict=True):
            cache[rows, columns] = newest[rows]


def _attend(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    lengths: list[int],
    runs: tuple[_Run, ...],
    scale: float,
) -> Tensor:
    """Attention [S, Hq, D] of sequences in the order of their prompts.

    Args:
        q: [S, Hq, D].
        prefix_k, prefix_v: [U, Hkv, D].
        own_k, own_v: [S, longest, Hkv, D] of the sequences' own tokens.
        lengths: how many of those are valid, for each sequence; all, where it is more.
        runs: the prompts.
        scale: factor of the scores.
    """
    sequences, query_heads, head_size = q.shape
    own, key_heads = own_k.shape[1:3]
    per_key_head = query_heads // key_heads
    own_k, own_v = widened(own_k), widened(own_v)
    query = (widened(q) * scale).reshape(sequences, key_heads, per_key_head, head_size)
    query = query.transpose(0, 1).contiguous()
    # Columns of the joint softmax: own keys, then the prompt's, then -inf up to the longest prompt.
    width = own + max((run.tokens for run in runs), default=0)
    scores = query.new_full((key_heads, sequences, per_key_head, width), -torch.inf)
    own_scores = scores[..., :own]
    for head in range(key_heads):
        own_scores[head] = torch.bmm(query[head], own_k[:, :, head].transpose(1, 2))
    if min(lengths, default=0) < own:
        ended = torch.arange(own) >= torch.tensor(lengths)[:, None]
        ended = ended.to(q.device)
        own_scores.masked_fill_(ended[:, None], -torch.inf)
        own_v = own_v.masked_fill(ended[..., None, None], 0)  # 0 * NaN, of what was never written
    for (queries, part), key in _products(runs, (query, scores[..., own:]), widened(prefix_k)):
        part[..., : key.shape[1]] = torch.bmm(queries, key.transpose(1, 2))

    weights = scores.softmax(-1)
    if min(lengths, default=1) <= 0 and any(run.tokens == 0 for run in runs):
        weights.masked_fill_((scores == -torch.inf).all(-1, keepdim=True), 0)  # no key to see
    out = torch.empty_like(query)
    for head in range(key_heads):
        torch.bmm(weights[head, ..., :own], own_v[:, :, head], out=out[head])
    for (part, to), value in _products(runs, (weights[..., own:], out), widened(prefix_v)):
        to.baddbmm_(part[..., : value.shape[1]], value)
    return out.transpose(0, 1).reshape(q.shape).to(q.dtype).contiguous()


def _products(
    runs: tuple[_Run, ...], rows: tuple[Tensor, Tensor], packed: Tensor
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Cut rows [Hkv, S, R, any] and packed [U, Hkv, D] into few batches that belong together.

    Yields:
        ([batch, sequences of a prompt x R, any] of each of `rows`, [batch, P, D]), all of them
        views. A batch is the prompts of one head or the heads of one prompt, whichever is more.
    """
    key_heads = packed.shape[1]
    for first_token, tokens, prompts, first_sequence, sequences in runs:
        stop = first_token + prompts * tokens
        prompt_rows = packed[first_token:stop].unflatten(0, (prompts, tokens))
        queries = [
            x[:, first_sequence : first_sequence + prompts * sequences].view(
                key_heads, prompts, sequences * x.shape[2], x.shape[3]
            )
            for x in rows
        ]
        if prompts > key_heads:
            for head in range(key_heads):
                yield [x[head] for x in queries], prompt_rows[:, :, head]
        else:
            for i in range(prompts):
                yield [x[:, i] for x in queries], prompt_rows[i].transpose(0, 1)
