"""Sampling on the GPU: the logits are read once, and of one split a second time.

A launch over (row, split of the vocabulary) makes the largest logit and the mass of each split; a
launch over rows chooses the split by the cumulative mass, and the token by a scan of that split
alone. Truncation puts the search for the threshold (`sampling_threshold`) and a pass for the mass
kept per split in between. The decision that is not obvious: the two scans may disagree with the
sums in the last bit, so each of them falls back on its last entry that has mass, and a token that
may not be drawn is never reached through rounding.

Shapes: S sequences, V vocabulary, in splits of a fixed number of logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastomni_kernels.plain_sampling import at_least_tiny, is_off, log_min_p
from fastomni_kernels.triton_kernels.sampling_threshold import (
    FOUND,
    KEY_BITS,
    LOG2_E,
    LOWEST,
    NUM_WARPS,
    NUMBERS,
    RULES,
    STATISTICS,
    TYPES,
    VOCABULARY,
    WHOLE,
    largest_and_total,
    next_bits,
    ordered_key,
    search,
    tiles_of,
)
from fastomni_kernels.triton_kernels.variants import Variant


@triton.jit
def uniform(seed, position):
    """One number in [0, 1) per (seed, position)."""
    return tl.rand(seed, position.to(tl.int32))


@triton.jit(do_not_specialize=["splits"])
def sample_statistics_kernel(
    logits,
    largest,
    totals,
    inverse_temperature,
    vocabulary,
    splits,
    stride_row,
    stride_column,
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    columns = split * SPLIT + tl.arange(0, SPLIT)
    pointers = logits + row * stride_row + columns * stride_column
    x = tl.load(pointers, columns < vocabulary, other=float("-inf")).to(tl.float32)
    largest_of_split = tl.maximum(tl.max(x, 0), LOWEST)
    masses = tl.exp2((x - largest_of_split) * (inverse_temperature * LOG2_E))
    tl.store(largest + row * splits + split, largest_of_split)
    tl.store(totals + row * splits + split, tl.sum(masses, 0))


@triton.jit(do_not_specialize=["rows", "splits", "rounds", "top_k"])
def sample_kept_kernel(
    logits,
    largest,
    totals,
    counts,
    masses,
    prefixes,
    counts_above,
    masses_above,
    kept_masses,
    thresholds,
    inverse_temperature,
    top_k,
    top_p,
    log_min_p,
    rows,
    vocabulary,
    splits,
    rounds,
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
    threshold, _, _ = next_bits(
        counts, masses, prefixes, counts_above, masses_above, row, rows, splits, rounds, top_k,
        total * top_p, WITH_COUNT, WITH_MASS, SPLITS,
    )  # fmt: skip
    columns = split * SPLIT + tl.arange(0, SPLIT)
    pointers = logits + row * stride_row + columns * stride_column
    x = tl.load(pointers, columns < vocabulary, other=float("-inf")).to(tl.float32)
    kept = _kept(x, x - largest_of_row, threshold, inverse_temperature, log_min_p, KEY_BITS)
    mass = tl.where(kept, tl.exp2((x - largest_of_row) * scale), 0.0)
    tl.store(kept_masses + row * splits + split, tl.sum(mass, 0))
    if split == 0:
        tl.store(thresholds + row, threshold.to(tl.int32))


@triton.jit
def _kept(x, distance, threshold, inverse_temperature, log_min_p, KEY_BITS: tl.constexpr):
    """Which logits pass all rules; past the vocabulary they have no mass, whatever this says."""
    likely = distance * inverse_temperature >= log_min_p
    return likely & (ordered_key(x, KEY_BITS) >= threshold)


@triton.jit
def invert(masses, target):
    """The first place with mass whose cumulative mass exceeds the target, and the mass before it.

    Past the end (by rounding) it is the last place with mass; the very first where none has any.
    """
    SIZE: tl.constexpr = masses.shape[0]
    places = tl.arange(0, SIZE)
    sums = tl.cumsum(masses, 0)
    has_mass = masses > 0
    first = tl.min(tl.where(has_mass & (sums > target), places, SIZE), 0)
    last = tl.max(tl.where(has_mass, places, 0), 0)
    place = tl.where(first < SIZE, first, last)
    return place, tl.sum(tl.where(places == place - 1, sums, 0.0), 0)


@triton.jit(do_not_specialize=["splits"])
def sample_choose_kernel(
    logits,
    seeds,
    positions,
    largest,
    totals,
    kept_masses,
    thresholds,
    tokens,
    logprobs,
    truncated_logprobs,
    inverse_temperature,
    log_min_p,
    vocabulary,
    splits,
    stride_row,
    stride_column,
    KEY_BITS: tl.constexpr,
    TRUNCATED: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale = inverse_temperature * LOG2_E
    largest_of_row, total, parts = largest_and_total(largest, totals, row, splits, scale, SPLITS)
    kept_total = total
    if TRUNCATED:
        places = tl.arange(0, SPLITS)
        parts = tl.load(kept_masses + row * splits + places, places < splits, other=0.0)
        kept_total = tl.sum(parts, 0)
    target = uniform(tl.load(seeds + row), tl.load(positions + row)) * kept_total
    split, before = invert(parts, target)

    columns = split.to(tl.int64) * SPLIT + tl.arange(0, SPLIT)
    pointers = logits + row * stride_row + columns * stride_column
    x = tl.load(pointers, columns < vocabulary, other=float("-inf")).to(tl.float32)
    distance = x - largest_of_row
    mass = tl.exp2(distance * scale)
    if TRUNCATED:
        threshold = tl.load(thresholds + row).to(tl.uint32)
        kept = _kept(x, distance, threshold, inverse_temperature, log_min_p, KEY_BITS)
        mass = tl.where(kept, mass, 0.0)
    place, _ = invert(mass, target - before)
    tl.store(tokens + row, split.to(tl.int64) * SPLIT + place)
    reached = tl.sum(tl.where(tl.arange(0, SPLIT) == place, distance, 0.0), 0)
    reached *= inverse_temperature
    logprob = reached - tl.log(total)
    tl.store(logprobs + row, logprob)
    # NaN in a row without a distribution, like the other one.
    truncated = tl.where(logprob == logprob, reached - tl.log(kept_total), logprob)
    tl.store(truncated_logprobs + row, truncated)


def forward(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    truncated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; arguments and returns are those of the operator."""
    if logits.dtype == torch.float64:
        logits = logits.float()
    rows, top_k = len(logits), min(top_k, logits.shape[1])
    tokens, logprobs, after = (
        torch.empty(rows, dtype=dtype, device=logits.device)
        for dtype in (torch.int64, torch.float32, torch.float32)
    )
    if rows:
        largest, totals = statistics(logits, temperature)
        off = is_off(top_k, top_p, min_p, logits.shape[1])
        kept_masses = thresholds = totals  # what is not truncated reads neither
        if not off:
            rules = (temperature, top_k, top_p, min_p)
            kept_masses, thresholds = truncate(logits, largest, totals, *rules)
        sample_choose_kernel[(rows,)](
            logits,
            seeds.contiguous(),
            positions.contiguous(),
            largest,
            totals,
            kept_masses,
            thresholds,
            tokens,
            logprobs,
            after,
            1.0 / temperature,
            log_min_p(min_p),
            logits.shape[1],
            largest.shape[1],
            *logits.stride(),
            KEY_BITS=KEY_BITS[logits.dtype],
            TRUNCATED=not off,
            **tiles_of(logits.shape[1]),
            num_warps=NUM_WARPS,
        )
    return tokens, logprobs, after if truncated else logprobs.new_empty(0)


