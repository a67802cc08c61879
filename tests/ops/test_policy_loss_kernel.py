"""The policy loss's kernels against the definition, and the operator with either of them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from fastomni_kernels import GroupLayout, LossOptions, grpo_loss
from fastomni_kernels.policy_loss import METRICS, loss_settings

pytest.importorskip("triton")

from fastomni_kernels.triton_kernels import policy_loss as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")
MISMATCHES = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
OPTIONAL = ("entropy", "reference_logprobs", "old_logprobs", "rollout_logprobs")

# Sums in another order. Kernels take numbers as fp32: those below are exact in it.
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-10}


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def random_tensors(tokens: int) -> dict[str, Tensor]:
    """Log-probs that drift apart as far as every clipping notices, and entropies."""
    logprobs = 0.4 * normal(tokens) - 2
    old = logprobs + 0.3 * normal(tokens, seed=1)
    rollout = old + 0.3 * normal(tokens, seed=3)
    rollout[1::5] = math.nan
    return {
        "logprobs": logprobs,
        "entropy": normal(tokens, seed=4).abs(),
        "reference_logprobs": logprobs + 0.3 * normal(tokens, seed=2),
        "old_logprobs": old,
        "rollout_logprobs": rollout,
    }


def loss_options(**changes: Any) -> LossOptions:
    """All terms at work; numbers are exact in fp32."""
    settings = {"beta": 0.25, "entropy_coef": 0.125} | {
        "clip": {"clip_low": 0.25, "clip_high": 0.375, "dual_clip": 1.5},
        "cispo": {"cispo_max": 1.25},
        "sapo": {"sapo_temperature_positive": 0.75, "sapo_temperature_negative": 1.125},
    }[changes.get("policy", "clip")]
    if changes.get("mismatch", "none") != "none":
        settings |= {"mismatch_min": 0.875, "mismatch_max": 1.125}
    return LossOptions(**{**settings, **changes})


def compare(layout: GroupLayout, options: LossOptions, tensors: dict[str, Tensor]) -> None:
    """Loss, gradients and every metric of the kernels and of the definition."""
    advantages = normal(layout.num_sequences, seed=5).to(tensors["logprobs"].dtype)
    results = []
    for backend in BACKENDS:
        given = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
        # A denominator that is a power of two: token_weight is handed over as fp32.
        loss, metrics = grpo_loss(
            given["logprobs"],
            advantages,
            layout,
            options,
            **{name: given[name] for name in OPTIONAL if name in given},
            num_tokens=2048,
            backend=backend,
        )
        loss.backward()
        grads = {
            f"grad_{name}": given[name].grad for name in ("logprobs", "entropy") if name in given
        }
        results.append({"loss": loss.detach(), **metrics, **grads})
    expected, found = results
    assert found.keys() == expected.keys()
    tolerance = TOLERANCES[expected["loss"].dtype]
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes short sequences and few of them take several steps of each loop."""
    monkeypatch.setattr(kernels, "BLOCK", 4)


@pytest.mark.usefixtures("poisoned_memory", "small_blocks")
@pytest.mark.parametrize("mismatch", MISMATCHES)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("policy", ["clip", "cispo", "sapo"])
def test_kernels_are_the_definition(policy: str, ratio: str, mismatch: str) -> None:
    layout = GroupLayout.build([1, 2], [[3, 0, 9, 4], [0, 5]], DEVICE)
    kl = ("k1", "k2", "k3")[MISMATCHES.index(mismatch) % 3]
    options = loss_options(policy=policy, ratio=ratio, mismatch=mismatch, kl=kl)
    compare(layout, options, random_tensors(21))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("present", list(itertools.product([False, True], repeat=4)))
def test_each_tensor_may_be_missing(present: tuple[bool, ...]) -> None:
    tensors = random_tensors(7)
    for name, is_present in zip(OPTIONAL, present, strict=True):
        if not is_present:
            del tensors[name]
    options = LossOptions(
        beta=0.25 if "reference_logprobs" in tensors else 0,
        entropy_coef=0.125 if "entropy" in tensors else 0,
        mismatch="token_mask" if "rollout_logprobs" in tensors else "none",
    )
    compare(GroupLayout.build([1], [[4, 3]], DEVICE), options, tensors)


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=6),
    st.sampled_from(MISMATCHES),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=8, deadline=None)
