"""The smallest logit that top-k and top-p keep, without sorting: radix rounds over its bits.

Logits are read as unsigned integers of the same order ("keys"). A round knows the upper bits of
the threshold's key, and adds up, for each of the 16 values of the next 4 bits, how many tokens have
them and with what mass; the least value whose tokens are exceeded by fewer than top_k tokens and by
less than top_p of the mass gives the next 4 bits. The decision that is not obvious: no launch is
spent on adding up the splits of a row. Every program of the next round does it for its own row, in
the same order and so with the same result, and nothing depends on which program comes last.

Shapes: S sequences, V vocabulary, in splits of a fixed number of logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastomni_kernels.plain_sampling import at_least_tiny
from fastomni_kernels.triton_kernels.variants import Variant

# Logits of one program, 16 per thread: the same for every shape, so no sum depends on the batch.
SPLIT = 4096
NUM_WARPS = 8
# The lowest finite fp32, for rows and splits that are -inf throughout: -inf - -inf is NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950408889634)
# The significant bits of a logit's fp32 pattern: bf16 has its upper half, fp16 8 bits of exponent
# and 10 of mantissa there.
KEY_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}


@triton.jit
def ordered_key(x, KEY_BITS: tl.constexpr):
    """An unsigned integer that orders as x does; -0.0 counts as 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    # Positive numbers get the top bit, of negative ones all bits are turned round.
    key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    return key >> (32 - KEY_BITS)


@triton.jit
def largest_and_total(largest, totals, row, splits, scale, SPLITS: tl.constexpr):
    """The largest logit of a row, its mass relative to that, and the mass of each split [SPLITS].

    Masses are exp2((x - largest) * scale), with scale = log2(e) / temperature.
    """
    places = tl.arange(0, SPLITS)
    inside = places < splits
    largest_of_split = tl.load(largest + row * splits + places, inside, other=LOWEST)
    largest_of_row = tl.max(largest_of_split, 0)
    parts = tl.load(totals + row * splits + places, inside, other=0.0)
    parts *= tl.exp2((largest_of_split - largest_of_row) * scale)
    return largest_of_row, tl.sum(parts, 0), parts


