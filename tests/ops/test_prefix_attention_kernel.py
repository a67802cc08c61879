"""The kernels of prefix_attention against their definition in float64, and their work lists.

In the interpreter a tile has 64 rows of (token, head) pairs, by 32 keys (16 with a mask) in the
forward and for the gradient of queries, and by 16 keys for the gradients of keys; a piece of a key
block is one tile. The lengths below lie on both sides of these borders.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from fastomni_kernels import GroupLayout, reference
from fastomni_kernels.triton_kernels import prefix_attention as kernels
from fastomni_kernels.triton_kernels import prefix_attention_backward, prefix_attention_keys
from fastomni_kernels.triton_kernels.attention_blocks import (
    Work,
    choose,
    key_blocks,
    query_blocks,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = torch.float64 if DEVICE == "cpu" else torch.float32

Groups = list[tuple[int, list[int]]]
Tensors = tuple[Tensor, ...]

# Absolute for the output and its log-sum-exp, of the largest number for a gradient. Half-precision
# results are rounded at the end; the interpreter truncates bf16.
OUTPUTS = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}
GRADIENTS = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}


def build(groups: Groups) -> GroupLayout:
    return GroupLayout.build([p for p, _ in groups], [c for _, c in groups], DEVICE)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = EXACT) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def random_inputs(
    layout: GroupLayout, heads: tuple[int, int], head_size: int, dtype: torch.dtype = EXACT
) -> Tensors:
    """q, k and v as views of what one matrix product gives."""
    counts = (heads[0], heads[1], heads[1])
    fused = normal(layout.num_rows, sum(counts), head_size, dtype=dtype)
    return fused.split(counts, dim=1)


def visible(layout: GroupLayout) -> Tensor:
    """Which keys each row sees, [T, T], told row by row."""
    seen = torch.zeros(layout.num_rows, layout.num_rows, dtype=torch.bool)
    row = 0
    for prompt, completions in zip(layout.prompt_lengths, layout.completion_lengths, strict=True):
        group = row
        for length in (prompt, *completions):
            start = row
            for _ in range(length):
                seen[row, group : group + prompt] = start > group
                seen[row, start : row + 1] = True
                row += 1
    return seen


def log_sum_exp(q: Tensor, k: Tensor, layout: GroupLayout, scale: float) -> Tensor:
    key = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), key) * scale
    return scores.masked_fill(~visible(layout).to(DEVICE), -torch.inf).logsumexp(-1).T


def both_ways(inputs: Tensors, grad: Tensor, layout: GroupLayout, scale: float) -> Tensors:
    """Output, log-sum-exp and the gradients of q, k and v."""
    q, k, v = inputs
    out, lse = kernels.forward(q, k, v, layout, scale)
    return out, lse, *kernels.backward(grad, q, k, v, out, lse, layout, scale)


def compare(inputs: Tensors, grad: Tensor, layout: GroupLayout, scale: float) -> None:
    """All results of the kernels and of the definition, on the same rounded inputs."""
    dtype = inputs[0].dtype
    wide = [x.detach().double().requires_grad_() for x in inputs]
    right_out = reference.prefix_attention(wide[0], wide[1], wide[2], layout, scale)
    right_grads = torch.autograd.grad(right_out, wide, grad.double())
    out, lse, *grads = both_ways(inputs, grad, layout, scale)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(out.double(), right_out.detach(), rtol=0, atol=OUTPUTS[dtype])
    right_lse = log_sum_exp(inputs[0], inputs[1], layout, scale)
    torch.testing.assert_close(lse.double(), right_lse, rtol=2e-6, atol=OUTPUTS[lse.dtype])
    for gradient, right, x in zip(grads, right_grads, inputs, strict=True):
        assert gradient.dtype == dtype and gradient.is_contiguous() and gradient.shape == x.shape
        atol = GRADIENTS[dtype] * max(1.0, float(right.abs().max()))
        torch.testing.assert_close(gradient.double(), right, rtol=0, atol=atol)


def compare_groups(
    groups: Groups, heads: tuple[int, int], head_size: int = 16, dtype: torch.dtype = EXACT
) -> None:
    layout = build(groups)
    inputs = random_inputs(layout, heads, head_size, dtype)
    grad = normal(layout.num_rows, heads[0], head_size, seed=1, dtype=dtype)
    compare(inputs, grad, layout, head_size**-0.5)


@settings(max_examples=5, deadline=None)
@given(
    groups=st.lists(
        st.tuples(
            st.sampled_from([1, 2, 15, 16, 17, 33]),
            st.lists(st.sampled_from([0, 1, 2, 9, 17]), max_size=3),
        ),
        min_size=1,
        max_size=3,
    ),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (7, 1), (8, 1)]),
)
@example([(1, []), (1, [1]), (1, [0]), (2, [0, 1, 0])], (2, 1))
@example([(32, [9, 8, 10]), (33, [])], (7, 1))
def test_any_layout(groups: Groups, heads: tuple[int, int]) -> None:
    compare_groups(groups, heads)


def test_a_prompt_longer_than_a_tile_and_a_long_completion() -> None:
    compare_groups([(67, [3, 70])], (1, 1))


@pytest.mark.parametrize("head_size", [16, 24, 64, 80, 96, 128])
def test_head_sizes(head_size: int) -> None:
    compare_groups([(5, [3, 2])], (2, 1), head_size)


@pytest.mark.parametrize("heads", [(14, 2), (16, 1), (24, 1), (64, 1)], ids=str)
def test_heads(heads: tuple[int, int]) -> None:
    compare_groups([(2, [3, 1])], heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    compare_groups([(18, [9, 0, 4]), (2, [1])], (7, 1), 24, dtype)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_scale(scale: float) -> None:
    layout = build([(17, [2, 3])])
    inputs = random_inputs(layout, (2, 1), 16)
    compare(inputs, normal(layout.num_rows, 2, 16, seed=1), layout, scale)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_scores_beyond_any_exponential() -> None:
    layout = build([(17, [2, 3])])
    q, k, v = random_inputs(layout, (2, 1), 16, torch.float32)
    out, lse, *grads = both_ways((q * 1e4, k * 1e4, v), torch.ones_like(q), layout, 0.25)
    wide = (q * 1e4).double(), (k * 1e4).double(), v.double()
    right = reference.prefix_attention(*wide, layout, 0.25)
    torch.testing.assert_close(out.double(), right, rtol=0, atol=1e-5)
    assert lse.abs().max() > 1e6
    assert all(gradient.isfinite().all() for gradient in grads)


def test_strides() -> None:
    layout = build([(5, [3, 2])])
    inputs = [x.contiguous() for x in random_inputs(layout, (4, 2), 16)]
    grad = normal(4, seed=1)[:, None].expand(layout.num_rows, 4, 16)
    right = both_ways(tuple(inputs), grad.contiguous(), layout, 0.25)
    transposed = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    spread = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    for given_inputs, given_grad in ((transposed, grad), (spread, grad.flip(2))):
        found = both_ways(tuple(given_inputs), given_grad, layout, 0.25)
        assert all(a.equal(b) and a.is_contiguous() for a, b in zip(found, right, strict=True))


def test_nothing_is_read_before_it_is_written(poisoned_memory: None) -> None:
    """The inputs lie between NaN too, which no load may reach."""
    layout = build([(19, [5, 0, 8]), (3, [2])])
    rows = layout.num_rows
    inputs = []
    for x in random_inputs(layout, (7, 1), 24):
        around = torch.full((rows + 2, x.shape[1] + 2, 32), float("nan"), dtype=EXACT)
        around[1:-1, 1:-1, 4:28] = x
        inputs.append(around[1:-1, 1:-1, 4:28])
    compare(tuple(inputs), normal(rows, 7, 24, seed=1), layout, 0.2)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
def test_neighbours_change_no_bit() -> None:
    """Groups of NaN before and behind; twice, because the order of additions is fixed."""
    group: Groups = [(34, [5, 9])]
    alone = build(group)
    inputs = random_inputs(alone, (4, 2), 16, torch.float32)
    grad = normal(alone.num_rows, 4, 16, seed=1, dtype=torch.float32)
    right = both_ways(inputs, grad, alone, 0.25)
    again = both_ways(inputs, grad, alone, 0.25)
    assert all(a.equal(b) for a, b in zip(again, right, strict=True))
    together = build([(7, [3]), *group, (50, [1])])
    among = [
        torch.cat([x.new_full((n, *x.shape[1:]), float("nan")) if n else x for n in (10, 0, 51)])
        for x in (*inputs, grad)
    ]
    found = both_ways(tuple(among[:3]), among[3], together, 0.25)
    for result, expected in zip(found, right, strict=True):
        assert result[10:-51].equal(expected)
        assert result[:10].isnan().all() and result[-51:].isnan().all()


layouts = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(0, 30), max_size=4)),
    min_size=1,
    max_size=3,
).map(build)


def listed(block: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a block, rows that it meets without a mask, and with one."""
    first, stop, begin, count, then, low, whole, high = block[:8]
    place = torch.arange(low, high)
    rows = torch.where(place < count, begin + place, then + place - count)
    return torch.arange(first, stop), rows[: whole - low], rows[whole - low :]


