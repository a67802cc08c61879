"""What one program of a decode does: a part of a softmax, over one split of keys.

`prompt_part` takes a split of a prompt's keys for all its sequences, `own_part` a split of one
sequence's own keys. What they store is the sum of exp2(score - largest) times the values, that of
the weights alone, and the largest score, all of them for `decode_merge`; scores are in units of
log2, and a split with no key, or of no sequence, stores nothing.

Two decisions that are not obvious. Which sequences belong to a prompt is found by each program from
`prompt_of`: a list made by the host would have to be made anew whenever a sequence ends, and could
not be in a CUDA graph. The newest key does not pass through the cache: where it is to be stored, it
starts the online softmax (arXiv:1805.02867) of its split, and the loop over keys ends before it.

Shapes: N prompts, S sequences, U rows of all prompts, Hkv key-value heads, R query heads of each,
D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Sizes(NamedTuple):
    """What a program is compiled for.

    Attributes:
        key_heads: Hkv.
        shared: R, query heads of each.
        head: D.
        block: D and what pads it to a power of two.
        rows: queries (of a sequence and a head) that meet a prompt's keys at a time.
        own_rows: R and what pads it.
        keys: keys of a tile.
        slots: sequences that are looked at at a time for those of a prompt.
        split: keys in a split of a sequence's own, and least of a prompt's.
        prompt_splits: splits of a prompt at most; longer prompts have longer splits.
        upcast: multiply in fp32, whatever the type of the heads.
    """

    key_heads: int
    shared: int
    head: int
    block: int
    rows: int
    own_rows: int
    keys: int
    slots: int
    split: int
    prompt_splits: int
    upcast: bool


@triton.jit
def bounds(prefix_offsets, prompt, used, U):
    """Where a prompt begins and ends; both 0 unless `used`."""
    begin = tl.load(prefix_offsets + prompt, used, other=0)
    end = tl.load(prefix_offsets + prompt + 1, used, other=0)
    return tl.maximum(begin, 0), tl.minimum(end, U)


@triton.jit
def split_size(length, SPLIT: tl.constexpr, PROMPT_SPLITS: tl.constexpr):
    """Keys in each split of a prompt but its last: whole SPLITs, and few enough splits."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, PROMPT_SPLITS), SPLIT), 1) * SPLIT


