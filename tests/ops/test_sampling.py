"""Sampling as a caller sees it: neighbours, ties, ends of the unit interval, refusals, peers.

What is said of both implementations is tried on both; the kernels run in Triton's interpreter where
there is no GPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fastomni_kernels import Sample, gather_logprobs, plain_sampling, sample
from fastomni_kernels.dispatch import triton_installed
from fastomni_kernels.philox import philox_uniform

# Triton's interpreter computes with numpy, which warns of what infinities do.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

BACKENDS = ["reference"] + ["triton"] * triton_installed()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES: list[dict[str, Any]] = [
    {},
    {"top_k": 20},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.01},
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def counting(length: int) -> Tensor:
    return torch.arange(length, device=DEVICE)


def same_bits(left: Sample, right: Sample) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_token_is_the_inverse_of_the_cumulative_distribution_in_vocabulary_order(
    backend: str,
) -> None:
    count = 2000 if backend == "reference" else 100
    logits = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.3], device=DEVICE).log()
    seeds = counting(count)
    tokens = sample(logits.expand(count, -1), seeds, 3, backend=backend).tokens
    borders = [0.1, 0.1, 0.5, 0.7, 1.0]
    uniforms = philox_uniform(seeds, torch.tensor(3, device=DEVICE))
    for uniform, token in zip(uniforms.tolist(), tokens.tolist(), strict=True):
        if min(abs(uniform - border) for border in borders) > 1e-5:
            assert token == next(i for i, border in enumerate(borders) if uniform < border)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_a_sequence_never_depends_on_its_neighbours(rules: dict[str, Any], backend: str) -> None:
    count, vocabulary = (33, 1001) if backend == "reference" else (7, 200)
    logits, seeds = normal(count, vocabulary).bfloat16(), counting(count) * 7
    positions = counting(count)

    def draw(rows: Any, position: Any) -> Sample:
        return sample(logits[rows], seeds[rows], position, 0.7, **rules,
                      truncated_logprobs=True, backend=backend)  # fmt: skip

    whole = draw(slice(None), positions)
    backwards = torch.arange(count - 1, -1, -1)
    for rows in (slice(5, 6), slice(0, 6), backwards):
        again = draw(rows, positions[rows])
        assert same_bits(again, Sample(*(x[rows] for x in whole if x is not None)))
    assert same_bits(draw(slice(5, 6), 5), draw(slice(5, 6), positions[5:6]))


def test_logprobs_agree_with_the_trainers() -> None:
    logits = 4 * normal(64, 700)
    tokens, logprobs, none = sample(logits, counting(64), 0, temperature=0.7, top_k=10)
    trainer, _ = gather_logprobs(logits, tokens, temperature=0.7)
    assert none is None
    torch.testing.assert_close(logprobs, trainer, rtol=0, atol=2e-6)
    half = sample(logits.bfloat16(), counting(64), 0)
    assert same_bits(half, sample(logits.bfloat16().float(), counting(64), 0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rules", [{}, {"top_k": 99}, {"top_k": 12}], ids=str)
def test_without_truncation_both_logprobs_are_the_same(rules: dict[str, Any], backend: str) -> None:
    drawn = sample(normal(3, 12), counting(3), 0, 0.7, **rules, truncated_logprobs=True,
                   backend=backend)  # fmt: skip
    assert drawn.truncated_logprobs is not None
    assert torch.equal(drawn.logprobs, drawn.truncated_logprobs)
    assert drawn.logprobs.data_ptr() != drawn.truncated_logprobs.data_ptr()
    plain = sample(normal(3, 12), counting(3), 0, 0.7, backend=backend)
    assert same_bits(plain, drawn) and plain.truncated_logprobs is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({"top_k": 1}, [2]),
        ({"top_k": 2}, [0, 2, 3, 5]),  # three tie for the second place
        ({"top_k": 4}, [0, 2, 3, 5]),
        ({"top_k": 5}, [0, 1, 2, 3, 4, 5]),  # 0.0 and -0.0 tie
        ({"top_p": 0.39}, [2]),
        ({"top_p": 0.41}, [0, 2, 3, 5]),
        ({"top_p": 1e-300}, [2]),
        ({"min_p": 1.0}, [2]),
        ({"min_p": 0.49}, [0, 2, 3, 5]),
    ],
    ids=str,
)
def test_ties_with_the_last_kept_token_are_kept(
    rules: dict[str, Any], kept: list[int], backend: str
) -> None:
    # 2 : 4 : 2 : 2 and a little; the masses are 0.2, 0.4, 0.2, 0.2 but for that.
    two = math.log(2e4)
    row = [two, 0.0, 2 * math.log(2) + math.log(1e4), two, -0.0, two, -math.inf]
    logits = torch.tensor([row], device=DEVICE)
    drawn = sample(logits, counting(1), 0, **rules, truncated_logprobs=True, backend=backend)
    token = int(drawn.tokens)
    assert token in kept
    wanted = row[token] - math.log(sum(math.exp(row[i]) for i in kept))
    assert drawn.truncated_logprobs is not None
    assert drawn.truncated_logprobs.item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_tokens_without_mass_are_never_drawn(rules: dict[str, Any], backend: str) -> None:
    count = 40_000 if backend == "reference" else 15
    row = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -300.0, -math.inf], device=DEVICE)
    drawn = sample(row.expand(count, -1), counting(count), 0, **rules, backend=backend)
    assert set(drawn.tokens.tolist()) == {1, 3}
    torch.testing.assert_close(drawn.logprobs, torch.full_like(drawn.logprobs, -math.log(2)))


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (1 - 2**-24, 3)])
@pytest.mark.parametrize("rules", [{}, {"min_p": 0.1}, {"top_k": 4}, {"top_p": 0.99999}], ids=str)
def test_the_ends_of_the_unit_interval_draw_tokens_with_mass(
    monkeypatch: pytest.MonkeyPatch, uniform: float, token: int, rules: dict[str, Any]
) -> None:
    monkeypatch.setattr(plain_sampling, "philox_uniform", lambda *_: torch.tensor([uniform]))
    logits = torch.tensor([[-math.inf, 1.7, 0.3, 1.1, -200.0, -math.inf]])
    assert sample(logits, torch.tensor([0]), 0, **rules, backend="reference").tokens == token


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_one_possible_token(rules: dict[str, Any], backend: str) -> None:
    masked = torch.full((1, 9), -math.inf, device=DEVICE)
    masked[0, 4] = -7.5
    for logits, token in ((masked, 4), (torch.full((1, 1), -3.0, device=DEVICE), 0)):
        drawn = sample(logits, counting(1), 0, **rules, truncated_logprobs=True, backend=backend)
        assert [x.item() for x in drawn if x is not None] == [token, 0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("truncated", [False, True])
def test_no_sequence_at_all(truncated: bool, backend: str) -> None:
    for rules in RULES:
        drawn = sample(torch.zeros(0, 9, device=DEVICE), counting(0), 0, **rules,
                       truncated_logprobs=truncated, backend=backend)  # fmt: skip
        assert drawn.tokens.shape == drawn.logprobs.shape == (0,)
        assert (drawn.truncated_logprobs is not None) == truncated


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    logits, operator = normal(3, 20), torch.ops.fastomni.sample.default
    for top_k, top_p, truncated in ((0, 1.0, False), (0, 1.0, True), (5, 0.9, True)):
        settings = (0.8, top_k, top_p, 0.01 * truncated, truncated, backend)
        opcheck(operator, (logits, counting(3), counting(3), *settings))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("truncated", [False, True])
def test_torch_compile_gives_the_same(backend: str, truncated: bool) -> None:
    logits, seeds, positions = normal(4, 20).requires_grad_(), counting(4), counting(4)

    def step(logits: Tensor, seeds: Tensor, positions: Tensor | int) -> Sample:
        return sample(2 * logits, seeds, positions, 0.8, 6 * truncated, 0.9, 0.01, truncated,
                      backend)  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for position in (positions, 3):
        found, wanted = (f(logits, seeds, position) for f in (compiled, step))
        assert isinstance(found, Sample) and same_bits(found, wanted)
        assert (found.truncated_logprobs is not None) == truncated
        assert not found.logprobs.requires_grad


@pytest.mark.parametrize(
    ("rules", "names"),
    [
        ({"top_k": 1}, ["TopK"]),
        ({"top_k": 17}, ["TopK"]),
        ({"top_p": 0.3}, ["TopP"]),
        ({"top_p": 0.95}, ["TopP"]),
        ({"min_p": 0.02}, ["MinP"]),
        ({"top_k": 17, "min_p": 0.05}, ["TopK", "MinP"]),
        ({"top_p": 0.8, "min_p": 0.05}, ["TopP", "MinP"]),
    ],
    ids=str,
)
def test_the_kept_tokens_are_those_of_transformers(rules: dict[str, Any], names: list[str]) -> None:
    logits, temperature = 2 * normal(50, 300).cpu(), 0.8
    assert all(len(row.unique()) == 300 for row in logits)
    scores = processed(logits / temperature, rules, names)
    assert torch.equal(kept_by_us(logits, temperature, rules), scores > -math.inf)
    drawn = sample(logits, torch.arange(50), 0, temperature, **rules, truncated_logprobs=True)
    log_p = scores.log_softmax(-1).gather(1, drawn.tokens[:, None])[:, 0]
    assert drawn.truncated_logprobs is not None
    torch.testing.assert_close(drawn.truncated_logprobs, log_p, rtol=0, atol=2e-6)


def test_top_p_after_top_k_is_where_transformers_differs() -> None:
    # Theirs is a share of what top-k left, ours of everything: 0.4 of 0.4 + 0.3 is more than half.
    logits, rules = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log(), {"top_k": 2, "top_p": 0.5}
    theirs = processed(logits, rules, ["TopK", "TopP"]) > -math.inf
    assert theirs.tolist() == [[True, False, False, False]]
    assert kept_by_us(logits, 1.0, rules).tolist() == [[True, True, False, False]]


def processed(scores: Tensor, rules: dict[str, Any], names: list[str]) -> Tensor:
    """Scores after the warpers of transformers, one after another."""
    transformers = pytest.importorskip("transformers")
    for name, value in zip(names, rules.values(), strict=True):
        scores = getattr(transformers, f"{name}LogitsWarper")(value)(None, scores)
    return scores


def kept_by_us(logits: Tensor, temperature: float, rules: dict[str, Any]) -> Tensor:
    """Which tokens plain torch keeps."""
    distances = (logits - logits.amax(-1, keepdim=True)) * (1 / temperature)
    masses = distances.exp()
    given = [{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **rules}[name] for name in
             ("top_k", "top_p", "min_p")]  # fmt: skip
    return plain_sampling.kept_tokens(logits, distances, masses, masses.sum(-1)[:, None], *given)


def test_top_p_stops_where_the_mass_is_reached() -> None:
    logits = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log()
    for top_p, kept in ((0.49, [1]), (0.51, [1, 2]), (0.74, [1, 2]), (0.76, [0, 1, 2, 3])):
        mask = kept_by_us(logits, 1.0, {"top_p": top_p})
        assert mask[0].nonzero().flatten().tolist() == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "greedy decoding is logits.argmax"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": 1e-19}, "from 1e-06 to"),
        ({"top_k": -1}, r"sample: top_k=-1; use 0 \(off\) or a number of tokens"),
        ({"top_k": 2.5}, r"top_k=2\.5"),
        ({"top_k": True}, "top_k=True"),
        ({"top_p": 0.0}, r"sample: top_p=0\.0; it must be in \(0, 1\], 1 is off"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"top_p": "0.9"}, r"top_p='0\.9'; it must be a number from 0 to 1"),
        ({"min_p": -0.1}, r"sample: min_p=-0\.1; it must be in \[0, 1\], 0 is off"),
        ({"min_p": None}, "min_p=None; it must be a number"),
        ({"position": -1}, "sample: position=-1; it must be from 0 to 2"),
        ({"position": 2**31}, "position=2147483648"),
        ({"position": 1.0}, r"position is of type float; use an int or \[S\] torch\.int64"),
        ({"position": torch.zeros(2)}, r"position is torch\.float32; use torch\.int64"),
        ({"position": torch.zeros(1).long()}, r"position has shape \[1\]; it must be \[2\]"),
        ({"position": torch.zeros((), dtype=torch.int64)}, r"position has shape \[\]"),
        ({"seeds": torch.zeros(2)}, r"sample: seeds is torch\.float32; use torch\.int64"),
        ({"seeds": torch.arange(3)}, r"seeds has shape \[3\]; it must be \[2\]"),
        ({"seeds": torch.empty(2, dtype=torch.int64, device="meta")}, "seeds lies on meta, logits"),
        ({"seeds": [1, 2]}, "seeds is of type list; it must be a Tensor"),
        ({"logits": torch.zeros(3)}, r"logits has shape \[3\]; it must be \[S, V\]"),
        ({"logits": torch.zeros(2, 3).long()}, r"logits is torch\.int64; it must be a float"),
        ({"logits": torch.zeros(2, 0)}, "V must be 1 or more"),
        ({"backend": "cuda"}, "backend 'cuda' is unknown; use one of auto, triton, reference"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 3), "seeds": torch.arange(2), "position": 0, **options}
    with pytest.raises(ValueError, match=message):
        sample(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_that_are_no_distribution_are_refused_by_row(
    bad: list[float], rules: dict[str, Any], backend: str
) -> None:
    logits = torch.tensor([[0.0, 1.0], bad])
    with pytest.raises(ValueError, match=r"sequences \[1\] are NaN, \+inf or all -inf"):
        sample(logits, torch.arange(2), 0, **rules, backend=backend)


def test_an_int_position_is_refused_in_the_capture_of_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Stands for a tensor on a GPU, of which the check reads nothing but this.
    class OnGPU:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check = sample.__globals__["_check_host_position"]
    with pytest.raises(ValueError, match="the same in every replay of the CUDA graph"):
        check("sample", 3, OnGPU())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    check("sample", 3, OnGPU())


@pytest.mark.skipif(DEVICE == "cpu", reason="captures a CUDA graph")
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_a_cuda_graph_draws_anew_in_every_replay(rules: dict[str, Any]) -> None:
    logits, seeds, positions = normal(6, 5000), counting(6), counting(6) * 0
    sample(logits, seeds, positions, **rules, backend="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = sample(logits, seeds, positions, **rules, backend="triton")
        positions += 1
    positions.zero_()
    for step in range(5):
        graph.replay()
        assert same_bits(drawn, sample(logits, seeds, step, **rules, backend="triton"))
