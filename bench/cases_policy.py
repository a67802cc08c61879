"""Cases on numbers per token and per completion: group_advantages and grpo_loss.

Shapes: N prompts, G completions per prompt, S completions of C tokens each, M = S * C tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastomni_kernels
from bench.cases import FORWARD, TRAINING, Answer, Call, Case, Cost, Problem, Provider, gradients
from bench.definitions import BETA, CLIP, generator, random_policy, token_loss
from fastomni_kernels import GroupLayout
from fastomni_kernels.options import LossOptions

OPTIONS = LossOptions(reduction="dapo", beta=BETA, kl="k3", clip_low=CLIP, clip_high=CLIP)
NO_GPU = "Triton kernels are timed on a GPU only; in Triton's interpreter a time means nothing"


def ours(prepare: Callable[[Problem, str], Call]) -> tuple[Provider, Provider]:
    """The project's two providers of a case: the Triton kernels and the plain torch path."""
    return (
        Provider("fastomni triton", lambda p: prepare(p, "triton"), True, ("triton",), ("cuda",),
                 NO_GPU, strict=True),
        Provider("fastomni reference", lambda p: prepare(p, "reference"), True, strict=True),
    )  # fmt: skip


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` for one shape, from a clean slate: cases must not share a cache limit."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


# group_advantages


def advantages_cost(sizes: Sequence[int], itemsize: int) -> Cost:
    """Rewards in, advantages out; mean, centre, square, sum, divide."""
    prompts, generations = sizes
    return Cost(
        8.0 * prompts * generations, 6.0 * prompts * generations, "bytes 8 N G, FLOPs 6 N G"
    )


def advantages_problem(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
    """Rewards of 0, 0.5 and 1, and one that could not be given."""
    if sizes[1] < 3:
        raise ValueError(f"group_advantages: G={sizes[1]}; the benchmark needs 3 or more")
    draw = generator(device)
    rewards = torch.randint(3, tuple(sizes), generator=draw, device=device).to(dtype) / 2
    rewards[:, :2] = torch.tensor([0.0, 1.0])  # no group without spread
    rewards[0, 2] = torch.nan
    wide = rewards.double()
    centred = wide - wide.nanmean(1, keepdim=True)
    count = (~wide.isnan()).sum(1, keepdim=True)
    std = (centred.square().nansum(1, keepdim=True) / (count - 1)).sqrt()
    return Problem({"rewards": rewards}, {"advantages": (centred / (std + 1e-4)).nan_to_num(0.0)})


def eager_advantages(rewards: Tensor) -> Tensor:
    """The formula in torch, aware of NaN."""
    mean = rewards.nanmean(1, keepdim=True)
    centred = rewards - mean
    count = (~rewards.isnan()).sum(1, keepdim=True)
    std = (centred.square().nansum(1, keepdim=True) / (count - 1)).sqrt()
    return (centred / (std + 1e-4)).nan_to_num(0.0)


def our_advantages(problem: Problem, backend: str) -> Call:
    """fastomni_kernels.group_advantages."""
    rewards = problem["rewards"]

    def call() -> Answer:
        result = fastomni_kernels.group_advantages(rewards, backend=backend)
        return {"advantages": result.advantages}

    return call


def torch_advantages(problem: Problem, function: Callable[[Tensor], Tensor]) -> Call:
    """Any function of the rewards alone."""
    rewards = problem["rewards"]
    return lambda: {"advantages": function(rewards)}


def trl_advantages(problem: Problem) -> Call:
    """The lines of TRL's `_generate_and_score_completions`, with its nanstd."""
    from trl.trainer.utils import nanstd

    def advantages(rewards: Tensor) -> Tensor:
        mean = torch.nanmean(rewards, dim=1, keepdim=True)
        scaled = (rewards - mean) / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)
        return torch.nan_to_num(scaled, nan=0.0)

    return torch_advantages(problem, advantages)


# grpo_loss


def loss_cost(sizes: Sequence[int], itemsize: int) -> Cost:
    """Three log-probs in and one gradient out per token, fp32; two exponentials and the rest."""
    sequences, length = sizes
    tokens = sequences * length
    return Cost(
        16.0 * tokens + 4.0 * sequences, 30.0 * tokens, "bytes 16 M + 4 S, FLOPs 30 M, M = S C"
    )


def loss_problem(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
    """Log-probs of three policies and an advantage per completion."""
    sequences, length = sizes
    tokens = sequences * length
    draw = generator(device)
    logprobs = -torch.empty(tokens, device=device).exponential_(generator=draw)
    inputs = random_policy(logprobs)
    inputs["advantages"] = torch.randn(sequences, generator=draw, device=device)
    inputs["logprobs"] = logprobs.requires_grad_()
    layout = GroupLayout.build([1], [[length] * sequences], device=device)
    problem = Problem(inputs, {}, settings={"layout": layout, "shape": (sequences, length)})
    exact_loss(problem, logprobs)
    return problem


def exact_loss(problem: Problem, logprobs: Tensor) -> Tensor:
    """Set the exact loss, and return its gradient [M] for the log-probs, float64."""
    wide = logprobs.detach().double().requires_grad_()
    old, reference, advantages = policy_tensors(problem, torch.float64)
    losses = token_loss(wide, old, reference, advantages)
    losses.mean().backward()
    # The loss is a sum of both signs and may be next to nothing; its terms are not.
    problem.scales["loss"] = losses.abs().mean().item()
    problem.exact["loss"] = losses.mean().detach()
    gradient = wide.grad
    assert gradient is not None
    if "logprobs" in problem.inputs:
        problem.exact["grad_logprobs"] = gradient
    return gradient


def policy_tensors(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Old and reference log-probs and advantages, all [M]."""
    _, length = problem.settings["shape"]
    advantages = problem["advantages"].repeat_interleave(length)
    old, reference = problem["old_logprobs"], problem["reference_logprobs"]
    return old.to(dtype), reference.to(dtype), advantages.to(dtype)


def our_loss(problem: Problem, backend: str) -> Call:
    """fastomni_kernels.grpo_loss with all its metrics, and the backward."""
    logprobs, advantages = problem["logprobs"], problem["advantages"]
    old, reference = problem["old_logprobs"], problem["reference_logprobs"]
    layout = problem.settings["layout"]

    def call() -> Answer:
        loss, _ = fastomni_kernels.grpo_loss(
            logprobs, advantages, layout, OPTIONS,
            reference_logprobs=reference, old_logprobs=old, backend=backend,
        )  # fmt: skip
        return {"loss": loss.detach(), **gradients([loss], {"logprobs": logprobs})}

    return call


def torch_loss(
    problem: Problem, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
) -> Call:
    """The formula in torch, without metrics."""
    logprobs = problem["logprobs"]
    old, reference, advantages = policy_tensors(problem, torch.float32)

    def mean_loss(x: Tensor) -> Tensor:
        return token_loss(x, old, reference, advantages).mean()

    function = wrap(mean_loss)

    def call() -> Answer:
        loss = function(logprobs)
        return {"loss": loss.detach(), **gradients([loss], {"logprobs": logprobs})}

    return call


def liger_loss(problem: Problem) -> Call:
    """The loss inside Liger's fused linear loss, with its one metric for each of KL and clip."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    shape = problem.settings["shape"]
    logprobs = problem["logprobs"]
    old, reference = (problem[name].view(shape) for name in ("old_logprobs", "reference_logprobs"))
    mask = torch.ones(shape, device=logprobs.device)

    def call() -> Answer:
        loss, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
            logprobs.view(shape), mask, problem["advantages"], mask,
            ref_per_token_logps=reference, old_per_token_logps=old, epsilon_low=CLIP,
            epsilon_high=CLIP, beta=BETA, loss_type="dapo",
        )  # fmt: skip
        return {"loss": loss.detach(), **gradients([loss], {"logprobs": logprobs})}

    return call


def identity(function: Callable[..., Any]) -> Callable[..., Any]:
    """Eager torch."""
    return function


CASES = (
    Case(
        "group_advantages",
        FORWARD,
        ("N", "G"),
        {"small": (64, 8), "full": (64, 8)},
        advantages_cost,
        advantages_problem,
        (
            *ours(our_advantages),
            Provider("torch eager", lambda p: torch_advantages(p, eager_advantages)),
            Provider("torch.compile", lambda p: torch_advantages(p, compiled(eager_advantages))),
            Provider("TRL", trl_advantages, modules=("trl",)),
        ),
        half_on_gpu=False,
    ),
    Case(
        "grpo_loss",
        TRAINING,
        ("S", "C"),
        {"small": (64, 200), "full": (64, 200)},
        loss_cost,
        loss_problem,
        (
            *ours(our_loss),
            Provider("torch eager", lambda p: torch_loss(p, identity)),
            Provider("torch.compile", lambda p: torch_loss(p, compiled)),
            Provider("Liger ppo_loss_fn", liger_loss, modules=("liger_kernel",)),
        ),
        half_on_gpu=False,
    ),
)
