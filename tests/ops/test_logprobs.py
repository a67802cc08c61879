"""Log-probabilities and entropy against torch's log_softmax in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastomni_kernels import chunked_logprobs, gather_logprobs, linear_logprobs, reference


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_ids(count: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0))


def plain_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("used", ["logprobs", "entropy", "both"])
def test_gradients_through_logprobs_and_entropy(temperature: float, used: str) -> None:
    hidden, weight = normal(11, 5).requires_grad_(), normal(7, 5, seed=1).requires_grad_()
    ids, coefficients = random_ids(11, 7), normal(2, 11, seed=2)
    coefficients *= torch.tensor([[float(used != "entropy")], [float(used != "logprobs")]])

    def total(outputs: tuple[Tensor, Tensor]) -> Tensor:
        parts = [c * x for c, x in zip(coefficients, outputs, strict=True) if c.any()]
        return torch.stack(parts).sum()

    expected = plain_logprobs(hidden @ weight.T, ids, temperature)
    expected_grads = torch.autograd.grad(total(expected), (hidden, weight))
    for actual in (
        gather_logprobs(hidden @ weight.T, ids, temperature),
        linear_logprobs(hidden, weight, ids, temperature),
        linear_logprobs(hidden, weight, ids, temperature, chunk_bytes=3 * 2 * 7 * 8),
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        grads = torch.autograd.grad(total(actual), (hidden, weight))
        torch.testing.assert_close(grads, expected_grads, rtol=0, atol=1e-12)


def test_gradcheck_of_both_outputs() -> None:
    hidden, weight = normal(4, 3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    ids = random_ids(4, 5)
    assert torch.autograd.gradcheck(lambda h, w: linear_logprobs(h, w, ids, 0.8), (hidden, weight))
    assert torch.autograd.gradcheck(
        lambda x: gather_logprobs(x, ids, 0.8), (weight[:4] @ weight.T,)
    )


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_changes_nothing_for_the_other(frozen: int) -> None:
    hidden, weight, ids = normal(4, 3), normal(5, 3, seed=1), random_ids(4, 5)
    trained = (weight, hidden)[frozen].requires_grad_()
    (actual,) = torch.autograd.grad(linear_logprobs(hidden, weight, ids)[0].sum(), trained)
    (hidden, weight)[frozen].requires_grad_()
    (expected,) = torch.autograd.grad(linear_logprobs(hidden, weight, ids)[0].sum(), trained)
    assert torch.equal(actual, expected)


def test_entropy_is_off_where_nobody_asks_for_it() -> None:
    hidden, weight, ids = normal(6, 3).requires_grad_(), normal(5, 3), random_ids(6, 5)
    for function, inputs in (
        (linear_logprobs, (hidden, weight)),
        (gather_logprobs, (hidden @ weight.T,)),
    ):
        with_it = function(*inputs, ids)
        without = function(*inputs, ids, with_entropy=False)
        torch.testing.assert_close(without[0], with_it[0], rtol=0, atol=1e-14)
        assert (without[1] == 0).all() and not without[1].requires_grad
        torch.testing.assert_close(
            torch.autograd.grad(without[0].sum(), hidden, retain_graph=True),
            torch.autograd.grad(with_it[0].sum(), hidden, retain_graph=True),
        )


@given(st.integers(0, 9), st.integers(1, 400))
@settings(max_examples=30, deadline=None)
def test_chunks_change_nothing(count: int, chunk_bytes: int) -> None:
    hidden, weight = normal(count, 3).requires_grad_(), normal(5, 3).requires_grad_()
    ids = random_ids(count, 5)
    results = []
    for chunk in (2**20, chunk_bytes):
        outputs = linear_logprobs(hidden, weight, ids, chunk_bytes=chunk)
        grads = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), (hidden, weight))
        results.append((*outputs, *grads))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


def allocated_bytes(profiler: profile, path: Path) -> list[int]:
    """What exists of torch's memory on the CPU after each allocation and release."""
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    existing, history = 0, []
    for event in sorted(changes, key=lambda event: float(event["ts"])):
        existing += int(event["args"]["Bytes"])
        history.append(existing)
    return history


