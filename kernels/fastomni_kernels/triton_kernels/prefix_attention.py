"""Attention of packed groups, forward: each completion sees its whole prompt, and itself causally.

A row of a tile is one query head of one token, R heads for each token, so that all heads that read
a key head are one tile's and its keys are loaded once for them. One program owns a block of tokens
(see `attention_blocks`) and one key head. The decision that is not obvious: what lies past the end
of a block or of its list of keys repeats the last row instead of being masked. It is never stored,
or never seen, and all loads are plain.

Softmax: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867; its
use in tiles: Dao, "FlashAttention-2", arXiv:2307.08691.

Shapes: T packed rows, Hq query heads, Hkv key-value heads, R = Hq / Hkv, D head size.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastomni_kernels import dispatch
from fastomni_kernels.layout import GroupLayout
from fastomni_kernels.triton_kernels.attention_blocks import (
    LN_2,
    Tile,
    along_heads,
    choose,
    listed_rows,
    load_rows,
    query_blocks,
    query_rows,
    read_block,
    seen_by,
    shipped_cases,
    store_rows,
    stream_of,
)
from fastomni_kernels.triton_kernels.linear_tiles import architecture, triton_pointer
from fastomni_kernels.triton_kernels.prefix_attention_backward import backward
from fastomni_kernels.triton_kernels.variants import Variant

__all__ = ["backward", "forward", "obstacle", "shipped"]

# sm_90, D = 64: 127 registers at most, so that two programs of 8 warps share a multiprocessor and
# one multiplies while the other takes exponentials; 64 rows would read twice as much from L2, and
# 128 keys leave one program alone. Masked tiles have half as many keys, or the mask would cost the
# second program.
_SMALL = {
    "half-64": Tile(128, 32, 4, 3),
    "half-128": Tile(128, 32, 8, 3),
    "wide-64": Tile(64, 32, 8, 2),
    "wide-128": Tile(64, 16, 8, 2),
}
_LARGE = _SMALL | {"half-64": Tile(128, 64, 8, 3), "half-128": Tile(128, 64, 8, 3)}
TILES = {
    "sm_80": _SMALL,
    "sm_90": _LARGE,
    "sm_100": _LARGE,
    "gfx942": {
        "half-64": Tile(64, 64, 4, 2),
        "half-128": Tile(128, 64, 8, 1),
        "wide-64": Tile(64, 32, 8, 2),
        "wide-128": Tile(64, 16, 8, 2),
    },
    "default": _SMALL,
    "interpreter": dict.fromkeys(_SMALL, Tile(64, 32, 4, 1)),
}

# The largest score before the first: finite, because -inf - -inf is NaN.
NO_SCORE = tl.constexpr(-1e30)


@triton.jit
def _attend(
    state,
    query,
    k,
    v,
    stride_k,
    stride_v,
    low,
    high,
    listed,
    tokens,
    own,
    scale,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Take the keys at places low .. high of a list into largest score, sum and weighted values."""
    largest, total, result = state
    COMPUTE: tl.constexpr = result.dtype
    for start in range(low, high, KEYS):
        places = start + tl.arange(0, KEYS)
        rows = listed_rows(tl.minimum(places, high - 1), listed)
        key = load_rows(k, rows, stride_k, 0, 0, D, WIDTH).to(query.dtype)
        value = load_rows(v, rows, stride_v, 0, 0, D, WIDTH).to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee", out_dtype=COMPUTE)
        if MASKED:
            seen = seen_by(places, listed, tokens, own)
            scores = tl.where(seen, scores * scale, float("-inf"))
            base = tl.maximum(largest, tl.max(scores, 1))
            powers = tl.exp2(scores - base[:, None])
        else:
            base = tl.maximum(largest, tl.max(scores, 1) * scale)
            powers = tl.exp2(scores * scale - base[:, None])
        decay = tl.exp2(largest - base)
        total = total * decay + tl.sum(powers, 1)
        result *= decay[:, None]
        powers = powers.to(query.dtype)
        result = tl.dot(powers, value, result, input_precision="ieee", out_dtype=COMPUTE)
        largest = base
    return largest, total, result