def test_ragged_layouts(lengths: list[int], mismatch: str, dtype: torch.dtype) -> None:
    layout = GroupLayout.build([1], [lengths], DEVICE)
    tensors = random_tensors(layout.num_completion_tokens)
    options = loss_options(mismatch=mismatch, ratio="sequence" if len(lengths) % 2 else "token")
    compare(layout, options, {name: x.to(dtype) for name, x in tensors.items()})


def test_sequences_longer_than_a_block_and_one_token() -> None:
    lengths = [kernels.BLOCK + 1, 1, 2 * kernels.BLOCK]
    layout = GroupLayout.build([1], [lengths], DEVICE)
    tensors = {name: x.float() for name, x in random_tensors(sum(lengths)).items()}
    options = loss_options(ratio="sequence", mismatch="token_truncate", reduction="dapo")
    compare(layout, options, tensors)


def test_strides_are_respected() -> None:
    layout = GroupLayout.build([1], [[4, 3]], DEVICE)
    tensors = {
        name: torch.stack([x, torch.full_like(x, math.nan)], 1)[:, 0]
        for name, x in random_tensors(7).items()
    }
    assert not tensors["logprobs"].is_contiguous()
    given = {name: tensors[name] for name in OPTIONAL}
    advantages = torch.ones(1, dtype=torch.float64, device=DEVICE).expand(2)
    options = loss_options(mismatch="token_truncate")
    losses = [
        grpo_loss(tensors["logprobs"], advantages, layout, options, **given, backend=backend)[0]
        for backend in BACKENDS
    ]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)


