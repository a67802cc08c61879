"""One decode step of all sequences, which read their prompt's keys and values together.

Shapes: N prompts, S sequences, P_i prompt tokens, Hq query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastomni_kernels import reference
from fastomni_kernels.checks import check_float, check_heads, check_shape, require


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
