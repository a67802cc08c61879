"""Log-probability and entropy from hidden states and the language-model head, without logits.

One program takes a block of rows and one split of the vocabulary, makes the logits tile by tile and
keeps, for each row, the largest logit and two sums (Milakov and Gimelshein, "Online normalizer
calculation for softmax", arXiv:1805.02867); a second kernel puts the splits together in order. The
splits depend on the vocabulary alone, so that no row's result depends on the rows beside it.

Two decisions that are not obvious. The temperature divides differences to the largest logit: a
tempered logit itself would be rounded a second time. The chosen token's logit is made again by the
second kernel, by the same instructions: to look for it in each tile costs the first kernel so many
registers that the tile must be halved.

Shapes: M completion tokens, H hidden, V vocabulary, splits of SPLIT vocabulary entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastomni_kernels.triton_kernels.linear_logprobs_backward import backward
from fastomni_kernels.triton_kernels.linear_tiles import (
    FLOOR,
    Tile,
    along_rows,
    architecture,
    choose,
    constants,
    operand_dtype,
    position,
    product,
    rows_together,
    shipped_cases,
    triton_pointer,
)
from fastomni_kernels.triton_kernels.variants import Variant

__all__ = ["backward", "forward", "shipped"]

# Vocabulary entries of one split: 149 of them in Qwen2.5's vocabulary, enough programs for a GPU
# even where there is one block of rows.
SPLIT = 1024
INTERPRETER_SPLIT = 128
# Splits that the second kernel reads at a time.
SPLITS_TOGETHER = 8

LN_2 = tl.constexpr(0.6931471805599453)
# The largest logit before the first, far below any that counts; finite, because a part in which all
# logits are masked would otherwise subtract -inf from -inf, and inf * exp(-inf) is NaN.
NO_LOGIT = tl.constexpr(-1e20)


@triton.jit
def _relative_to(base, largest, total, weighted, scale):
    """Sums relative to `largest`, made relative to `base` >= largest; both are finite."""
    shift = (largest - base) * scale
    factor = tl.exp2(shift)
    return factor * total, factor * (weighted + shift * total)


@triton.jit
def _diagonal(x, ROWS: tl.constexpr):
    """What rows have with themselves of a product of rows with rows, [ROWS]."""
    order = tl.arange(0, ROWS)
    return tl.sum(tl.where(order[:, None] == order[None, :], x, 0.0), 1)


@triton.jit(do_not_specialize=["M", "row_blocks", "splits", "blocks_per_group"])
def linear_logprobs_kernel(
    hidden,
    weight,
    largests,
    totals,
    weighteds,
    M,
    V,
    H,
    stride_hidden,
    stride_weight,
    scale,
    row_blocks,
    splits,
    blocks_per_group,
    ENTROPY: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    COMPUTE: tl.constexpr = totals.dtype.element_ty
    row_block, split = position(tl.program_id(0), row_blocks, splits, blocks_per_group)
    rows = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    hidden_rows = hidden + tl.minimum(rows, M - 1) * stride_hidden
    first = split * SPLIT
    largest = tl.full((ROWS,), NO_LOGIT, COMPUTE)
    total = tl.zeros((ROWS,), COMPUTE)
    weighted = tl.zeros((ROWS,), COMPUTE)
    for start in range(first, tl.minimum(first + SPLIT, V), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        weight_rows = weight + tl.minimum(columns, V - 1).to(tl.int64) * stride_weight
        logits = product(hidden_rows, weight_rows, H, ROWS, COLUMNS, DEPTH, WHOLE, OPERAND, COMPUTE)
        if start + COLUMNS > V:
            logits = tl.where((columns < V)[None, :], logits, float("-inf"))
        base = tl.maximum(largest, tl.max(logits, 1))
        total, weighted = _relative_to(base, largest, total, weighted, scale)
        exponents = (logits - base[:, None]) * scale
        powers = tl.exp2(exponents)
        total += tl.sum(powers, 1)
        if ENTROPY:
            weighted += tl.sum(tl.maximum(exponents, FLOOR) * powers, 1)
        largest = base
    places = split.to(tl.int64) * M + rows
    tl.store(largests + places, largest, rows < M)
    tl.store(totals + places, total, rows < M)
    if ENTROPY:
        tl.store(weighteds + places, weighted, rows < M)


@triton.jit
def _merged(
    largests,
    totals,
    weighteds,
    rows,
    M,
    splits,
    scale,
    ENTROPY: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Largest logit and sums of each row, over all splits in their order."""
    largest = tl.full((ROWS,), NO_LOGIT, COMPUTE)
    total = tl.zeros((ROWS,), COMPUTE)
    weighted = tl.zeros((ROWS,), COMPUTE)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        places = split.to(tl.int64)[:, None] * M + rows[None, :]
        exists = (split < splits)[:, None]
        part_largest = tl.load(largests + places, exists, other=NO_LOGIT)
        part_total = tl.load(totals + places, exists, other=0.0)
        part_weighted = tl.zeros((SPLITS, ROWS), COMPUTE)
        if ENTROPY:
            part_weighted = tl.load(weighteds + places, exists, other=0.0)
        base = tl.maximum(largest, tl.max(part_largest, 0))
        total, weighted = _relative_to(base, largest, total, weighted, scale)
        part_total, part_weighted = _relative_to(
            base[None, :], part_largest, part_total, part_weighted, scale
        )
        total += tl.sum(part_total, 0)
        weighted += tl.sum(part_weighted, 0)
        largest = base
    return largest, total, weighted


