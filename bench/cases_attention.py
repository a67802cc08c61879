"""Case of flash_varlen: causal attention within packed sequences of different lengths.

Shapes: B sequences of up to L rows, T rows of all, Hq query heads, Hkv key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

import fastomni_kernels
from bench.cases import FORWARD, TRAINING, Answer, Call, Case, Cost, Problem, Provider, gradients
from bench.cases_policy import compiled, identity
from bench.definitions import exact_attention, generator

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sequence_lengths(sequences: int, longest: int) -> list[int]:
    """B different lengths, from L down to a little more than three quarters of it."""
    return [longest - i * (longest // (4 * sequences)) for i in range(sequences)]


def attention_cost(mode: str) -> Callable[[Sequence[int], int], Cost]:
    """Half of each square of scores is seen; the backward has five products to the forward's two.

    Forward reads q, k, v and writes the output; backward reads those and the output's gradient and
    writes three gradients.
    """
    factor, q_passes, k_passes = (4, 2, 2) if mode == FORWARD else (14, 6, 6)

    def cost(sizes: Sequence[int], itemsize: int) -> Cost:
        sequences, longest, heads, key_heads, size = sizes
        lengths = sequence_lengths(sequences, longest)
        rows, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
        elements = (q_passes * heads + k_passes * key_heads) * rows * size
        text = (
            f"bytes ({q_passes} Hq + {k_passes} Hkv) T D e, "
            f"FLOPs {factor} Hq D sum L (L + 1) / 2, e = {itemsize}"
        )
        return Cost(float(elements * itemsize), float(factor * heads * size * pairs), text)

    return cost


def attention_problem(mode: str) -> Callable[[Sequence[int], torch.device, torch.dtype], Problem]:
    """Normal queries, keys and values."""

    def make(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
        sequences, longest, heads, key_heads, size = sizes
        if heads % key_heads:
            raise ValueError(f"flash_varlen: Hq={heads} is no multiple of Hkv={key_heads}")
        lengths = sequence_lengths(sequences, longest)
        draw, rows = generator(device), sum(lengths)

        def normal(number: int) -> Tensor:
            values = torch.randn(rows, number, size, generator=draw, device=device)
            return values.to(dtype)

        inputs = {"q": normal(heads), "k": normal(key_heads), "v": normal(key_heads)}
        seed = normal(heads)
        q, k, v = inputs.values()
        exact = exact_attention(q, k, v, lengths, seed if mode == TRAINING else None)
        if mode == TRAINING:
            for x in inputs.values():
                x.requires_grad_()
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return Problem(
            {**inputs, "seed": seed, "offsets": offsets}, exact, settings={"lengths": lengths}
        )

    return make


def attention_call(problem: Problem, function: Attention, mode: str) -> Call:
    """The call of any function (q, k, v) -> output."""
    leaves = {name: problem[name] for name in ("q", "k", "v")}

    def call() -> Answer:
        output = function(*leaves.values())
        answer = {"output": output.detach()}
        if mode == TRAINING:
            answer |= gradients([output], leaves, [problem["seed"]])
        return answer

    return call


def ours(problem: Problem, backend: str) -> Attention:
    """fastomni_kernels.flash_varlen."""
    offsets, longest = problem["offsets"], max(problem.settings["lengths"])

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastomni_kernels.flash_varlen(
            q, k, v, offsets, offsets, longest, longest, causal=True, backend=backend
        )

    return function


def sdpa(problem: Problem) -> Attention:
    """torch's scaled_dot_product_attention, one sequence at a time."""
    lengths = problem.settings["lengths"]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
            query, key, value = (x.transpose(0, 1)[None] for x in parts)
            output = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)

    return function


def eager(problem: Problem) -> Attention:
    """Scores, mask, softmax and product, one sequence at a time."""
    lengths = problem.settings["lengths"]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for query, key, value in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
            repeat = q.shape[1] // k.shape[1]
            key, value = (x.repeat_interleave(repeat, 1).transpose(0, 1) for x in (key, value))
            scores = query.transpose(0, 1) @ key.transpose(1, 2) * q.shape[2] ** -0.5
            future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
            weights = scores.masked_fill(future, -torch.inf).softmax(-1, dtype=torch.float32)
            outputs.append((weights.to(v.dtype) @ value).transpose(0, 1))
        return torch.cat(outputs)

    return function


def torch_varlen(problem: Problem) -> Attention:
    """torch.nn.attention.varlen."""
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = problem["offsets"], max(problem.settings["lengths"])

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = varlen_attn(
            q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0), enable_gqa=True
        )
        assert isinstance(output, Tensor)  # a pair only where the log-sum-exp is asked for
        return output

    return function


def flash_attn(problem: Problem) -> Attention:
    """flash-attn 2's own entry point."""
    from flash_attn import flash_attn_varlen_func

    offsets, longest = problem["offsets"], max(problem.settings["lengths"])

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest, causal=True)

    return function


def attention_case(mode: str) -> Case:
    """flash_varlen in one mode."""

    def provider(
        name: str,
        make: Callable[[Problem], Attention],
        wrap: Callable[[Attention], Attention] = identity,
        modules: tuple[str, ...] = (),
        devices: tuple[str, ...] = ("cpu", "cuda"),
        is_ours: bool = False,
    ) -> Provider:
        return Provider(
            name, lambda p: attention_call(p, wrap(make(p)), mode), is_ours, modules, devices
        )

    return Case(
        "flash_varlen",
        mode,
        ("B", "L", "Hq", "Hkv", "D"),
        {"small": (4, 256, 14, 2, 64), "full": (8, 1500, 14, 2, 64)},
        attention_cost(mode),
        attention_problem(mode),
        (
            provider("fastomni", lambda p: ours(p, "auto"), is_ours=True),
            provider("torch SDPA", sdpa),
            provider("torch eager", eager),
            provider("torch.compile", eager, compiled),
            provider("torch varlen", torch_varlen, devices=("cuda",)),
            provider("flash-attn", flash_attn, modules=("flash_attn",), devices=("cuda",)),
        ),
    )


CASES = (attention_case(FORWARD), attention_case(TRAINING))
