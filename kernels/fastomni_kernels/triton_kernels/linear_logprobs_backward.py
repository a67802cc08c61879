"""Gradients of the fused head: logits made again, slab by slab of the vocabulary, and two GEMMs.

A Triton kernel writes the gradient with respect to a slab of logits, in the type that the library's
GEMMs want; they turn it into the gradients of hidden states and weights. The decision that is not
obvious: slabs cut the vocabulary and not the rows. Each weight's gradient is then written once,
with its whole sum inside one GEMM; only the hidden states' gradient adds up over slabs, in fp32.

Shapes: M completion tokens, H hidden, V vocabulary, n vocabulary entries of a slab.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastomni_kernels.triton_kernels.linear_tiles import (
    FLOOR,
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

SLAB_BYTES = 384 * 2**20
# Rows and columns of a slab are whole tiles, of any size in `TILES`: the kernel has no masks.
SLAB_ROWS = 128
SLAB_COLUMNS = 256

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=["M", "first", "last", "row_blocks", "column_blocks", "blocks_per_group"]
)
def linear_logprobs_backward_kernel(
    hidden,
    weight,
    ids,
    normaliser,
    entropy,
    grad_logprobs,
    grad_entropy,
    slab,
    M,
    first,
    last,
    H,
    stride_hidden,
    stride_weight,
    stride_slab,
    inverse_temperature,
    row_blocks,
    column_blocks,
    blocks_per_group,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    COMPUTE: tl.constexpr = normaliser.dtype.element_ty
    row_block, column_block = position(
        tl.program_id(0), row_blocks, column_blocks, blocks_per_group
    )
    # What lies outside repeats the last row or token: nobody reads that part of the slab.
    rows = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = first + column_block * COLUMNS + tl.arange(0, COLUMNS)
    hidden_rows = hidden + tl.minimum(rows, M - 1) * stride_hidden
    weight_rows = weight + tl.minimum(columns, last - 1).to(tl.int64) * stride_weight
    logits = product(hidden_rows, weight_rows, H, ROWS, COLUMNS, DEPTH, WHOLE, OPERAND, COMPUTE)

    # d logp_i / d z_j = [j = i] - p_j and d entropy / d z_j = -p_j (log p_j + entropy).
    given = tl.minimum(rows, M - 1)
    log_p = logits * inverse_temperature - tl.load(normaliser + given)[:, None]
    grad = tl.load(grad_logprobs + given) * inverse_temperature
    factor = grad[:, None]
    if ENTROPY:
        entropy_grad = tl.load(grad_entropy + given) * inverse_temperature
        surprise = tl.maximum(log_p, FLOOR) + tl.load(entropy + given)[:, None]
        factor += entropy_grad[:, None] * surprise
    # 32 bits: a 64-bit comparison for each logit costs registers.
    chosen = (tl.load(ids + given) - first - column_block * COLUMNS).to(tl.int32)
    column = tl.arange(0, COLUMNS)[None, :]
    one_hot = tl.where(chosen[:, None] == column, grad[:, None], 0.0)
    result = one_hot - tl.exp2(log_p * LOG2_E) * factor
    corner = row_block.to(tl.int64) * ROWS * stride_slab + column_block * COLUMNS
    places = tl.arange(0, ROWS)[:, None] * stride_slab + column
    tl.store(slab + corner + places, result.to(slab.dtype.element_ty))


def slab_columns(rows: int, itemsize: int) -> int:
    """Vocabulary entries of a slab of at most `SLAB_BYTES`, or `SLAB_COLUMNS` where none fit.

    Args:
        rows: M.
        itemsize: bytes of one number of the slab.
    """
    block_bytes = _padded(rows) * SLAB_COLUMNS * itemsize
    return max(1, SLAB_BYTES // block_bytes) * SLAB_COLUMNS


def slab_dtype(operand: torch.dtype) -> torch.dtype:
    """The type of logit gradients, which is that of the GEMMs.

    fp32 for fp16: a probability times a token's share of the loss is often below 6e-8, fp16's
    smallest number, and would vanish. bf16 has the exponents of fp32.
    """
    return torch.float32 if operand == torch.float16 else operand


def backward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    normaliser: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of hidden states and weights, each None where not needed.

    Args:
        hidden, weight, ids, temperature: as of `linear_logprobs.forward`.
        normaliser, entropy: [M] what it returned; the entropy is read with `grad_entropy` only.
        grad_logprobs: [M] the loss's gradient with respect to log-probs; None: 0.
        grad_entropy: [M] likewise.
        need_hidden: whether the gradient of `hidden` is wanted.
        need_weight: whether that of `weight` is.

    Returns:
        (grad_hidden [M, H], grad_weight [V, H]) in the dtypes of `hidden` and `weight`.
    """
    (rows, size), vocabulary = hidden.shape, weight.shape[0]
    wanted = need_hidden or need_weight
    if rows == 0 or (grad_logprobs is None and grad_entropy is None) or not wanted:
        return (
            hidden.new_zeros(hidden.shape) if need_hidden else None,
            weight.new_zeros(weight.shape) if need_weight else None,
        )
    wanted_dtype, operand = hidden.dtype, operand_dtype(hidden.dtype, weight.dtype)
    hidden, weight = along_rows(hidden.to(operand)), along_rows(weight)
    dtype = slab_dtype(operand)
    columns = min(
        slab_columns(rows, dtype.itemsize), triton.cdiv(vocabulary, SLAB_COLUMNS) * SLAB_COLUMNS
    )
    slab = torch.empty(_padded(rows), columns, dtype=dtype, device=hidden.device)
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(normaliser)
    vectors = [
        x if x is None else x.contiguous()
        for x in (ids, normaliser, entropy, grad_logprobs, grad_entropy)
    ]
    hidden_sum = _empty_like(normaliser, rows, size) if need_hidden else None
    grad_weight = _empty_like(weight, vocabulary, size) if need_weight else None
    left = hidden.to(dtype) if need_weight else hidden
    for first in range(0, vocabulary, columns):
        last = min(first + columns, vocabulary)
        _fill(slab, hidden, weight, vectors, first, last, temperature)
        gradient = slab[:rows, : last - first]
        if hidden_sum is not None:
            _add_product(hidden_sum, gradient, weight[first:last].to(dtype), first == 0)
        if grad_weight is not None:
            _write_product(grad_weight[first:last], gradient.T, left)
    return None if hidden_sum is None else hidden_sum.to(wanted_dtype), grad_weight