@triton.jit(do_not_specialize=["M", "splits"])
def linear_logprobs_combine_kernel(
    hidden,
    weight,
    ids,
    largests,
    totals,
    weighteds,
    logprobs,
    entropy,
    normaliser,
    M,
    V,
    H,
    stride_hidden,
    stride_weight,
    scale,
    inverse_temperature,
    splits,
    ENTROPY: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    COMPUTE: tl.constexpr = totals.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    given = tl.minimum(rows, M - 1)
    largest, total, weighted = _merged(
        largests, totals, weighteds, given, M, splits, scale, ENTROPY, SPLITS, ROWS, COMPUTE
    )
    chosen = tl.load(ids + given)
    known = (chosen >= 0) & (chosen < V)
    hidden_rows = hidden + given * stride_hidden
    weight_rows = weight + tl.where(known, chosen, 0) * stride_weight
    logit = _diagonal(
        product(hidden_rows, weight_rows, H, ROWS, ROWS, DEPTH, WHOLE, OPERAND, COMPUTE), ROWS
    )
    log_total = tl.log2(total)
    logprob = (logit - largest) * inverse_temperature - log_total * LN_2
    tl.store(logprobs + rows, tl.where(known, logprob, float("nan")), rows < M)
    tl.store(normaliser + rows, largest * inverse_temperature + log_total * LN_2, rows < M)
    if ENTROPY:
        tl.store(entropy + rows, (log_total - weighted / total) * LN_2, rows < M)
    else:
        tl.store(entropy + rows, tl.zeros((ROWS,), COMPUTE), rows < M)


def forward(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch both kernels.

    Args:
        hidden: [M, H] fp16, bf16, fp32 or fp64, any strides.
        weight: [V, H] likewise; see `linear_tiles.operand_dtype` for two types.
        ids: [M] int64; one outside the vocabulary gives NaN.
        temperature, with_entropy: as of `fastomni_kernels.linear_logprobs`.

    Returns:
        (logprobs, entropy, log-sum-exp of the tempered logits), each [M] fp32 or fp64, nats.
    """
    operand = operand_dtype(hidden.dtype, weight.dtype)
    hidden, weight, ids = along_rows(hidden.to(operand)), along_rows(weight), ids.contiguous()
    (rows, size), vocabulary = hidden.shape, weight.shape[0]
    kind: Any = {"dtype": torch.promote_types(operand, torch.float32), "device": hidden.device}
    outputs = [torch.empty(rows, **kind) for _ in range(3)]
    logprobs, entropy, normaliser = outputs
    if rows == 0:
        return logprobs, entropy, normaliser
    target = architecture()
    tile, whole = choose(target, operand, size)
    split = _split(target)
    splits, row_blocks = triton.cdiv(vocabulary, split), triton.cdiv(rows, tile.rows)
    # Memory of their own: slices would start at addresses that Triton compiles anew for.
    parts = [torch.empty(n, rows, **kind) for n in (splits, splits, splits * with_entropy)]
    sizes = (rows, vocabulary, size, hidden.stride(0), weight.stride(0))
    scale = math.log2(math.e) / temperature  # the hardware has powers of two
    group = rows_together(row_blocks, tile.rows * size * hidden.itemsize)
    flags = constants(tile, whole, operand, target) | {"ENTROPY": with_entropy}
    flags |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    linear_logprobs_kernel[(row_blocks * splits,)](
        hidden,
        weight,
        *parts,
        *sizes,
        scale,
        row_blocks,
        splits,
        group,
        SPLIT=split,
        **flags,
    )
    flags.pop("COLUMNS")
    linear_logprobs_combine_kernel[(row_blocks,)](
        hidden,
        weight,
        ids,
        *parts,
        *outputs,
        *sizes,
        scale,
        1 / temperature,
        splits,
        SPLITS=SPLITS_TOGETHER,
        **flags,
    )
    return logprobs, entropy, normaliser


def _split(target: str) -> int:
    return INTERPRETER_SPLIT if target == "interpreter" else SPLIT


def shipped(target: str) -> list[Variant]:
    """The variants of both kernels that are compiled ahead of time for a target."""
    return [
        variant
        for name, dtype, tile, whole in shipped_cases(target)
        for with_entropy in (True, False)
        for variant in _variants(target, name, dtype, tile, whole, with_entropy)
    ]


def _variants(
    target: str, name: str, dtype: torch.dtype, tile: Tile, whole: bool, with_entropy: bool
) -> Iterator[Variant]:
    parts = dict.fromkeys(("largests", "totals", "weighteds"), "*fp32")
    sizes = dict.fromkeys(("M", "V", "H", "stride_hidden", "stride_weight"), "i32")
    inputs = dict.fromkeys(("hidden", "weight"), triton_pointer(dtype))
    signatures: dict[Any, dict[str, str]] = {
        linear_logprobs_kernel: inputs
        | parts
        | sizes
        | {"scale": "fp32"}
        | dict.fromkeys(("row_blocks", "splits", "blocks_per_group"), "i32"),
        linear_logprobs_combine_kernel: inputs
        | {"ids": "*i64"}
        | parts
        | dict.fromkeys(("logprobs", "entropy", "normaliser"), "*fp32")
        | sizes
        | {"scale": "fp32", "inverse_temperature": "fp32", "splits": "i32"},
    }
    flags = constants(tile, whole, dtype, target) | {"ENTROPY": with_entropy}
    extra: list[dict[str, Any]] = [
        flags | {"SPLIT": SPLIT},
        {k: v for k, v in flags.items() if k != "COLUMNS"} | {"SPLITS": SPLITS_TOGETHER},
    ]
    for (kernel, signature), constexprs in zip(signatures.items(), extra, strict=True):
        prefix = kernel.fn.__name__.removesuffix("_kernel")
        aligned = [argument for argument, kind in signature.items() if kind[0] == "*"]
        aligned += ["stride_hidden", "stride_weight", "H"] if whole else []
        yield Variant(
            name=f"{prefix}-{name}{'' if with_entropy else '-no_entropy'}",
            kernel=kernel,
            signature=signature,
            constexprs=constexprs,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            divisible_by_16=tuple(aligned),
            has_dot=dtype.itemsize == 2,
        )
