"""The second step of a decode: parts of a softmax over splits of the keys, put together in order.

One program per sequence and query head. The decision that is not obvious: a step of the loop takes
many splits at once, because splits one after another would each wait for memory. Which splits a
step takes depends on nothing but their numbers, so a sequence's result has the same bits whatever
shares its batch.

Shapes: N prompts, S sequences, U rows of all prompts, Hq query heads, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastomni_kernels.triton_kernels.decode_parts import bounds, split_size

# The largest score of no keys, far below any that counts.
NOTHING = tl.constexpr(-1e30)


@triton.jit(do_not_specialize=["N", "U", "places", "splits"])
def prefix_decode_merge_kernel(
    parts,
    largests,
    totals,
    out,
    prefix_offsets,
    suffix_lengths,
    prompt_of,
    N,
    U,
    places,
    splits,
    SIZES: tl.constexpr,
):
    D: tl.constexpr = SIZES.head
    BLOCK: tl.constexpr = SIZES.block
    PROMPT_SPLITS: tl.constexpr = SIZES.prompt_splits
    COMPUTE: tl.constexpr = parts.dtype.element_ty
    row = tl.program_id(0)
    sequence = row // (SIZES.key_heads * SIZES.shared)
    prompt = tl.load(prompt_of + sequence)
    active = (prompt >= 0) & (prompt < N)
    begin, end = bounds(prefix_offsets, prompt, active, U)
    length = end - begin
    shared_splits = tl.cdiv(length, split_size(length, SIZES.split, PROMPT_SPLITS))
    own = tl.minimum(tl.load(suffix_lengths + sequence), places)
    own_splits = tl.where(active, tl.cdiv(tl.maximum(own, 0), SIZES.split), 0)

    columns = tl.arange(0, BLOCK)
    first = row.to(tl.int64) * splits
    largest = tl.full((), float("-inf"), COMPUTE)
    total = tl.zeros((), COMPUTE)
    merged = tl.zeros((BLOCK,), COMPUTE)
    for start in range(0, tl.where(active, PROMPT_SPLITS + own_splits, 0), PROMPT_SPLITS):
        split = start + tl.arange(0, PROMPT_SPLITS)
        # The prompt's splits, then the sequence's own: a split past the end was never written.
        exists = split < shared_splits
        if start > 0:
            exists = split < PROMPT_SPLITS + own_splits
        part_largest = tl.load(largests + first + split, exists, other=float("-inf"))
        part_total = tl.load(totals + first + split, exists, other=0.0)
        inside = exists[:, None] & (columns < D)[None, :]
        part = tl.load(parts + (first + split)[:, None] * D + columns[None, :], inside, other=0.0)
        # Finite where there is nothing yet: -inf - -inf is NaN. What is NaN in a part stays NaN.
        base = tl.maximum(tl.maximum(largest, tl.max(part_largest, 0)), NOTHING)
        weight = tl.exp2(part_largest - base)
        keep = tl.exp2(largest - base)
        total = total * keep + tl.sum(part_total * weight, 0)
        merged = merged * keep + tl.sum(part * weight[:, None], 0)
        largest = base
    merged /= tl.where(total == 0.0, 1.0, total)  # 0: the sequence sees nothing
    tl.store(out + row.to(tl.int64) * D + columns, merged.to(out.dtype.element_ty), columns < D)
