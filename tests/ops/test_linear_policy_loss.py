"""linear_grpo_loss in both modes against logits, autograd and the loss of log-probs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastomni_kernels import (
    GroupLayout,
    LinearLoss,
    LossOptions,
    chunked_logprobs,
    grpo_loss,
    linear_grpo_loss,
    linear_policy_loss,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = ("recompute", "workspace")
WAYS = [(mode, backend) for mode in MODES for backend in ("reference", "triton")]
H, V = 6, 37

# A slab of three rows of fp64 logits; the plain path takes room for working copies besides.
THREE_ROWS = {"triton": 3 * V * 8, "reference": 3 * V * 8 + chunked_logprobs.GATHER_BYTES}


class Problem:
    """Hidden states, head, tokens and everything a loss may want, over ragged groups."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

        self.layout = GroupLayout.build([3, 2], [[4, 0, 7], [1, 5, 2]], DEVICE)
        tokens, sequences = self.layout.num_completion_tokens, self.layout.num_sequences
        self.hidden = normal(tokens, H).requires_grad_()
        self.weight = normal(V, H).requires_grad_()
        self.ids = torch.randint(V, (tokens,), generator=generator).to(DEVICE)
        self.advantages = normal(sequences)
        with torch.no_grad():
            logits = (self.hidden @ self.weight.T / 0.8).double()
            now = logits.log_softmax(-1).gather(1, self.ids[:, None])[:, 0]
            # 0.4 apart: some ratios are clipped, none by orders of magnitude.
            self.given = {
                "reference_logprobs": (now + 0.4 * normal(tokens)).to(dtype),
                "old_logprobs": (now + 0.4 * normal(tokens)).to(dtype),
            }
            self.given["rollout_logprobs"] = self.given["old_logprobs"] + 0.2 * normal(tokens)

    def loss(self, options: LossOptions, **keywords: Any) -> LinearLoss:
        return linear_grpo_loss(
            self.hidden, self.weight, self.ids, self.advantages, self.layout, options,
            temperature=0.8, **{**self.given, **keywords},
        )  # fmt: skip

    def expected(self, options: LossOptions, **totals: int) -> LinearLoss:
        """From materialised logits in float64, by torch's own log_softmax and autograd."""
        logits = self.hidden.double() @ self.weight.double().T / 0.8
        log_p = logits.log_softmax(-1)
        logprobs = log_p.gather(1, self.ids[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        loss, metrics = grpo_loss(
            logprobs, self.advantages, self.layout, options, entropy=entropy, backend="reference",
            **{name: x.double() for name, x in self.given.items()}, **totals,
        )  # fmt: skip
        return LinearLoss(loss, metrics, logprobs.detach(), entropy.detach())

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))


OPTIONS = [
    LossOptions(),
    LossOptions(beta=0.04, kl="k2", reduction="dapo", dual_clip=1.5),
    LossOptions(policy="cispo", cispo_max=1.1, entropy_coef=0.1, reduction="bnpo"),
    LossOptions(policy="sapo", mismatch="token_truncate", mismatch_max=1.1, beta=0.1),
    LossOptions(mismatch="token_mask", mismatch_max=1.1, reduction="dr_grpo", max_completion=9),
]
BY_SEQUENCE = [
    LossOptions(ratio="sequence", clip_low=0.01, clip_high=0.01, entropy_coef=0.1),
    LossOptions(mismatch="sequence_mask", mismatch_max=1.5),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o.policy}-{o.reduction}-{o.mismatch}")
@pytest.mark.parametrize(("mode", "backend"), WAYS)
def test_both_modes_give_the_loss_of_the_logits(
    mode: str, backend: str, options: LossOptions, poisoned_memory: None
) -> None:
    problem = Problem()
    expected = problem.expected(options)
    actual = problem.loss(options, mode=mode, backend=backend, workspace_bytes=THREE_ROWS[backend])
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0, atol=1e-9)
    assert actual.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        torch.testing.assert_close(actual.metrics[name], value, rtol=0, atol=1e-9, msg=name)
        assert not actual.metrics[name].requires_grad
    for name in ("logprobs", "entropy"):
        got, want = getattr(actual, name), getattr(expected, name)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
        assert not got.requires_grad
    # Scaled, as a loss is that is one of several.
    grads, wanted = problem.gradients(-3 * actual.loss), problem.gradients(-3 * expected.loss)
    torch.testing.assert_close(grads, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", BY_SEQUENCE, ids=["ratio", "mismatch"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_needs_whole_sequences_is_recomputed(backend: str, options: LossOptions) -> None:
    problem = Problem()
    expected = problem.expected(options)
    actual = problem.loss(options, backend=backend)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        problem.gradients(actual.loss), problem.gradients(expected.loss), rtol=0, atol=1e-9
    )
    with pytest.raises(ValueError, match=r"mode='workspace' cannot be had: .* whole sequences"):
        problem.loss(options, mode="workspace")