def statistics(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The largest logit of each split [S, splits], and the split's mass relative to it."""
    rows, vocabulary = logits.shape
    split = tiles_of(vocabulary)["SPLIT"]
    splits = triton.cdiv(vocabulary, split)
    largest, totals = (
        torch.empty(rows, splits, dtype=torch.float32, device=logits.device) for _ in range(2)
    )
    sample_statistics_kernel[(rows, splits)](
        logits,
        largest,
        totals,
        1.0 / temperature,
        vocabulary,
        splits,
        *logits.stride(),
        SPLIT=split,
        num_warps=NUM_WARPS,
    )
    return largest, totals


def truncate(
    logits: Tensor,
    largest: Tensor,
    totals: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor]:
    """The mass that is kept of each split [S, splits], and the key of the threshold [S]."""
    rows, splits = largest.shape
    rounds, flags, found = search(logits, largest, totals, temperature, top_k, top_p)
    kept_masses = torch.empty(rows, splits, dtype=torch.float32, device=logits.device)
    thresholds = torch.empty(rows, dtype=torch.int32, device=logits.device)
    sample_kept_kernel[(rows, splits)](
        logits,
        largest,
        totals,
        *found,
        kept_masses,
        thresholds,
        1.0 / temperature,
        top_k,
        at_least_tiny(top_p),
        log_min_p(min_p),
        rows,
        logits.shape[1],
        splits,
        rounds,
        *logits.stride(),
        KEY_BITS=KEY_BITS[logits.dtype],
        **flags,
        **tiles_of(logits.shape[1]),
        num_warps=NUM_WARPS,
    )
    return kept_masses, thresholds


def shipped(target: str) -> list[Variant]:
    """The variants that are compiled ahead of time; the kernels are the same on every target."""
    variants = []
    numbers = {"inverse_temperature": "fp32"} | dict.fromkeys((*WHOLE, "splits"), "i32")
    tiles = tiles_of(VOCABULARY)
    for dtype, kind in TYPES.items():
        logits, constants = {"logits": f"*{dtype}"}, {"stride_column": 1}
        pointers = logits | STATISTICS
        variants.append(
            Variant(
                name=f"sample_statistics-{dtype}",
                kernel=sample_statistics_kernel,
                signature=pointers | numbers,
                constexprs=constants | {"SPLIT": tiles["SPLIT"]},
                num_warps=NUM_WARPS,
                divisible_by_16=(*pointers, *WHOLE),
            )
        )
        constants |= {"KEY_BITS": KEY_BITS[kind]} | tiles
        pointers |= FOUND | {"kept_masses": "*fp32", "thresholds": "*i32"}
        for name, flags in {"min_p": {"WITH_COUNT": False, "WITH_MASS": False}, **RULES}.items():
            variants.append(
                Variant(
                    name=f"sample_kept-{dtype}-{name}",
                    kernel=sample_kept_kernel,
                    signature=pointers | NUMBERS | {"log_min_p": "fp32", "rounds": "i32"},
                    constexprs=constants | flags,
                    num_warps=NUM_WARPS,
                    divisible_by_16=(*pointers, *WHOLE),
                )
            )
        outputs = {"tokens": "*i64", "logprobs": "*fp32", "truncated_logprobs": "*fp32"}
        for truncated in (False, True):
            threshold = {"thresholds": "*i32" if truncated else "*fp32", "kept_masses": "*fp32"}
            pointers = logits | {"seeds": "*i64", "positions": "*i64"} | STATISTICS
            pointers = pointers | threshold | outputs
            variants.append(
                Variant(
                    name=f"sample_choose-{dtype}" + "-truncated" * truncated,
                    kernel=sample_choose_kernel,
                    signature=pointers | numbers | {"log_min_p": "fp32"},
                    constexprs=constants | {"TRUNCATED": truncated},
                    num_warps=NUM_WARPS,
                    divisible_by_16=(*pointers, *WHOLE),
                )
            )
    return variants
