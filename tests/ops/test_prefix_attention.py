"""Shared-prefix attention against plain attention over repeated, padded rows."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastomni_kernels import GroupLayout, prefix_attention, prefix_decode, reference
from fastomni_kernels.dense_attention import _plan
from fastomni_kernels.prefix_attention import causal_attention, shares_prompts

Groups = list[tuple[int, list[int]]]
# Lengths on both sides of the kernel's batching by length, and empty and one-token completions.
groups_strategy = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 5, 9]),
        st.lists(st.sampled_from([0, 1, 2, 7, 17, 40]), max_size=4),
    ),
    min_size=1,
    max_size=4,
)
heads_strategy = st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1), (6, 2)])


def build(groups: Groups) -> GroupLayout:
    return GroupLayout.build([p for p, _ in groups], [c for _, c in groups])


def random_inputs(
    layout: GroupLayout, heads: tuple[int, int], dtype: torch.dtype, head_size: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(count: int) -> Tensor:
        shape = (layout.num_rows, count, head_size)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    return normal(heads[0]), normal(heads[1]), normal(heads[1])


def repeated_and_padded(layout: GroupLayout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as a trainer without sharing does it: every completion with its own prompt.

    Written with a softmax over an ordinary causal and padding mask; a prompt's rows are taken from
    its first copy, which is why the incoming gradient must reach only that one.
    """
    repeated = layout.repeated()
    lengths = torch.tensor(repeated.group_offsets).diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    longest = int(lengths.max())

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(len(lengths), longest, *x.shape[1:])
        return padded.index_put((sequence, repeated.positions), x[layout.repeat_rows])

    query, key, value = pad(q), pad(k), pad(v)
    shared = q.shape[1] // k.shape[1]
    key, value = key.repeat_interleave(shared, 2), value.repeat_interleave(shared, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / q.shape[-1] ** 0.5
    column = torch.arange(longest)
    causal = column[:, None] >= column
    real = column < lengths[:, None]
    scores = scores.masked_fill(~(causal & real[:, None]).unsqueeze(1), -1e30)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
    packed = out[sequence, repeated.positions]
    # Row r of the layout: the first of its copies.
    copies = layout.repeat_rows.tolist()
    first = torch.tensor([copies.index(row) for row in range(layout.num_rows)])
    return packed[first]


def assert_equal_with_gradients(
    groups: Groups, heads: tuple[int, int], dtype: torch.dtype, tolerances: tuple[float, float]
) -> None:
    layout = build(groups)
    inputs = random_inputs(layout, heads, dtype)
    q, k, v = (x.detach().double().requires_grad_() for x in inputs)
    expected = repeated_and_padded(layout, q, k, v)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad)
    for function in (prefix_attention, reference.prefix_attention):
        actual = function(*inputs, layout)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerances[0])
        actual_grads = torch.autograd.grad(actual, inputs, grad.to(dtype))
        for name, got, want in zip("qkv", actual_grads, expected_grads, strict=True):
            error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1)
            assert error < tolerances[1], f"gradient of {name}: {error:.2e}"


@given(groups_strategy, heads_strategy)
@example([(5, [7, 7, 7]), (5, [7, 7, 7]), (5, [7, 7, 7])], (4, 2))  # batched by key head
@example([(5, [3]), (5, [3, 0]), (5, [0, 0]), (5, [])], (4, 2))  # nothing shared
@example([(1, [40, 1, 17, 40])], (6, 2))  # three batches by length
@settings(max_examples=40, deadline=None)
def test_float64_equals_repeated_and_padded(groups: Groups, heads: tuple[int, int]) -> None:
    assert_equal_with_gradients(groups, heads, torch.float64, (1e-10, 1e-10))


@given(groups_strategy, heads_strategy)
@settings(max_examples=20, deadline=None)
def test_float32_equals_repeated_and_padded(groups: Groups, heads: tuple[int, int]) -> None:
    assert_equal_with_gradients(groups, heads, torch.float32, (1e-5, 1e-4))


def test_bfloat16_is_computed_wider_and_rounded_once() -> None:
    assert_equal_with_gradients([(9, [7, 2]), (5, [17])], (4, 2), torch.bfloat16, (2e-2, 2e-2))
    layout = build([(9, [7, 2])])
    q, k, v = random_inputs(layout, (4, 2), torch.bfloat16)
    wide = prefix_attention(q.float(), k.float(), v.float(), layout)
    assert torch.equal(prefix_attention(q, k, v, layout), wide.bfloat16())


