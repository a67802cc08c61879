"""Shared-prefix attention against plain attention over repeated, padded rows."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastomni_kernels import (
    GroupLayout,
    dense_attention,
    prefix_attention,
    prefix_reference,
    reference,
)
from fastomni_kernels.dense_attention import _plan
from fastomni_kernels.dense_backward import _Gathered
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
@settings(max_examples=40, deadline=None)
def test_plain_torch_for_other_devices_is_the_definition(
    groups: Groups, heads: tuple[int, int]
) -> None:
    layout = build(groups)
    inputs = random_inputs(layout, heads, torch.float64)
    expected = reference.prefix_attention(*inputs, layout, 0.3)
    upstream = inputs[0].detach().flip(0)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    q, k, v = (x.detach() for x in inputs)
    out, lse = prefix_reference.forward(q, k, v, layout, 0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    actual = prefix_reference.backward(upstream, q, k, v, out, lse, layout, 0.3)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


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


@pytest.mark.parametrize(
    ("groups", "heads"),
    [
        ([(384, [3, 2])], (2, 1)),  # two whole blocks
        ([(385, [1, 40, 0]), (9, [2, 2]), (401, [7]), (390, [])], (3, 1)),
        ([(770, [5, 6])], (6, 2)),  # three blocks, the last one not full
        ([(386, [4, 4]), (386, [4, 4]), (386, [4, 4])], (5, 5)),
    ],
)
def test_long_prompts_have_a_backward_of_their_own(groups: Groups, heads: tuple[int, int]) -> None:
    assert_equal_with_gradients(groups, heads, torch.float64, (1e-10, 1e-10))


def test_rows_that_fill_up_blocks_meet_no_infinity() -> None:
    """Scores far below zero, where a key of zeros would have the weight exp(900)."""
    layout = build([(389, [3, 2])])
    q, k, v = (x.detach() for x in random_inputs(layout, (5, 1), torch.float32))
    inputs = tuple(x.requires_grad_() for x in (q + 16, k - 20, v))
    wide = tuple(x.detach().double().requires_grad_() for x in inputs)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    actual = torch.autograd.grad(prefix_attention(*inputs, layout), inputs, upstream)
    expected = reference.prefix_attention(*wide, layout)
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    for got, want in zip(actual, wanted, strict=True):
        assert (got - want).abs().max() < 1e-3 * want.abs().max()


def test_gradients_of_a_long_group_do_not_depend_on_its_neighbours() -> None:
    layout, alone = build([(400, [9, 4]), (385, [3, 3])]), build([(400, [9, 4])])
    q, k, v = random_inputs(layout, (4, 2), torch.float32)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for some in (layout, alone):
        rows = some.num_rows
        out = prefix_attention(q[:rows], k[:rows], v[:rows], some)
        grads = torch.autograd.grad(out, (q, k, v), upstream[:rows])
        results.append([grad[: alone.num_rows] for grad in grads])
    assert all(map(torch.equal, *results))


def test_gradients_of_a_long_prompt_do_not_depend_on_the_number_of_cores() -> None:
    layout = build([(400, [9])])
    q, k, v = (x.detach() for x in random_inputs(layout, (4, 2), torch.float32))
    out, lse = dense_attention.forward(q, k, v, layout, 0.3)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            arguments = (q.flip(0), q, k, v, out, lse, layout, 0.3)
            results.append(dense_attention.backward(*arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("heads", [(14, 2), (1, 1), (12, 4), (5, 5), (16, 16)])
@pytest.mark.parametrize("prompt", [384, 976, 977, 5000])
def test_tasks_are_even_and_little_is_added(heads: tuple[int, int], prompt: int) -> None:
    shared = heads[0] // heads[1]
    group = _Gathered(prompt, prompt + 512, heads[1], shared)
    for tasks in {group.most_tasks, max(group.most_tasks // 2, 1)}:
        assert tasks * heads[1] % 8 == 0  # on 1, 2, 4 or 8 cores nobody waits
        assert shared * group.block_rows % tasks == group.end % tasks == 0
    assert group.blocks * group.block_rows >= prompt
    real = shared * (prompt + 512)
    assert real <= group.end < 1.07 * real


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
    monkeypatch.delenv("FASTOMNI_KERNELS", raising=False)
    module = sys.modules["fastomni_kernels.prefix_attention"]
    lengths: list[int] = []

    def varlen(q: Tensor, *_: object, **__: object) -> Tensor:
        lengths.append(len(q))
        return q

    monkeypatch.setattr(module, "flash_varlen", varlen)
    monkeypatch.setattr(module, "explain", lambda *_: ("torch", ""))
    for layout in (alone, shared):
        q, k, v = (x.to("meta") for x in random_inputs(layout, (6, 2), torch.float32))
        assert prefix_attention(q, k, v, layout).shape == (layout.num_rows, 6, 8)
    assert lengths == [alone.num_rows]


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