@triton.jit
def _sequences_of(prompt_of, prompt, ranks, S, SLOTS: tl.constexpr):
    """The ranks-th of a prompt's sequences, for each of `ranks`, and how many there are."""
    found = tl.zeros_like(ranks)
    count = tl.zeros((), tl.int32)
    for start in range(0, S, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        belongs = (tl.load(prompt_of + slot, slot < S, other=-1) == prompt).to(tl.int32)
        here = tl.sum(belongs, 0)
        if here > 0:
            rank = count + tl.cumsum(belongs, 0) - 1
            meant = (belongs > 0)[:, None] & (rank[:, None] == ranks[None, :])
            found += tl.sum(tl.where(meant, slot[:, None], 0), 0)
            count += here
    return found, count


@triton.jit
def _load_turned(x, angles, columns, inside, ROTATE: tl.constexpr, D: tl.constexpr):
    """Elements `columns` of heads at `x`, rotated by (cosines, sines) at `angles`, rounded."""
    values = tl.load(x + columns, inside, other=0.0)
    if ROTATE:
        WIDE: tl.constexpr = tl.float64 if values.dtype == tl.float64 else tl.float32
        partners = tl.where(columns < D // 2, columns + D // 2, columns - D // 2)
        turned = values.to(WIDE) * tl.load(angles[0] + columns, inside, other=0.0).to(WIDE)
        others = tl.load(x + partners, inside, other=0.0).to(WIDE)
        turned += others * tl.load(angles[1] + columns, inside, other=0.0).to(WIDE)
        values = turned.to(values.dtype)
    return values


@triton.jit
def _attend(
    state, q, keys, values, strides, first, stop, scale, D: tl.constexpr, SIZES: tl.constexpr
):
    """Take keys first..stop - 1 into (largest, total, part) of queries q [rows, block]."""
    OPERAND: tl.constexpr = tl.float32 if SIZES.upcast else q.dtype
    largest, total, part = state
    lanes = tl.arange(0, SIZES.keys)
    columns = tl.arange(0, SIZES.block)
    at_key = lanes[:, None] * strides[0] + columns[None, :]
    at_value = lanes[:, None] * strides[1] + columns[None, :]
    for start in range(first, stop, SIZES.keys):
        seen = lanes < stop - start
        inside = seen[:, None] & (columns < D)[None, :]
        row = tl.zeros((), tl.int64) + start
        k = tl.load(keys + row * strides[0] + at_key, inside, other=0.0)
        v = tl.load(values + row * strides[1] + at_value, inside, other=0.0)
        # Without "ieee", NVIDIA's tensor cores would round fp32 operands to 10 bits of mantissa.
        scores = tl.dot(
            q.to(OPERAND),
            tl.trans(k.to(OPERAND)),
            input_precision="ieee",
            out_dtype=part.dtype,
        )
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        base = tl.maximum(largest, tl.max(scores, 1))
        keep = tl.exp2(largest - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * keep + tl.sum(weights, 1)
        part = tl.dot(
            weights.to(OPERAND),
            v.to(OPERAND),
            part * keep[:, None],
            input_precision="ieee",
            out_dtype=part.dtype,
        )
        largest = base
    return largest, total, part


@triton.jit
def _store_part(scratch, state, place, inside, D: tl.constexpr, BLOCK: tl.constexpr):
    """Store (largest, total, part) of rows at their places in [S, Hq, splits]."""
    tl.store(scratch[1] + place, state[0], inside)
    tl.store(scratch[2] + place, state[1], inside)
    columns = tl.arange(0, BLOCK)
    here = inside[:, None] & (columns < D)[None, :]
    tl.store(scratch[0] + place[:, None] * D + columns[None, :], state[2], here)


@triton.jit
def prompt_part(
    q,
    keys,
    values,
    prefix_offsets,
    prompt_of,
    angles,
    scratch,
    scale,
    S,
    U,
    splits,
    stride_q,
    strides,
    prompt,
    head,
    split,
    ROTATE: tl.constexpr,
    SIZES: tl.constexpr,
):
    """A split of a prompt's keys, for all its sequences, some (sequence, query head) at a time."""
    D: tl.constexpr = SIZES.head
    R: tl.constexpr = SIZES.shared
    ROWS: tl.constexpr = SIZES.rows
    BLOCK: tl.constexpr = SIZES.block
    COMPUTE: tl.constexpr = scratch[0].dtype.element_ty
    columns = tl.arange(0, BLOCK)
    start = 0
    rows = 1  # until they are counted
    while start < rows:
        # Read for each tile: what follows from them would else stay in registers for all tiles.
        begin, end = bounds(prefix_offsets, prompt, prompt >= 0, U)
        size = split_size(end - begin, SIZES.split, SIZES.prompt_splits)
        first = begin + split * size
        row = start + tl.arange(0, ROWS)
        sequences, count = _sequences_of(prompt_of, prompt, row // R, S, SIZES.slots)
        rows = tl.where(first < end, count * R, 0)
        if rows > 0:
            sequence = sequences.to(tl.int64)
            query_head = head * R + row % R
            queries = _load_turned(
                q + (sequence * stride_q + query_head * D)[:, None],
                (angles[0] + (sequence * D)[:, None], angles[1] + (sequence * D)[:, None]),
                columns[None, :],
                (row < rows)[:, None] & (columns < D)[None, :],
                ROTATE,
                D,
            )
            state = (
                tl.full((ROWS,), float("-inf"), COMPUTE),
                tl.zeros((ROWS,), COMPUTE),
                tl.zeros((ROWS, BLOCK), COMPUTE),
            )
            stop = tl.minimum(first + size, end)
            state = _attend(state, queries, keys, values, strides, first, stop, scale, D, SIZES)
            place = (sequence * SIZES.key_heads * R + query_head) * splits + split
            _store_part(scratch, state, place, row < rows, D, BLOCK)
        start += ROWS


@triton.jit
def own_part(
    q,
    keys,
    values,
    new_k,
    new_v,
    angles,
    scratch,
    scale,
    active,
    length,
    places,
    strides,
    split,
    first_place,
    splits,
    APPEND: tl.constexpr,
    ROTATE: tl.constexpr,
    SIZES: tl.constexpr,
):
    """A split of one sequence's own keys, into which the newest goes that is to be stored.

    All pointers are those of the sequence and the key head.
    """
    D: tl.constexpr = SIZES.head
    ROWS: tl.constexpr = SIZES.own_rows
    BLOCK: tl.constexpr = SIZES.block
    COMPUTE: tl.constexpr = scratch[0].dtype.element_ty
    columns = tl.arange(0, BLOCK)
    lanes = tl.arange(0, ROWS)
    first = split * SIZES.split
    stop = tl.minimum(tl.minimum(length, places), first + SIZES.split)
    # Before it is known whether they are needed, so that they and what says so come together.
    queries = _load_turned(
        q + (lanes * D)[:, None],
        angles,
        columns[None, :],
        (lanes < SIZES.shared)[:, None] & (columns < D)[None, :],
        ROTATE,
        D,
    )
    if active & (first < stop):
        largest = tl.full((ROWS,), float("-inf"), COMPUTE)
        total = tl.zeros((ROWS,), COMPUTE)
        part = tl.zeros((ROWS, BLOCK), COMPUTE)
        if APPEND:
            appends = stop == length  # the newest place is in this split, and exists
            inside = columns < tl.where(appends, D, 0)
            k = _load_turned(new_k, angles, columns, inside, ROTATE, D)
            v = tl.load(new_v + columns, inside, other=0.0)
            newest = (length - 1).to(tl.int64)
            tl.store(keys + newest * strides[0] + columns, k, inside)
            tl.store(values + newest * strides[1] + columns, v, inside)
            score = tl.sum(queries.to(COMPUTE) * k.to(COMPUTE)[None, :], 1) * scale
            largest = tl.where(appends, score, largest)
            total = tl.where(appends, 1.0, total)
            part += v.to(COMPUTE)[None, :]
            stop = tl.where(appends, stop - 1, stop)
        state = (largest, total, part)
        state = _attend(state, queries, keys, values, strides, first, stop, scale, D, SIZES)
        place = first_place + lanes * splits + SIZES.prompt_splits + split
        _store_part(scratch, state, place, lanes < SIZES.shared, D, BLOCK)