@triton.jit
def prefix_attention_kernel(
    q,
    k,
    v,
    starts,
    blocks,
    out,
    lse,
    stride_q,
    stride_k,
    stride_v,
    stride_q_head,
    stride_k_head,
    stride_v_head,
    key_heads,
    scale,
    R: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    END_KEYS: tl.constexpr,
):
    COMPUTE: tl.constexpr = lse.dtype.element_ty
    program = tl.program_id(0)
    first, stop, listed, low, whole, high = read_block(blocks, program // key_heads)
    key_head = (program % key_heads).to(tl.int64)
    tokens, heads, exists = query_rows(first, stop, key_head, R, ROWS)
    own = tl.load(starts + tokens)
    query = load_rows(q, tokens, stride_q, heads, stride_q_head, D, WIDTH)
    if UPCAST:
        query = query.to(tl.float32)
    k += key_head * stride_k_head
    v += key_head * stride_v_head
    zeros = tl.zeros((ROWS,), COMPUTE)
    state = zeros + NO_SCORE, zeros, tl.zeros((ROWS, WIDTH), COMPUTE)
    state = _attend(
        state, query, k, v, stride_k, stride_v, low, whole, listed, tokens, own, scale,
        False, KEYS, D, WIDTH,
    )  # fmt: skip
    largest, total, result = _attend(
        state, query, k, v, stride_k, stride_v, whole, high, listed, tokens, own, scale,
        True, END_KEYS, D, WIDTH,
    )  # fmt: skip
    places = tokens.to(tl.int64) * (key_heads * R) + heads
    store_rows(out, result / total[:, None], places * D, exists, D, WIDTH)
    tl.store(lse + places, (largest + tl.log2(total)) * LN_2, exists)


def obstacle(query_heads: int, key_heads: int, head_size: int, dtype: torch.dtype) -> str:
    """Why the kernels cannot take such tensors; empty where they can.

    Args:
        query_heads: Hq, a multiple of Hkv.
        key_heads: Hkv.
        head_size: D.
        dtype: of q, k and v.
    """
    if not 16 <= head_size <= 128:
        return f"heads are of 16 to 128 numbers there, not of {head_size}"
    if query_heads // key_heads > 64:
        return f"a key head has at most 64 query heads there, not {query_heads // key_heads}"
    if dtype == torch.float64 and not dispatch.interpreted():
        return "float64 runs in Triton's interpreter only"
    return ""


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch the kernel.

    Args:
        q: [T, Hq, D] fp16, bf16, fp32 or (interpreted) fp64, any strides.
        k, v: [T, Hkv, D] likewise, of q's type.
        layout: the rows.
        scale: factor of the scores.

    Returns:
        out [T, Hq, D] in q's dtype, and the natural log-sum-exp of each row's scaled scores
        [T, Hq] fp32 or fp64; both contiguous.
    """
    (rows, query_heads, head_size), key_heads = q.shape, k.shape[1]
    tile, flags = choose(TILES, architecture(), q.dtype, query_heads // key_heads, head_size)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.empty(rows, query_heads, dtype=wide, device=q.device)
    if scale < 0:  # the largest score is looked for before it is scaled
        q, scale = -q, -scale
    q, k, v = (along_heads(x) for x in (q, k, v))
    tokens = tile.rows // flags["R"]
    work = query_blocks(layout, q.device, tokens, tile.keys, stream_of(q.device))
    prefix_attention_kernel[(len(work.blocks) * key_heads,)](
        q,
        k,
        v,
        work.starts,
        work.blocks,
        out,
        lse,
        *(x.stride(dim) for dim in (0, 1) for x in (q, k, v)),
        key_heads,
        scale * math.log2(math.e),  # the hardware has powers of two
        **flags,
        END_KEYS=max(16, tile.keys // 2),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out, lse


def shipped(target: str) -> list[Variant]:
    """The variants of the kernel that are compiled ahead of time for a target."""
    strides = tuple(f"stride_{x}{end}" for end in ("", "_head") for x in "qkv")
    found = []
    for name, dtype, ratio, head_size in shipped_cases():
        tile, flags = choose(TILES, target, dtype, ratio, head_size)
        pointers = dict.fromkeys(("q", "k", "v", "out"), triton_pointer(dtype))
        pointers |= {"starts": "*i32", "blocks": "*i32", "lse": "*fp32"}
        sizes = dict.fromkeys((*strides, "key_heads"), "i32") | {"scale": "fp32"}
        found.append(
            Variant(
                name=f"prefix_attention-{name}",
                kernel=prefix_attention_kernel,
                signature=pointers | sizes,
                constexprs=flags | {"END_KEYS": max(16, tile.keys // 2)},
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                divisible_by_16=(*pointers, *strides),
                has_dot=dtype.itemsize == 2,
            )
        )
    return found