def test_gradcheck() -> None:
    # Of the mode that allows several backwards; the other is compared with it above.
    problem = Problem()
    options = LossOptions(policy="sapo", beta=0.1, entropy_coef=0.1)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        problem.hidden, problem.weight = hidden, weight
        return problem.loss(options, mode="recompute").loss

    assert torch.autograd.gradcheck(loss, (problem.hidden, problem.weight))


@pytest.mark.parametrize("mode", ["recompute", "workspace"])
def test_micro_batches_add_up_to_the_batch(mode: str) -> None:
    problem = Problem()
    layout, options = problem.layout, LossOptions(beta=0.04, entropy_coef=0.1)
    whole = problem.expected(options)
    total = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for start, stop in ((0, 1), (1, 2)):
        tokens = slice(layout.token_offsets[start], layout.token_offsets[stop])
        sequences = slice(layout.sequence_offsets[start], layout.sequence_offsets[stop])
        part = linear_grpo_loss(
            problem.hidden[tokens], problem.weight, problem.ids[tokens],
            problem.advantages[sequences], layout.select_prompts(start, stop), options,
            temperature=0.8, mode=mode, num_sequences=layout.num_sequences,
            num_tokens=layout.num_completion_tokens,
            **{name: x[tokens] for name, x in problem.given.items()},
        )  # fmt: skip
        total = total + part.loss
    torch.testing.assert_close(total, whole.loss, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        problem.gradients(total), problem.gradients(whole.loss), rtol=0, atol=1e-9
    )


def test_the_size_of_a_slab_changes_nothing() -> None:
    problem = Problem()
    one_row = problem.loss(OPTIONS[0], mode="workspace", workspace_bytes=1)
    at_once = problem.loss(OPTIONS[0], mode="workspace")
    torch.testing.assert_close(one_row.loss, at_once.loss, rtol=0, atol=1e-12)
    for name, value in at_once.metrics.items():
        torch.testing.assert_close(one_row.metrics[name], value, rtol=0, atol=1e-12, msg=name)
    torch.testing.assert_close(
        problem.gradients(one_row.loss), problem.gradients(at_once.loss), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("frozen", "trained"), [("hidden", "weight"), ("weight", "hidden")])
@pytest.mark.parametrize("mode", ["recompute", "workspace"])
def test_what_is_frozen_gets_no_gradient(mode: str, frozen: str, trained: str) -> None:
    problem = Problem()
    x = getattr(problem, trained)
    (both,) = torch.autograd.grad(problem.loss(OPTIONS[0], mode=mode).loss, x)
    getattr(problem, frozen).requires_grad_(False)
    loss = problem.loss(OPTIONS[0], mode=mode).loss
    loss.backward()
    assert torch.equal(x.grad, both)
    assert getattr(problem, frozen).grad is None


def test_without_gradients_none_are_made() -> None:
    problem = Problem()
    with torch.no_grad():
        made: list[int] = []
        with allocations(made):
            quiet = problem.loss(OPTIONS[0], mode="workspace")
    assert problem.weight.numel() * 8 not in made
    assert not quiet.loss.requires_grad
    torch.testing.assert_close(quiet.loss, problem.expected(OPTIONS[0]).loss.detach())


def test_a_second_backward_is_refused() -> None:
    problem = Problem()
    loss = problem.loss(OPTIONS[0], mode="workspace").loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^linear_grpo_loss: .* use mode='recompute'"):
        loss.backward()
    recomputed = problem.loss(OPTIONS[0], mode="recompute").loss
    recomputed.backward(retain_graph=True)
    recomputed.backward()


