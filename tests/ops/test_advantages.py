"""Group advantages, both implementations, against plain Python and TRL's deviations."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastomni_kernels import group_advantages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def plain_advantages(
    rewards: list[list[list[float]]],
    eps: float,
    scale: str,
    baseline: str,
    weights: list[float],
    aggregation: str,
) -> tuple[list[list[float]], list[bool], list[int]]:
    """The definition, completion by completion, on lists [N][G][K]."""
    totals: list[list[float | None]] = []
    spreads = []
    for group in rewards:
        values: list[float | None] = []
        columns = []
        for k in range(len(weights)):
            present = [c[k] for c in group if not math.isnan(c[k])]
            columns.append((present, len(set(present)) > 1))
        for completion in group:
            if all(map(math.isnan, completion)):
                values.append(None)
                continue
            total = 0.0
            for k, reward in enumerate(completion):
                if math.isnan(reward):
                    continue
                if aggregation == "normalize_then_sum":
                    present, spread = columns[k]
                    if not spread:
                        continue
                    reward = (reward - statistics.fmean(present)) / (deviation(present) + eps)
                total += weights[k] * reward
            values.append(total)
        totals.append(values)
        kept = {v for v in values if v is not None}
        by_column = any(spread for _, spread in columns)
        spreads.append(by_column if aggregation == "normalize_then_sum" else len(kept) > 1)
    everything = [v for group in totals for v in group if v is not None]
    advantages = []
    for values, spread in zip(totals, spreads, strict=True):
        present = [v for v in values if v is not None]
        row = []
        for value in values:
            if value is None or not spread:
                row.append(0.0)
            elif aggregation == "normalize_then_sum":
                centred = value - statistics.fmean(everything)
                row.append(centred / (deviation(everything) + eps))
            else:
                others = list(present)
                if baseline == "leave_one_out":
                    others.remove(value)
                centred = value - statistics.fmean(others)
                by = {"group": deviation(present), "batch": deviation(everything)}.get(scale)
                row.append(centred if by is None else centred / (by + eps))
        advantages.append(row)
    missing = [sum(v is None for v in values) for values in totals]
    return advantages, [not spread for spread in spreads], missing


WAYS = [
    dict(scale="group"),
    dict(scale="batch"),
    dict(scale="none"),
    dict(scale="none", baseline="leave_one_out"),
    dict(scale="group", baseline="leave_one_out"),
    dict(scale="batch", baseline="leave_one_out"),
    dict(aggregation="normalize_then_sum"),
]
# Quarters are exact in every float type, so equal rewards are equal in all of them.
reward = st.one_of(st.just(math.nan), st.integers(-4, 4).map(lambda n: n / 4))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))
@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_every_way_is_its_definition(backend: str, way: dict[str, str], data: Any) -> None:
    groups, size, kinds = (data.draw(st.integers(low, 4)) for low in (1, 2, 1))
    cell = st.lists(reward, min_size=kinds, max_size=kinds)
    row = st.lists(cell, min_size=size, max_size=size)
    rewards = data.draw(st.lists(row, min_size=groups, max_size=groups))
    weights = data.draw(st.sampled_from([None, [0.5, -2.0, 1.0, 4.0][:kinds]]))
    full = dict(scale="group", baseline="mean", aggregation="sum_then_normalize") | way
    expected, no_spread, missing = plain_advantages(
        rewards, 1e-4, weights=weights or [1.0] * kinds, **full
    )
    given_rewards = torch.tensor(rewards, dtype=torch.float64, device=DEVICE)
    actual = group_advantages(given_rewards, weights=weights, backend=backend, **way)
    wanted = torch.tensor(expected, dtype=torch.float64)
    tolerance = 1e-6 if backend == "triton" else 1e-10  # the kernel's eps is fp32
    torch.testing.assert_close(actual.advantages.cpu(), wanted, rtol=0, atol=tolerance)
    assert actual.no_spread.tolist() == no_spread
    assert actual.missing.tolist() == missing and actual.missing.dtype == torch.int32


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        (
            [2, 1, 1, 0, 2, 2, 1, 1],
            [1.06051, -0.3535, -0.3535, -1.76752, 1.06051, 1.06051, -0.3535, -0.3535],
        ),
        ([2, 0, 0, 0, 0, 0, 0, 0], [2.47452] + [-0.3535] * 7),
        ([2] * 7 + [1], [0.35345] * 7 + [-2.47417]),
    ],
)
def test_what_the_released_trainer_makes_of_its_rewards(
    backend: str, rewards: list[float], expected: list[float]
) -> None:
    given_rewards = torch.tensor([rewards], dtype=torch.float32, device=DEVICE)
    advantages, no_spread, missing = group_advantages(given_rewards, backend=backend)
    torch.testing.assert_close(advantages.cpu(), torch.tensor([expected]), rtol=0, atol=1e-5)
    assert advantages.dtype == torch.float32
    assert no_spread.tolist() == [False] and missing.tolist() == [0]


def test_groups_without_spread_are_exactly_zero(backend: str) -> None:
    # The fp32 mean of seven times 0.1 is not 0.1.
    rewards = torch.tensor([[0.1] * 7, [1.0] * 6 + [0.0], [0.0] * 7], device=DEVICE)
    for way in WAYS:
        advantages, no_spread, _ = group_advantages(rewards, backend=backend, **way)
        assert no_spread.tolist() == [True, False, True]
        assert (advantages[[0, 2]] == 0).all()
        assert (advantages[1] != 0).all()


def test_missing_rewards_take_no_part_and_are_counted(backend: str) -> None:
    nan = math.nan
    rewards = torch.tensor([[1.0, nan, 0.0, 1.0], [nan, 1.0, nan, nan], [nan] * 4], device=DEVICE)
    advantages, no_spread, missing = group_advantages(rewards, backend=backend)
    without, _, _ = group_advantages(torch.tensor([[1.0, 0.0, 1.0]], device=DEVICE))
    torch.testing.assert_close(advantages[0, [0, 2, 3]], without[0], rtol=0, atol=1e-6)
    assert advantages[0, 1] == 0 and (advantages[1:] == 0).all()
    assert no_spread.tolist() == [False, True, True]
    assert missing.tolist() == [1, 3, 4]


def test_standard_deviations_are_trls(backend: str) -> None:
    trainer = pytest.importorskip("trl.trainer.utils")
    rewards = torch.randn(5, 8, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rewards[0, 3] = math.nan
    total = rewards.nansum(2).masked_fill(rewards.isnan().all(2), math.nan)
    centred = total - total.nanmean(1, keepdim=True)
    for scale, std in (
        ("group", trainer.nanstd(total, dim=1)[:, None]),
        ("batch", trainer.nanstd(total)),
    ):
        actual = group_advantages(rewards, scale=scale, backend=backend).advantages
        expected = (centred / (std + 1e-4)).nan_to_num(nan=0.0)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    per_reward = (rewards - rewards.nanmean(1, keepdim=True)) / (
        trainer.nanstd(rewards, dim=1, keepdim=True) + 1e-4
    )
    added = per_reward.nansum(2).masked_fill(rewards.isnan().all(2), math.nan)
    expected = (added - added.nanmean()) / (trainer.nanstd(added) + 1e-4)
    actual = group_advantages(rewards, aggregation="normalize_then_sum", backend=backend)
    torch.testing.assert_close(
        actual.advantages, expected.nan_to_num(nan=0.0), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("groups", "size"), [(1, 2), (3, 5), (70, 16), (2, 1030)])
def test_layouts_and_types(
    backend: str, dtype: torch.dtype, groups: int, size: int, poisoned_memory: None
) -> None:
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randint(0, 3, (size, 3, groups), generator=generator).to(DEVICE, dtype)
    strided = rewards.permute(2, 0, 1)
    for way in WAYS:
        actual = group_advantages(strided, backend=backend, **way)
        wide = group_advantages(strided.double().contiguous(), backend="reference", **way)
        assert actual.advantages.dtype == torch.float32
        torch.testing.assert_close(
            actual.advantages.double(), wide.advantages, rtol=1e-5, atol=2e-5
        )
        assert torch.equal(actual.no_spread, wide.no_spread)


def test_the_operator_is_registered(backend: str) -> None:
    rewards = torch.randn(3, 4, 2, device=DEVICE)
    arguments = (rewards, 1e-4, "group", "mean", [1.0, 2.0], "sum_then_normalize", backend)
    torch.library.opcheck(torch.ops.fastomni.group_advantages.default, arguments)

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return 2 * group_advantages(x, weights=[1.0, 2.0], backend=backend).advantages

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rewards), scaled(rewards))


@pytest.mark.parametrize(
    ("rewards", "keywords", "message"),
    [
        ([[0.0, 1.0]], {}, "rewards is of type list; it must be a Tensor"),
        (torch.zeros(3), {}, r"rewards has shape \[3\]; it must be \[N, G\] or \[N, G, K\]"),
        (torch.zeros(2, 1), {}, "1 completion per prompt leaves nothing to compare"),
        (torch.zeros(2, 2, dtype=torch.int64), {}, "must be a float tensor"),
        (torch.tensor([[0.0, math.inf]]), {}, "mark a completion without a reward with NaN"),
        (torch.zeros(2, 2), {"eps": -1.0}, "eps=-1.0; it must be finite and not negative"),
        (torch.zeros(2, 2), {"scale": "std"}, "scale='std'; use one of group, batch, none"),
        (torch.zeros(2, 2), {"baseline": "rloo"}, "use one of mean, leave_one_out"),
        (torch.zeros(2, 2, 2), {"weights": [1.0]}, r"weights=\[1.0\] for 2 rewards"),
        (
            torch.zeros(2, 2),
            {"aggregation": "normalize_then_sum", "scale": "none"},
            "leave scale='none' and baseline='mean' at 'group' and 'mean'",
        ),
        (torch.zeros(2, 2), {"backend": "cuda"}, "use one of auto, triton, reference"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    backend: str, rewards: Any, keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"group_advantages: .*{message}"):
        group_advantages(rewards, **{"backend": backend, **keywords})
