"""The benchmark of shared prompts: exact answers, what counts as wrong, costs, refusals."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

CPU = torch.device("cpu")
RAGGED = (2, 19, 3, 7, 4, 2, 16, 50)


@pytest.fixture(scope="module")
def part(repository: Path) -> Iterator[Any]:
    """A function that gives a module of the benchmark by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository))
        patch.setattr(torch, "compile", lambda function, **_: function)
        yield lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture
def profile(part: Any) -> Callable[..., dict[str, Any]]:
    """A function (case, sizes, providers) -> what is said of them, by their names."""

    def rows(case: Any, sizes: tuple[int, ...], *providers: Any) -> dict[str, Any]:
        doctored = replace(case, providers=providers)
        result = part("profiling").profile_case(doctored, sizes, "tiny", CPU, repeats=1)
        return {row["provider"]: row for row in result["rows"]}

    return rows


def seen_pairs(lengths: tuple[list[int], list[list[int]]], repeated: bool) -> int:
    """Count ones in the masks, row by row."""
    total = 0
    for prompt, completions in zip(*lengths, strict=True):
        if not repeated:
            total += sum(range(1, prompt + 1))
        for own in completions:
            total += sum(range(1, prompt + own + 1)) if repeated else 0
            total += 0 if repeated else sum(range(prompt + 1, prompt + own + 1))
    return total


def test_exact_prefix_attention_is_sdpa_under_the_mask(part: Any) -> None:
    prompts, completions = [5, 3, 4], [[2, 3], [], [1]]
    draw = torch.Generator().manual_seed(0)
    q, seed = torch.randn(2, 18, 4, 8, generator=draw).double()
    k, v = torch.randn(2, 18, 2, 8, generator=draw).double()
    answer = part("definitions").exact_prefix_attention(q, k, v, prompts, completions, seed)
    # Group and part of each row: part 0 is the prompt.
    group = torch.tensor([0] * 10 + [1] * 3 + [2] * 5)
    own = torch.tensor([0] * 5 + [1] * 2 + [2] * 3 + [0] * 3 + [0] * 4 + [1])
    mask = (group == group[:, None]) & ((own == 0) | (own == own[:, None]))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    output = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in leaves), attn_mask=mask.tril(), enable_gqa=True
    )[0].transpose(0, 1)
    wanted = torch.autograd.grad(output, leaves, seed)
    torch.testing.assert_close(answer.pop("output"), output.detach())
    torch.testing.assert_close(list(answer.values()), list(wanted))
    alone = part("definitions").exact_prefix_attention(q, k, v, prompts, completions, None)
    assert list(alone) == ["output"]


def test_ragged_lengths_follow_from_the_sizes(part: Any) -> None:
    cases = part("cases_prefix")
    prompts, completions = cases.lengths(cases.SIZES["ragged"])
    flat = [length for group in completions for length in group]
    assert prompts[0] == 512 and flat[0] == 64
    assert len(set(prompts)) == 4 and len(set(flat)) > 20
    assert 0.4 * 512 <= min(prompts) < 0.5 * 512 and 25 <= min(flat) < 30
    assert cases.lengths((2, 9, 3, 5, 4, 2, 16, 100)) == ([9, 9], [[5] * 3] * 2)
    assert min(cases.ragged(100, 3, 1)) == 1


@pytest.mark.parametrize("mode, products", [("forward", 2), ("forward+backward", 7)])
def test_pairs_of_shared_and_repeated_rows_are_counted(part: Any, mode: str, products: int) -> None:
    cases = part("cases_prefix")
    case = next(case for case in cases.CASES if case.mode == mode)
    lengths = cases.lengths(RAGGED)
    shared, repeated = (seen_pairs(lengths, repeated) for repeated in (False, True))
    assert case.repeated_work(RAGGED) == pytest.approx(repeated / shared)
    cost = case.cost(RAGGED, 4)
    assert cost.flops == 2 * products * shared * 4 * 16
    problem = case.problem(RAGGED, CPU, torch.float32)
    tensors = [problem["q"], problem["k"], problem["v"], problem["q"]]  # the last: the output
    assert cost.bytes == (1 if mode == "forward" else 3) * sum(4 * x.numel() for x in tensors)
    assert case.repeated_work(case.sizes["cpu"]) == pytest.approx(4.36, abs=0.005)


def test_what_is_not_attention_of_the_groups_gets_no_time(part: Any, profile: Any) -> None:
    cases, attention = part("cases_prefix"), part("cases_attention")
    case = next(case for case in cases.CASES if case.mode == "forward+backward")
    ours = next(p for p in case.providers if p.name == "fastomni reference")

    def causal(problem: Any) -> Any:
        """Completions see their sisters."""
        offsets = problem.settings["layout"].group_offsets
        settings = {"lengths": [b - a for a, b in pairwise(offsets)], "causal": True}
        whole = part("cases").Problem(problem.inputs, {}, settings=settings)
        return attention.attention_call(problem, attention.sdpa(whole), case.mode)

    def without_prompt_gradients(problem: Any) -> Any:
        """Keys of the prompt get no gradient from completions."""
        call = ours.prepare(problem)
        rows = problem.settings["layout"].prompt_rows

        def run() -> dict[str, torch.Tensor]:
            answer = call()
            answer["grad_k"] = answer["grad_k"].index_fill(0, rows[:3], 0.0)
            return answer

        return run

    provider = part("cases").Provider
    rows = profile(
        case,
        RAGGED,
        ours,
        provider("causal", causal),
        provider("forgetful", without_prompt_gradients),
    )
    assert {name: row["status"] for name, row in rows.items()} == {
        "fastomni reference": "timed", "causal": "refused", "forgetful": "refused",
    }  # fmt: skip
    assert rows["forgetful"]["reason"].startswith("error of grad_k")


