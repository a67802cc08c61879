"""What the kernel benchmark computes with: errors, memory, turns, exact answers, goals, units."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture(scope="module")
def part(repository: Path) -> Iterator[Any]:
    """A function that gives a module of the benchmark by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository))
        yield lambda name: importlib.import_module(f"bench.{name}")


def test_the_relative_error_is_that_of_the_worst_row(part: Any) -> None:
    compare = part("errors").compare
    exact = torch.tensor([[3e3, 4e3], [3e-3, 4e-3], [3e-3, 4e-3]], dtype=torch.float64)
    assert compare(exact, exact) == (0.0, 0.0)
    forgotten = exact.clone()
    forgotten[1:] = 0
    largest, relative = compare(forgotten, exact)
    assert (largest, relative) == pytest.approx((4e-3, 1.0))
    zero = exact.clone()
    zero[1] = 0  # measured against a tenth of the median row
    off = zero.clone()
    off[1, 0] = 1.0
    median = zero.norm(dim=1)[[0, 2]].median().item()
    assert compare(off, zero)[1] == pytest.approx(1 / (0.1 * median))
    assert compare(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0]).double()) == (1.0, 0.25)
    assert compare(torch.tensor(0.5), torch.tensor(0.0).double(), scale=2.0) == (0.5, 0.25)
    bad = exact.clone()
    bad[2, 0] = torch.nan
    assert not compare(bad, exact)[1] <= 1e9


