"""Parts of the sampling kernels on their own: keys, counters, uniform numbers, search in sums."""

from __future__ import annotations

import math

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402 (after the skip)

from fastomni_kernels.philox import philox_uniform  # noqa: E402
from fastomni_kernels.triton_kernels import sampling as kernels  # noqa: E402
from fastomni_kernels.triton_kernels import sampling_threshold as threshold  # noqa: E402

# Triton's interpreter computes with numpy, which warns of what infinities do.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def keys_kernel(values, out, KEY_BITS: tl.constexpr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    x = tl.load(values + places).to(tl.float32)
    tl.store(out + places, threshold.ordered_key(x, KEY_BITS).to(tl.int64))


@pytest.mark.parametrize("dtype", threshold.KEY_BITS, ids=str)
def test_keys_order_as_the_logits_do(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    edges = [0.0, -0.0, limits.smallest_normal, 1.0, 1 + limits.eps, limits.max]
    if dtype != torch.bfloat16:  # whose subnormal numbers are 0 in the interpreter
        edges.append(limits.smallest_normal / 2)
    edges += [-x for x in edges] + [math.inf, -math.inf]
    ordinary = torch.randn(512 - len(edges), generator=torch.Generator().manual_seed(0))
    values = torch.cat([torch.tensor(edges, dtype=dtype), ordinary.to(dtype)]).to(DEVICE)
    out = torch.empty(512, dtype=torch.int64, device=DEVICE)
    keys_kernel[(1,)](values, out, threshold.KEY_BITS[dtype], 512)
    assert out.min() >= 0 and out.max() < 2 ** threshold.KEY_BITS[dtype]
    wide = values.double()
    assert torch.equal(out[:, None] < out[None, :], wide[:, None] < wide[None, :])


@triton.jit
def digits_kernel(digits, candidates, out, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    counts = threshold.count_digits(
        tl.load(digits + places), tl.load(candidates + places).to(tl.int1)
    )
    tl.store(out + tl.arange(0, 16), counts)


@pytest.mark.parametrize("size", [16, 64, 4096])
def test_counters_of_digits_do_not_overflow(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randint(16, (size,), generator=generator)
    some = torch.randint(2, (size,), generator=generator)
    same = [(torch.full((size,), digit), torch.ones(size)) for digit in range(16)]
    for digits, candidates in [(mixed, some), *same]:
        out = torch.empty(16, dtype=torch.int32, device=DEVICE)
        given = digits.to(DEVICE, torch.int32), candidates.to(DEVICE, torch.int8)
        digits_kernel[(1,)](*given, out, size)
        assert out.tolist() == torch.bincount(digits[candidates > 0], minlength=16).tolist()


@triton.jit
def uniforms_kernel(seeds, positions, out):
    i = tl.program_id(0)
    tl.store(out + i, kernels.uniform(tl.load(seeds + i), tl.load(positions + i)))


def test_the_uniform_number_is_the_same_in_triton_and_in_plain_torch() -> None:
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 2**32, 123456789012345], device=DEVICE)
    positions = torch.tensor([0, 1, 2, 3, 2**31 - 1, 100, 7], device=DEVICE)
    out = torch.empty(len(seeds), device=DEVICE)
    uniforms_kernel[(len(seeds),)](seeds, positions, out)
    assert torch.equal(out, philox_uniform(seeds, positions))


@triton.jit
def invert_kernel(masses, targets, places, before, SIZE: tl.constexpr):
    i = tl.program_id(0)
    masses = tl.load(masses + tl.arange(0, SIZE))
    place, mass_before = kernels.invert(masses, tl.load(targets + i))
    tl.store(places + i, place)
    tl.store(before + i, mass_before)


def test_a_target_at_or_past_the_ends_finds_a_place_with_mass() -> None:
    masses = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.0, 0.0, 0.0, 0.0], device=DEVICE)
    targets = torch.tensor([-0.1, 0.0, 0.4, 0.5, 0.7, 0.75, 0.8, math.nan], device=DEVICE)
    places = torch.empty(8, dtype=torch.int32, device=DEVICE)
    before = torch.empty(8, device=DEVICE)
    invert_kernel[(8,)](masses, targets, places, before, 8)
    assert places.tolist() == [1, 1, 1, 3, 3, 3, 3, 3]
    assert before.tolist() == [0.0] * 3 + [0.5] * 5
    for nothing in (0.0, math.nan):
        invert_kernel[(8,)](torch.full_like(masses, nothing), targets, places, before, 8)
        assert places.tolist() == [0] * 8