def test_blocks_of_the_flash_kernel_are_crossed() -> None:
    """Prompts and suffixes longer than one block of queries or keys of the CPU kernel."""
    assert_equal_with_gradients([(600, [90, 33, 200])], (2, 1), torch.float64, (1e-10, 1e-10))


def test_padding_and_calls_stay_few() -> None:
    """What makes it fast, and no result shows: few calls for equal groups, little padding."""
    equal = _plan(build([(9, [7] * 4)] * 16))
    assert [(s.groups, s.causal) for s in equal.segments] == [(16, True), (16, False)]
    assert len(list(equal.segments[0].views(torch.zeros(16 * 37, 4, 2), (0, 9), 2))) == 2
    lengths = [1, 3, 20, 500, 90, 33, 400, 64]
    padded = sum(len(batch.rows) for batch in _plan(build([(9, lengths)])).completions)
    assert sum(lengths) <= padded < 2 * sum(lengths)
    alone = _plan(build([(9, []), (9, []), (6, [3]), (6, [3])]))
    assert [(s.groups, s.causal) for s in alone.segments] == [(4, True)]
    assert not alone.completions


@pytest.mark.usefixtures("poisoned_memory")
def test_every_row_is_written() -> None:
    for groups in ([(5, [7, 0, 20]), (2, []), (3, [4])], [(2, [3, 3])] * 3):
        assert_equal_with_gradients(groups, (4, 2), torch.float64, (1e-10, 1e-10))


def test_gradcheck() -> None:
    layout = build([(3, [2, 0, 1]), (2, [2])])
    inputs = random_inputs(layout, (2, 1), torch.float64, head_size=3)
    assert torch.autograd.gradcheck(lambda q, k, v: prefix_attention(q, k, v, layout), inputs)


def test_strided_inputs_and_an_explicit_scale() -> None:
    layout = build([(5, [3, 4]), (2, [1, 1])])
    packed = torch.randn(layout.num_rows, 8, 6, dtype=torch.float64)
    q, k, v = packed.split([4, 2, 2], dim=1)  # views of one fused projection
    expected = reference.prefix_attention(q, k, v, layout, 0.3)
    torch.testing.assert_close(prefix_attention(q, k, v, layout, 0.3), expected, rtol=0, atol=1e-12)
    other_order = packed.permute(0, 2, 1).contiguous().permute(0, 2, 1)  # last stride is not 1
    q, k, v = other_order.split([4, 2, 2], dim=1)
    torch.testing.assert_close(prefix_attention(q, k, v, layout, 0.3), expected, rtol=0, atol=1e-12)
    assert (expected - reference.prefix_attention(q, k, v, layout)).abs().max() > 1e-3


def test_large_scores_do_not_overflow_the_merge() -> None:
    layout = build([(5, [3, 4])])
    q, k, v = (x.detach() for x in random_inputs(layout, (2, 2), torch.float32))
    expected = reference.prefix_attention(300 * q.double(), k.double(), v.double(), layout)
    actual = prefix_attention(300 * q, k, v, layout)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-3)


def test_prompt_rows_do_not_depend_on_completions() -> None:
    layout, alone = build([(9, [7, 2])]), build([(9, [])])
    q, k, v = random_inputs(layout, (4, 2), torch.float32)
    assert torch.equal(
        prefix_attention(q, k, v, layout)[:9],
        prefix_attention(q[:9], k[:9], v[:9], alone),
    )


