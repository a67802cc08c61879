"""Work lists of the attention of packed groups, and what its kernels share.

A block is a run of rows that one program owns: queries, or keys whose gradients it makes. It meets
other rows in the order of a list: `count` rows from `begin` on, then rows from `then` on. Rows that
all of the block sees (or that see all of it) come first and need no mask; only the end of the list
has one. The decision that is not obvious: such a list packs two runs into the same tiles (the end
of a prompt and a completion's own rows), so that short completions do not leave tiles half empty.

No block crosses the border of a prompt or of a group, and a list depends on its own group alone:
neighbours in a batch change no bit of a row.

Shapes: N prompts, T packed rows, R query heads per key-value head, D head size.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastomni_kernels.layout import GroupLayout

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Columns of a list of blocks: first, stop (rows of the block), begin, count, then (rows that it
# meets), low, whole, high (places of that list: no mask from low to whole, a mask from there to
# high), anchor, partial (see `key_blocks`).
FIELDS = tl.constexpr(10)
ANCHOR = tl.constexpr(8)
PARTIAL = tl.constexpr(9)
NO_ANCHOR = 2**31 - 1

# Programs for the gradients of a group's keys, two for each of an H100's 132 multiprocessors: fewer
# blocks than this are cut into pieces. A function of the group alone, not of its batch. Each piece
# costs its size in fp32.
_PROGRAMS_OF_A_GROUP = 264
_MOST_PIECES = 8
_WORK_LISTS_KEPT = 32


class Tile(NamedTuple):
    """Sizes of one program: rows of (token, head) pairs, keys, warps, stages of the pipeline."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


class Work(NamedTuple):
    """Work lists on the device, int32, parts of one buffer.

    Attributes:
        starts: [T] first row of the own prompt or completion that a row sees.
        blocks: [n, FIELDS] what each program does, the longest first.
        sums: [m, 4] key blocks in pieces: first row, row after the last, first partial sum, pieces.
        partials: partial sums of all key blocks.
    """

    starts: Tensor
    blocks: Tensor
    sums: Tensor
    partials: int


@triton.jit
def read_block(blocks, program):
    """(first, stop, (begin, count, then), low, whole, high) of a program's block."""
    block = blocks + program * FIELDS
    first, stop = tl.load(block), tl.load(block + 1)
    listed = tl.load(block + 2), tl.load(block + 3), tl.load(block + 4)
    return first, stop, listed, tl.load(block + 5), tl.load(block + 6), tl.load(block + 7)


@triton.jit
def listed_rows(place, listed):
    """Packed rows at places of a block's list."""
    begin, count, then = listed
    return tl.where(place < count, begin + place, then + (place - count))