def test_same_input_same_bits() -> None:
    layout = GroupLayout.build([1], [[5, 2, 6]], DEVICE)
    tensors = {name: x.float() for name, x in random_tensors(13).items()}
    arguments = operator_arguments(layout, loss_options(), tensors, "triton")
    first, second = (torch.ops.fastomni.grpo_loss.default(*arguments) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_the_kl_keeps_its_digits_near_zero() -> None:
    """k3 of 2^-12 is 2^-25, which exp(d) - 1 - d rounds to 0 or 2^-23 in fp32."""
    layout = GroupLayout.build([1], [[3]], DEVICE)
    logprobs = torch.zeros(3, device=DEVICE, requires_grad=True)
    reference = torch.tensor([2.0**-12, -(2.0**-12), 0.0], device=DEVICE)
    loss, metrics = grpo_loss(
        logprobs,
        torch.zeros(1, device=DEVICE),
        layout,
        LossOptions(beta=1.0),
        reference_logprobs=reference,
        backend="triton",
    )
    assert metrics["kl"].item() == pytest.approx(2 * 2.0**-25 / 3, rel=1e-3)
    (grad,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(grad, -reference.double().expm1().float() / 3, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ratio_beyond_all_numbers_is_clipped_like_any_other(backend: str) -> None:
    """exp(200) is infinite in fp32; clipped, or times no advantage, it must not be noticed."""
    layout = GroupLayout.build([1], [[1, 1, 1, 1]], DEVICE)
    logprobs = torch.tensor([0.0, 0.0, -200.0, 0.0], device=DEVICE, requires_grad=True)
    loss, metrics = grpo_loss(
        logprobs,
        torch.tensor([1.0, -1.0, -1.0, 0.0], device=DEVICE),
        layout,
        LossOptions(dual_clip=3.0, clip_low=0.25, clip_high=0.25),
        old_logprobs=torch.tensor([-200.0, -200.0, 0.0, -200.0], device=DEVICE),
        backend=backend,
    )
    assert loss.item() == pytest.approx((-1.25 + 3 + 0.75) / 4)
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert grad.tolist() == [0.0, 0.0, 0.0, 0.0]
    assert metrics["ratio/max"].item() == pytest.approx(math.exp(60), rel=1e-5)


def test_what_ships_holds_every_branch() -> None:
    shipped = kernels.shipped("sm_90")
    assert {variant.kernel for variant in shipped} == {
        kernels.sequence_loss_kernel,
        kernels.batch_loss_kernel,
    }
    variants = [v for v in shipped if v.kernel is kernels.sequence_loss_kernel]
    for name, values in {
        "POLICY": {"clip", "cispo", "sapo"},
        "KL": {"k1", "k2", "k3"},
        "MISMATCH": {"none", "truncate", "mask"},
        "SEQUENCE_RATIO": {False, True},
        "SEQUENCE_MISMATCH": {False, True},
    }.items():
        assert {variant.constexprs[name] for variant in variants} == values
    for name in OPTIONAL:
        assert {name in variant.signature for variant in variants} == {False, True}


def operator_arguments(
    layout: GroupLayout, options: LossOptions, tensors: dict[str, Tensor], backend: str
) -> list[Any]:
    """Arguments of the operator itself; every token has its sequence's number as weight."""
    sequences = layout.num_sequences
    return [
        *(tensors.get(name) for name in ("logprobs", *OPTIONAL)),
        normal(sequences, seed=5).to(tensors["logprobs"].dtype),
        layout.cu_completions,
        0.01 * (1 + torch.arange(sequences, device=DEVICE, dtype=tensors["logprobs"].dtype)),
        *loss_settings(options, layout.num_completion_tokens),
        backend,
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_slabs_of_tokens_add_up(backend: str) -> None:
    """The fused loss calls the operator on ranges of tokens that cut sequences anywhere."""
    layout = GroupLayout.build([1, 1], [[3, 0, 4], [1, 5]], DEVICE)
    tensors = random_tensors(13)
    options = LossOptions(beta=0.25, mismatch="token_mask", entropy_coef=0.125, dual_clip=1.5)
    arguments = operator_arguments(layout, options, tensors, backend)
    operator = torch.ops.fastomni.grpo_loss.default
    loss, metrics, grad = operator(*arguments)
    parts = []
    for first, last in itertools.pairwise([0, 2, 5, 5, 8, 13]):
        cut = [None if x is None else x[first:last] for x in arguments[:5]]
        cu_completions = layout.cu_completions.clamp(first, last) - first
        parts.append(operator(*cut, arguments[5], cu_completions, *arguments[7:]))
    torch.testing.assert_close(torch.stack([part[0] for part in parts]).sum(), loss)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), grad)
    totals = [i for i, name in enumerate(METRICS) if not name.endswith(("/min", "/max"))]
    summed = torch.stack([part[1] for part in parts]).sum(0)
    torch.testing.assert_close(summed[totals], metrics[totals])


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_tokens(lengths: list[int], backend: str) -> None:
    layout = GroupLayout.build([1], [lengths], DEVICE)
    empty = torch.zeros(0, device=DEVICE)
    logprobs = torch.zeros(0, device=DEVICE, requires_grad=True)
    options = LossOptions(beta=0.1, entropy_coef=0.1, mismatch="sequence_mask", ratio="sequence")
    loss, metrics = grpo_loss(
        logprobs,
        torch.ones(len(lengths), device=DEVICE),
        layout,
        options,
        reference_logprobs=empty,
        rollout_logprobs=empty,
        entropy=empty,
        backend=backend,
    )
    assert loss.item() == 0
    loss.backward()
    ones = [f"{x}/{end}" for x in ("ratio", METRICS[8][:-5]) for end in ("min", "max")]
    assert {k: v.item() for k, v in metrics.items()} == {
        name: float(name in ones) for name in METRICS
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend: str) -> None:
    layout = GroupLayout.build([1], [[2, 0, 1]], DEVICE)
    tensors = {name: x.float() for name, x in random_tensors(3).items()}
    for name in ("logprobs", "entropy"):
        tensors[name].requires_grad_()
    options = LossOptions(beta=0.1, entropy_coef=0.1, mismatch="sequence_mask")
    opcheck(
        torch.ops.fastomni.grpo_loss.default, operator_arguments(layout, options, tensors, backend)
    )
    alone = {"logprobs": tensors["logprobs"]}
    opcheck(
        torch.ops.fastomni.grpo_loss.default,
        operator_arguments(layout, LossOptions(), alone, backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_one_node_of_a_compiled_graph(backend: str) -> None:
    layout = GroupLayout.build([1], [[2, 0, 1]], DEVICE)
    given = random_tensors(3)
    logprobs = given.pop("logprobs").requires_grad_()
    entropy = given.pop("entropy").requires_grad_()
    options = LossOptions(beta=0.25, entropy_coef=0.125, mismatch="token_truncate")
    advantages = normal(3, seed=5)

    def run(logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        loss, metrics = grpo_loss(
            logprobs, advantages, layout, options, entropy=entropy, **given, backend=backend
        )
        return 2 * loss, metrics["sampling/importance_sampling_ratio/max"]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for plain, fast in zip(run(logprobs, entropy), compiled(logprobs, entropy), strict=True):
        torch.testing.assert_close(plain.detach(), fast.detach())
    grads = [
        torch.autograd.grad(function(logprobs, entropy)[0], (logprobs, entropy))
        for function in (run, compiled)
    ]
    torch.testing.assert_close(*grads)