def check_work(work: Work, layout: GroupLayout) -> None:
    starts = [row for row, length in segments(layout) for _ in range(length)]
    assert work.starts.tolist() == starts
    lengths = work.blocks[:, 7] - work.blocks[:, 5]
    assert lengths.equal(lengths.sort(descending=True).values) and lengths.min() > 0
    for tensor in work[:3]:
        assert tensor.dtype == torch.int32 and tensor.device.type == DEVICE
        assert tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def segments(layout: GroupLayout) -> list[tuple[int, int]]:
    """First row and length of each prompt and completion."""
    found, row = [], 0
    for prompt, completions in zip(layout.prompt_lengths, layout.completion_lengths, strict=True):
        for length in (prompt, *completions):
            found.append((row, length))
            row += length
    return found


@settings(max_examples=60, deadline=None)
@given(layouts, st.sampled_from([1, 3, 9, 18]), st.sampled_from([4, 16]))
def test_query_blocks_meet_each_key_once(layout: GroupLayout, tokens: int, keys: int) -> None:
    work = query_blocks(layout, torch.device(DEVICE), tokens, keys)
    check_work(work, layout)
    seen, met = visible(layout), torch.zeros(layout.num_rows, layout.num_rows, dtype=torch.int64)
    for block in work.blocks.tolist():
        queries, whole, masked = listed(block)
        assert 0 < len(queries) <= tokens and len(whole) % keys == 0
        assert seen[queries][:, whole].all()
        met[queries[:, None], torch.cat([whole, masked])] += 1
        # What the kernel's mask allows: the prompt's places, then own start .. own token.
        count, place = block[3], torch.arange(block[6], block[7])
        own = torch.tensor(work.starts.tolist())[queries] - block[4] + count
        mask = (place < count) | (
            (place >= own[:, None]) & (place <= (queries - block[4] + count)[:, None])
        )
        assert mask.equal(seen[queries][:, masked])
    assert met.max() == 1 and met[seen].min() == 1


