"""One decode step: a prompt's keys are read once for all its sequences, own keys beside them.

One launch makes parts of the softmax (`decode_parts`), a second puts them together
(`decode_merge`). The decision that is not obvious: a program of the first takes one key head and
either a split of a prompt or a split of one sequence's own keys, so that long prompts and many
sequences fill a GPU alike. Splits depend on the length of the prompt or the sequence alone, and
tiles on the heads: no bit of a sequence's result depends on what shares its batch.

Shapes: N prompts, S sequences, U rows of all prompts, C_max places of a sequence's own tokens, Hq
query heads, Hkv key-value heads, R = Hq / Hkv, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastomni_kernels.triton_kernels.decode_merge import prefix_decode_merge_kernel
from fastomni_kernels.triton_kernels.decode_parts import Sizes, own_part, prompt_part
from fastomni_kernels.triton_kernels.linear_tiles import architecture, triton_pointer
from fastomni_kernels.triton_kernels.variants import Variant


class Tile(NamedTuple):
    """Sizes of one program that the machine and the type decide; see `decode_parts.Sizes`."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    slots: int = 32
    split: int = 128
    prompt_splits: int = 16


# By type and largest head; "half" is fp16 and bf16, "wide" is fp32, which NVIDIA's tensor cores do
# not multiply at full precision. Rows, keys and splits decide how sums are rounded.
_CUDA = {
    ("half", 64): Tile(64, 32, 4, 4),
    ("half", 128): Tile(64, 32, 4, 3),
    ("wide", 64): Tile(32, 32, 8, 2),
    ("wide", 128): Tile(32, 32, 8, 2),
}
_SMALL = Tile(16, 16, 4, 1, slots=4, split=32, prompt_splits=4)
TILES = {
    "sm_80": _CUDA | {("half", 128): Tile(64, 32, 8, 3)},
    "sm_90": _CUDA,
    "sm_100": _CUDA | {("half", 128): Tile(64, 32, 8, 3)},
    "gfx942": {
        ("half", 64): Tile(64, 32, 4, 2),
        ("half", 128): Tile(64, 32, 8, 2),
        ("wide", 64): Tile(32, 32, 8, 2),
        ("wide", 128): Tile(32, 16, 8, 2),
    },
    "default": _CUDA,
    "interpreter": dict.fromkeys(_CUDA, _SMALL),
}
MERGE_WARPS = 2

LOG2_E = math.log2(math.e)  # the hardware has powers of two


