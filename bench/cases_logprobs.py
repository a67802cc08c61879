"""Cases of gather_logprobs (from logits) and linear_logprobs (from hidden states and head).

Shapes: M completion tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor

import fastomni_kernels
from bench import heads
from bench.cases import FORWARD, TRAINING, Answer, Call, Case, Cost, Problem, Provider, gradients
from bench.cases_policy import compiled, identity, ours
from bench.definitions import (
    LOGIT_SPREAD,
    completions,
    exact_linear_gradients,
    exact_linear_logprobs,
    generator,
    random_head,
    random_lift,
    row_chunks,
    token_logprobs,
)

Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]

# gather_logprobs


def gather_cost(mode: str) -> Callable[[Sequence[int], int], Cost]:
    """The logits are read once forward; backward reads them again and writes their gradient."""
    passes, operations = (1, 6) if mode == FORWARD else (3, 10)

    def cost(sizes: Sequence[int], itemsize: int) -> Cost:
        tokens, vocabulary = sizes
        elements = tokens * vocabulary
        factor = f"{passes} " if passes > 1 else ""
        text = f"bytes {factor}M V e + 16 M, FLOPs {operations} M V, e = {itemsize}"
        return Cost(passes * elements * itemsize + 16.0 * tokens, operations * elements, text)

    return cost


def gather_problem(mode: str) -> Callable[[Sequence[int], torch.device, torch.dtype], Problem]:
    """Logits with one word that stands out, as a trained policy has them."""

    def make(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
        tokens, vocabulary = sizes
        draw = generator(device)
        ids = torch.randint(vocabulary, (tokens,), generator=draw, device=device)
        logits = torch.randn(tokens, vocabulary, generator=draw, device=device)
        lift = random_lift(tokens, vocabulary, draw)
        logits = logits.mul_(LOGIT_SPREAD).scatter_add_(1, ids[:, None], lift).to(dtype)
        seed = torch.randn(tokens, generator=draw, device=device)
        parts: dict[str, list[Tensor]] = {"logprobs": [], "entropy": []}
        for rows in row_chunks(tokens, vocabulary):
            wide = logits[rows].double().requires_grad_(mode == TRAINING)
            logprobs, entropy = token_logprobs(wide, ids[rows])
            parts["logprobs"].append(logprobs.detach())
            parts["entropy"].append(entropy.detach())
            if mode == TRAINING:
                found = torch.autograd.grad(logprobs, wide, seed[rows].double())
                parts.setdefault("grad_logits", []).append(found[0])
        inputs = {"logits": logits.requires_grad_(mode == TRAINING), "ids": ids, "seed": seed}
        exact = {name: torch.cat(values) for name, values in parts.items()}
        return Problem(inputs, exact, settings={"shape": completions(tokens)})

    return make


def gather_call(problem: Problem, function: Function, mode: str) -> Call:
    """The call of any function (logits, ids) -> (log-probs, entropy or None)."""
    logits, ids, seed = problem["logits"], problem["ids"], problem["seed"]

    def call() -> Answer:
        logprobs, entropy = function(logits, ids)
        answer = {"logprobs": logprobs.detach()}
        if entropy is not None:
            answer["entropy"] = entropy.detach()
        if mode == TRAINING:
            answer |= gradients([logprobs], {"logits": logits}, [seed.to(logprobs.dtype)])
        return answer

    return call


def our_gather(problem: Problem, backend: str, mode: str) -> Call:
    """fastomni_kernels.gather_logprobs."""

    def function(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return fastomni_kernels.gather_logprobs(logits, ids, backend=backend)

    return gather_call(problem, function, mode)


def trl_gather(problem: Problem, mode: str) -> Call:
    """TRL's log-prob and entropy, per completion as its trainers call it."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    shape = problem.settings["shape"]

    def function(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = selective_log_softmax_and_entropy(
            logits.view(*shape, logits.shape[1]), ids.view(shape), entropy_requires_grad=False
        )
        return logprobs.flatten(), entropy.flatten()

    return gather_call(problem, function, mode)


def liger_gather(problem: Problem) -> Call:
    """Liger's Triton log-prob without entropy; it wants one row of logits more than tokens."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    logits = torch.cat([problem["logits"], problem["logits"][:1]])[None]
    ids = problem["ids"][None]
    return lambda: {"logprobs": fused_selective_log_softmax(logits, ids, temperature=1.0)[0]}


def quack_gather(problem: Problem, mode: str) -> Call:
    """QuACK's cross-entropy of rows; it has no entropy."""
    cross_entropy = import_module("quack.cross_entropy").cross_entropy

    def function(logits: Tensor, ids: Tensor) -> tuple[Tensor, None]:
        return -cross_entropy(logits, ids, reduction="none"), None

    return gather_call(problem, function, mode)


def gather_case(mode: str) -> Case:
    """gather_logprobs in one mode."""

    def torch_call(wrap: Callable[[Function], Function]) -> Callable[[Problem], Call]:
        return lambda p: gather_call(p, wrap(heads.eager_logprobs), mode)

    providers = [
        *ours(lambda p, backend: our_gather(p, backend, mode)),
        Provider("torch eager", torch_call(identity)),
        Provider("torch.compile", torch_call(compiled)),
        Provider("TRL", lambda p: trl_gather(p, mode), modules=("trl",)),
        Provider("QuACK", lambda p: quack_gather(p, mode), modules=("quack",), devices=("cuda",)),
    ]
    if mode == FORWARD:
        providers.append(
            Provider("Liger triton", liger_gather, modules=("liger_kernel",), devices=("cuda",))
        )
    sizes = {"small": (64, 151936), "full": (12800, 151936)}
    return Case(
        "gather_logprobs",
        mode,
        ("M", "V"),
        sizes,
        gather_cost(mode),
        gather_problem(mode),
        tuple(providers),
    )


# linear_logprobs

# The small size has an eighth of the vocabulary.
HEAD_SIZES = {"small": (128, 896, 18992), "full": (12800, 896, 151936)}


def head_cost(mode: str) -> Callable[[Sequence[int], int], Cost]:
    """One product forward, two more for the gradients; hidden and head are read, gradients written.

    Making the logits again in the backward costs a fourth product and is not counted: an
    implementation that keeps them does not need it.
    """
    products, passes = (1, 1) if mode == FORWARD else (3, 2)

    def cost(sizes: Sequence[int], itemsize: int) -> Cost:
        tokens, width, vocabulary = sizes
        elements = tokens * width + vocabulary * width
        factor = f"{passes} " if passes > 1 else ""
        text = f"bytes {factor}(M H + V H) e + 16 M, FLOPs {2 * products} M H V, e = {itemsize}"
        return Cost(
            passes * elements * itemsize + 16.0 * tokens,
            2.0 * products * tokens * width * vocabulary,
            text,
        )

    return cost


def head_problem(mode: str) -> Callable[[Sequence[int], torch.device, torch.dtype], Problem]:
    """Hidden states that predict the sampled words well or badly."""

    def make(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
        tokens, width, vocabulary = sizes
        hidden, weight, ids = random_head(tokens, width, vocabulary, device, dtype)
        logprobs, entropy = exact_linear_logprobs(hidden, weight, ids)
        exact = {"logprobs": logprobs, "entropy": entropy}
        seed = torch.randn(len(ids), generator=generator(device, seed=1), device=device)
        if mode == TRAINING:
            exact |= exact_linear_gradients(hidden, weight, ids, seed)
            hidden.requires_grad_()
            weight.requires_grad_()
        inputs = {"hidden": hidden, "weight": weight, "ids": ids, "seed": seed}
        return Problem(inputs, exact, settings={"shape": completions(len(ids))})

    return make


def head_call(problem: Problem, head: heads.Head, mode: str) -> Call:
    """The call of any head."""
    hidden, weight, seed = problem["hidden"], problem["weight"], problem["seed"]

    def call() -> Answer:
        logprobs, entropy = head(hidden, weight)
        answer = {"logprobs": logprobs.detach()}
        if entropy is not None:
            answer["entropy"] = entropy
        if mode == TRAINING:
            leaves = {"hidden": hidden, "weight": weight}
            answer |= gradients([logprobs], leaves, [seed.to(logprobs.dtype)])
        return answer

    return call


def head_case(mode: str) -> Case:
    """linear_logprobs in one mode."""

    def provider(maker: heads.HeadMaker) -> Provider:
        return Provider(
            maker.name,
            lambda p: head_call(p, maker.prepare(p), mode),
            modules=maker.modules,
            devices=maker.devices,
        )

    providers = (
        *ours(lambda p, backend: head_call(p, heads.ours(p, backend), mode)),
        provider(heads.EAGER),
        Provider("torch.compile", lambda p: head_call(p, compiled(heads.eager(p)), mode)),
        *(provider(maker) for maker in (*heads.PEERS, heads.LIGER)),
    )
    return Case(
        "linear_logprobs",
        mode,
        ("M", "H", "V"),
        HEAD_SIZES,
        head_cost(mode),
        head_problem(mode),
        providers,
    )


CASES = (
    gather_case(FORWARD),
    gather_case(TRAINING),
    head_case(FORWARD),
    head_case(TRAINING),
)
