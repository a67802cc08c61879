"""The definitions in plain torch: every kernel is judged against this file.

All functions run on any device and any float dtype and compute in fp32 or wider. The one decision
that is not obvious: the policy loss is in `loss_definition.py`, with derivatives written out, and
is offered here too; all else leaves its derivatives to autograd.

Shapes: N prompts, G completions per prompt, S sequences, T packed rows, M completion tokens, P_i
prompt tokens, H hidden, V vocabulary, Hq query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastomni_kernels.chunked_logprobs import widened
from fastomni_kernels.layout import GroupLayout
from fastomni_kernels.loss_definition import grpo_loss, kl_penalty

__all__ = [
    "flash_varlen",
    "gather_logprobs",
    "group_advantages",
    "grpo_loss",
    "kl_penalty",
    "linear_logprobs",
    "prefix_attention",
    "prefix_decode",
]


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, scale: float | None = None
) -> Tensor:
    """Attend within each group: prompts causally, completions to their prompt and themselves.

    Args:
        q: [T, Hq, D] queries of the packed rows.
        k: [T, Hkv, D] keys; Hkv divides Hq, and query head h reads key head h // (Hq / Hkv).
        v: [T, Hkv, D] values.
        layout: the rows.
        scale: factor of the scores, D ** -0.5 by default.

    Returns:
        [T, Hq, D] in q's dtype.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    per_key_head = q.shape[1] // k.shape[1]
    outputs = []
    for i, prompt in enumerate(layout.prompt_lengths):
        rows = slice(layout.group_offsets[i], layout.group_offsets[i + 1])
        query = widened(q[rows]).transpose(0, 1)
        key, value = (
            widened(x[rows]).transpose(0, 1).repeat_interleave(per_key_head, 0) for x in (k, v)
        )
        lengths = torch.tensor([prompt, *layout.completion_lengths[i]])
        part = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(q.device)
        seen = ((part == 0) | (part == part[:, None])).tril()
        scores = (scale * query @ key.transpose(1, 2)).masked_fill(~seen, -torch.inf)
        outputs.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)


def flash_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attend within each packed sequence; a causal mask is aligned to the bottom right.

    Args:
        q: [T, Hq, D] queries of all sequences.
        k: [U, Hkv, D] keys; query head h reads key head h // (Hq / Hkv).
        v: [U, Hkv, D] values.
        cu_seqlens_q: [B + 1] offsets of the sequences in q.
        cu_seqlens_k: [B + 1] offsets in k and v.
        causal: whether query i of Lq sees keys up to i + Lk - Lq only.
        scale: factor of the scores, D ** -0.5 by default.

    Returns:
        [T, Hq, D] in q's dtype; zeros where a query sees no key.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    per_key_head = q.shape[1] // k.shape[1]
    outputs = []
    bounds = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    for query_rows, key_rows in bounds:
        query = widened(q[slice(*query_rows)]).transpose(0, 1)
        key, value = (
            widened(x[slice(*key_rows)]).transpose(0, 1).repeat_interleave(per_key_head, 0)
            for x in (k, v)
        )
        scores = scale * query @ key.transpose(1, 2)
        seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
        if causal:
            seen = seen.tril(seen.shape[1] - seen.shape[0])
        blind = ~seen.any(1, keepdim=True)
        # A blind row is a softmax over anything, made zero: a softmax over nothing is NaN.
        weights = scores.masked_fill(~(seen | blind), -torch.inf).softmax(-1)
        outputs.append((weights.masked_fill(blind, 0) @ value).transpose(0, 1))
    return torch.cat([widened(q[:0]), *outputs]).to(q.dtype)