def test_every_copy_of_a_row_counts(part: Any, profile: Any) -> None:
    """One wrong copy among the repeated rows, or one gradient that is missing, is found."""
    peers = part("prefix_peers")
    case = next(c for c in part("cases_prefix").CASES if c.mode == "forward+backward")
    good = next(p for p in case.providers if p.name == "repeated: SDPA padded")

    def spoil(name: str) -> Any:
        def finish(problem: Any, answer: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            answer = dict(answer)
            answer[name] = answer[name].clone()
            answer[name][4, 3] = 0  # a row of the fifth sequence, one copy of a prompt's
            return peers.fold_padded(problem, answer)

        return replace(good, name=name, finish=finish)

    rows = profile(case, RAGGED, good, *map(spoil, ("output", "grad_q", "grad_k", "grad_v")))
    assert rows.pop(good.name)["status"] == "timed"
    for name, row in rows.items():
        assert row["status"] == "refused", name
        assert ("output_repeated" if name == "output" else name) in row["reason"]


def test_two_passes_are_merged_as_one_softmax(part: Any) -> None:
    merge = part("two_pass").merge
    scores, values = torch.randn(6, 9).double(), torch.randn(9, 5).double()
    parts = [(scores[:, s].softmax(-1) @ values[s], scores[:, s].logsumexp(-1))
             for s in (slice(0, 4), slice(4, 9))]  # fmt: skip
    merged = merge(*parts[0], *parts[1])
    torch.testing.assert_close(merged, scores.softmax(-1) @ values, atol=1e-6, rtol=1e-6)
    nothing = torch.full((6,), -torch.inf).double()
    torch.testing.assert_close(
        merge(*parts[0], torch.zeros(6, 5).double(), nothing), parts[0][0], atol=1e-6, rtol=1e-6
    )


def test_decoding_is_checked_against_all_keys(part: Any, profile: Any) -> None:
    decode = part("cases_decode")
    (case,) = decode.CASES
    sizes = (2, 19, 3, 5, 4, 2, 16)
    problem = case.problem(sizes, CPU, torch.float32)
    keys, values = decode.caches(problem)
    assert keys.shape == (6, 24, 2, 16) and not keys.isnan().any()
    assert problem["suffix_k"][:, 5:].isnan().all() and problem["suffix_k"].shape[1] == 10
    wanted = F.scaled_dot_product_attention(
        problem["q"].double()[:, :, None],
        *(x.double().transpose(1, 2) for x in (keys, values)),
        enable_gqa=True,
    )
    torch.testing.assert_close(problem.exact["output"], wanted[:, :, 0])
    # 2 prompts' keys and values, 6 sequences' own ones, queries in, outputs out.
    assert case.cost(sizes, 2).bytes == 2 * (2 * 38 * 32 + 2 * 30 * 32 + 2 * 6 * 64)
    assert case.cost(sizes, 2).flops == 2 * 2 * 6 * 24 * 4 * 16

    def deaf(problem: Any) -> Any:
        """Sequences without their own keys."""
        keys, values = (x[:, :19].transpose(1, 2) for x in decode.caches(problem))
        return lambda q: F.scaled_dot_product_attention(
            q[:, :, None], keys, values, enable_gqa=True
        )[:, :, 0]

    rows = profile(case, sizes, decode.peer("deaf", deaf))
    assert rows["deaf"]["status"] == "refused"


def test_sweeps_leave_out_what_is_not_worth_its_time(part: Any) -> None:
    kernels = part("kernels")
    cases = kernels.select(["prefix_attention"])
    jobs = kernels.plan(cases, ["cpu-sweep", "cpu"], CPU)
    swept = [(case, sizes) for case, name, sizes in jobs if name == "cpu-sweep"]
    assert [sizes for _, sizes in swept] == list(part("cases_prefix").CPU_SWEEP)
    names = {provider.name for case, _ in swept for provider in case.providers}
    assert {"fastomni reference", "repeated: SDPA padded", "FlexAttention"} <= names
    assert not names & {"torch eager", "torch.compile", "repeated: SDPA per sequence"}
    whole = [case for case, name, _ in jobs if name == "cpu"]
    assert whole == cases
    grid = kernels.plan(cases, ["grid"], torch.device("cuda"))
    assert len(grid) == 2 * 64


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "prefix_attention", "--sizes", "1x8x2x4x4x2x8x101"], "shortest=101 is a perc"),
        (["--only", "prefix_attention", "--sizes", "1x8x2x4x3x2x8x50"], "Hq=3 is no multiple of"),
        (["--only", "prefix_decode", "--sizes", "1x8x2x4x3x2x8"], "Hq=3 is no multiple of Hkv=2"),
        (["--only", "prefix_attention", "--sizes", "sweep"], "which take a CPU hours"),
        (["--sizes", "full-g16"], "which take a CPU hours"),
        (["--only", "sample", "--sizes", "cpu-sweep"], "a size of prefix_attention alone"),
    ],
)
def test_what_cannot_be_run_is_refused(
    part: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    kernels = part("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "measure_ceilings", lambda device: None)
        assert kernels.main(["--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_list_shows_sweeps(part: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert part("kernels").main(["--list", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "prefix_attention/forward  [N x P x G x C x Hq x Hkv x D x shortest]" in shown
    assert "  grid: 2x512x4x64x14x2x64x100 " in shown and "and 60 more" in shown
    assert "FlexAttention                 FlexAttention has no backward on a CPU" in shown
