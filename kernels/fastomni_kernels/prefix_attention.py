"""Attention of packed groups: each completion sees its whole prompt, and itself causally.

Shapes: N prompts, T packed rows, Hq query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from fastomni_kernels import dense_attention, reference
from fastomni_kernels.checks import check_float, check_heads, check_shape, require
from fastomni_kernels.flash_varlen import flash_varlen
from fastomni_kernels.layout import GroupLayout


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
        return dense_attention.prefix_attention(q, k, v, layout, scale)
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