@triton.jit
def next_bits(
    counts,
    masses,
    prefixes,
    counts_above,
    masses_above,
    row,
    rows,
    splits,
    round,
    count_limit,
    mass_limit,
    WITH_COUNT: tl.constexpr,
    WITH_MASS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The threshold's bits after `round` rounds, and the count and mass of tokens beyond them."""
    prefix = tl.zeros((), tl.uint32)
    count_above = tl.zeros((), tl.int32)
    mass_above = tl.zeros((), tl.float32)
    if round > 0:
        # Two of everything: programs of a round read one and write the other.
        before = ((round - 1) % 2) * rows.to(tl.int64) + row
        digits = tl.arange(0, 16)
        parts = tl.arange(0, SPLITS)
        places = (before * splits + parts[None, :]) * 16 + digits[:, None]
        inside = (parts[None, :] < splits) & (digits[:, None] < 16)
        higher = digits[None, :] > digits[:, None]
        passing = digits >= 0
        if WITH_COUNT:
            of_digit = tl.sum(tl.load(counts + places, inside, other=0), 1)
            all_counts = tl.load(counts_above + before)
            all_counts += tl.sum(tl.where(higher, of_digit[None, :], 0), 1)
            passing = passing & (all_counts < count_limit)
        if WITH_MASS:
            of_digit_mass = tl.sum(tl.load(masses + places, inside, other=0.0), 1)
            all_masses = tl.load(masses_above + before)
            all_masses += tl.sum(tl.where(higher, of_digit_mass[None, :], 0.0), 1)
            passing = passing & (all_masses < mass_limit)
        # The highest value always passes, but in a row that has no distribution.
        digit = tl.min(tl.where(passing, digits, 15), 0)
        prefix = (tl.load(prefixes + before).to(tl.uint32) << 4) | digit.to(tl.uint32)
        if WITH_COUNT:
            count_above = tl.sum(tl.where(digits == digit, all_counts, 0), 0)
        if WITH_MASS:
            mass_above = tl.sum(tl.where(digits == digit, all_masses, 0.0), 0)
    return prefix, count_above, mass_above


@triton.jit
def count_digits(digit, candidates):
    """How many candidates have each of the 16 digits [16].

    Sixteen counters of 8 bits lie in two integers, which are added up over groups too small for a
    counter to overflow: a sum per digit repeats the work of the masses, and the atomics of
    tl.histogram would meet in a few places: the first bits of most logits are alike.
    """
    SIZE: tl.constexpr = digit.shape[0]
    GROUP: tl.constexpr = 128 if SIZE > 128 else SIZE
    one = candidates.to(tl.int64) << ((digit & 7) * 8).to(tl.int64)
    lower = tl.where(digit < 8, one, 0)
    lower_sums = tl.sum(tl.reshape(lower, [SIZE // GROUP, GROUP]), 1)
    upper_sums = tl.sum(tl.reshape(one - lower, [SIZE // GROUP, GROUP]), 1)
    digits = tl.arange(0, 16)[None, :]
    words = tl.where(digits < 8, lower_sums[:, None], upper_sums[:, None])
    return tl.sum((words >> ((digits & 7) * 8).to(tl.int64)) & 255, 0).to(tl.int32)


@triton.jit
def sums_of_next_bits(
    x,
    inside,
    prefix,
    shift,
    largest_of_row,
    scale,
    KEY_BITS: tl.constexpr,
    WITH_COUNT: tl.constexpr,
    WITH_MASS: tl.constexpr,
):
    """Count and mass of a split's logits with the prefix, by their next 4 bits [16]."""
    upper = ordered_key(x, KEY_BITS) >> shift
    # In two steps, because the first round would shift by all 32 bits.
    candidates = inside & ((upper >> 4) == prefix)
    counts = tl.zeros((16,), tl.int32)
    masses = tl.zeros((16,), tl.float32)
    # From the second or third round on, most splits have few candidates, and many have none.
    if tl.max(candidates.to(tl.int32), 0) > 0:
        digit = (upper & 15).to(tl.int32)
        if WITH_COUNT:
            counts = count_digits(digit, candidates)
        if WITH_MASS:
            mass = tl.where(candidates, tl.exp2((x - largest_of_row) * scale), 0.0)
            hits = digit[None, :] == tl.arange(0, 16)[:, None]
            masses = tl.sum(tl.where(hits, mass[None, :], 0.0), 1)
    return counts, masses


@triton.jit(do_not_specialize=["rows", "splits", "round", "shift", "top_k"])
def sample_round_kernel(
    logits,
    largest,
    totals,
    counts,
    masses,
    prefixes,
    counts_above,
    masses_above,
    inverse_temperature,
    top_k,
    top_p,
    rows,
    vocabulary,
    splits,
    round,
    shift,
    stride_row,
    stride_column,
    KEY_BITS: tl.constexpr,
    WITH_COUNT: tl.constexpr,
    WITH_MASS: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    scale = inverse_temperature * LOG2_E
    largest_of_row, total, _ = largest_and_total(largest, totals, row, splits, scale, SPLITS)
    prefix, count_above, mass_above = next_bits(
        counts, masses, prefixes, counts_above, masses_above, row, rows, splits, round, top_k,
        total * top_p, WITH_COUNT, WITH_MASS, SPLITS,
    )  # fmt: skip
    here = (round % 2) * rows.to(tl.int64) + row
    if split == 0:
        tl.store(prefixes + here, prefix.to(tl.int32))
        tl.store(counts_above + here, count_above)
        tl.store(masses_above + here, mass_above)

    columns = split * SPLIT + tl.arange(0, SPLIT)
    inside = columns < vocabulary
    pointers = logits + row * stride_row + columns * stride_column
    x = tl.load(pointers, inside, other=float("-inf")).to(tl.float32)
    found_counts, found_masses = sums_of_next_bits(
        x, inside, prefix, shift, largest_of_row, scale, KEY_BITS, WITH_COUNT, WITH_MASS
    )
    places = (here * splits + split) * 16 + tl.arange(0, 16)
    if WITH_COUNT:
        tl.store(counts + places, found_counts)
    if WITH_MASS:
        tl.store(masses + places, found_masses)


def search(
    logits: Tensor,
    largest: Tensor,
    totals: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[int, dict[str, bool], tuple[Tensor, ...]]:
    """Launch all rounds, none where neither top-k nor top-p is on.

    Returns:
        How many rounds there were, the rules that are on, and what `next_bits` reads to know the
        threshold: counts and masses of the last rounds [2, S, splits, 16], and the bits, counts and
        masses before them [2, S].
    """
    rows, splits = largest.shape
    flags = {"WITH_COUNT": 0 < top_k < logits.shape[1], "WITH_MASS": top_p < 1.0}
    types = (torch.int32, torch.float32, torch.int32, torch.int32, torch.float32)
    partial = (2, rows, splits, 16)
    # What no rule that is on asks for is neither written nor read.
    shapes = [partial if used else (1,) for used in flags.values()] + 3 * [(2, rows)]
    found = tuple(
        torch.empty(shape, dtype=dtype, device=logits.device)
        for shape, dtype in zip(shapes, types, strict=True)
    )
    bits = KEY_BITS[logits.dtype]
    rounds = triton.cdiv(bits, 4) if any(flags.values()) else 0
    for round in range(rounds):
        sample_round_kernel[(rows, splits)](
            logits,
            largest,
            totals,
            *found,
            1.0 / temperature,
            top_k,
            at_least_tiny(top_p),
            rows,
            logits.shape[1],
            splits,
            round,
            4 * (rounds - 1 - round),
            *logits.stride(),
            KEY_BITS=bits,
            **flags,
            **tiles_of(logits.shape[1]),
            num_warps=NUM_WARPS,
        )
    return rounds, flags, found


def tiles_of(vocabulary: int) -> dict[str, int]:
    """Logits of one split, and the power of two that holds the number of splits."""
    return {"SPLIT": SPLIT, "SPLITS": triton.next_power_of_2(triton.cdiv(vocabulary, SPLIT))}


# For lists of variants: types of the arguments that kernels of sampling share, the rules that need
# a search (min-p has a threshold that is known at once), and tiles of the 0.5B model's vocabulary.
STATISTICS = {"largest": "*fp32", "totals": "*fp32"}
FOUND = {"counts": "*i32", "masses": "*fp32", "prefixes": "*i32", "counts_above": "*i32",
         "masses_above": "*fp32"}  # fmt: skip
NUMBERS = {"inverse_temperature": "fp32", "top_k": "i32", "top_p": "fp32", "rows": "i32",
           "vocabulary": "i32", "splits": "i32", "stride_row": "i32"}  # fmt: skip
WHOLE = ("vocabulary", "stride_row")
RULES = {
    "top_k": {"WITH_COUNT": True, "WITH_MASS": False},
    "top_p": {"WITH_COUNT": False, "WITH_MASS": True},
    "top_k-top_p": {"WITH_COUNT": True, "WITH_MASS": True},
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCABULARY = 151_936


def shipped(target: str) -> list[Variant]:
    """The variants that are compiled ahead of time; the kernel is the same on every target."""
    pointers = STATISTICS | FOUND
    return [
        Variant(
            name=f"sample_round-{dtype}-{name}",
            kernel=sample_round_kernel,
            signature={"logits": f"*{dtype}"}
            | pointers
            | NUMBERS
            | {"round": "i32", "shift": "i32"},
            constexprs={"stride_column": 1, "KEY_BITS": KEY_BITS[TYPES[dtype]]}
            | flags
            | tiles_of(VOCABULARY),
            num_warps=NUM_WARPS,
            divisible_by_16=("logits", *pointers, *WHOLE),
        )
        for dtype in TYPES
        for name, flags in RULES.items()
    ]
