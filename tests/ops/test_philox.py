"""Philox against published vectors, and what is made of its words.

That Triton makes the same numbers is tested with the kernels.
"""

from __future__ import annotations

import pytest
import torch

from fastomni_kernels.philox import philox, philox_uniform


# Random123's kat_vectors, philox4x32 with 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert philox(torch.tensor(counter), torch.tensor(key)).tolist() == expected
    batched = philox(torch.tensor(counter)[:, None].expand(4, 3), torch.tensor(key)[:, None])
    assert batched.T.tolist() == [expected] * 3


def test_uniform_folds_the_first_word_as_triton_does() -> None:
    # Word 0 of counter 0, key 0 is 0x6627E8D5, not negative as int32.
    value = philox_uniform(torch.tensor([0]), torch.tensor(0))
    assert value.item() == pytest.approx(0x6627E8D5 / 2**31, rel=1e-6)
    # Counter (5, 0, 0, 0), key 0 by the published algorithm in plain Python integers.
    counter, key = [5, 0, 0, 0], [0, 0]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    signed = counter[0] - 2**32 if counter[0] >= 2**31 else counter[0]
    folded = -signed - 1 if signed < 0 else signed
    value = philox_uniform(torch.tensor([0]), torch.tensor([5]))
    assert value.item() == pytest.approx(folded / 2**31, rel=1e-6)


def test_uniforms_stay_below_one() -> None:
    values = philox_uniform(torch.arange(-20_000, 20_000), torch.tensor(7))
    assert values.dtype == torch.float32
    assert values.min() >= 0 and values.max() < 1
    largest = torch.tensor([0x7FFFFFFF], dtype=torch.int64).float() * 4.6566127342e-10
    assert largest.item() < 1.0


def test_both_halves_of_a_seed_and_the_position_matter() -> None:
    seeds = torch.tensor([1, 1 + 2**32, -1, 2**63 - 1, -(2**63)])
    grid = philox_uniform(seeds[:, None], torch.arange(4)[None])
    assert grid.shape == (5, 4)
    assert len(grid.flatten().unique()) == 20
    assert torch.equal(grid[:, 2], philox_uniform(seeds, torch.tensor(2)))