@settings(max_examples=60, deadline=None)
@given(
    layouts,
    st.sampled_from([1, 60, 1000]),
    st.sampled_from([4, 16]),
    st.sampled_from([1, 3, 9]),
    st.sampled_from([1, 2, 50]),
)
def test_pieces_of_key_blocks_meet_each_query_once(
    layout: GroupLayout, key_heads: int, keys: int, tokens: int, piece_tiles: int
) -> None:
    work = key_blocks(layout, torch.device(DEVICE), key_heads, keys, tokens, piece_tiles)
    check_work(work, layout)
    seen, met = visible(layout), torch.zeros(layout.num_rows, layout.num_rows, dtype=torch.int64)
    starts = torch.tensor(work.starts.tolist())
    partials: dict[int, list[int]] = {}
    for block in sorted(work.blocks.tolist(), key=lambda block: block[5]):
        rows, whole, masked = listed(block)
        assert 0 < len(rows) <= keys and block[5] % tokens == 0
        assert len(whole) % tokens == 0 and seen[whole][:, rows].all()
        met[torch.cat([whole, masked])[:, None], rows] += 1
        own = starts[masked].clamp(max=block[8])
        mask = (rows >= own[:, None]) & (rows <= masked[:, None])
        assert mask.equal(seen[masked][:, rows])
        partials.setdefault(block[0], []).append(block[9])
    assert met.max() == 1 and met[seen].min() == 1
    # Keys in one piece go to the output, others to partial sums one after another.
    sums = {first: (stop, offset, pieces) for first, stop, offset, pieces in work.sums.tolist()}
    for first, slots in partials.items():
        if slots == [-1]:
            assert first not in sums
        else:
            stop, offset, pieces = sums.pop(first)
            assert first < stop <= first + keys and 1 < pieces <= 8 and key_heads < 264
            assert slots == list(range(offset, offset + pieces))
    assert not sums
    used = sorted(slot for slots in partials.values() for slot in slots if slot >= 0)
    assert used == list(range(work.partials))


def test_work_lists_are_made_once_for_a_layout() -> None:
    arguments = (torch.device(DEVICE), 4, 16)
    first = query_blocks(build([(9, [3])]), *arguments)
    assert query_blocks(build([(9, [3])]), *arguments) is first
    assert query_blocks(build([(9, [4])]), *arguments) is not first


@pytest.mark.parametrize("target", sorted(kernels.TILES))
def test_tiles_hold_all_heads_of_a_token(target: str) -> None:
    for ratio in (1, 7, 17, 33, 64):
        for tiles in (kernels.TILES, prefix_attention_backward.TILES, prefix_attention_keys.TILES):
            for dtype in (torch.bfloat16, torch.float32):
                tile, flags = choose(tiles, target, dtype, ratio, 128)
                assert tile.rows == flags["ROWS"] >= ratio
        assert prefix_attention_keys.end_rows(tile, ratio) >= ratio


def test_what_the_kernels_cannot_take_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.obstacle(14, 2, 64, torch.bfloat16) == ""
    assert kernels.obstacle(64, 1, 16, torch.float32) == ""
    assert "not of 8" in kernels.obstacle(14, 2, 8, torch.bfloat16)
    assert "not of 136" in kernels.obstacle(14, 2, 136, torch.bfloat16)
    assert "not 65" in kernels.obstacle(65, 1, 64, torch.bfloat16)
    monkeypatch.setattr(kernels.dispatch, "interpreted", lambda: True)
    assert kernels.obstacle(14, 2, 64, torch.float64) == ""
    monkeypatch.setattr(kernels.dispatch, "interpreted", lambda: False)
    assert "float64" in kernels.obstacle(14, 2, 64, torch.float64)