def prefix_decode(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_offsets: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Tensor,
    prompt_of: Tensor,
    *,
    new_k: Tensor | None = None,
    new_v: Tensor | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """One decode step, sequence by sequence; see `prefix_decode.prefix_decode` for the arguments.

    Returns:
        [S, Hq, D] in q's dtype; zeros for sequences that are not in use or see no key. With `new_k`
        and `new_v` the caches are changed in place.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    per_key_head = q.shape[1] // prefix_k.shape[1]
    offsets, places = prefix_offsets.tolist(), suffix_k.shape[1]
    if rotation is not None:
        q = rotated(q, rotation)
        new_k = None if new_k is None else rotated(new_k, rotation)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for s, (prompt, length) in enumerate(
        zip(prompt_of.tolist(), suffix_lengths.tolist(), strict=True)
    ):
        if not 0 <= prompt < len(offsets) - 1:
            continue
        if new_k is not None and new_v is not None and 1 <= length <= places:
            suffix_k[s, length - 1], suffix_v[s, length - 1] = new_k[s], new_v[s]
        shared, own = slice(offsets[prompt], offsets[prompt + 1]), slice(0, max(0, length))
        key, value = (
            widened(torch.cat((prefix[shared], suffix[s, own]))).repeat_interleave(per_key_head, 1)
            for prefix, suffix in ((prefix_k, suffix_k), (prefix_v, suffix_v))
        )
        weights = (scale * torch.einsum("hd,khd->hk", widened(q[s]), key)).softmax(-1)
        out[s] = torch.einsum("hk,khd->hd", weights, value)
    return out


def rotated(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Heads [S, n, D] rotated by position, rounded once; the first half of D pairs with the second.

    Args:
        heads: queries or keys.
        rotation: cosines and signed sines (those of the first half negated), each [S, 1, D].
    """
    wide = widened(heads)
    cosines, sines = (x.to(wide.dtype) for x in rotation)
    turned = wide * cosines + wide.roll(heads.shape[-1] // 2, dims=-1) * sines
    return turned.to(heads.dtype)


def gather_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each id and entropy under softmax(logits / temperature).

    Args:
        logits: [M, V], -inf for tokens that cannot be.
        ids: [M] int64.
        temperature: > 0.

    Returns:
        (logprobs, entropy), each [M] fp32 (fp64 for fp64 logits), nats.
    """
    log_p = (widened(logits) / temperature).log_softmax(-1)
    # A token that cannot be adds nothing to the entropy, where 0 * -inf would be NaN.
    surprise = -log_p.masked_fill(log_p == -torch.inf, 0)
    return log_p.gather(-1, ids[:, None]).squeeze(-1), (log_p.exp() * surprise).sum(-1)


def linear_logprobs(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`gather_logprobs` of the logits hidden [M, H] @ weight.T [H, V], multiplied in fp32."""
    dtype = torch.promote_types(widened(hidden).dtype, widened(weight).dtype)
    return gather_logprobs(hidden.to(dtype) @ weight.to(dtype).T, ids, temperature)


def group_advantages(
    rewards: Tensor,
    eps: float = 1e-4,
    scale: str = "group",
    baseline: str = "mean",
    weights: Sequence[float] | None = None,
    aggregation: str = "sum_then_normalize",
) -> tuple[Tensor, Tensor, Tensor]:
    """Centre and scale rewards within each group; see `advantages.group_advantages`.

    Returns:
        advantages [N, G], no_spread [N] bool, missing [N] int32.
    """
    columns = widened(rewards if rewards.dim() == 3 else rewards[..., None])
    factors = columns.new_tensor([1.0] * columns.shape[2] if weights is None else list(weights))
    given = ~columns.isnan()
    scored = given.any(2)
    missing = (~scored).sum(1, dtype=torch.int32)
    if aggregation == "normalize_then_sum":
        centred, spread = _centred(columns, given, baseline)
        normalised = centred / (_deviation(columns, given, 1) + eps)
        total = (normalised.where(spread & given, 0) * factors).sum(2)
        no_spread = ~spread.any(2).squeeze(1)
        mean = total.where(scored, 0).sum() / scored.sum().clamp(min=1)
        deviation = _deviation(total.flatten(), scored.flatten(), 0)
        advantages = (total - mean) / (deviation + eps)
    else:
        total = (columns.where(given, 0) * factors).sum(2)
        advantages, spread = _centred(total, scored, baseline)
        no_spread = ~spread.squeeze(1)
        if scale == "group":
            advantages = advantages / (_deviation(total, scored, 1) + eps)
        elif scale == "batch":
            advantages = advantages / (_deviation(total.flatten(), scored.flatten(), 0) + eps)
    return advantages.where(scored & ~no_spread[:, None], 0), no_spread, missing


def _centred(values: Tensor, given: Tensor, baseline: str) -> tuple[Tensor, Tensor]:
    """Return values [N, G, ...] less their group's baseline, and whether a group has any spread."""
    count = given.sum(1, keepdim=True, dtype=values.dtype)
    centred = values - values.where(given, 0).sum(1, keepdim=True) / count.clamp(min=1)
    if baseline == "leave_one_out":  # r - mean of the others = (r - mean of all) * n / (n - 1)
        centred = centred * (count / (count - 1).clamp(min=1))
    # Equality, not std == 0: the mean of equal rewards may round, and 1e-8 / eps is not 0.
    largest = values.where(given, -torch.inf).amax(1, keepdim=True)
    smallest = values.where(given, torch.inf).amin(1, keepdim=True)
    return centred, largest > smallest


def _deviation(values: Tensor, given: Tensor, dim: int) -> Tensor:
    """Return the standard deviation (ddof=1) of the given values along `dim`, kept as size 1."""
    count = given.sum(dim, keepdim=True, dtype=values.dtype)
    mean = values.where(given, 0).sum(dim, keepdim=True) / count.clamp(min=1)
    squares = (values - mean).where(given, 0).square().sum(dim, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()
