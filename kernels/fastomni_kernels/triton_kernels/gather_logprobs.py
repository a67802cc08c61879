"""Log-probability and entropy from logits that exist: one read forward, one read and write back.

One program per row forward: it keeps the largest logit so far, and per lane the sums that belong to
it, so that a block costs a single reduction across threads (online softmax, arXiv:1805.02867). The
entropy's sum is over exp(x - largest) * (x - largest) and not over exp(x - largest) * x, which
would lose the digits of a row of large logits to cancellation.

Shapes: M completion tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastomni_kernels.triton_kernels.variants import Variant

# Logits in one step of the forward's loop, and in one program of the backward: 16 per thread, two
# loads of 16 bytes in bf16. Memory decides the speed, so they are the same on every target.
BLOCK = 4096
NUM_WARPS = 8
# exp(-1000) is 0 in fp64 too: what stands beside such a probability counts for nothing. Without a
# floor it would be -inf for a masked logit (or overflow to it), and 0 * -inf is NaN.
FLOOR = tl.constexpr(-1000.0)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _take_in(x, largest, totals, moments, scale, WITH_ENTROPY: tl.constexpr, LOWEST: tl.constexpr):
    """Add a block to the largest logit so far and to the sums that belong to it.

    Limits at LOWEST keep 0 * -inf, of the start and of a masked logit, from being NaN.
    """
    before = largest
    largest = tl.maximum(before, tl.max(x, 0))
    if largest > before:  # the same for all threads, and rare after the first blocks
        moved = before - largest
        keep = tl.exp2(moved * scale)
        totals *= keep
        if WITH_ENTROPY:
            moments = keep * moments + tl.maximum(moved, LOWEST) * totals
    distance = x - largest
    weights = tl.exp2(distance * scale)
    totals += weights
    if WITH_ENTROPY:
        moments += weights * tl.maximum(distance, LOWEST)
    return largest, totals, moments


@triton.jit
def gather_logprobs_forward_kernel(
    logits,
    ids,
    logprobs,
    entropy,
    normaliser,
    inverse_temperature,
    vocabulary,
    stride_row,
    stride_column,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    COMPUTE: tl.constexpr = logprobs.dtype.element_ty
    # A finite start: with -inf, a block that is masked altogether would give -inf - -inf.
    LOWEST: tl.constexpr = -3.4028234663852886e38 if COMPUTE == tl.float32 else -1.7e308
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * stride_row
    lanes = tl.arange(0, BLOCK)
    pointers = first + lanes.to(tl.int64) * stride_column
    largest = tl.full((), LOWEST, COMPUTE)
    totals = tl.zeros((BLOCK,), COMPUTE)
    moments = tl.zeros((BLOCK,), COMPUTE)
    scale = tl.full((), LOG2_E, COMPUTE) * inverse_temperature
    step = tl.full((), BLOCK, tl.int64) * stride_column
    whole = vocabulary // BLOCK * BLOCK
    for _ in range(0, whole, BLOCK):
        x = tl.load(pointers).to(COMPUTE)
        pointers += step
        largest, totals, moments = _take_in(
            x, largest, totals, moments, scale, WITH_ENTROPY, LOWEST
        )
    if whole < vocabulary:
        x = tl.load(pointers, lanes < vocabulary - whole, other=float("-inf")).to(COMPUTE)
        largest, totals, moments = _take_in(
            x, largest, totals, moments, scale, WITH_ENTROPY, LOWEST
        )
    total = tl.sum(totals, 0)
    log_total = tl.log(total)

    token = tl.load(ids + row)
    known = (token >= 0) & (token < vocabulary)
    target = tl.load(first + token * stride_column, known, other=float("nan")).to(COMPUTE)
    tl.store(logprobs + row, (target - largest) * inverse_temperature - log_total)
    tl.store(normaliser + row, largest * inverse_temperature + log_total)
    if WITH_ENTROPY:
        moment = tl.sum(moments, 0) / total * inverse_temperature
        tl.store(entropy + row, log_total - moment)
    else:
        tl.store(entropy + row, tl.zeros((), COMPUTE))


@triton.jit
def gather_logprobs_backward_kernel(
    logits,
    out,
    ids,
    normaliser,
    entropy,
    grad_logprobs,
    grad_entropy,
    inverse_temperature,
    vocabulary,
    stride_row,
    stride_column,
    out_stride_row,
    out_stride_column,
    THROUGH_LOGPROBS: tl.constexpr,
    THROUGH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    COMPUTE: tl.constexpr = normaliser.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    x = tl.load(logits + row * stride_row + columns * stride_column, inside, other=float("-inf"))
    log_p = x.to(COMPUTE) * inverse_temperature - tl.load(normaliser + row)
    # d logp_i / d z_j = [j = i] - p_j and d entropy / d z_j = -p_j (log p_j + entropy).
    factor = tl.zeros((BLOCK,), COMPUTE)
    if THROUGH_ENTROPY:
        surprise = tl.maximum(log_p, FLOOR) + tl.load(entropy + row)
        factor -= surprise * tl.load(grad_entropy + row)
    if THROUGH_LOGPROBS:
        factor -= tl.load(grad_logprobs + row)
    grad = tl.exp2(log_p * LOG2_E) * factor
    if THROUGH_LOGPROBS:
        grad += tl.where(columns == tl.load(ids + row), tl.load(grad_logprobs + row), 0.0)
    places = out + row * out_stride_row + columns * out_stride_column
    tl.store(places, grad * inverse_temperature, inside)


def forward(
    logits: Tensor, ids: Tensor, temperature: float, with_entropy: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; returns (logprobs, entropy, normaliser), the entropy 0 where not asked for."""
    logits, temperature = _tempered(logits, temperature)
    rows, vocabulary = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logprobs, entropy, normaliser = (
        torch.empty(rows, dtype=dtype, device=logits.device) for _ in range(3)
    )
    if rows:
        with torch.cuda.device_of(logits):
            gather_logprobs_forward_kernel[(rows,)](
                logits,
                ids.contiguous(),
                logprobs,
                entropy,
                normaliser,
                1.0 / temperature,
                vocabulary,
                *logits.stride(),
                WITH_ENTROPY=with_entropy,
                BLOCK=_block(vocabulary),
                num_warps=NUM_WARPS,
            )
    return logprobs, entropy, normaliser