def test_rows_that_share_nothing_are_causal_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = build([(5, [3]), (1, []), (9, [0]), (2, [40])])
    shared = build([(5, [3]), (2, [4, 1])])
    assert not shares_prompts(alone) and shares_prompts(shared)
    q, k, v = random_inputs(alone, (6, 2), torch.float64)
    actual = causal_attention(q, k, v, alone, scale=0.3)
    expected = reference.prefix_attention(q, k, v, alone, scale=0.3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    upstream = random_inputs(alone, (6, 2), torch.float64)[0].detach().flip(0)
    grads, wanted = (torch.autograd.grad(x, (q, k, v), upstream) for x in (actual, expected))
    torch.testing.assert_close(grads, wanted, rtol=0, atol=1e-12)

    # What a device other than the CPU does, with meta tensors for its tensors.
    module = sys.modules["fastomni_kernels.prefix_attention"]
    seen: list[str] = []
    monkeypatch.setattr(module, "flash_varlen", lambda q, *_, **__: seen.append("varlen") or q)
    monkeypatch.setattr(reference, "prefix_attention", lambda q, *_: seen.append("groups") or q)
    for layout in (alone, shared):
        prefix_attention(
            *(x.to("meta") for x in random_inputs(layout, (6, 2), torch.float32)), layout
        )
    assert seen == ["varlen", "groups"]


@pytest.mark.parametrize("prompt_lengths", [(5, 5, 5), (5, 5, 3), (1, 4, 2)])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (3, 1)])
@pytest.mark.parametrize("suffix", [1, 4])
def test_decode_is_the_last_row_of_attention(
    prompt_lengths: tuple[int, ...], heads: tuple[int, int], suffix: int
) -> None:
    generations = 2
    layout = GroupLayout.build(prompt_lengths, [[suffix] * generations] * len(prompt_lengths))
    q, k, v = (x.detach() for x in random_inputs(layout, heads, torch.float64))
    last = torch.tensor(layout.sequence_rows) + suffix - 1
    expected = reference.prefix_attention(q, k, v, layout)[last]
    prompt_k, prompt_v = k[layout.prompt_rows], v[layout.prompt_rows]
    # Places after the valid ones hold what an earlier rollout left there.
    own_k, own_v = (
        torch.cat([layout.pad_completions(x[layout.completion_rows], 0.0)] * 2, 1) for x in (k, v)
    )
    arguments = (q[last], prompt_k, prompt_v, prompt_lengths, own_k, own_v)
    for length in (suffix, torch.full((layout.num_sequences,), suffix)):
        actual = prefix_decode(*arguments, length, generations)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_decode_with_ragged_suffixes_including_none() -> None:
    lengths = [[0, 3], [2, 1]]
    prompts = (4, 6)
    layout = GroupLayout.build(prompts, lengths)
    _, k, v = (x.detach() for x in random_inputs(layout, (4, 2), torch.float64))
    query = torch.randn(4, 4, 8, dtype=torch.float64)
    expected = []
    for s, length in enumerate(layout.sequence_lengths):
        i = s // 2
        start = layout.sequence_rows[s]
        prompt = range(layout.group_offsets[i], layout.group_offsets[i] + prompts[i])
        rows = torch.tensor([*prompt, *range(start, start + length)])
        key, value = k[rows].repeat_interleave(2, 1), v[rows].repeat_interleave(2, 1)
        weights = (torch.einsum("hd,khd->hk", query[s], key) / 8**0.5).softmax(-1)
        expected.append(torch.einsum("hk,khd->hd", weights, value))
    own_k, own_v = (layout.pad_completions(x[layout.completion_rows], 0.0) for x in (k, v))
    prompt_k, prompt_v = k[layout.prompt_rows], v[layout.prompt_rows]
    actual = prefix_decode(
        query, prompt_k, prompt_v, prompts, own_k, own_v, layout.completion_length_tensor, 2
    )
    torch.testing.assert_close(actual, torch.stack(expected), rtol=0, atol=1e-12)
    before_any = prefix_decode(query, prompt_k, prompt_v, prompts, own_k, own_v, 0, 2)
    torch.testing.assert_close(before_any[0], expected[0], rtol=0, atol=1e-12)


def test_wrong_arguments_are_refused_by_name() -> None:
    layout = build([(3, [1, 1])])
    q, k, v = (x.detach() for x in random_inputs(layout, (4, 2), torch.float32))
    with pytest.raises(ValueError, match=r"q has shape \[4, 4, 8\]; it must be \[5, Hq, D\]"):
        prefix_attention(q[:4], k, v, layout)
    with pytest.raises(ValueError, match="3 query heads cannot be shared by 2 key heads"):
        prefix_attention(q[:, :3], k, v, layout)
    with pytest.raises(ValueError, match=r"v is torch\.float64; they must agree"):
        prefix_attention(q, k, v.double(), layout)
    with pytest.raises(ValueError, match=r"k is torch\.int64; it must be a float tensor"):
        prefix_attention(q, k.long(), v, layout)
    own = torch.zeros(2, 3, 2, 8)
    with pytest.raises(ValueError, match="suffix_length=4 but the suffix cache has 3 places"):
        prefix_decode(q[:2], k[:3], v[:3], (3,), own, own, 4, 2)
    with pytest.raises(ValueError, match=r"prefix_k has shape \[2, 2, 8\]; it must be \[3, Hkv, 8"):
        prefix_decode(q[:2], k[:2], v[:2], (3,), own, own, 1, 2)
    with pytest.raises(ValueError, match="generations=0"):
        prefix_decode(q[:0], k[:3], v[:3], (3,), own, own, 1, 0)
