"""Attention of packed groups, backward: the gradients of keys and values.

A prompt's keys get the sum over all completions and query heads because the loop of their program
goes over all of these rows. Long loops are cut into pieces, whose fp32 sums a second kernel adds in
order: one group alone has few blocks of keys, and atomic additions would come in any order. The
decision that is not obvious: a row past the end of a tile repeats the last one, with a log-sum-exp
of +inf, which makes its probabilities 0 without a mask of the tile.

Tiles are [keys, queries], so that both products with a tile of probabilities or of their gradients
take it from registers.

Shapes: T packed rows, Hq query heads, Hkv key-value heads, R = Hq / Hkv, D head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastomni_kernels.layout import GroupLayout
from fastomni_kernels.triton_kernels.attention_blocks import (
    ANCHOR,
    FIELDS,
    LOG2_E,
    PARTIAL,
    Tile,
    choose,
    key_blocks,
    listed_rows,
    load_rows,
    read_block,
    shipped_cases,
    store_rows,
    stream_of,
)
from fastomni_kernels.triton_kernels.linear_tiles import architecture, triton_pointer
from fastomni_kernels.triton_kernels.variants import Variant

# Two programs of 4 warps share a multiprocessor of sm_90, so that one multiplies while the other
# takes exponentials; more rows, keys or stages spill, with Triton 3.6 if not with 3.9. At D = 128
# the two sums leave registers for 32 rows only, and 4 warps for none at all.
_SMALL = {
    "half-64": Tile(32, 64, 4, 2),
    "half-128": Tile(32, 64, 8, 2),
    "wide-64": Tile(32, 32, 8, 2),
    "wide-128": Tile(16, 32, 8, 1),
}
_LARGE = _SMALL | {"half-64": Tile(64, 64, 4, 2), "half-128": Tile(32, 128, 8, 2)}
TILES = {
    "sm_80": _SMALL,
    "sm_90": _LARGE,
    "sm_100": _LARGE,
    "gfx942": _SMALL | {"half-64": Tile(32, 64, 4, 1), "half-128": Tile(32, 64, 4, 1)},
    "default": _SMALL,
    "interpreter": dict.fromkeys(_SMALL, Tile(64, 16, 4, 1)),
}

# (token, head) rows of a piece of a key block.
PIECE_ROWS = 4096
INTERPRETER_PIECE_ROWS = 64
_SUMS_FLAGS = ("D", "WIDTH", "KEYS")


@triton.jit
def _add_gradients(
    grads,
    key,
    value,
    q,
    grad_out,
    lse,
    delta,
    starts,
    strides,
    low,
    high,
    listed,
    first,
    anchor,
    scale,
    MASKED: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add what the queries at places low .. high of a list give to a key tile's gradients."""
    grad_key, grad_value = grads
    stride_q, stride_grad, stride_q_head, stride_grad_head, query_heads = strides
    COMPUTE: tl.constexpr = grad_key.dtype
    TOKENS: tl.constexpr = ROWS // R
    row = tl.arange(0, ROWS)
    head = (row % R).to(tl.int64)
    column = tl.arange(0, KEYS)[:, None]
    # The order of products and the end without a pipeline keep the tile in registers.
    for start in tl.range(low, high, TOKENS, num_stages=1 if MASKED else None):
        places = start + row // R
        tokens = listed_rows(tl.minimum(places, high - 1), listed)
        query = load_rows(q, tokens, stride_q, head, stride_q_head, D, WIDTH).to(key.dtype)
        grad = load_rows(grad_out, tokens, stride_grad, head, stride_grad_head, D, WIDTH)
        grad = grad.to(key.dtype)
        vectors = tokens.to(tl.int64) * query_heads + head
        lses = tl.load(lse + vectors) * LOG2_E
        deltas = tl.load(delta + vectors)
        if MASKED or TOKENS * R < ROWS:
            lses = tl.where((row < TOKENS * R) & (places < high), lses, float("inf"))
        scores = tl.dot(key, tl.trans(query), input_precision="ieee", out_dtype=COMPUTE)
        powers = tl.exp2(scores * scale - lses[None, :])
        if MASKED:
            own = tl.minimum(tl.load(starts + tokens), anchor)
            seen = (column >= (own - first)[None, :]) & (column <= (tokens - first)[None, :])
            powers = tl.where(seen, powers, 0.0)
        half = powers.to(key.dtype)
        grad_value = tl.dot(half, grad, grad_value, input_precision="ieee", out_dtype=COMPUTE)
        change = tl.dot(value, tl.trans(grad), input_precision="ieee", out_dtype=COMPUTE)
        change = powers * (change - deltas[None, :])
        if MASKED:
            change = tl.where(seen, change, 0.0)
        half = change.to(key.dtype)
        grad_key = tl.dot(half, query, grad_key, input_precision="ieee", out_dtype=COMPUTE)
    return grad_key, grad_value


