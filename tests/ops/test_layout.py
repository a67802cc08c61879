"""GroupLayout against a naive construction, token by token, in plain Python."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastomni_kernels import GroupLayout

Groups = list[tuple[int, list[int]]]
groups_strategy = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=4)), min_size=1, max_size=4
)


def build(groups: Groups) -> GroupLayout:
    return GroupLayout.build([p for p, _ in groups], [c for _, c in groups])


@dataclass
class Naive:
    """What the layout must say, collected by walking over every token."""

    positions: list[int] = field(default_factory=list)
    prompt_rows: list[int] = field(default_factory=list)
    completion_rows: list[int] = field(default_factory=list)
    predictor_rows: list[int] = field(default_factory=list)
    sequence_of_token: list[int] = field(default_factory=list)
    index_in_completion: list[int] = field(default_factory=list)
    prompt_of_sequence: list[int] = field(default_factory=list)
    completion_length_tensor: list[int] = field(default_factory=list)
    repeat_rows: list[int] = field(default_factory=list)


def walk(groups: Groups) -> Naive:
    naive = Naive()
    for i, (prompt, completions) in enumerate(groups):
        prompt_rows = []
        for position in range(prompt):
            prompt_rows.append(len(naive.positions))
            naive.positions.append(position)
        naive.prompt_rows += prompt_rows
        if not completions:
            naive.repeat_rows += prompt_rows
        for length in completions:
            sequence = len(naive.prompt_of_sequence)
            naive.prompt_of_sequence.append(i)
            naive.completion_length_tensor.append(length)
            naive.repeat_rows += prompt_rows
            previous = prompt_rows[-1]
            for t in range(length):
                row = len(naive.positions)
                naive.positions.append(prompt + t)
                naive.completion_rows.append(row)
                naive.predictor_rows.append(previous)
                naive.sequence_of_token.append(sequence)
                naive.index_in_completion.append(t)
                naive.repeat_rows.append(row)
                previous = row
    return naive


@given(groups_strategy)
@settings(max_examples=150, deadline=None)
def test_indices_are_those_of_a_naive_walk(groups: Groups) -> None:
    layout, naive = build(groups), walk(groups)
    for name, expected in vars(naive).items():
        actual = getattr(layout, name)
        assert actual.dtype == torch.int64, name
        assert actual.tolist() == expected, name
    assert layout.num_rows == len(naive.positions)
    assert layout.num_completion_tokens == len(naive.completion_rows)
    assert layout.num_sequences == len(naive.prompt_of_sequence)
    assert layout.num_prompts == len(groups)
    assert layout.max_prompt == max(p for p, _ in groups)
    assert layout.max_completion == max(naive.completion_length_tensor, default=0)


@given(groups_strategy)
@settings(max_examples=50, deadline=None)
def test_offsets_cut_rows_sequences_and_tokens_by_prompt(groups: Groups) -> None:
    layout = build(groups)
    rows = sequences = tokens = 0
    starts = []
    for i, (prompt, completions) in enumerate(groups):
        assert layout.group_offsets[i] == rows
        assert layout.sequence_offsets[i] == sequences
        assert layout.token_offsets[i] == tokens
        starts += [rows + prompt + sum(completions[:j]) for j in range(len(completions))]
        rows += prompt + sum(completions)
        sequences += len(completions)
        tokens += sum(completions)
    assert layout.group_offsets[-1] == rows
    assert layout.sequence_offsets[-1] == sequences
    assert layout.token_offsets[-1] == tokens
    assert layout.sequence_rows == tuple(starts)
    assert layout.cu_completions.dtype == layout.cu_prompts.dtype == torch.int32
    assert layout.cu_completions.diff().tolist() == list(layout.sequence_lengths)
    assert layout.cu_prompts.diff().tolist() == list(layout.prompt_lengths)


def test_a_small_batch_written_out_by_hand() -> None:
    layout = GroupLayout.build([2, 1], [[2, 0, 1], [1]])
    # rows: p p a a c | p d
    assert layout.positions.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert layout.completion_rows.tolist() == [2, 3, 4, 6]
    assert layout.predictor_rows.tolist() == [1, 2, 1, 5]
    assert layout.sequence_of_token.tolist() == [0, 0, 2, 3]
    assert layout.repeat_rows.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 4, 5, 6]


def test_all_lengths_are_one_tensor_on_the_cpu() -> None:
    with torch.device("meta"):  # whatever else is made here
        layout = GroupLayout.build([2, 1, 7], [[2, 0, 1], [1], []], "meta")
    assert layout.lengths.tolist() == [3, 2, 1, 7, 3, 1, 0, 2, 0, 1, 1]
    assert layout.lengths.dtype == torch.int64
    assert layout.select_prompts(1, 3).lengths.tolist() == [2, 1, 7, 1, 0, 1]
    assert "tensor" not in repr(layout)


@given(groups_strategy)
@settings(max_examples=50, deadline=None)
def test_repeated_gives_each_completion_its_own_prompt(groups: Groups) -> None:
    layout = build(groups)
    repeated = layout.repeated()
    assert all(len(completions) <= 1 for completions in repeated.completion_lengths)
    assert repeated.sequence_lengths == layout.sequence_lengths
    assert repeated.num_rows == len(layout.repeat_rows)
    assert torch.equal(repeated.positions, layout.positions[layout.repeat_rows])
    # The same tokens in the same order: the row of each completion token maps back to itself.
    assert torch.equal(layout.repeat_rows[repeated.completion_rows], layout.completion_rows)
    assert torch.equal(layout.repeat_rows[repeated.predictor_rows], layout.predictor_rows)


@given(groups_strategy, st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_split_is_greedy_and_cuts_only_at_prompt_borders(groups: Groups, budget: int) -> None:
    layout = build(groups)
    ranges = layout.split(budget)
    covered = [i for start, stop in ranges for i in range(start, stop)]
    assert covered == list(range(len(groups)))
    sizes = [layout.select_prompts(start, stop).num_rows for start, stop in ranges]
    for (start, stop), size in zip(ranges, sizes, strict=True):
        assert size <= budget or stop - start == 1
        if stop < len(groups):
            prompt, completions = groups[stop]
            assert size + prompt + sum(completions) > budget


@given(groups_strategy, st.data())
@settings(max_examples=50, deadline=None)
def test_select_prompts_is_the_layout_of_those_prompts(groups: Groups, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(groups) - 1))
    stop = data.draw(st.integers(start + 1, len(groups)))
    layout = build(groups)
    selected = layout.select_prompts(start, stop)
    assert selected == build(groups[start:stop])
    rows = slice(layout.group_offsets[start], layout.group_offsets[stop])
    assert torch.equal(selected.positions, layout.positions[rows])


@given(groups_strategy)
@settings(max_examples=50, deadline=None)
def test_pad_and_unpad_are_inverse(groups: Groups) -> None:
    layout = build(groups)
    values = torch.arange(layout.num_completion_tokens * 2).float().view(-1, 2) + 1
    padded = layout.pad_completions(values, fill=-7.0)
    assert padded.shape == (layout.num_sequences, layout.max_completion, 2)
    token = 0
    for s, length in enumerate(layout.sequence_lengths):
        assert torch.equal(padded[s, :length], values[token : token + length])
        assert (padded[s, length:] == -7.0).all()
        token += length
    assert torch.equal(layout.unpad(padded), values)


def test_padding_carries_gradients() -> None:
    layout = GroupLayout.build([1], [[2, 1]])
    values = torch.ones(3, requires_grad=True)
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    (layout.pad_completions(values, 0.0) * weights).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 2.0, 3.0]


def test_index_tensors_are_made_once_and_layouts_compare_by_lengths() -> None:
    layout = GroupLayout.build([3], [[1, 2]])
    assert layout.positions is layout.positions
    same = GroupLayout.build((3,), ((1, 2),))
    assert layout == same and hash(layout) == hash(same)
    assert layout != GroupLayout.build([3], [[2, 1]])


def test_integers_of_numpy_are_accepted() -> None:
    layout = GroupLayout.build([np.int64(2), np.int64(3)], [[np.int64(1)], [np.int32(2)]])
    assert layout == GroupLayout.build([2, 3], [[1], [2]])


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([], [], "no prompts"),
        ([3], [[1], [2]], "1 prompt lengths but completion lengths for 2"),
        ([3, 0], [[1], [1]], r"prompt_lengths\[1\] is 0"),
        ([3], [[1, -1]], r"completion_lengths\[0\]\[1\] is -1"),
        ([2.5], [[1]], "not an integer"),
    ],
)
def test_bad_lengths_are_refused(
    prompts: list[int], completions: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GroupLayout.build(prompts, completions)


def test_a_device_tensor_of_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="lies on meta"):
        GroupLayout.build(list(torch.ones(1, dtype=torch.int64, device="meta")), [[1]])


def test_bad_ranges_and_shapes_are_refused() -> None:
    layout = GroupLayout.build([3, 2], [[1], [2]])
    for start, stop in ((1, 1), (-1, 1), (0, 3)):
        with pytest.raises(ValueError, match="not a range of prompts"):
            layout.select_prompts(start, stop)
    with pytest.raises(ValueError, match="max_tokens=0"):
        layout.split(0)
    with pytest.raises(ValueError, match="2 values for 3 completion tokens"):
        layout.pad_completions(torch.zeros(2), 0.0)
    with pytest.raises(ValueError, match="cannot hold 2 completions of up to 2"):
        layout.unpad(torch.zeros(2, 1))


def test_a_layout_nobody_has_read_from_can_be_compiled() -> None:
    def total(values: torch.Tensor, layout: GroupLayout) -> torch.Tensor:
        return values[layout.predictor_rows].sum() + layout.cu_completions.sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for lengths in ([4, 0], [1, 7]):
        values = torch.arange(20.0)
        cold = GroupLayout.build([3], [lengths])
        expected = total(values, GroupLayout.build([3], [lengths]))
        assert torch.equal(compiled(values, cold), expected)


def test_lazy_values_are_made_once_and_documented() -> None:
    layout = GroupLayout.build([3], [[2, 1]])
    assert layout.positions is layout.positions
    assert GroupLayout.positions.__doc__.startswith("[T]")
