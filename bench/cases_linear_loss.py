"""Case of linear_grpo_loss: hidden states in, loss and gradients of hidden states and head out.

Shapes: M completion tokens (S completions of C each), H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastomni_kernels
from bench import heads
from bench.cases import TRAINING, Answer, Call, Case, Problem, Provider, gradients
from bench.cases_logprobs import HEAD_SIZES, head_cost
from bench.cases_policy import NO_GPU, OPTIONS, compiled, exact_loss, identity, policy_tensors
from bench.definitions import (
    BETA,
    CLIP,
    completions,
    exact_linear_gradients,
    exact_linear_logprobs,
    random_head,
    random_policy,
    token_loss,
)
from fastomni_kernels import GroupLayout

# Where the goal of the CPU path is measured (see `bench.goals`); some minutes on two cores.
CPU_SIZE = (512, 896, 151936)


def make_problem(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
    """A batch whose old policy differs from the new one token by token."""
    tokens, width, vocabulary = sizes
    hidden, weight, ids = random_head(tokens, width, vocabulary, device, dtype)
    logprobs, _ = exact_linear_logprobs(hidden, weight, ids)
    number, length = shape = completions(len(ids))
    layout = GroupLayout.build([1], [[length] * number], device=device)
    inputs = {"hidden": hidden, "weight": weight, "ids": ids, **random_policy(logprobs)}
    problem = Problem(inputs, {}, settings={"layout": layout, "shape": shape})
    grad_logprobs = exact_loss(problem, logprobs)
    problem.exact |= exact_linear_gradients(hidden, weight, ids, grad_logprobs)
    hidden.requires_grad_()
    weight.requires_grad_()
    return problem


def finish(problem: Problem, loss: Tensor) -> Answer:
    """The loss and the gradients of hidden and weight."""
    leaves = {name: problem[name] for name in ("hidden", "weight")}
    return {"loss": loss.detach(), **gradients([loss], leaves)}


def ours(problem: Problem, backend: str, mode: str) -> Call:
    """fastomni_kernels.linear_grpo_loss with entropy and all its metrics."""
    hidden, weight, ids = (problem[name] for name in ("hidden", "weight", "ids"))
    old, reference = problem["old_logprobs"], problem["reference_logprobs"]
    advantages, layout = problem["advantages"], problem.settings["layout"]

    def call() -> Answer:
        result = fastomni_kernels.linear_grpo_loss(
            hidden, weight, ids, advantages, layout, OPTIONS, old_logprobs=old,
            reference_logprobs=reference, mode=mode, backend=backend,
        )  # fmt: skip
        return finish(problem, result.loss)

    return call


def from_head(
    problem: Problem,
    head: heads.Head,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = identity,
) -> Call:
    """Any head, then the loss in torch; the entropy is computed for the log, as trainers do."""
    old, reference, advantages = policy_tensors(problem, torch.float32)

    def loss_and_entropy(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        logprobs, entropy = head(hidden, weight)
        loss = token_loss(logprobs, old, reference, advantages).mean()
        return loss, None if entropy is None else entropy.mean()

    function = wrap(loss_and_entropy)

    def call() -> Answer:
        loss, _ = function(problem["hidden"], problem["weight"])
        return finish(problem, loss)

    return call


def liger_fused(problem: Problem) -> Call:
    """Liger's chunked loss; its parts are compiled on a GPU, as its default says."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, shape = problem["hidden"], problem.settings["shape"]
    module = LigerFusedLinearGRPOLoss(
        beta=BETA, compiled=hidden.is_cuda, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="dapo"
    )
    ids = problem["ids"].view(shape)
    old, reference = (problem[name].view(shape) for name in ("old_logprobs", "reference_logprobs"))
    mask = torch.ones(shape, device=hidden.device)

    def call() -> Answer:
        loss, _ = module(
            hidden.view(*shape, hidden.shape[1]), problem["weight"], ids, mask,
            problem["advantages"], ref_per_token_logps=reference, old_per_token_logps=old,
        )  # fmt: skip
        return finish(problem, loss)

    return call


def liger_triton(problem: Problem) -> Call:
    """All logits, then Liger's Triton loss on them; it wants one row more per completion."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    hidden, shape = problem["hidden"], problem.settings["shape"]
    ids = problem["ids"].view(shape)
    old, reference = (problem[name].view(shape) for name in ("old_logprobs", "reference_logprobs"))

    def call() -> Answer:
        rows = F.pad(hidden.view(*shape, hidden.shape[1]), (0, 0, 0, 1))
        loss, _ = triton_grpo_loss(
            rows @ problem["weight"].T, old, reference, ids, problem["advantages"],
            temperature=1.0, beta=BETA, eps_low=CLIP, eps_high=CLIP, loss_type="dapo",
            reduce=True,
        )  # fmt: skip
        return finish(problem, loss)

    return call


def our_providers() -> list[Provider]:
    """Both modes, as Triton kernels and in plain torch."""

    def provider(backend: str, mode: str) -> Provider:
        triton = backend == "triton"
        return Provider(
            f"fastomni {backend} {mode}",
            lambda p: ours(p, backend, mode),
            True,
            ("triton",) if triton else (),
            ("cuda",) if triton else ("cpu", "cuda"),
            NO_GPU,
            strict=True,
        )

    return [provider(b, m) for b in ("triton", "reference") for m in ("workspace", "recompute")]


def head_provider(maker: heads.HeadMaker) -> Provider:
    """A library's head and the loss in torch."""
    return Provider(
        maker.name,
        lambda p: from_head(p, maker.prepare(p)),
        modules=maker.modules,
        devices=maker.devices,
    )


CASES = (
    Case(
        "linear_grpo_loss",
        TRAINING,
        ("M", "H", "V"),
        {**HEAD_SIZES, "cpu": CPU_SIZE},
        head_cost(TRAINING),
        make_problem,
        (
            *our_providers(),
            head_provider(heads.EAGER),
            Provider("torch.compile", lambda p: from_head(p, heads.eager(p), compiled)),
            *(head_provider(maker) for maker in heads.PEERS),
            Provider("Liger fused linear", liger_fused, modules=("liger_kernel",)),
            Provider(
                "Liger triton", liger_triton, modules=("liger_kernel", "triton"), devices=("cuda",)
            ),
        ),
    ),
)
