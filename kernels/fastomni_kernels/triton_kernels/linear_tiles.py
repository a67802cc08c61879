"""Tiles of hidden @ weight.T, which the forward and the backward of the fused head both make.

The decision that is not obvious: rows and columns past the end are clamped to the last one instead
of masked, so that the loop over H has plain loads. Who uses a tile must leave out what lies outside
(a clamped column is a phantom of the last token).

Shapes: M completion tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastomni_kernels import dispatch

# Hidden states that programs which run at the same time read again and again: a third of the 50 MB
# of an H100's L2, because the slab and the weights pass through it too.
_GROUP_BYTES = 16 * 2**20


class Tile(NamedTuple):
    """Sizes of one program: rows, columns and depth of a tile, warps, stages of the pipeline."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# "half" is for fp16 and bf16; "ragged" for the same where H is no multiple of the depth (masks and
# narrow loads in the loop cost registers); "wide" for fp32 and fp64, which NVIDIA's tensor cores do
# not multiply at full precision. sm_90: of all tiles that need no spills, 128 x 256 reads the least
# from L2; its stages take 192 of 227 KiB.
_SMALL = {
    "half": Tile(128, 128, 32, 8, 3),
    "ragged": Tile(64, 64, 32, 4, 2),
    "wide": Tile(64, 64, 32, 8, 2),
}
TILES = {
    "sm_80": _SMALL | {"half": Tile(128, 128, 64, 8, 4)},
    "sm_90": _SMALL | {"half": Tile(128, 256, 64, 8, 4)},
    "sm_100": _SMALL | {"half": Tile(128, 256, 64, 8, 3)},
    "gfx942": _SMALL | {"half": Tile(128, 128, 64, 8, 2)},
    "default": _SMALL,
    "interpreter": dict.fromkeys(_SMALL, Tile(16, 64, 32, 4, 1)),
}

# 2^-2000 is 0 in fp64 too: what stands beside such a probability counts for nothing. Without a
# floor it would be -inf for a masked logit, and 0 * -inf is NaN.
FLOOR = tl.constexpr(-2000.0)

_TRITON_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_SHIPPED_TYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def position(program, row_blocks, column_blocks, blocks_per_group):
    """(row block, column block) of a program: neighbours share columns, groups share rows."""
    programs_per_group = blocks_per_group * column_blocks
    first = (program // programs_per_group) * blocks_per_group
    blocks = tl.minimum(row_blocks - first, blocks_per_group)
    within = program % programs_per_group
    return first + within % blocks, within // blocks


@triton.jit
def product(
    hidden_rows,
    weight_rows,
    H,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Dot products [ROWS, COLUMNS] of rows of H numbers, given pointers to their first ones."""
    k = tl.arange(0, DEPTH)
    left = hidden_rows[:, None] + k[None, :]
    right = weight_rows[None, :] + k[:, None]
    logits = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for start in range(0, H, DEPTH):
        if WHOLE:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, (k < H - start)[None, :], other=0.0)
            b = tl.load(right, (k < H - start)[:, None], other=0.0)
        # Without "ieee", NVIDIA's tensor cores would round fp32 operands to 10 bits of mantissa.
        logits = tl.dot(
            a.to(OPERAND), b.to(OPERAND), logits, input_precision="ieee", out_dtype=COMPUTE
        )
        left += DEPTH
        right += DEPTH
    return logits


def architecture() -> str:
    """The row of `TILES` for the device that launches go to; the small tiles fit into any."""
    if dispatch.interpreted():
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx942"
    # 8.6, 8.9 and 12.x have 99 KiB of shared memory; 10.3 is 10.0 with more formats.
    return {80: "sm_80", 90: "sm_90", 100: "sm_100", 103: "sm_100"}.get(target.arch, "default")


def operand_dtype(hidden: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """The narrowest type that holds both operands.

    Hidden states are converted to it before a launch, which costs little; a narrower head is not
    copied but converted in registers.
    """
    return torch.promote_types(hidden, weight)


def choose(target: str, operand: torch.dtype, hidden_size: int) -> tuple[Tile, bool]:
    """The tile for a row of `TILES`, and whether H is a whole number of depths."""
    kind = "half" if operand.itemsize == 2 else "wide"
    tile = TILES[target][kind]
    whole = hidden_size % tile.depth == 0
    if kind == "half" and not whole:
        tile = TILES[target]["ragged"]
        whole = hidden_size % tile.depth == 0
    return tile, whole


def constants(tile: Tile, whole: bool, operand: torch.dtype, target: str) -> dict[str, Any]:
    """Constexpr arguments that the kernels share."""
    # Triton's interpreter multiplies bf16 wrongly.
    upcast = target == "interpreter" and operand == torch.bfloat16
    return {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "WHOLE": whole,
        "OPERAND": _TRITON_TYPES[torch.float32 if upcast else operand],
    }


def rows_together(row_blocks: int, block_bytes: int) -> int:
    """Row blocks of a group (see `position`): even shares that fit into `_GROUP_BYTES`."""
    most = max(1, _GROUP_BYTES // max(1, block_bytes))
    return triton.cdiv(row_blocks, triton.cdiv(row_blocks, most))


def along_rows(x: Tensor) -> Tensor:
    """`x` [n, H] with its rows contiguous; copied only where they are not."""
    return x if x.stride(1) == 1 else x.contiguous()


def triton_pointer(dtype: torch.dtype) -> str:
    """The type of a pointer to `dtype` in the signature of a variant."""
    return f"*{_TRITON_TYPES[dtype].name}"


def shipped_cases(target: str) -> Iterator[tuple[str, torch.dtype, Tile, bool]]:
    """(name, dtype of hidden states and head, tile, whole) of what is compiled ahead of time."""
    for dtype in _SHIPPED_TYPES:
        name = str(dtype).removeprefix("torch.")
        tile, _ = choose(target, dtype, 0)
        yield name, dtype, tile, True
        if dtype == torch.bfloat16:  # fp16 compiles to the same but for the instruction's type
            yield f"{name}-ragged", dtype, TILES[target]["ragged"], False