@triton.jit(do_not_specialize=["S", "N", "U", "places", "splits", "prompt_programs"])
def prefix_decode_kernel(
    q,
    prefix_k,
    prefix_v,
    prefix_offsets,
    suffix_k,
    suffix_v,
    suffix_lengths,
    prompt_of,
    new_k,
    new_v,
    cosines,
    sines,
    parts,
    largests,
    totals,
    scale,
    S,
    N,
    U,
    places,
    splits,
    prompt_programs,
    stride_q,
    stride_new_k,
    stride_new_v,
    stride_prefix_k,
    stride_prefix_v,
    stride_suffix_k,
    stride_suffix_v,
    stride_place_k,
    stride_place_v,
    APPEND: tl.constexpr,
    ROTATE: tl.constexpr,
    SIZES: tl.constexpr,
):
    D: tl.constexpr = SIZES.head
    program = tl.program_id(0)
    scratch = (parts, largests, totals)
    if program < prompt_programs:  # the longer ones begin first
        split = program % SIZES.prompt_splits
        head = program // SIZES.prompt_splits % SIZES.key_heads
        prompt_part(
            q,
            prefix_k + head * D,
            prefix_v + head * D,
            prefix_offsets,
            prompt_of,
            (cosines, sines),
            scratch,
            scale,
            S,
            U,
            splits,
            stride_q,
            (stride_prefix_k, stride_prefix_v),
            program // SIZES.prompt_splits // SIZES.key_heads,
            head,
            split,
            ROTATE,
            SIZES,
        )
    else:
        own = program - prompt_programs
        own_splits = splits - SIZES.prompt_splits
        split = own % own_splits
        head = own // own_splits % SIZES.key_heads
        sequence = (own // own_splits // SIZES.key_heads).to(tl.int64)
        prompt = tl.load(prompt_of + sequence)
        first_head = head * SIZES.shared
        own_part(
            q + sequence * stride_q + first_head * D,
            suffix_k + sequence * stride_suffix_k + head * D,
            suffix_v + sequence * stride_suffix_v + head * D,
            new_k + sequence * stride_new_k + head * D,
            new_v + sequence * stride_new_v + head * D,
            (cosines + sequence * D, sines + sequence * D),
            scratch,
            scale,
            (prompt >= 0) & (prompt < N),
            tl.load(suffix_lengths + sequence),
            places,
            (stride_place_k, stride_place_v),
            split,
            (sequence * SIZES.key_heads * SIZES.shared + first_head) * splits,
            splits,
            APPEND,
            ROTATE,
            SIZES,
        )


def forward(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_offsets: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Tensor,
    prompt_of: Tensor,
    new_k: Tensor | None,
    new_v: Tensor | None,
    cosines: Tensor | None,
    sines: Tensor | None,
    scale: float,
) -> Tensor:
    """Launch both kernels; see `fastomni_kernels.prefix_decode` for the arguments."""
    sequences, query_heads, head_size = q.shape
    prompts, key_heads, places = len(prefix_offsets) - 1, prefix_k.shape[1], suffix_k.shape[1]
    append = new_k is not None and new_v is not None
    q, prefix_k, prefix_v = (_heads_together(x) for x in (q, prefix_k, prefix_v))
    if not append:
        suffix_k, suffix_v = _heads_together(suffix_k), _heads_together(suffix_v)
    # What is missing is not read; its pointer only has to exist.
    new_k, new_v = (q if x is None else _heads_together(x) for x in (new_k, new_v))
    angles = [q if x is None else x.contiguous() for x in (cosines, sines)]
    offsets, lengths, owners = (x.contiguous() for x in (prefix_offsets, suffix_lengths, prompt_of))
    sizes, tile = sizes_of(architecture(), q.dtype, query_heads, key_heads, head_size)
    own_splits = triton.cdiv(places, sizes.split)
    splits = sizes.prompt_splits + own_splits
    dtype = torch.promote_types(q.dtype, torch.float32)
    scratch = [
        torch.empty((sequences, query_heads, splits, *size), dtype=dtype, device=q.device)
        for size in ((head_size,), (), ())
    ]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    prompt_programs = prompts * key_heads * sizes.prompt_splits
    programs = prompt_programs + sequences * key_heads * own_splits
    counts = (prompts, len(prefix_k), places, splits)
    if programs:
        prefix_decode_kernel[(programs,)](
            *(q, prefix_k, prefix_v, offsets),
            *(suffix_k, suffix_v, lengths, owners, new_k, new_v, *angles, *scratch),
            scale * LOG2_E,
            sequences,
            *counts,
            prompt_programs,
            *(x.stride(0) for x in (q, new_k, new_v, prefix_k, prefix_v, suffix_k, suffix_v)),
            *(x.stride(1) for x in (suffix_k, suffix_v)),
            APPEND=append,
            ROTATE=cosines is not None,
            SIZES=sizes,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    prefix_decode_merge_kernel[(sequences * query_heads,)](
        *(*scratch, out, offsets, lengths, owners, *counts), SIZES=sizes, num_warps=MERGE_WARPS
    )
    if append:
        torch.autograd.graph.increment_version((suffix_k, suffix_v))
    return out


def _heads_together(x: Tensor) -> Tensor:
    """`x` [..., heads, D] with heads side by side; copied only where they are not."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def sizes_of(
    target: str, dtype: torch.dtype, query_heads: int, key_heads: int, head_size: int
) -> tuple[Sizes, Tile]:
    """What the kernels are compiled for on a row of `TILES`, and with how many warps and stages."""
    tile = TILES[target]["half" if dtype.itemsize == 2 else "wide", 64 if head_size <= 64 else 128]
    shared = query_heads // key_heads
    sizes = Sizes(
        key_heads=key_heads,
        shared=shared,
        head=head_size,
        # Tensor cores take 16 rows and 16 elements of a head at least.
        block=max(16, triton.next_power_of_2(head_size)),
        rows=tile.rows,
        own_rows=max(16, triton.next_power_of_2(shared)),
        keys=tile.keys,
        slots=tile.slots,
        split=tile.split,
        prompt_splits=tile.prompt_splits,
        # Triton's interpreter multiplies bf16 wrongly.
        upcast=target == "interpreter" and dtype == torch.bfloat16,
    )
    return sizes, tile


# (query heads, key heads, head size) of what is compiled ahead of time: Qwen2.5 of 0.5B first.
_HEADS = ((14, 2, 64), (28, 4, 128), (16, 8, 96), (4, 4, 32), (4, 2, 16))
_FLAGS = {
    "": (False, False),
    "-rotate": (False, True),
    "-append": (True, False),
    "-append-rotate": (True, True),
}


def shipped(target: str) -> list[Variant]:
    """The variants of both kernels that are compiled ahead of time for a target."""
    return [
        variant
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for heads in (_HEADS if dtype == torch.bfloat16 else _HEADS[:2])
        for variant in _variants(target, dtype, heads)
    ]


def _variants(target: str, dtype: torch.dtype, heads: tuple[int, int, int]) -> Iterator[Variant]:
    name = f"{str(dtype).removeprefix('torch.')}-{heads[0]}x{heads[1]}x{heads[2]}"
    sizes, tile = sizes_of(target, dtype, *heads)
    heads_of = triton_pointer(dtype)
    types = dict.fromkeys(("prefix_offsets", "suffix_lengths", "prompt_of"), "*i32")
    types |= dict.fromkeys(("parts", "largests", "totals"), "*fp32") | {"scale": "fp32"}
    types |= dict.fromkeys(("S", "N", "U", "places", "splits", "prompt_programs"), "i32")

    def variant(kernel: Any, suffix: str, flags: dict[str, Any], **launch: Any) -> Variant:
        constexprs = flags | {"SIZES": sizes}
        names = [x for x in kernel.arg_names if x not in constexprs]
        strides = [x for x in names if x.startswith("stride_")]
        signature = {x: "i32" if x in strides else types.get(x, heads_of) for x in names}
        return Variant(
            name=f"{kernel.fn.__name__.removesuffix('_kernel')}-{name}{suffix}",
            kernel=kernel,
            signature=signature,
            constexprs=constexprs,
            divisible_by_16=(*(x for x in names if signature[x][0] == "*"), *strides),
            **launch,
        )

    launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    for suffix, (append, rotate) in _FLAGS.items():
        if append == rotate or (dtype, heads) == (torch.bfloat16, _HEADS[0]):
            flags = {"APPEND": append, "ROTATE": rotate}
            has_dot = dtype.itemsize == 2
            yield variant(prefix_decode_kernel, suffix, flags, has_dot=has_dot, **launch)
    yield variant(prefix_decode_merge_kernel, "", {}, num_warps=MERGE_WARPS)