@pytest.mark.parametrize("bound", [50_000, 200_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_beyond_inputs_and_gradients_stays_under_the_bound(
    tmp_path: Path, dtype: torch.dtype, bound: int
) -> None:
    hidden, weight = (normal(n, 8, seed=n).to(dtype).requires_grad_() for n in (300, 2000))
    ids = random_ids(300, 2000)

    def run() -> None:
        logprobs, entropy = linear_logprobs(hidden, weight, ids, chunk_bytes=bound)
        (logprobs + entropy).sum().backward()

    run()
    hidden.grad = weight.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    history = allocated_bytes(profiler, tmp_path / "trace.json")
    per_row = 4 * (3 * 8 + 24)  # hidden states and gradients in fp32; results and work, [300] each
    fixed = 300 * per_row + weight.numel() * weight.element_size()
    assert max(history) <= bound + fixed
    assert max(history) < 300 * 2000 * 4  # all logits at once


@pytest.mark.parametrize("chunk_bytes", [chunked_logprobs.DEFAULT_CHUNK_BYTES, 40_000])
def test_tiles_of_the_vocabulary_are_aligned(chunk_bytes: int) -> None:
    hidden, weight = torch.randn(40, 3), torch.randn(1000, 3)
    tiles = chunked_logprobs._Tiles(hidden, weight, 1.0, chunk_bytes, widened_copies=0)
    parts = [part for part, _ in tiles.columns()]
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert parts[0].start == 0 and parts[-1].stop == 1000
    assert all(part.start % 64 == 0 for part in parts)
    assert len(parts) == (1 if chunk_bytes > 10**6 else 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_token_at_all(poisoned_memory: None, dtype: torch.dtype) -> None:
    hidden, weight = (normal(n, 3).to(dtype).requires_grad_() for n in (0, 5))
    for values in (
        linear_logprobs(hidden, weight, random_ids(0, 5)),
        gather_logprobs(hidden @ weight.T, random_ids(0, 5)),
    ):
        assert [x.shape for x in values] == [(0,), (0,)]
        grads = torch.autograd.grad(values[0].sum() + values[1].sum(), (hidden, weight))
        assert grads[0].shape == (0, 3) and torch.equal(grads[1], torch.zeros_like(weight))


def test_float32_is_close_to_float64_and_bfloat16_is_computed_wider() -> None:
    hidden, weight, ids = normal(64, 32), 3 * normal(300, 32, seed=1), random_ids(64, 300)
    expected = plain_logprobs(hidden @ weight.T, ids, 1.0)
    actual = linear_logprobs(hidden.float(), weight.float(), ids)
    assert all(x.dtype == torch.float32 for x in actual)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)
    half = linear_logprobs(hidden.bfloat16(), weight.bfloat16(), ids)
    wide = linear_logprobs(hidden.bfloat16().float(), weight.bfloat16().float(), ids)
    assert torch.equal(half[0], wide[0]) and torch.equal(half[1], wide[1])


def test_very_negative_and_very_large_logits() -> None:
    logits = torch.tensor([[0.0, -1e4, -1e30], [-1e30, -1e30, -1e30], [3e38, 0.0, -3e38]])
    ids = torch.tensor([1, 2, 0])
    values, entropy = gather_logprobs(logits.requires_grad_(), ids)
    torch.testing.assert_close(values, torch.tensor([-1e4, -math.log(3), 0.0]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, math.log(3), 0.0]))
    (values.sum() + entropy.sum()).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("size", [1.0, 1e3])
def test_masked_logits_stay_so_under_large_gradients(size: float) -> None:
    logits = torch.tensor([[1.0, -math.inf, 0.5]], requires_grad=True)
    logprobs, entropy = gather_logprobs(logits, torch.tensor([2]))
    # -3e38 * 1e3 would overflow, and 0 * inf is NaN.
    (grad,) = torch.autograd.grad(size * (logprobs.sum() - entropy.sum()), logits)
    assert grad[0, 1] == 0 and grad.isfinite().all() and grad.abs().max() > 0.1 * size


def test_masked_logits_have_no_mass_and_no_gradient() -> None:
    logits = torch.tensor([[1.0, -math.inf, 0.5, -math.inf]], requires_grad=True)
    kept = torch.tensor([[1.0, 0.5]], requires_grad=True)
    actual = gather_logprobs(logits, torch.tensor([2]))
    expected = plain_logprobs(kept, torch.tensor([1]), 1.0)
    torch.testing.assert_close(actual, expected)
    (grad,) = torch.autograd.grad(actual[0].sum() + actual[1].sum(), logits)
    (kept_grad,) = torch.autograd.grad(expected[0].sum() + expected[1].sum(), kept)
    torch.testing.assert_close(grad[:, [0, 2]], kept_grad)
    assert (grad[:, [1, 3]] == 0).all()
    assert gather_logprobs(logits, torch.tensor([1]))[0].item() == -math.inf


@pytest.mark.parametrize(
    ("ids", "temperature", "message"),
    [
        (torch.tensor([0, 5]), 1.0, "ids go from 0 to 5 but the vocabulary has 5"),
        (torch.tensor([0, -100]), 1.0, "drop padding ids"),
        (torch.tensor([0, 1], dtype=torch.int32), 1.0, "must be torch.int64"),
        (torch.tensor([0]), 1.0, r"ids has shape \[1\]; it must be \[2\]"),
        (torch.tensor([0, 1]), 0.0, "temperature=0.0"),
        (torch.tensor([0, 1]), math.nan, "temperature=nan"),
        (torch.tensor([0, 1]), 1e-19, "temperature=1e-19; .* from 1e-06 to 1e\\+06"),
        (torch.tensor([0, 1]), 1e20, "temperature=1e\\+20; .* from 1e-06 to 1e\\+06"),
        (torch.tensor([0, 1]), "hot", "temperature='hot'"),
        (torch.tensor([0, 1]), True, "temperature=True"),
        (torch.tensor([0, 1]), torch.tensor(1.0), r"temperature=tensor\(1.\)"),
    ],
)
def test_ids_and_temperatures_that_mean_nothing_are_refused(
    ids: Tensor, temperature: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gather_logprobs(torch.zeros(2, 5), ids, temperature)
    with pytest.raises(ValueError, match=message):
        linear_logprobs(torch.zeros(2, 3), torch.zeros(5, 3), ids, temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_definitions_in_reference(temperature: float) -> None:
    hidden, weight = normal(9, 5).requires_grad_(), normal(40, 5, seed=1).requires_grad_()
    ids, coefficients = random_ids(9, 40), normal(2, 9, seed=2)
    logits = hidden @ weight.T
    logits = logits.masked_fill(torch.arange(40) == 39 - ids[:, None], -math.inf)
    for defined, ours in (
        (reference.gather_logprobs(logits, ids, temperature), None),
        (reference.linear_logprobs(hidden, weight, ids, temperature), linear_logprobs),
    ):
        if ours is None:
            actual = gather_logprobs(logits, ids, temperature)
        else:
            actual = ours(hidden, weight, ids, temperature)
        torch.testing.assert_close(actual, defined, rtol=0, atol=1e-12)
        grads = [
            torch.autograd.grad(
                (torch.stack(x) * coefficients).sum(), (hidden, weight), retain_graph=True
            )
            for x in (actual, defined)
        ]
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)]
)
def test_hidden_and_weight_may_differ_in_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    hidden, weight = (
        normal(n, 3, seed=n).to(dtype).requires_grad_()
        for n, dtype in zip((6, 5), dtypes, strict=True)
    )
    ids = random_ids(6, 5)
    wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    actual, wanted = linear_logprobs(hidden, weight, ids), linear_logprobs(*wide, ids)
    assert actual[0].dtype == actual[1].dtype == dtypes[1]
    torch.testing.assert_close(actual[0].double(), wanted[0], rtol=0, atol=1e-6)
    grads = torch.autograd.grad(actual[0].sum(), (hidden, weight))
    assert tuple(grad.dtype for grad in grads) == dtypes
    for grad, want in zip(grads, torch.autograd.grad(wanted[0].sum(), wide), strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=1e-2, atol=1e-6)
