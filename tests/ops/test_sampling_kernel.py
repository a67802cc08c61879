"""Both implementations of sampling against a textbook in float64, and what kernels can get wrong.

The textbook sorts; it shares nothing with either implementation but the uniform number, which has
tests of its own. Tokens must agree wherever that number is not within rounding of a border between
two tokens. `split` is the number of logits of one program: the small one gives a row several splits
and a tail.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402 (after the skip)

from fastomni_kernels import Sample, sample  # noqa: E402
from fastomni_kernels.dispatch import interpreted  # noqa: E402
from fastomni_kernels.philox import philox_uniform  # noqa: E402
from fastomni_kernels.triton_kernels import sampling as kernels  # noqa: E402
from fastomni_kernels.triton_kernels import sampling_threshold as threshold  # noqa: E402

# Triton's interpreter computes with numpy, which warns of what infinities do.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL_SPLIT = 64
ROUNDING = 2e-6
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
ALL_RULES = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0, "top_k": 17},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 2.0, "min_p": 0.1},
    {"top_k": 9, "top_p": 0.6},
    {"top_k": 40, "min_p": 0.02},
    {"top_p": 0.97, "min_p": 0.02},
    ALL_RULES,
    {"top_k": 1},
]


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> int:
    """Few logits per program."""
    monkeypatch.setattr(threshold, "SPLIT", SMALL_SPLIT)
    return SMALL_SPLIT


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def counting(length: int) -> Tensor:
    return torch.arange(length, device=DEVICE)


class Textbook(NamedTuple):
    """What sampling is, in float64.

    Attributes:
        tokens: [S].
        logprobs: [S, V] of the tempered distribution.
        truncated: [S, V] of the one that is drawn from.
        certain: [S], whether rounding can change neither the token nor what is kept.
    """

    tokens: Tensor
    logprobs: Tensor
    truncated: Tensor
    certain: Tensor


def textbook(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Textbook:
    rows = []
    for row, uniform in zip(logits.float().double(), uniforms.double(), strict=True):
        log_p = (row / temperature).log_softmax(-1)
        values, group, sizes = row.unique(return_inverse=True, return_counts=True)  # ascending
        p = log_p.exp()
        masses = torch.zeros_like(values).index_add(0, group, p)
        higher = sizes.flip(0).cumsum(0).flip(0) - sizes  # tokens of higher values
        mass_above = masses.flip(0).cumsum(0).flip(0) - masses
        ratio = ((values - values[-1]) / temperature).exp()
        passes = (ratio >= min_p) & ((higher < top_k) | (top_k == 0))
        if top_p < 1:
            passes &= mass_above < top_p
            passes[-1] = True
        kept = p.where(passes[group], 0.0)
        borders = kept.cumsum(0)
        target = uniform * borders[-1]
        token = torch.searchsorted(borders, target, right=True)
        near = [(borders - target).abs() / borders[-1]]
        if top_p < 1:
            near.append((mass_above - top_p).abs())
        if 0 < min_p < 1:
            near.append((ratio - min_p).abs())
        certain = torch.cat(near).min() > ROUNDING
        rows.append((token, log_p, (kept / borders[-1]).log(), certain))
    return Textbook(*map(torch.stack, zip(*rows, strict=True)))


def assert_textbook(drawn: Sample, logits: Tensor, uniforms: Tensor, **settings: Any) -> int:
    """Checks all three results; returns how many tokens could have gone either way."""
    wanted = textbook(logits, uniforms, **{**OFF, **settings})
    assert torch.equal(drawn.tokens[wanted.certain], wanted.tokens[wanted.certain])
    assert drawn.truncated_logprobs is not None
    for found, log_p in (
        (drawn.logprobs, wanted.logprobs),
        (drawn.truncated_logprobs, wanted.truncated),
    ):
        assert found.dtype == torch.float32
        assert not found.isnan().any()
        exact = log_p.gather(1, drawn.tokens[:, None])[:, 0]
        rows = slice(None) if log_p is wanted.logprobs else wanted.certain
        torch.testing.assert_close(found[rows].double(), exact[rows], rtol=2e-6, atol=2e-6)
    return int((~wanted.certain).sum())


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [(x, torch.bfloat16) for x in SETTINGS]
    + [(x, dtype) for x in ({}, ALL_RULES) for dtype in (torch.float32, torch.float16)],
    ids=str,
)
def test_kernels_do_what_the_textbook_says(
    poisoned_memory: None, split: int, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    logits, seeds = normal(3, 2 * split + 21, dtype=dtype), counting(3) * 1001 - 500
    logits[1, ::3] = -math.inf
    logits[2, 5:9] = logits[2].max()  # four of the most likely, and bf16 ties everywhere
    drawn = sample(logits, seeds, 7, **settings, truncated_logprobs=True, backend="triton")
    uniforms = philox_uniform(seeds, torch.tensor(7, device=DEVICE))
    assert assert_textbook(drawn, logits, uniforms, **settings) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_torch_does_what_the_textbook_says_for_all_combinations(dtype: torch.dtype) -> None:
    seeds, uncertain, count = counting(12) * 1001 - 500, 0, 0
    uniforms = philox_uniform(seeds, torch.tensor(7, device=DEVICE))
    combinations = itertools.product(
        (0.5, 1.0, 2.7), (0, 1, 5, 37, 1000), (1.0, 0.9, 0.3, 1e-4), (0.0, 0.05, 1.0)
    )
    for number, values in enumerate(combinations):
        settings = dict(zip(OFF, values, strict=True))
        logits = normal(12, 150, seed=number, dtype=dtype)
        logits[:, 7:31] = -math.inf
        drawn = sample(logits, seeds, 7, **settings, truncated_logprobs=True, backend="reference")
        uncertain += assert_textbook(drawn, logits, uniforms, **settings)
        count += len(seeds)
    assert count == 2160 and uncertain < 10


@pytest.mark.parametrize("settings", [{}, ALL_RULES], ids=str)
def test_both_implementations_draw_the_same(split: int, settings: dict[str, Any]) -> None:
    count = 12 if settings else 60
    logits, seeds = normal(count, 50, dtype=torch.bfloat16), counting(count)
    positions = seeds * 10_000_019
    found, wanted = (
        sample(logits, seeds, positions, **settings, truncated_logprobs=True, backend=backend)
        for backend in ("triton", "reference")
    )
    certain = textbook(logits, philox_uniform(seeds, positions), **{**OFF, **settings}).certain
    assert certain.sum() >= count - 1
    assert torch.equal(found.tokens[certain], wanted.tokens[certain])
    for name in ("logprobs", "truncated_logprobs"):
        mine, theirs = (getattr(x, name)[certain] for x in (found, wanted))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "top_k": 50, "top_p": 0.95}])
def test_the_vocabulary_of_the_real_model(settings: dict[str, Any], backend: str) -> None:
    logits, seeds = normal(1, 151_936, dtype=torch.bfloat16), counting(1) + 5
    drawn = sample(logits, seeds, 7, **settings, truncated_logprobs=True, backend=backend)
    uniforms = philox_uniform(seeds, torch.tensor(7, device=DEVICE))
    assert assert_textbook(drawn, logits, uniforms, **settings) == 0


@triton.jit
def lowest_uniform(seed, position):
    return tl.zeros((), tl.float32)


@triton.jit
def highest_uniform(seed, position):
    return tl.full((), 1 - 2**-24, tl.float32)


@pytest.mark.skipif(DEVICE != "cpu", reason="a compiled kernel keeps its functions")
@pytest.mark.parametrize("settings", [{}, ALL_RULES], ids=str)
@pytest.mark.parametrize("uniform", [lowest_uniform, highest_uniform], ids=["0", "almost 1"])
def test_the_ends_of_the_unit_interval_draw_tokens_with_mass(
    monkeypatch: pytest.MonkeyPatch, split: int, uniform: Any, settings: dict[str, Any]
) -> None:
    assert interpreted()
    monkeypatch.setattr(kernels, "uniform", uniform)
    logits = torch.full((4, 3 * split), -math.inf)
    logits[0, split + 3 : 2 * split + 5] = normal(1, split + 2)  # -inf at both ends
    logits[1] = normal(3 * split)
    logits[2, [2, 2 * split]] = 1.0  # two possible tokens, and a split of -inf between theirs
    logits[3, split : split + 9] = -1e4 - normal(9)  # far below 0
    logits = logits.bfloat16()
    log_p = textbook(logits, torch.zeros(4), **{**OFF, **settings}).truncated
    drawn = sample(logits, torch.arange(4), 0, **settings, backend="triton")
    for p, token in zip(log_p.exp(), drawn.tokens.tolist(), strict=True):
        assert p[token] > 0
        # What lies further out than the end of the interval reaches weighs next to nothing.
        beyond = p[:token] if uniform is lowest_uniform else p[token + 1 :]
        assert beyond.sum() < 1e-6


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_without_a_distribution_gives_some_token_and_nan(
    poisoned_memory: None, split: int, bad: float, settings: dict[str, Any]
) -> None:
    logits = normal(3, split + 9)
    logits[1, 0 if bad != -math.inf else slice(None)] = bad
    given = list({**OFF, **settings}.values())
    tokens, *logprobs = kernels.forward(logits, counting(3), counting(3), *given, True)
    assert ((tokens >= 0) & (tokens < split + 9)).all()
    for values in logprobs:
        assert values.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("settings", [{}, {"top_k": 9}], ids=str)
@pytest.mark.parametrize("layout", ["slice", "transposed", "every second", "expanded"])
def test_any_strides(
    poisoned_memory: None, split: int, layout: str, settings: dict[str, Any]
) -> None:
    half = torch.bfloat16
    logits = {
        "slice": lambda: normal(4, split + 60, dtype=half)[1:, 3 : split + 30],
        "transposed": lambda: normal(split + 27, 3, dtype=half).T,
        "every second": lambda: normal(6, 2 * split + 54, dtype=half)[::2, ::2],
        "expanded": lambda: normal(1, split + 27, dtype=half).expand(3, -1),
    }[layout]()
    assert not logits.is_contiguous()
    seeds, positions = (counting(6) * 5)[::2], torch.tensor(9, device=DEVICE).expand(3)
    results = [
        sample(x, s, p, **settings, truncated_logprobs=True, backend="triton")
        for x, s, p in (
            (logits, seeds, positions),
            (logits.contiguous(), seeds.contiguous(), positions.contiguous()),
        )
    ]
    assert all(map(torch.equal, *results))


def test_float64_logits_are_read_as_fp32(split: int) -> None:
    logits = normal(3, 90, dtype=torch.float64) * (1 + 1e-9)
    for backend in ("triton", "reference"):
        results = [
            sample(x, counting(3), 0, **ALL_RULES, truncated_logprobs=True, backend=backend)
            for x in (logits, logits.float())
        ]
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("settings", [{}, {"top_k": 5, "top_p": 0.9}], ids=str)
def test_offsets_past_two_to_the_31(settings: dict[str, Any]) -> None:
    stride, vocabulary = 2**30 + 128, 50
    try:
        memory = torch.empty(2 * stride + vocabulary, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space are not to be had: {error}")
    logits = memory.as_strided((3, vocabulary), (stride, 1))
    logits.copy_(normal(3, vocabulary))
    far, near = (
        sample(x, counting(3), 0, **settings, truncated_logprobs=True, backend="triton")
        for x in (logits, logits.contiguous())
    )
    assert all(map(torch.equal, far, near))


@pytest.mark.parametrize(
    ("settings", "launches"),
    [
        ({}, {"statistics": 1, "choose": 1}),
        ({"top_k": 50}, {"statistics": 1, "choose": 1}),  # of 50 tokens: off
        ({"min_p": 0.1}, {"statistics": 1, "kept": 1, "choose": 1}),
        ({"top_k": 5}, {"statistics": 1, "round": {32: 8, 16: 4, 19: 5}, "kept": 1, "choose": 1}),
        (ALL_RULES, {"statistics": 1, "round": {32: 8, 16: 4, 19: 5}, "kept": 1, "choose": 1}),
    ],
    ids=str,
)
def test_the_number_of_launches(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], launches: dict[str, Any]
) -> None:
    counts: dict[str, int] = {}

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            counts[self.name] = counts.get(self.name, 0) + 1
            return self.kernel[grid]

    for module, names in ((kernels, ("statistics", "kept", "choose")), (threshold, ("round",))):
        for name in names:
            kernel = getattr(module, f"sample_{name}_kernel")
            monkeypatch.setattr(module, f"sample_{name}_kernel", Counted(name, kernel))
    for dtype, bits in threshold.KEY_BITS.items():
        counts.clear()
        sample(normal(1, 50, dtype=dtype), counting(1), 0, **settings, backend="triton")
        wanted = {k: v[bits] if isinstance(v, dict) else v for k, v in launches.items()}
        assert counts == wanted