def _empty_like(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _padded(rows: int) -> int:
    return triton.cdiv(rows, SLAB_ROWS) * SLAB_ROWS


def _fill(
    slab: Tensor,
    hidden: Tensor,
    weight: Tensor,
    vectors: list[Tensor | None],
    first: int,
    last: int,
    temperature: float,
) -> None:
    """Write the gradient of the logits of tokens first .. last - 1 into the slab."""
    rows, size = hidden.shape
    target = architecture()
    tile, whole = choose(target, hidden.dtype, size)
    row_blocks = triton.cdiv(rows, tile.rows)
    column_blocks = triton.cdiv(last - first, tile.columns)
    *given, grad_entropy = vectors
    linear_logprobs_backward_kernel[(row_blocks * column_blocks,)](
        hidden,
        weight,
        *given,
        given[-1] if grad_entropy is None else grad_entropy,
        slab,
        rows,
        first,
        last,
        size,
        hidden.stride(0),
        weight.stride(0),
        slab.stride(0),
        1 / temperature,
        row_blocks,
        column_blocks,
        rows_together(row_blocks, tile.rows * size * hidden.itemsize),
        ENTROPY=grad_entropy is not None,
        **constants(tile, whole, hidden.dtype, target),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _add_product(total: Tensor, left: Tensor, right: Tensor, start: bool) -> None:
    """Add left @ right to `total`, which holds nothing yet at the start, in its own precision."""
    if left.dtype != total.dtype and left.device.type == "cpu":
        # torch has half-precision products with fp32 sums on GPUs only.
        left, right = left.to(total.dtype), right.to(total.dtype)
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, beta=0 if start else 1, out=total)
    else:
        torch.addmm(total, left, right, beta=0 if start else 1, out_dtype=total.dtype, out=total)


def _write_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Write left @ right to `out`, in its dtype; out= keeps autocast away."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(torch.mm(left, right, out=_empty_like(left, *out.shape)))


def shipped(target: str) -> list[Variant]:
    """The variants of the kernel that are compiled ahead of time for a target."""
    vectors = ("normaliser", "entropy", "grad_logprobs", "grad_entropy")
    counts = ("row_blocks", "column_blocks", "blocks_per_group")
    strides = ("stride_hidden", "stride_weight", "stride_slab")
    found = []
    for name, dtype, tile, whole in shipped_cases(target):
        pointers = {
            "hidden": triton_pointer(dtype),
            "weight": triton_pointer(dtype),
            "ids": "*i64",
            **dict.fromkeys(vectors, "*fp32"),
            "slab": triton_pointer(slab_dtype(dtype)),
        }
        sizes = dict.fromkeys(("M", "first", "last", "H", *strides), "i32")
        signature = (
            pointers | sizes | {"inverse_temperature": "fp32"} | dict.fromkeys(counts, "i32")
        )
        aligned = (*pointers, *strides, "H") if whole else (*pointers, "stride_slab")
        for with_entropy in (True, False):
            found.append(
                Variant(
                    name=f"linear_logprobs_backward-{name}{'' if with_entropy else '-no_entropy'}",
                    kernel=linear_logprobs_backward_kernel,
                    signature=signature,
                    constexprs=constants(tile, whole, dtype, target) | {"ENTROPY": with_entropy},
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    divisible_by_16=aligned,
                    has_dot=dtype.itemsize == 2,
                )
            )
    return found
