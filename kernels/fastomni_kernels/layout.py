"""Packed rows: what every kernel and the trainer know about a batch of groups.

One group is one prompt followed by its completions, `[prompt | c1 | ... | cG]`, and the groups of a
batch lie one after another with no padding anywhere. `GroupLayout` is made once per batch from host
lists. It keeps every length as a Python int (loops, buckets, maxima) and makes each index tensor on
the device the first time somebody asks for it, so nothing ever has to read a device tensor back.

Shapes: N prompts, S sequences (completions) of all prompts, T packed rows, M completion tokens,
P_i tokens of prompt i, C_s tokens of completion s. Sequences are ordered prompt by prompt.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import SupportsIndex

import torch
from torch import Tensor

from fastomni_kernels.lazily import lazily


def _concatenated_ranges(starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Return `[s0, s0 + 1, .., s0 + n0 - 1, s1, ..]` as int64 on the CPU."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    shift = torch.tensor(starts, dtype=torch.int64) - (counts.cumsum(0) - counts)
    return torch.arange(sum(lengths)) + torch.repeat_interleave(shift, counts)


def _length(value: SupportsIndex, smallest: int, what: str) -> int:
    # Reading a device tensor would stop the stream, which a layout exists to avoid.
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise ValueError(f"GroupLayout: {what} lies on {value.device}; pass host integers")
    try:
        length = operator.index(value)
    except TypeError:
        raise ValueError(
            f"GroupLayout: {what} is {value!r}, not an integer; lengths are host integers, so call "
            ".tolist() once on a tensor of lengths"
        ) from None
    if length < smallest:
        raise ValueError(f"GroupLayout: {what} is {length}; it must be {smallest} or more")
    return length


@dataclass(frozen=True)
class GroupLayout:
    """Lengths and indices of packed groups; make one with `GroupLayout.build`.

    Attributes:
        prompt_lengths: N host ints, P_i >= 1.
        completion_lengths: per prompt, the host ints C_s >= 0 of its completions (maybe none).
        device: where the index tensors live.
    """

    prompt_lengths: tuple[int, ...]
    completion_lengths: tuple[tuple[int, ...], ...]
    device: torch.device

    def __post_init__(self) -> None:
        # Not lazily: torch.compile would see it made of this layout's numbers, and compile again
        # for those of the next one.
        counts = map(len, self.completion_lengths)
        numbers = [self.num_prompts, *self.prompt_lengths, *counts, *self.sequence_lengths]
        object.__setattr__(self, "_lengths", torch.tensor(numbers, device="cpu"))

    @property
    def lengths(self) -> Tensor:
        """[1 + 2N + S] int64 on the CPU: N, then all P_i, completions of each prompt, all C_s."""
        # Not a field: FSDP copies a dataclass among arguments out of its fields.
        return self.__dict__["_lengths"]

    @classmethod
    def build(
        cls,
        prompt_lengths: Sequence[SupportsIndex],
        completion_lengths: Sequence[Sequence[SupportsIndex]],
        device: torch.device | str = "cpu",
    ) -> GroupLayout:
        """Check host lists of lengths and make the layout.

        Args:
            prompt_lengths: N tokens per prompt, each 1 or more.
            completion_lengths: for each prompt its completions' tokens, each 0 or more; an empty
                list is a prompt alone (prefill). Prompts may have different numbers of completions.
            device: where the index tensors will be made.

        Returns:
            The layout.

        Raises:
            ValueError: no prompts, lists that do not match, or lengths out of range.
        """
        if len(prompt_lengths) == 0:
            raise ValueError("GroupLayout: no prompts; a layout needs at least one")
        if len(prompt_lengths) != len(completion_lengths):
            raise ValueError(
                f"GroupLayout: {len(prompt_lengths)} prompt lengths but completion lengths for "
                f"{len(completion_lengths)} prompts; give one (maybe empty) list per prompt"
            )
        prompts = tuple(
            _length(length, 1, f"prompt_lengths[{i}]") for i, length in enumerate(prompt_lengths)
        )
        completions = tuple(
            tuple(
                _length(length, 0, f"completion_lengths[{i}][{j}]")
                for j, length in enumerate(group)
            )
            for i, group in enumerate(completion_lengths)
        )
        return cls(prompts, completions, torch.device(device))

    @property
    def num_prompts(self) -> int:
        """N."""
        return len(self.prompt_lengths)

    @lazily
    def sequence_lengths(self) -> tuple[int, ...]:
        """C_s of all S completions, prompt by prompt."""
        return tuple(chain.from_iterable(self.completion_lengths))

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.sequence_lengths)

    @property
    def num_rows(self) -> int:
        """T."""
        return self.group_offsets[-1]

    @property
    def num_completion_tokens(self) -> int:
        """M."""
        return self.token_offsets[-1]

    @lazily
    def max_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(self.prompt_lengths)

    @lazily
    def max_completion(self) -> int:
        """Tokens of the longest completion, 0 where there is none."""
        return max(self.sequence_lengths, default=0)

    @lazily
    def group_offsets(self) -> tuple[int, ...]:
        """N + 1 rows: group i is rows `group_offsets[i] : group_offsets[i + 1]`."""
        rows = zip(self.prompt_lengths, map(sum, self.completion_lengths), strict=True)
        return tuple(accumulate(map(sum, rows), initial=0))

    @lazily
    def sequence_offsets(self) -> tuple[int, ...]:
        """N + 1 sequences: prompt i owns `sequence_offsets[i] : sequence_offsets[i + 1]`."""
        return tuple(accumulate(map(len, self.completion_lengths), initial=0))

    @lazily
    def token_offsets(self) -> tuple[int, ...]:
        """N + 1 completion tokens: prompt i owns `token_offsets[i] : token_offsets[i + 1]`."""
        return tuple(accumulate(map(sum, self.completion_lengths), initial=0))

    @lazily
    def sequence_rows(self) -> tuple[int, ...]:
        """S rows where each completion begins (an empty one: where it would begin)."""
        starts: list[int] = []
        for i, lengths in enumerate(self.completion_lengths):
            first = self.group_offsets[i] + self.prompt_lengths[i]
            starts.extend(accumulate(lengths[:-1], initial=first) if lengths else ())
        return tuple(starts)

    # Index tensors, int64 unless said, each made once.

    def _counts(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)

    @lazily
    def positions(self) -> Tensor:
        """[T]: position of each row; every completion restarts at its prompt's length."""
        starts: list[int] = []
        lengths: list[int] = []
        for prompt, completions in zip(self.prompt_lengths, self.completion_lengths, strict=True):
            starts += [0, *(prompt for _ in completions)]
            lengths += [prompt, *completions]
        return _concatenated_ranges(starts, lengths).to(self.device)

    @lazily
    def prompt_rows(self) -> Tensor:
        """[sum P]: row of each prompt token."""
        return _concatenated_ranges(self.group_offsets[:-1], self.prompt_lengths).to(self.device)

    @lazily
    def completion_rows(self) -> Tensor:
        """[M]: row of each completion token."""
        return _concatenated_ranges(self.sequence_rows, self.sequence_lengths).to(self.device)

    @lazily
    def predictor_rows(self) -> Tensor:
        """[M]: row whose hidden state predicts each completion token.

        The prompt's last row predicts the first token of all its completions, so it appears once
        per (not empty) completion; any other token is predicted by the row before it.
        """
        rows = _concatenated_ranges([r - 1 for r in self.sequence_rows], self.sequence_lengths)
        first_token = accumulate(self.sequence_lengths[:-1], initial=0)
        last_prompt_row = chain.from_iterable(
            [self.group_offsets[i] + prompt - 1] * len(self.completion_lengths[i])
            for i, prompt in enumerate(self.prompt_lengths)
        )
        cases = zip(first_token, last_prompt_row, self.sequence_lengths, strict=False)
        heads = [(token, row) for token, row, length in cases if length]
        if heads:
            tokens, values = zip(*heads, strict=True)
            rows[torch.tensor(tokens)] = torch.tensor(values)
        return rows.to(self.device)

    @lazily
    def sequence_of_token(self) -> Tensor:
        """[M]: sequence 0 .. S - 1 of each completion token."""
        counts = torch.tensor(self.sequence_lengths, dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(counts)), counts).to(self.device)

    @lazily
    def index_in_completion(self) -> Tensor:
        """[M]: 0 for the first token of each completion, 1 for the second, ..."""
        starts = [0] * self.num_sequences
        return _concatenated_ranges(starts, self.sequence_lengths).to(self.device)

    @lazily
    def prompt_of_sequence(self) -> Tensor:
        """[S]: prompt 0 .. N - 1 of each sequence."""
        counts = torch.tensor([len(group) for group in self.completion_lengths])
        return torch.repeat_interleave(torch.arange(len(counts)), counts).to(self.device)

    @lazily
    def completion_length_tensor(self) -> Tensor:
        """[S]: C_s."""
        return self._counts(self.sequence_lengths)

    @lazily
    def cu_completions(self) -> Tensor:
        """[S + 1] int32: completion tokens before each sequence."""
        offsets = tuple(accumulate(self.sequence_lengths, initial=0))
        return self._counts(offsets, torch.int32)

    @lazily
    def cu_prompts(self) -> Tensor:
        """[N + 1] int32: prompt tokens before each prompt (not rows: prompts packed alone)."""
        return self._counts(tuple(accumulate(self.prompt_lengths, initial=0)), torch.int32)

    @lazily
    def cu_groups(self) -> Tensor:
        """[N + 1] int32: rows before each group."""
        return self._counts(self.group_offsets, torch.int32)

    def repeated(self) -> GroupLayout:
        """Return the layout in which every completion has a prompt copy of its own.

        Groups without completions stay as they are, so no token is lost. `repeat_rows` says which
        row of this layout each row of the repeated one is.
        """
        prompts: list[int] = []
        completions: list[tuple[int, ...]] = []
        for prompt, group in zip(self.prompt_lengths, self.completion_lengths, strict=True):
            prompts += [prompt] * max(len(group), 1)
            completions += [(length,) for length in group] or [()]
        return GroupLayout(tuple(prompts), tuple(completions), self.device)

    @lazily
    def repeat_rows(self) -> Tensor:
        """[T of the repeated layout]: `rows_repeated = rows[repeat_rows]`."""
        starts: list[int] = []
        lengths: list[int] = []
        for i, prompt in enumerate(self.prompt_lengths):
            owned = range(self.sequence_offsets[i], self.sequence_offsets[i + 1])
            for s in owned:
                starts += [self.group_offsets[i], self.sequence_rows[s]]
                lengths += [prompt, self.sequence_lengths[s]]
            if not owned:
                starts.append(self.group_offsets[i])
                lengths.append(prompt)
        return _concatenated_ranges(starts, lengths).to(self.device)

    def select_prompts(self, start: int, stop: int) -> GroupLayout:
        """Return the layout of prompts `start <= i < stop` with all their completions.

        Its rows are `group_offsets[start] : group_offsets[stop]` of this layout's rows; sequences
        and completion tokens are cut by `sequence_offsets` and `token_offsets` in the same way.

        Raises:
            ValueError: an empty range or one outside the layout.
        """
        if not 0 <= start < stop <= self.num_prompts:
            raise ValueError(
                f"GroupLayout.select_prompts: [{start}, {stop}) is not a range of prompts within "
                f"0 .. {self.num_prompts}"
            )
        chosen = slice(start, stop)
        return GroupLayout(
            self.prompt_lengths[chosen], self.completion_lengths[chosen], self.device
        )

    def split(self, max_tokens: int) -> list[tuple[int, int]]:
        """Cut the batch at prompt borders into micro-batches of at most `max_tokens` rows.

        Args:
            max_tokens: row budget of one micro-batch; a group longer than it is a micro-batch of
                its own, because a group is never cut.

        Returns:
            Ranges (start, stop) of prompts, in order, for `select_prompts`.

        Raises:
            ValueError: a budget below 1.
        """
        if max_tokens < 1:
            raise ValueError(f"GroupLayout.split: max_tokens={max_tokens}; it must be 1 or more")
        return list(self._micro_batches(max_tokens))

    def _micro_batches(self, max_tokens: int) -> Iterator[tuple[int, int]]:
        start = 0
        for i in range(1, self.num_prompts):
            if self.group_offsets[i + 1] - self.group_offsets[start] > max_tokens:
                yield start, i
                start = i
        yield start, self.num_prompts

    def pad_completions(self, values: Tensor, fill: float) -> Tensor:
        """Spread values [M, ...] over [S, max_completion, ...]; the rest is `fill`."""
        if values.shape[0] != self.num_completion_tokens:
            raise ValueError(
                f"GroupLayout.pad_completions: {values.shape[0]} values for "
                f"{self.num_completion_tokens} completion tokens"
            )
        shape = (self.num_sequences, self.max_completion, *values.shape[1:])
        padded = values.new_full(shape, fill)
        return padded.index_put((self.sequence_of_token, self.index_in_completion), values)

    def unpad(self, padded: Tensor) -> Tensor:
        """Take the completion tokens [M, ...] out of padded values [S, >= max_completion, ...]."""
        if padded.shape[0] != self.num_sequences or padded.shape[1] < self.max_completion:
            raise ValueError(
                f"GroupLayout.unpad: padded values of shape {tuple(padded.shape)} cannot hold "
                f"{self.num_sequences} completions of up to {self.max_completion} tokens"
            )
        return padded[self.sequence_of_token, self.index_in_completion]