def backward(
    logits: Tensor,
    ids: Tensor,
    normaliser: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Launch; writes the gradient of `logits` to `out`, which may be `logits` itself."""
    tempered, left_over = _tempered(logits, temperature)
    rows, vocabulary = logits.shape
    block = _block(vocabulary)
    # A gradient that is missing is not read; its pointer only has to exist.
    grads = [normaliser if x is None else x.contiguous() for x in (grad_logprobs, grad_entropy)]
    if out.numel():
        with torch.cuda.device_of(logits):
            gather_logprobs_backward_kernel[(rows, triton.cdiv(vocabulary, block))](
                tempered,
                out,
                ids.contiguous(),
                normaliser,
                entropy,
                *grads,
                1.0 / left_over,
                vocabulary,
                *tempered.stride(),
                *out.stride(),
                THROUGH_LOGPROBS=grad_logprobs is not None,
                THROUGH_ENTROPY=grad_entropy is not None,
                BLOCK=block,
                num_warps=NUM_WARPS,
            )
    if left_over != temperature:
        out.div_(temperature)


def _tempered(logits: Tensor, temperature: float) -> tuple[Tensor, float]:
    """Return logits and the temperature that the kernel applies: a launch passes fp32 only."""
    return (logits / temperature, 1.0) if logits.dtype == torch.float64 else (logits, temperature)


def _block(vocabulary: int) -> int:
    return min(BLOCK, triton.next_power_of_2(vocabulary))


def shipped(target: str) -> list[Variant]:
    """The variants that are compiled ahead of time; the kernels are the same on every target."""
    outputs = dict.fromkeys(("logprobs", "entropy", "normaliser"), "*fp32")
    saved = dict.fromkeys(("normaliser", "entropy", "grad_logprobs", "grad_entropy"), "*fp32")
    counts = {"inverse_temperature": "fp32", "vocabulary": "i32", "stride_row": "i32"}
    whole = ("vocabulary", "stride_row")
    variants = []
    for dtype in ("fp32", "bf16", "fp16"):
        logits = {"logits": f"*{dtype}"}
        for with_entropy in (True, False):
            pointers = logits | {"ids": "*i64"} | outputs
            variants.append(
                Variant(
                    name=f"gather_logprobs_forward-{dtype}" + "-entropy" * with_entropy,
                    kernel=gather_logprobs_forward_kernel,
                    signature=pointers | counts,
                    constexprs={"stride_column": 1, "WITH_ENTROPY": with_entropy, "BLOCK": BLOCK},
                    num_warps=NUM_WARPS,
                    divisible_by_16=(*pointers, *whole),
                )
            )
        for name, through in (
            ("logprobs", (True, False)),
            ("entropy", (False, True)),
            ("both", (True, True)),
        ):
            pointers = logits | {"out": f"*{dtype}", "ids": "*i64"} | saved
            flags = dict(zip(("THROUGH_LOGPROBS", "THROUGH_ENTROPY"), through, strict=True))
            strides = {"stride_column": 1, "out_stride_column": 1}
            variants.append(
                Variant(
                    name=f"gather_logprobs_backward-{dtype}-{name}",
                    kernel=gather_logprobs_backward_kernel,
                    signature=pointers | counts | {"out_stride_row": "i32"},
                    constexprs={**strides, **flags, "BLOCK": BLOCK},
                    num_warps=NUM_WARPS,
                    divisible_by_16=(*pointers, *whole, "out_stride_row"),
                )
            )
    return variants
