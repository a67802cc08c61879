"""The public functions; those of attention and sampling are here, the others in their own files.

Arguments are checked first, then the device chooses the implementation. Checks read shapes, dtypes,
devices and host numbers only.

Shapes: N prompts, G completions per prompt, S sequences, T packed rows, M completion tokens, P_i
prompt tokens, H hidden, V vocabulary, Hq query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastomni_kernels import prefix_attention as cpu_attention
from fastomni_kernels import reference, sampling
from fastomni_kernels.advantages import GroupAdvantages, group_advantages
from fastomni_kernels.checks import (
    check_float,
    check_heads,
    check_shape,
    check_temperature,
    require,
)
from fastomni_kernels.flash_varlen import flash_varlen
from fastomni_kernels.layout import GroupLayout
from fastomni_kernels.linear_policy_loss import LinearLoss, linear_grpo_loss
from fastomni_kernels.logprobs import gather_logprobs, linear_logprobs
from fastomni_kernels.options import LossOptions
from fastomni_kernels.policy_loss import grpo_loss, kl_penalty

__all__ = [
    "GroupAdvantages",
    "LinearLoss",
    "LossOptions",
    "flash_varlen",
    "gather_logprobs",
    "group_advantages",
    "grpo_loss",
    "kl_penalty",
    "linear_grpo_loss",
    "linear_logprobs",
    "prefix_attention",
    "prefix_decode",
    "sample",
]


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, scale: float | None = None
) -> Tensor:
    """Attention of packed groups; see `reference.prefix_attention`.

    On the CPU it runs on dense pieces without any mask. Elsewhere, rows that share nothing (every
    prompt has one completion at most, as in prefill and supervised training) are causal sequences
    and go to `flash_varlen`; groups are the definition's.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other or the layout.
    """
    name = "prefix_attention"
    check_shape(name, "q", q, (layout.num_rows, "Hq", "D"))
    shape = (layout.num_rows, "Hkv", q.shape[2])
    check_shape(name, "k", k, shape)
    check_shape(name, "v", v, (layout.num_rows, k.shape[1], q.shape[2]))
    check_heads(name, q, k.shape[1])
    check_float(name, q=q, k=k, v=v)
    require(
        q.dtype == k.dtype == v.dtype,
        f"{name}: q is {q.dtype}, k is {k.dtype}, v is {v.dtype}; they must agree",
    )
    if q.device.type == "cpu":
        return cpu_attention.prefix_attention(q, k, v, layout, scale)
    if not shares_prompts(layout):
        return causal_attention(q, k, v, layout, scale)
    return reference.prefix_attention(q, k, v, layout, scale)


def shares_prompts(layout: GroupLayout) -> bool:
    """Whether any prompt has more than one completion."""
    return any(len(completions) > 1 for completions in layout.completion_lengths)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, scale: float | None = None
) -> Tensor:
    """Attention of groups with one completion at most: each is one causal sequence."""
    offsets = layout.group_offsets
    longest = max(stop - start for start, stop in pairwise(offsets))
    rows = layout.cu_groups
    return flash_varlen(q, k, v, rows, rows, longest, longest, causal=True, scale=scale)


def prefix_decode(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prompt_lengths: Sequence[int],
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_length: int | Tensor,
    generations: int,
    scale: float | None = None,
) -> Tensor:
    """One decode step for all sequences; see `reference.prefix_decode`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    name = "prefix_decode"
    sequences = len(prompt_lengths) * generations
    require(
        generations >= 1 and min(prompt_lengths, default=0) >= 1,
        f"{name}: generations={generations} and prompt_lengths={list(prompt_lengths)[:8]}; "
        "all must be 1 or more, and there must be a prompt",
    )
    check_shape(name, "q", q, (sequences, "Hq", "D"))
    check_shape(name, "prefix_k", prefix_k, (sum(prompt_lengths), "Hkv", q.shape[2]))
    check_shape(name, "prefix_v", prefix_v, prefix_k.shape)
    check_shape(name, "suffix_k", suffix_k, (sequences, "C_max", *prefix_k.shape[1:]))
    check_shape(name, "suffix_v", suffix_v, suffix_k.shape)
    check_heads(name, q, prefix_k.shape[1])
    check_float(
        name, q=q, prefix_k=prefix_k, prefix_v=prefix_v, suffix_k=suffix_k, suffix_v=suffix_v
    )
    if isinstance(suffix_length, Tensor):
        check_shape(name, "suffix_length", suffix_length, (sequences,))
    else:
        require(
            0 <= suffix_length <= suffix_k.shape[1],
            f"{name}: suffix_length={suffix_length} but the suffix cache has "
            f"{suffix_k.shape[1]} places",
        )
    return reference.prefix_decode(
        q,
        prefix_k,
        prefix_v,
        prompt_lengths,
        suffix_k,
        suffix_v,
        suffix_length,
        generations,
        scale,
    )


def sample(
    logits: Tensor,
    seeds: Tensor,
    position: int | Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Draw one token per sequence; see `sampling.sample`.

    Raises:
        ValueError: shapes, dtypes or numbers out of range, or (on the CPU) logits that are no
            distribution.
    """
    name = "sample"
    check_shape(name, "logits", logits, ("S", "V"))
    check_shape(name, "seeds", seeds, (logits.shape[0],))
    check_float(name, logits=logits)
    require(seeds.dtype == torch.int64, f"{name}: seeds are {seeds.dtype}; use torch.int64")
    if isinstance(position, Tensor):
        check_shape(name, "position", position, (logits.shape[0],))
    check_temperature(name, temperature)
    require(top_k >= 0, f"{name}: top_k={top_k}; use 0 (off) or a number of tokens")
    require(0 < top_p <= 1, f"{name}: top_p={top_p}; it must be in (0, 1], 1 is off")
    require(0 <= min_p <= 1, f"{name}: min_p={min_p}; it must be in [0, 1], 0 is off")
    return sampling.sample(logits, seeds, position, temperature, top_k, top_p, min_p)
