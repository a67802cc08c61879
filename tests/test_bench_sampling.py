"""The benchmark of sampling: what was drawn is judged by the exact distribution."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

CPU = torch.device("cpu")
SIZES = (64, 301)

Sampler = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def part(repository: Path) -> Iterator[Any]:
    """A function that gives a module of the benchmark by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository))
        patch.setattr(torch, "compile", lambda function, **_: function)
        yield lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture
def profile(part: Any) -> Callable[..., dict[str, str]]:
    """A function (mode, samplers by name) -> what is said against each; empty: timed."""

    def reasons(mode: str, **samplers: Sampler) -> dict[str, str]:
        sampling = part("cases_sampling")
        providers = [
            part("cases").Provider(
                name,
                lambda problem, function=function: sampling.sample_call(problem, function),
                finish=sampling.judge,
            )
            for name, function in samplers.items()
        ]
        case = next(case for case in sampling.CASES if case.mode == mode)
        case = replace(case, providers=tuple(providers))
        result = part("profiling").profile_case(case, SIZES, "tiny", CPU, repeats=1)
        return {row["provider"]: row["reason"] for row in result["rows"]}

    return reasons


@pytest.mark.parametrize("mode", ["forward", "truncated"])
def test_samplers_that_do_not_sample_get_no_time(part: Any, profile: Any, mode: str) -> None:
    sampling = part("cases_sampling")
    fair = sampling.multinomial(mode)

    def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = (logits / sampling.TEMPERATURE).log_softmax(-1)
        return sampling.with_logprobs(log_p, log_p.argmax(-1, keepdim=True))

    def at_random(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = (logits / sampling.TEMPERATURE).log_softmax(-1)
        return sampling.with_logprobs(log_p, torch.randint(logits.shape[1], (len(logits), 1)))

    def cold(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, _ = fair(logits)
        log_p = logits.log_softmax(-1)  # without the temperature
        return sampling.with_logprobs(log_p, tokens[:, None])

    torch.manual_seed(0)
    said = profile(mode, fair=fair, likeliest=likeliest, at_random=at_random, cold=cold)
    assert said["fair"] == ""
    assert said["likeliest"].startswith("error of tokens 1.0e+00")
    assert said["at_random"].startswith("error of tokens 1.0e+00")
    assert said["cold"].startswith("error of logprobs")


def test_a_word_that_is_left_out_must_not_be_drawn(part: Any, profile: Any) -> None:
    """Draws from all words are found out where they should be truncated."""
    torch.manual_seed(0)
    said = profile("truncated", whole=part("cases_sampling").multinomial("forward"))
    assert said["whole"].startswith("error of tokens")


def test_what_the_rules_let_through(part: Any) -> None:
    sampling = part("cases_sampling")
    # Top-p takes 0.5 and 0.3 and the 0.15 that reaches 0.9; min-p wants 0.025.
    p = torch.tensor([[0.01, 0.5, 0.3, 0.04, 0.15], [0.99, 0.004, 0.003, 0.002, 0.001]]).double()
    allowed = sampling.possible(p.log())
    assert allowed.tolist() == [[False, True, True, False, True], [True] + [False] * 4]
    flat = torch.full((1, 200), 1 / 200).double().log()
    assert sampling.possible(flat).sum() == sampling.TOP_K
    # Min-p alone: of 0.4, 0.3, 0.195 and many of 0.001 each, top-p would take six of the last.
    long = torch.tensor([[0.4, 0.3, 0.195] + [0.001] * 105]).double()
    assert sampling.possible(long.log()).sum() == 3


def test_transformers_keeps_a_part_of_what_may_be_kept(part: Any) -> None:
    sampling = part("cases_sampling")
    case = next(case for case in sampling.CASES if case.mode == "truncated")
    problem = case.problem(SIZES, CPU, torch.float32)
    torch.manual_seed(0)
    function = sampling.transformers_warpers("truncated")
    for _ in range(20):
        tokens, logprobs = function(problem["logits"])
        found = sampling.judge_possible(problem, {"tokens": tokens, "logprobs": logprobs})
        assert found["tokens"] == 0 and found["logprobs"].abs().max() < 1e-4


@pytest.mark.parametrize("mode", ["forward", "truncated"])
def test_ours_returns_what_its_case_asks_for(part: Any, mode: str) -> None:
    sampling = part("cases_sampling")
    case = next(case for case in sampling.CASES if case.mode == mode)
    problem = case.problem(SIZES, CPU, torch.float32)
    answer = sampling.our_sample(problem, "reference", mode)()
    assert answer["tokens"].shape == answer["logprobs"].shape == (64,)
    again = sampling.our_sample(problem, "reference", mode)()
    torch.testing.assert_close(answer, again, rtol=0, atol=0)  # seeds and positions are given
    allowed = problem.settings["possible"].gather(1, answer["tokens"][:, None])
    assert allowed.all()
    assert case.cost(SIZES, 4).bytes == 4 * 64 * 301 + 20 * 64