def test_no_tokens_at_all() -> None:
    layout = GroupLayout.build([3], [[0, 0]], DEVICE)
    hidden = torch.zeros(0, H, device=DEVICE, requires_grad=True)
    weight = torch.randn(V, H, device=DEVICE, requires_grad=True)
    ids = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for mode in ("recompute", "workspace"):
        out = linear_grpo_loss(hidden, weight, ids, torch.ones(2, device=DEVICE), layout, mode=mode)
        assert out.loss.item() == 0 and out.logprobs.shape == (0,)
        grads = torch.autograd.grad(out.loss, (hidden, weight))
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_half_precision_is_computed_wider(backend: str) -> None:
    problem = Problem(torch.bfloat16)
    options = LossOptions(beta=0.04)
    expected = problem.expected(options)
    actual = problem.loss(options, backend=backend)
    assert actual.loss.dtype == torch.float32
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=1e-4, atol=1e-4)
    for got, want in zip(
        problem.gradients(actual.loss), problem.gradients(expected.loss), strict=True
    ):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want.double(), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(("mode", "backend"), WAYS)
def test_registration_and_compilation(mode: str, backend: str) -> None:
    problem = Problem()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        problem.hidden, problem.weight = hidden, weight
        return 3 * problem.loss(OPTIONS[1], mode=mode, backend=backend).loss

    inputs = problem.hidden, problem.weight
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs)
    )
    if mode == "workspace":
        with captured_arguments() as arguments:
            loss(*inputs)
        operator = torch.ops.fastomni.linear_grpo_loss.default
        torch.library.opcheck(operator, arguments[0])


@contextmanager
def captured_arguments() -> Iterator[list[tuple[Any, ...]]]:
    """The arguments with which the operator is called inside."""
    seen: list[tuple[Any, ...]] = []
    original = linear_policy_loss.workspace_loss

    def record(*arguments: Any) -> Any:
        seen.append(arguments)
        return original(*arguments)

    linear_policy_loss.workspace_loss = record
    try:
        yield seen
    finally:
        linear_policy_loss.workspace_loss = original


@contextmanager
def allocations(sizes: list[int]) -> Iterator[None]:
    """Collects the bytes of every tensor that torch makes inside."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, Tensor):
                    sizes.append(x.numel() * x.element_size())
            return result

    with Watch():
        yield


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "fast"}, "mode='fast'; use one of auto, recompute, workspace"),
        ({"workspace_bytes": -1}, "workspace_bytes=-1; it must be positive"),
        ({"temperature": 0.0}, "temperature=0.0; it must be a positive number"),
        ({"hidden": [[1.0]]}, "hidden is of type list; it must be a Tensor"),
        ({"layout": [19]}, "layout is of type list; it must be a GroupLayout"),
        ({"options": {"beta": 0.04}}, "options is of type dict; it must be a LossOptions"),
        ({"workspace_bytes": 0}, "workspace_bytes=0; it must be positive"),
        ({"num_tokens": 3}, "num_tokens=3 but this micro-batch alone has 19"),
        ({"reference_logprobs": None}, r"beta=0.04 needs reference_logprobs, which is missing"),
        ({"old_logprobs": torch.zeros(3)}, r"old_logprobs has shape \[3\]; it must be \[19\]"),
        ({"advantages": torch.zeros(3)}, r"advantages has shape \[3\]; it must be \[6\]"),
        ({"ids": torch.full((19,), V)}, f"ids go from {V} to {V} but the vocabulary has {V}"),
        ({"ids": torch.zeros(19)}, "ids are torch.float32; they must be torch.int64"),
        ({"weight": torch.zeros(V, H + 1)}, rf"weight has shape .*; it must be \[V, {H}\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    problem = Problem(torch.float32)
    arguments = {
        "hidden": problem.hidden, "weight": problem.weight, "ids": problem.ids,
        "advantages": problem.advantages, "layout": problem.layout,
        "options": LossOptions(beta=0.04), **problem.given,
    }  # fmt: skip
    changes = {k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in changes.items()}
    with pytest.raises(ValueError, match=f"linear_grpo_loss: .*{message}"):
        linear_grpo_loss(**{**arguments, **changes})
