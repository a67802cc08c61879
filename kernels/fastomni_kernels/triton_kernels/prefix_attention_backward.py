"""Attention of packed groups, backward: the gradient of queries; `prefix_attention_keys` follows.

Probabilities are made again from the log-sum-exp over all keys of a row, its prompt's and its own.
The decision that is not obvious: this kernel, which reads each row of the output and its gradient
once, also makes their dot products for the kernel that comes after it.

Algorithm: Dao, "FlashAttention-2", arXiv:2307.08691, section 3.1.2, without its atomic additions.

Shapes: T packed rows, Hq query heads, Hkv key-value heads, R = Hq / Hkv, D head size.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastomni_kernels.layout import GroupLayout
from fastomni_kernels.triton_kernels.attention_blocks import (
    LOG2_E,
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
from fastomni_kernels.triton_kernels.prefix_attention_keys import key_gradients
from fastomni_kernels.triton_kernels.variants import Variant

# Three programs of 4 warps share a multiprocessor of sm_90 (two at D = 128); 128 rows would halve
# what is read from L2, but one program of 8 warps alone has nobody to take turns with.
_SMALL = {
    "half-64": Tile(64, 64, 4, 2),
    "half-128": Tile(64, 32, 4, 2),
    "wide-64": Tile(64, 32, 8, 2),
    "wide-128": Tile(32, 16, 4, 2),
}
TILES = {
    "sm_80": _SMALL,
    "sm_90": _SMALL | {"half-64": Tile(64, 64, 4, 3), "half-128": Tile(64, 64, 4, 2)},
    "sm_100": _SMALL | {"half-64": Tile(128, 64, 8, 3), "half-128": Tile(64, 64, 4, 2)},
    "gfx942": _SMALL | {"half-128": Tile(64, 32, 4, 1)},
    "default": _SMALL,
    "interpreter": dict.fromkeys(_SMALL, Tile(64, 32, 4, 1)),
}


@triton.jit
def _add_gradient(
    result,
    query,
    grad,
    lse,
    delta,
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
    """Add what the keys at places low .. high of a list give to the gradient of a query tile."""
    COMPUTE: tl.constexpr = result.dtype
    for start in range(low, high, KEYS):
        places = start + tl.arange(0, KEYS)
        rows = listed_rows(tl.minimum(places, high - 1), listed)
        key = load_rows(k, rows, stride_k, 0, 0, D, WIDTH).to(query.dtype)
        value = load_rows(v, rows, stride_v, 0, 0, D, WIDTH).to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee", out_dtype=COMPUTE)
        powers = tl.exp2(scores * scale - lse[:, None])
        change = tl.dot(grad, tl.trans(value), input_precision="ieee", out_dtype=COMPUTE)
        change = powers * (change - delta[:, None])
        if MASKED:
            change = tl.where(seen_by(places, listed, tokens, own), change, 0.0)
        change = change.to(query.dtype)
        result = tl.dot(change, key, result, input_precision="ieee", out_dtype=COMPUTE)
    return result


@triton.jit
def prefix_attention_queries_kernel(
    grad_out,
    q,
    k,
    v,
    out,
    lse,
    starts,
    blocks,
    delta,
    grad_q,
    stride_grad,
    stride_q,
    stride_k,
    stride_v,
    stride_grad_head,
    stride_q_head,
    stride_k_head,
    stride_v_head,
    key_heads,
    scale,
    scale_2,
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
    places = tokens.to(tl.int64) * (key_heads * R) + heads
    grad = load_rows(grad_out, tokens, stride_grad, heads, stride_grad_head, D, WIDTH)
    given = load_rows(out, tokens, key_heads * R * D, heads, D, D, WIDTH)
    deltas = tl.sum(grad.to(COMPUTE) * given.to(COMPUTE), 1)
    tl.store(delta + places, deltas, exists)
    query = load_rows(q, tokens, stride_q, heads, stride_q_head, D, WIDTH)
    if UPCAST:
        query = query.to(tl.float32)
    grad = grad.to(query.dtype)
    lses = tl.load(lse + places) * LOG2_E
    k += key_head * stride_k_head
    v += key_head * stride_v_head
    result = tl.zeros((ROWS, WIDTH), COMPUTE)
    result = _add_gradient(
        result, query, grad, lses, deltas, k, v, stride_k, stride_v, low, whole, listed, tokens,
        own, scale_2, False, KEYS, D, WIDTH,
    )  # fmt: skip
    result = _add_gradient(
        result, query, grad, lses, deltas, k, v, stride_k, stride_v, whole, high, listed, tokens,
        own, scale_2, True, END_KEYS, D, WIDTH,
    )  # fmt: skip
    store_rows(grad_q, result * scale, places * D, exists, D, WIDTH)


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
    """Launch the kernels.

    Args:
        grad_out: [T, Hq, D] the loss's gradient with respect to `out`, any strides.
        q, k, v, layout, scale: as of `prefix_attention.forward`.
        out, lse: what it returned.

    Returns:
        The gradients of q, k and v, contiguous, in their dtypes.
    """
    grad_out, q, k, v = (along_heads(x) for x in (grad_out.to(q.dtype), q, k, v))
    (_, query_heads, head_size), key_heads = q.shape, k.shape[1]
    tile, flags = choose(TILES, architecture(), q.dtype, query_heads // key_heads, head_size)
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    tokens = tile.rows // flags["R"]
    work = query_blocks(layout, q.device, tokens, tile.keys, stream_of(q.device))
    prefix_attention_queries_kernel[(len(work.blocks) * key_heads,)](
        grad_out,
        q,
        k,
        v,
        out.contiguous(),
        lse,
        work.starts,
        work.blocks,
        delta,
        grad_q,
        *(x.stride(dim) for dim in (0, 1) for x in (grad_out, q, k, v)),
        key_heads,
        scale,
        scale * math.log2(math.e),  # the hardware has powers of two
        **flags,
        END_KEYS=max(16, tile.keys // 2),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return grad_q, *key_gradients(grad_out, q, k, v, lse, delta, layout, scale)


def shipped(target: str) -> list[Variant]:
    """The variants of the kernel that are compiled ahead of time for a target."""
    strides = tuple(f"stride_{x}{end}" for end in ("", "_head") for x in ("grad", "q", "k", "v"))
    halves = ("grad_out", "q", "k", "v", "out", "grad_q")
    found = []
    for name, dtype, ratio, head_size in shipped_cases():
        tile, flags = choose(TILES, target, dtype, ratio, head_size)
        pointers = dict.fromkeys(halves, triton_pointer(dtype))
        pointers |= {"starts": "*i32", "blocks": "*i32", "lse": "*fp32", "delta": "*fp32"}
        sizes = dict.fromkeys((*strides, "key_heads"), "i32")
        found.append(
            Variant(
                name=f"prefix_attention_queries-{name}",
                kernel=prefix_attention_queries_kernel,
                signature=pointers | sizes | {"scale": "fp32", "scale_2": "fp32"},
                constexprs=flags | {"END_KEYS": max(16, tile.keys // 2)},
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                divisible_by_16=(*pointers, *strides),
                has_dot=dtype.itemsize == 2,
            )
        )
    return found