@triton.jit
def _store_gradients(
    grad_key,
    grad_value,
    grad_k,
    grad_v,
    partials,
    first,
    stop,
    partial,
    key_head,
    key_heads,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write a key tile's gradients to the output, or as a partial sum with a number."""
    column = tl.arange(0, KEYS)
    if partial < 0:
        places = ((first + column).to(tl.int64) * key_heads + key_head) * D
        store_rows(grad_k, grad_key, places, first + column < stop, D, WIDTH)
        store_rows(grad_v, grad_value, places, first + column < stop, D, WIDTH)
    else:
        places = ((partial * key_heads + key_head) * 2 * KEYS + column) * WIDTH
        store_rows(partials, grad_key, places, column < KEYS, WIDTH, WIDTH)
        store_rows(partials, grad_value, places + KEYS * WIDTH, column < KEYS, WIDTH, WIDTH)


@triton.jit
def prefix_attention_keys_kernel(
    grad_out,
    q,
    k,
    v,
    lse,
    delta,
    starts,
    blocks,
    partials,
    grad_k,
    grad_v,
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
    END_ROWS: tl.constexpr,
):
    COMPUTE: tl.constexpr = lse.dtype.element_ty
    block = tl.program_id(0) // key_heads
    key_head = (tl.program_id(0) % key_heads).to(tl.int64)
    first, stop, listed, low, whole, high = read_block(blocks, block)
    anchor = tl.load(blocks + block * FIELDS + ANCHOR)
    partial = tl.load(blocks + block * FIELDS + PARTIAL)
    keys = tl.minimum(first + tl.arange(0, KEYS), stop - 1)
    key = load_rows(k, keys, stride_k, key_head, stride_k_head, D, WIDTH)
    value = load_rows(v, keys, stride_v, key_head, stride_v_head, D, WIDTH)
    if UPCAST:
        key, value = key.to(tl.float32), value.to(tl.float32)
    q += key_head * R * stride_q_head
    grad_out += key_head * R * stride_grad_head
    lse += key_head * R
    delta += key_head * R
    strides = stride_q, stride_grad, stride_q_head, stride_grad_head, key_heads * R
    grads = tl.zeros((KEYS, WIDTH), COMPUTE), tl.zeros((KEYS, WIDTH), COMPUTE)
    grads = _add_gradients(
        grads, key, value, q, grad_out, lse, delta, starts, strides, low, whole, listed, first,
        anchor, scale_2, False, R, ROWS, KEYS, D, WIDTH,
    )  # fmt: skip
    grads = _add_gradients(
        grads, key, value, q, grad_out, lse, delta, starts, strides, whole, high, listed, first,
        anchor, scale_2, True, R, END_ROWS, KEYS, D, WIDTH,
    )  # fmt: skip
    _store_gradients(
        grads[0] * scale, grads[1], grad_k, grad_v, partials, first, stop, partial, key_head,
        key_heads, D, WIDTH, KEYS,
    )  # fmt: skip


@triton.jit
def prefix_attention_sums_kernel(
    partials,
    sums,
    grad_k,
    grad_v,
    key_heads,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    COMPUTE: tl.constexpr = partials.dtype.element_ty
    entry = sums + tl.program_id(0) // key_heads * 4
    key_head = (tl.program_id(0) % key_heads).to(tl.int64)
    first, stop, partial, pieces = (
        tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3),
    )  # fmt: skip
    column = tl.arange(0, KEYS)
    inside = column[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    grad_key = tl.zeros((KEYS, WIDTH), COMPUTE)
    grad_value = tl.zeros((KEYS, WIDTH), COMPUTE)
    for piece in range(partial, partial + pieces):
        part = partials + (piece * key_heads + key_head) * 2 * KEYS * WIDTH
        grad_key += tl.load(part + inside)
        grad_value += tl.load(part + KEYS * WIDTH + inside)
    exists = first + column < stop
    places = ((first + column).to(tl.int64) * key_heads + key_head) * D
    store_rows(grad_k, grad_key, places, exists, D, WIDTH)
    store_rows(grad_v, grad_value, places, exists, D, WIDTH)


def key_gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    layout: GroupLayout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Launch both kernels.

    Args:
        grad_out, q, k, v: with contiguous vectors.
        lse: [T, Hq] natural log-sum-exp of each row's scores.
        delta: [T, Hq] dot product of each row of the output and its gradient.
        layout, scale: as of `prefix_attention.forward`.

    Returns:
        The gradients of k and v, contiguous, in their dtypes.
    """
    key_heads = k.shape[1]
    target = architecture()
    tile, flags = choose(TILES, target, q.dtype, q.shape[1] // key_heads, q.shape[2])
    rows = INTERPRETER_PIECE_ROWS if target == "interpreter" else PIECE_ROWS
    piece_tiles = triton.cdiv(rows, tile.rows)
    tokens = tile.rows // flags["R"]
    sizes = (key_heads, tile.keys, tokens, piece_tiles)
    work = key_blocks(layout, q.device, *sizes, stream_of(q.device))
    shape = (work.partials, key_heads, 2, tile.keys, flags["WIDTH"])
    partials = torch.empty(shape, dtype=lse.dtype, device=q.device)
    options: dict[str, Any] = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v)]
    prefix_attention_keys_kernel[(len(work.blocks) * key_heads,)](
        grad_out,
        q,
        k,
        v,
        lse,
        delta,
        work.starts,
        work.blocks,
        partials,
        *gradients,
        *(x.stride(dim) for dim in (0, 1) for x in (grad_out, q, k, v)),
        key_heads,
        scale,
        scale * math.log2(math.e),  # the hardware has powers of two
        **flags | options | {"END_ROWS": end_rows(tile, flags["R"])},
    )
    if len(work.sums):
        prefix_attention_sums_kernel[(len(work.sums) * key_heads,)](
            partials,
            work.sums,
            *gradients,
            key_heads,
            **{name: flags[name] for name in _SUMS_FLAGS} | options,
        )
    return gradients[0], gradients[1]


def end_rows(tile: Tile, heads_per_key: int) -> int:
    """Rows of a masked tile: half of the others', but all heads of a token."""
    return max(16, tile.rows // 2, triton.next_power_of_2(heads_per_key))


def shipped(target: str) -> list[Variant]:
    """The variants of both kernels that are compiled ahead of time for a target."""
    strides = tuple(f"stride_{x}{end}" for end in ("", "_head") for x in ("grad", "q", "k", "v"))
    found = []
    for name, dtype, ratio, head_size in shipped_cases():
        tile, flags = choose(TILES, target, dtype, ratio, head_size)
        results = dict.fromkeys(("grad_k", "grad_v"), triton_pointer(dtype)) | {"partials": "*fp32"}
        inputs = dict.fromkeys(("grad_out", "q", "k", "v"), triton_pointer(dtype))
        inputs |= {"lse": "*fp32", "delta": "*fp32", "starts": "*i32", "blocks": "*i32"}
        sizes = dict.fromkeys((*strides, "key_heads"), "i32")
        options: dict[str, Any] = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        found += [
            Variant(
                name=f"prefix_attention_keys-{name}",
                kernel=prefix_attention_keys_kernel,
                signature=inputs | results | sizes | {"scale": "fp32", "scale_2": "fp32"},
                constexprs=flags | {"END_ROWS": end_rows(tile, ratio)},
                divisible_by_16=(*inputs, *results, *strides),
                has_dot=dtype.itemsize == 2,
                **options,
            ),
            Variant(
                name=f"prefix_attention_sums-{name}",
                kernel=prefix_attention_sums_kernel,
                signature=results | {"sums": "*i32", "key_heads": "i32"},
                constexprs={flag: flags[flag] for flag in _SUMS_FLAGS},
                divisible_by_16=(*results, "sums"),
                **options,
            ),
        ]
    return found