def test_memory_is_counted_to_the_byte(part: Any) -> None:
    measure = part("memory").measure_memory

    def call() -> dict[str, torch.Tensor]:
        first = torch.ones(3 * MIB // 4)
        del first
        second, third = torch.ones(2 * MIB // 4), torch.ones(4 * MIB // 4)
        answer = torch.ones(8 * MIB // 4)
        return {"answer": answer, "again": answer, "sum": (second.sum() + third.sum())[None]}

    memory = measure(call, CPU)
    assert memory.answer == 8 * MIB + 4
    # Two sums of four bytes live at the peak beside their sum.
    assert 6 * MIB <= memory.extra <= 6 * MIB + 64
    big = measure(lambda: {"y": torch.ones(64 * MIB // 4).sum()}, CPU)
    assert 64 * MIB <= big.extra <= 64 * MIB + 64
    if sys.platform == "linux":
        assert big.resident_extra == pytest.approx(64 * MIB, abs=4 * MIB)
    matrix = torch.randn(512, 512, requires_grad=True)

    def backward() -> dict[str, torch.Tensor]:
        loss = matrix.exp().sum()
        return {"grad": torch.autograd.grad(loss, matrix)[0]}

    assert measure(backward, CPU).answer == MIB
    assert MIB <= measure(backward, CPU).extra <= MIB + 64  # exp is kept for its backward


def test_calls_are_timed_in_turn(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = part("timing")
    order: list[str] = []
    clock = {"now": 0.0}
    cost = {"a": 1.0, "b": 10.0, "c": 3e-4}

    def call(name: str) -> Any:
        def run() -> dict[str, torch.Tensor]:
            order.append(name)
            clock["now"] += cost[name]
            return {}

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["now"])
    times = timing.time_calls({name: call(name) for name in cost}, 4, CPU)
    rounds = [name for name in order if name != "c"][2:]
    assert "".join(rounds) == "ab" + "ba" + "ab" + "ab" + "ba"
    for name, seconds in cost.items():
        assert times[name].seconds == pytest.approx([seconds] * 4)
    # 3e-4 s is too short for a measurement of at least 2 ms.
    assert [times[name].calls_per_round for name in cost] == [1, 1, 7]


def test_what_fails_while_it_is_timed_ends_nobody_else(part: Any) -> None:
    calls = {"early": 0, "late": 0, "good": 0}

    def call(name: str, last: int) -> Any:
        def run() -> dict[str, torch.Tensor]:
            calls[name] += 1
            if calls[name] > last:
                raise RuntimeError("out of memory")
            return {}

        return run

    limits = {"early": 0, "late": 10**4, "good": 10**9}
    times = part("timing").time_calls({n: call(n, limits[n]) for n in limits}, 3, CPU)
    assert len(times["good"].seconds) == 3 and times["good"].error is None
    for name in ("early", "late"):
        assert str(times[name].error) == "out of memory"
        assert calls[name] == limits[name] + 1  # not called again

    cases = part("cases")
    x = torch.ones(3)
    seen: list[int] = []

    def fails_later() -> dict[str, torch.Tensor]:
        seen.append(1)
        if len(seen) > 3:  # the check and two measurements of memory
            raise RuntimeError("out of memory\nand more")
        return {"y": 2 * x}

    case = cases.Case(
        "double", "forward", ("N",), {}, lambda sizes, itemsize: cases.Cost(8.0, 1.0, ""),
        lambda *_: cases.Problem({"x": x}, {"y": 2 * x.double()}),
        (cases.Provider("bad", lambda p: fails_later, ours=True),
         cases.Provider("good", lambda p: lambda: {"y": 2 * x})),
    )  # fmt: skip
    bad, good = part("profiling").profile_case(case, (3,), "3", CPU, repeats=2)["rows"]
    assert (bad["status"], bad["reason"]) == ("failed", "while timed: RuntimeError: out of memory")
    assert "median_s" not in bad and good["status"] == "timed"


def test_errors_do_not_depend_on_chunks(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = part("errors")
    exact = torch.randn(7, 5).double()
    wrong = (exact + torch.linspace(0, 1, 7)[:, None]).float()
    whole = errors.compare(wrong, exact)
    monkeypatch.setattr(errors, "CHUNK_ELEMENTS", 12)  # two rows
    assert errors.compare(wrong, exact) == whole
    assert whole[0] == pytest.approx(1.0)


def test_exact_answers_do_not_depend_on_chunks(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    definitions = part("definitions")
    monkeypatch.setattr(definitions, "CHUNK_BYTES", 8 * 60 * 3)  # three rows
    hidden, weight = torch.randn(7, 5).double(), torch.randn(60, 5).double()
    ids, seed = torch.randint(60, (7,)), torch.randn(7).double()
    logprobs, entropy = definitions.exact_linear_logprobs(hidden, weight, ids)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = leaves[0] @ leaves[1].T
    loss = F.cross_entropy(logits, ids, reduction="none")
    torch.testing.assert_close(logprobs, -loss.detach())
    torch.testing.assert_close(
        entropy, torch.distributions.Categorical(logits=logits.detach()).entropy()
    )
    wanted = torch.autograd.grad(-loss, leaves, seed)
    found = definitions.exact_linear_gradients(hidden, weight, ids, seed)
    torch.testing.assert_close(
        found, dict(zip(("grad_hidden", "grad_weight"), wanted, strict=True))
    )


def test_exact_attention_is_sdpa_of_each_sequence(part: Any) -> None:
    q, k, v = torch.randn(9, 4, 8).double(), *torch.randn(2, 9, 2, 8).double()
    answer = part("definitions").exact_attention(q, k, v, [5, 4], None)["output"]
    for rows in (slice(0, 5), slice(5, 9)):
        parts = (x[rows].transpose(0, 1)[None] for x in (q, k, v))
        wanted = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(answer[rows], wanted[0].transpose(0, 1))


def made_up(provider: str, **figures: float) -> dict:
    return {"provider": provider, "status": "timed", "ours": provider.startswith("fast"), **figures}


def test_goals_are_judged_by_the_right_ratio(part: Any) -> None:
    rows = [
        made_up("fastomni reference workspace", median_s=2.1, extra_bytes=100),
        made_up("torch eager", median_s=2.0, extra_bytes=700),
    ]
    result = {
        "name": "linear_grpo_loss/forward+backward",
        "size_name": "cpu",
        "sizes": {"M": 512, "H": 896, "V": 151936},
        "rows": rows,
    }
    report = {"environment": {"accelerator": None}, "cases": [result]}
    judged = [goal for goal in part("goals").judge_all(report) if goal["measured"] is not None]
    assert [goal["goal"][:4] for goal in judged] == ["CPU:", "CPU:"]
    assert [goal["measured"] for goal in judged] == pytest.approx([7.0, 1.05])
    assert [goal["verdict"] for goal in judged] == ["met", "met"]
    rows[0]["extra_bytes"], rows[0]["median_s"] = 120, 2.3
    verdicts = [goal["verdict"] for goal in part("goals").judge_all(report)]
    assert verdicts.count("missed") == 2


def test_goals_of_a_gpu_are_judged_on_that_gpu_alone(part: Any) -> None:
    result = {
        "name": "group_advantages/forward",
        "size_name": "full",
        "sizes": {"N": 64, "G": 8},
        "rows": [
            made_up("fastomni triton", median_s=3e-6, extra_bytes=0),
            made_up("TRL", median_s=9e-6, extra_bytes=0),
        ],
    }
    for name, measured in (("NVIDIA H100 80GB HBM3", 2), ("NVIDIA H200", 1)):
        report = {"environment": {"accelerator": {"name": name}}, "cases": [result]}
        goals = part("goals").judge_all(report)
        assert [goal["verdict"] for goal in goals].count("met") == measured
    assert goals[4]["measured"] == pytest.approx(1 / 3)


def test_units(part: Any) -> None:
    tables = part("tables")
    assert tables.seconds(0.00123) == "1.23 ms"
    assert tables.seconds(12.34) == "12.3 s"
    assert tables.seconds(2e-8) == "0.02 us"
    assert tables.size(1536) == "1.50 KiB"
    assert tables.size(0) == "0.00 B"
    assert tables.rate(2.5e9, "B/s") == "2.50 GB/s"
    assert tables.rate(999.0, "FLOP") == "999 FLOP"
