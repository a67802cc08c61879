"""Sampling: Philox against published vectors, draws against the exact distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastomni_kernels import gather_logprobs, sample, sampling
from fastomni_kernels.sampling import philox, philox_uniform, truncation_mask

DRAWS = 40_000


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
    value = philox_uniform(torch.tensor([0]), 0)
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


def test_uniforms_are_uniform_and_below_one() -> None:
    values = philox_uniform(torch.arange(-DRAWS // 2, DRAWS // 2), 7)
    assert values.dtype == torch.float32
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, bins=50, min=0, max=1).double()
    assert chi_square_is_plausible(counts, torch.full((50,), 1 / 50).double())
    largest = torch.tensor([0x7FFFFFFF], dtype=torch.int64).float() * 4.6566127342e-10
    assert largest.item() < 1.0


def test_both_halves_of_a_seed_and_the_position_matter() -> None:
    seeds = torch.tensor([1, 1 + 2**32, -1, 2**63 - 1, -(2**63)])
    grid = philox_uniform(seeds[:, None], torch.arange(4)[None])
    assert grid.shape == (5, 4)
    assert len(grid.flatten().unique()) == 20
    assert torch.equal(grid[:, 2], philox_uniform(seeds, 2))


def chi_square_is_plausible(counts: Tensor, probabilities: Tensor) -> bool:
    """Accept below the 0.9999 quantile of chi-square (Wilson and Hilferty's approximation)."""
    possible = probabilities > 0
    if counts[~possible].any():
        return False
    expected = probabilities[possible] * counts.sum()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum().item()
    freedom = int(possible.sum()) - 1
    if freedom == 0:
        return True
    spread = 2 / (9 * freedom)
    return statistic < freedom * (1 - spread + 3.719 * math.sqrt(spread)) ** 3


def exact_distribution(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """The distribution of one row [V] in Python floats, token by token."""
    p = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept, mass = set(), 0.0
    for rank, i in enumerate(order):
        within_k = top_k == 0 or rank < top_k
        if within_k and mass < top_p and p[i] >= min_p * p[order[0]]:
            kept.add(i)
        mass += p[i]
    total = sum(p[i] for i in kept)
    return torch.tensor([p[i] / total if i in kept else 0.0 for i in range(len(p))]).double()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (2.5, 0, 1.0, 0.0),
        (1.0, 5, 1.0, 0.0),
        (1.0, 0, 0.7, 0.0),
        (1.0, 0, 1.0, 0.2),
        (0.8, 6, 0.9, 0.0),
        (1.3, 8, 0.95, 0.1),
        (1.0, 1, 1.0, 0.0),
        (1.0, 0, 1e-6, 0.0),
        (1.0, 0, 1.0, 1.0),
        (1.0, 99, 1.0, 0.0),
    ],
)
def test_draws_follow_the_exact_distribution(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = 1.5 * torch.randn(12, generator=torch.Generator().manual_seed(3))
    tokens, logprobs = sample(
        logits.expand(DRAWS, -1), torch.arange(DRAWS), 11, temperature, top_k, top_p, min_p
    )
    expected = exact_distribution(logits, temperature, top_k, top_p, min_p)
    assert chi_square_is_plausible(torch.bincount(tokens, minlength=12).double(), expected)
    # The log-prob is that of the tempered distribution before truncation.
    full = (logits.double() / temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), full[tokens], rtol=0, atol=1e-5)


def test_one_sequence_over_positions_follows_the_distribution_too() -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(4))
    seeds = torch.full((DRAWS,), 123456789012345)
    tokens, _ = sample(logits.expand(DRAWS, -1), seeds, torch.arange(DRAWS))
    assert chi_square_is_plausible(torch.bincount(tokens).double(), logits.double().softmax(-1))


def test_the_chi_square_test_can_fail() -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(4))
    tokens, _ = sample(logits.expand(DRAWS, -1), torch.arange(DRAWS), 0, temperature=1.1)
    counts = torch.bincount(tokens).double()
    assert not chi_square_is_plausible(counts, logits.double().softmax(-1))