@triton.jit
def query_rows(first, stop, key_head, R: tl.constexpr, ROWS: tl.constexpr):
    """Token, query head and existence of each row; a block's last token stands for what is none."""
    row = tl.arange(0, ROWS)
    token = first + row // R
    # A block has no more than ROWS // R tokens, so that the second comparison says it all. The
    # first one takes the forward on sm_90 from 144 to 127 registers (Triton 3.6; 3.9 does without),
    # and 128 is the most with which two programs share a multiprocessor.
    exists = (row < ROWS // R * R) & (token < stop)
    return tl.minimum(token, stop - 1), key_head * R + row % R, exists


@triton.jit
def seen_by(places, listed, tokens, own):
    """Which keys of a tile, at places of a query block's list, each query sees: [queries, keys].

    In places, because these differ from column to column by constants, which take no registers.
    """
    count, then = listed[1], listed[2]
    after_start = places[None, :] >= (own - then + count)[:, None]
    before_end = places[None, :] <= (tokens - then + count)[:, None]
    return (places < count)[None, :] | (after_start & before_end)


@triton.jit
def load_rows(x, rows, stride_row, heads, stride_head, D: tl.constexpr, WIDTH: tl.constexpr):
    """Vectors [rows, WIDTH] of D numbers, zeros after them; heads is a number or one for each."""
    d = tl.arange(0, WIDTH)
    places = rows.to(tl.int64) * stride_row + heads * stride_head
    pointers = x + places[:, None] + d[None, :]
    if D == WIDTH:
        return tl.load(pointers)
    return tl.load(pointers, (d < D)[None, :], other=0.0)


@triton.jit
def store_rows(x, value, places, exists, D: tl.constexpr, WIDTH: tl.constexpr):
    """Write vectors [rows, WIDTH] of D numbers to the given places, where they exist."""
    d = tl.arange(0, WIDTH)
    mask = exists[:, None] & (d < D)[None, :]
    tl.store(x + places[:, None] + d[None, :], value.to(x.dtype.element_ty), mask)


def along_heads(x: Tensor) -> Tensor:
    """`x` [T, heads, D] with its vectors contiguous; copied only where they are not."""
    return x if x.stride(2) == 1 else x.contiguous()


def choose(
    tiles: dict[str, dict[str, Tile]],
    target: str,
    dtype: torch.dtype,
    heads_per_key: int,
    head_size: int,
) -> tuple[Tile, dict[str, Any]]:
    """The tile for R query heads of D numbers, and the constexpr arguments that kernels share.

    fp32 and fp64 are "wide": NVIDIA's tensor cores do not multiply them at full precision.
    """
    kind = "half" if dtype.itemsize == 2 else "wide"
    tile = tiles[target][f"{kind}-{64 if head_size <= 64 else 128}"]
    # A tile holds all heads of at least one token.
    tile = tile._replace(rows=max(tile.rows, triton.next_power_of_2(heads_per_key)))
    return tile, {
        "R": heads_per_key,
        "D": head_size,
        "WIDTH": triton.next_power_of_2(head_size),
        # Triton's interpreter multiplies bf16 wrongly.
        "UPCAST": target == "interpreter" and dtype == torch.bfloat16,
        "ROWS": tile.rows,
        "KEYS": tile.keys,
    }


def shipped_cases() -> list[tuple[str, torch.dtype, int, int]]:
    """(name, dtype, R, D) of what is compiled ahead of time.

    Qwen2.5 has 7 query heads for a key head, of 64 numbers (0.5B) or 128 (7B). The other sizes are
    narrower than any decoder's, or padded.
    """
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    cases = [(dtype, 7, head_size) for dtype in dtypes for head_size in (64, 128)]
    cases += [
        (torch.bfloat16, ratio, head_size) for ratio, head_size in ((1, 16), (2, 32), (8, 80))
    ]
    return [(f"{str(case[0]).removeprefix('torch.')}-{case[1]}x{case[2]}", *case) for case in cases]


def _blocks(begins: Tensor, ends: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut runs of rows into blocks of at most `size`: (run, first row, row after the last)."""
    counts = (ends - begins + size - 1) // size
    run = torch.repeat_interleave(torch.arange(len(counts)), counts)
    first = begins[run] + (torch.arange(len(run)) - (counts.cumsum(0) - counts)[run]) * size
    return run, first, torch.minimum(first + size, ends[run])


def _runs(layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """Begins and ends of the runs that blocks are cut from: prompt, completions, prompt, .."""
    groups = torch.tensor(layout.group_offsets)
    borders = groups[:-1] + torch.tensor(layout.prompt_lengths)
    begins = torch.stack([groups[:-1], borders], 1).flatten()
    return begins, torch.stack([borders, groups[1:]], 1).flatten()


def _segments(layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """For each row [T], the begin and the end of its own prompt or completion."""
    lengths: list[int] = []
    for prompt, completions in zip(layout.prompt_lengths, layout.completion_lengths, strict=True):
        lengths += [prompt, *completions]
    counts = torch.tensor(lengths)
    begins = torch.tensor(list(accumulate(lengths[:-1], initial=0)))
    starts = torch.repeat_interleave(begins, counts)
    return starts, torch.repeat_interleave(begins + counts, counts)


def _work(parts: list[Tensor], partials: int, device: torch.device) -> Work:
    """The lists in int32 on a device, by one copy that nobody waits for."""
    flat = [part.flatten().to(torch.int32) for part in parts]
    # Triton compiles anew for a pointer that is not at a multiple of 16 bytes.
    padded = torch.cat([torch.nn.functional.pad(x, (0, -len(x) % 4)) for x in flat])
    if device.type == "cuda":
        padded = padded.pin_memory()
    buffer = padded.to(device, non_blocking=True)
    sizes = buffer.split([len(x) + -len(x) % 4 for x in flat])
    starts, blocks, sums = (
        whole[: part.numel()].view(part.shape) for whole, part in zip(sizes, parts, strict=True)
    )
    return Work(starts, blocks, sums, partials)


def stream_of(device: torch.device) -> int:
    """The stream that launches go to: what was copied on one is not yet there for another."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@lru_cache(maxsize=_WORK_LISTS_KEPT)
def query_blocks(
    layout: GroupLayout, device: torch.device, tokens: int, keys: int, stream: int = 0
) -> Work:
    """Blocks of queries; the keys that each meets are its prompt's, then its completions' own.

    Args:
        layout: the rows.
        device: where the lists go.
        tokens: of a block.
        keys: of a tile.
        stream: see `stream_of`; each has lists of its own.
    """
    begins, ends = _runs(layout)
    starts, _ = _segments(layout)
    run, first, stop = _blocks(begins, ends, tokens)
    # A prompt's queries meet their own keys only.
    prompt = torch.where(run % 2 == 1, ends[run - 1] - begins[run - 1], 0)
    own = starts[first]
    see_all = prompt + torch.where(starts[stop - 1] == own, first + 1 - own, 0)
    high = prompt + stop - own
    none = torch.zeros_like(first)
    fields = [first, stop, begins[run - run % 2], prompt, own, none, see_all // keys * keys, high]
    blocks = torch.stack([*fields, none, none], 1)
    blocks = blocks[torch.argsort(high, descending=True, stable=True)]
    return _work([starts, blocks, torch.empty(0, 4)], 0, device)


def _pieces(run: Tensor, tiles: Tensor, key_heads: int, piece_tiles: int) -> tuple[Tensor, Tensor]:
    """How many pieces each key block has, and how many tiles one of them."""
    programs = torch.bincount(run)[::2] * key_heads
    most = ((_PROGRAMS_OF_A_GROUP + programs - 1) // programs).clamp(max=_MOST_PIECES)
    pieces = torch.minimum((tiles + piece_tiles - 1) // piece_tiles, most[run // 2])
    share = (tiles + pieces - 1) // pieces
    return (tiles + share - 1) // share, share


@lru_cache(maxsize=_WORK_LISTS_KEPT)
def key_blocks(
    layout: GroupLayout,
    device: torch.device,
    key_heads: int,
    keys: int,
    tokens: int,
    piece_tiles: int,
    stream: int = 0,
) -> Work:
    """Blocks of keys, in pieces; the queries that each meets are those that see a key of it.

    A row sees key j where min(first row of the row's own segment, anchor) <= j <= row: the anchor
    of a prompt's block is its first key, since all completions see it. A piece's sum goes to the
    partial sum of its number, or to the output where that is negative.

    Args:
        layout: the rows.
        device: where the lists go.
        key_heads: Hkv, each of which is a program of its own.
        keys: of a block.
        tokens: of a tile of queries.
        piece_tiles: tiles of queries in a piece; more where a key block would have too many pieces.
        stream: see `stream_of`; each has lists of its own.
    """
    begins, ends = _runs(layout)
    starts, stops = _segments(layout)
    run, first, stop = _blocks(begins, ends, keys)
    last, of_prompt = stop - 1, run % 2 == 0
    end = torch.where(of_prompt, ends[run - run % 2 + 1], stops[last])
    # Rows from the last key on see the whole block, unless it crosses completions.
    see_all = torch.where(starts[first] == starts[last], end - last, 0)
    tiles = (end - first + tokens - 1) // tokens
    pieces, share = _pieces(run, tiles, key_heads, piece_tiles)
    slots = torch.where(pieces > 1, pieces, 0)
    offsets = slots.cumsum(0) - slots

    block = torch.repeat_interleave(pieces)
    piece = torch.arange(len(block)) - (pieces.cumsum(0) - pieces)[block]
    low = (piece * share[block]) * tokens
    high = torch.minimum(low + share[block] * tokens, (end - first)[block])
    whole = torch.minimum(torch.maximum((see_all // tokens * tokens)[block], low), high)
    partial = torch.where(pieces[block] > 1, offsets[block] + piece, -1)
    anchor = torch.where(of_prompt, first, NO_ANCHOR)[block]
    fields = [x[block] for x in (first, stop, last, see_all, first)]
    blocks = torch.stack([*fields, low, whole, high, anchor, partial], 1)
    blocks = blocks[torch.argsort(high - low, descending=True, stable=True)]
    sums = torch.stack([first, stop, offsets, pieces], 1)[pieces > 1]
    return _work([starts, blocks, sums], int(slots.sum()), device)