def test_the_token_is_the_inverse_of_the_cumulative_distribution_in_vocabulary_order() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.3])
    seeds = torch.arange(2000)
    tokens, _ = sample(probabilities.log().expand(2000, -1), seeds, 3)
    borders = [0.1, 0.1, 0.5, 0.7, 1.0]
    for uniform, token in zip(philox_uniform(seeds, 3).tolist(), tokens.tolist(), strict=True):
        if min(abs(uniform - border) for border in borders) > 1e-5:
            assert token == next(i for i, border in enumerate(borders) if uniform < border)


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}])
def test_a_token_never_depends_on_its_neighbours(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, seeds = torch.randn(33, 1001, generator=generator), torch.arange(33) * 7
    positions = torch.arange(33)
    tokens, logprobs = sample(logits, seeds, positions, **options)
    for rows in (slice(5, 6), slice(0, 17), torch.arange(32, -1, -1)):
        again = sample(logits[rows], seeds[rows], positions[rows], **options)
        assert torch.equal(again[0], tokens[rows])
        assert torch.equal(again[1], logprobs[rows])
    alone = sample(logits[5:6], seeds[5:6], 5, **options)
    assert alone[0].item() == tokens[5].item()


def test_logprobs_agree_with_the_trainers() -> None:
    logits = 4 * torch.randn(64, 700, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample(logits, torch.arange(64), 0, temperature=0.7, top_k=10)
    trainer, _ = gather_logprobs(logits, tokens, temperature=0.7)
    torch.testing.assert_close(logprobs, trainer, rtol=0, atol=2e-6)
    half, _ = sample(logits.bfloat16(), torch.arange(64), 0)
    assert torch.equal(half, sample(logits.bfloat16().float(), torch.arange(64), 0)[0])


def test_ties_with_the_last_kept_token_are_kept() -> None:
    p = torch.tensor([[0.3, 0.2, 0.2, 0.2, 0.1]])
    for top_k, top_p, expected in (
        (2, 1.0, [True, True, True, True, False]),
        (0, 0.4, [True, True, True, True, False]),
        (1, 1.0, [True, False, False, False, False]),
    ):
        mask = truncation_mask(p, top_k, top_p, 0.0)
        assert mask is not None and mask.tolist() == [expected]
    assert truncation_mask(p, 0, 1.0, 0.0) is None


def test_top_p_stops_where_the_mass_is_reached() -> None:
    p = torch.tensor([[0.125, 0.5, 0.25, 0.125]])  # sums are exact
    for top_p, kept in ((0.5, [1]), (0.51, [1, 2]), (0.75, [1, 2])):
        mask = truncation_mask(p, 0, top_p, 0.0)
        assert mask is not None and mask[0].nonzero().flatten().tolist() == kept


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (1 - 2**-24, 3)])
def test_the_ends_of_the_unit_interval_draw_tokens_with_mass(
    monkeypatch: pytest.MonkeyPatch, uniform: float, token: int
) -> None:
    monkeypatch.setattr(sampling, "philox_uniform", lambda seeds, _: torch.full((1,), uniform))
    for min_p in (0.0, 0.1):
        logits = torch.tensor([[-math.inf, 1.7, 0.3, 1.1, -200.0, -math.inf]])
        tokens, _ = sample(logits, torch.tensor([0]), 0, min_p=min_p)
        assert tokens.tolist() == [token]


def test_tokens_without_mass_are_never_drawn() -> None:
    logits = torch.full((DRAWS, 6), -math.inf)
    logits[:, [1, 3]] = 0.0
    tokens, logprobs = sample(logits, torch.arange(DRAWS), 0)
    assert set(tokens.tolist()) == {1, 3}
    torch.testing.assert_close(logprobs, torch.full((DRAWS,), -math.log(2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "greedy decoding is logits.argmax"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": 1e-19}, "from 1e-06 to"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(2, 3), torch.arange(2), 0, **options)


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_that_are_no_distribution_are_refused_by_row(bad: list[float]) -> None:
    logits = torch.tensor([[0.0, 1.0], bad])
    with pytest.raises(ValueError, match=r"sequences \[1\] are NaN"):
        sample(logits, torch.arange(2), 0)


def test_seeds_and_positions_of_wrong_type_or_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"use torch\.int64"):
        sample(torch.zeros(2, 3), torch.zeros(2), 0)
    with pytest.raises(ValueError, match=r"seeds has shape \[3\]; it must be \[2\]"):
        sample(torch.zeros(2, 3), torch.arange(3), 0)
    with pytest.raises(ValueError, match=r"position has shape \[1\]"):
        sample(torch.zeros(2, 3), torch.arange(2), torch.zeros(1, dtype=torch.int64))
