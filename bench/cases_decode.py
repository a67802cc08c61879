"""Case of prefix_decode: the newest token of each sequence attends to its prompt and its own rows.

The middle of a rollout: all sequences have C tokens of their own, in caches with room for 2 C.
Peers that do not share read a copy of the prompt's keys for every sequence; the copies are made
outside the clock. Bytes are counted with every prompt once.

Shapes: N prompts of P tokens, G sequences of each with C own tokens, S = N G sequences, Hq query
heads, Hkv key-value heads, R = Hq / Hkv, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastomni_kernels
from bench.cases import FORWARD, Call, Case, Cost, Problem, Provider
from bench.cases_policy import compiled, identity, ours
from bench.definitions import causal_attention, generator
from bench.two_pass import merge

# What is attended with: queries [S, Hq, D] -> output [S, Hq, D].
Decode = Callable[[Tensor], Tensor]


def decode_cost(sizes: Sequence[int], itemsize: int) -> Cost:
    """Keys and values of every prompt once, own ones, queries in and outputs out."""
    prompts, length, generations, own, heads, key_heads, size = sizes
    sequences = prompts * generations
    rows = prompts * length + sequences * own
    elements = 2 * size * (key_heads * rows + heads * sequences)
    return Cost(
        float(elements * itemsize),
        4.0 * heads * size * sequences * (length + own),
        f"bytes 2 D (Hkv (N P + S C) + Hq S) e, FLOPs 4 Hq D S (P + C), S = N G, e = {itemsize}",
    )


def decode_problem(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
    """Normal queries, keys and values; places of the caches that are not valid yet hold NaN."""
    prompts, length, generations, own, heads, key_heads, size = sizes
    if heads % key_heads:
        raise ValueError(f"prefix_decode: Hq={heads} is no multiple of Hkv={key_heads}")
    sequences, draw = prompts * generations, generator(device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, size, generator=draw, device=device).to(dtype)

    inputs = {"q": normal(sequences, heads)}
    for name in ("k", "v"):
        inputs[f"prefix_{name}"] = normal(prompts * length, key_heads)
        cache = normal(sequences, 2 * own, key_heads)
        cache[:, own:] = torch.nan
        inputs[f"suffix_{name}"] = cache
    problem = Problem(inputs, {}, settings={"sizes": tuple(sizes)})
    outputs = []
    for s in range(sequences):
        prompt = slice(s // generations * length, (s // generations + 1) * length)
        keys, values = (
            torch.cat([inputs[f"prefix_{x}"][prompt], inputs[f"suffix_{x}"][s, :own]]).double()
            for x in ("k", "v")
        )
        outputs.append(causal_attention(inputs["q"][s : s + 1].double(), keys, values))
    problem.exact["output"] = torch.cat(outputs)
    whole = {
        "prefix_offsets": torch.arange(prompts + 1) * length,
        "suffix_lengths": torch.full((sequences,), own),
        "prompt_of": torch.arange(sequences) // generations,
    }
    problem.inputs |= {name: x.to(device, torch.int32) for name, x in whole.items()}
    return problem


def decode_call(problem: Problem, function: Decode) -> Call:
    """The call of any function of the queries."""
    return lambda: {"output": function(problem["q"])}


def our_decode(problem: Problem, backend: str) -> Call:
    """fastomni_kernels.prefix_decode; the keys of the newest tokens are in the caches already."""
    names = ("prefix_k", "prefix_v", "prefix_offsets", "suffix_k", "suffix_v", "suffix_lengths")
    caches = [problem[name] for name in (*names, "prompt_of")]

    def function(q: Tensor) -> Tensor:
        return fastomni_kernels.prefix_decode(q, *caches, backend=backend)

    return decode_call(problem, function)


def caches(problem: Problem) -> tuple[Tensor, Tensor]:
    """Keys and values [S, P + C, Hkv, D] of every sequence, the prompt's repeated."""
    if "repeated" not in problem.settings:
        prompts, length, generations, own, *_ = problem.settings["sizes"]
        problem.settings["repeated"] = tuple(
            torch.cat(
                [
                    problem[f"prefix_{x}"]
                    .unflatten(0, (prompts, length))
                    .repeat_interleave(generations, 0),
                    problem[f"suffix_{x}"][:, :own],
                ],
                1,
            )
            for x in ("k", "v")
        )
    keys, values = problem.settings["repeated"]
    return keys, values


def sdpa(problem: Problem) -> Decode:
    """torch's scaled_dot_product_attention, a query a head, as transformers calls it."""
    keys, values = (x.transpose(1, 2) for x in caches(problem))

    def function(q: Tensor) -> Tensor:
        query = q[:, :, None]
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)[:, :, 0]

    return function


def sdpa_rows(problem: Problem) -> Decode:
    """The same with the R query heads of a key head as rows of one product."""
    keys, values = (x.transpose(1, 2) for x in caches(problem))

    def function(q: Tensor) -> Tensor:
        query = q.unflatten(1, (keys.shape[1], -1))
        return F.scaled_dot_product_attention(query, keys, values).flatten(1, 2)

    return function


def varlen(problem: Problem) -> Decode:
    """fastomni_kernels.flash_varlen, with the backend that it chooses, on queries of one row."""
    keys, values = (x.flatten(0, 1) for x in caches(problem))
    prompts, length, generations, own, *_ = problem.settings["sizes"]
    starts = torch.arange(prompts * generations + 1, dtype=torch.int32, device=keys.device)
    ends = starts * (length + own)

    def function(q: Tensor) -> Tensor:
        return fastomni_kernels.flash_varlen(q, keys, values, starts, ends, 1, length + own)

    return function


def flash_attn(problem: Problem) -> Decode:
    """flash-attn's decode kernel, which splits the keys."""
    from flash_attn import flash_attn_with_kvcache

    keys, values = caches(problem)

    def function(q: Tensor) -> Tensor:
        output: Tensor = flash_attn_with_kvcache(q[:, None], keys, values)
        return output[:, 0]

    return function


def eager(problem: Problem) -> Decode:
    """Scores, softmax and product over the repeated keys."""
    keys, values = (x.transpose(1, 2) for x in caches(problem))

    def function(q: Tensor) -> Tensor:
        query = q.unflatten(1, (keys.shape[1], -1))
        scores = query @ keys.transpose(2, 3) * q.shape[2] ** -0.5
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        return (weights @ values).flatten(1, 2)

    return function


def flash_rows(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Flash attention [B, H, L, D] of as many heads, without a mask, and its sums [B, H, L]."""
    if query.device.type == "cpu":
        output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    else:
        output, sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    return output, sums


def two_pass(problem: Problem) -> Decode:
    """Hydragen: the G R rows of a prompt's sequences to its keys, each one's own, and a merge."""
    prompts, length, generations, own, *_ = problem.settings["sizes"]
    prompt_k, prompt_v = (
        problem[f"prefix_{x}"].unflatten(0, (prompts, length)).transpose(1, 2) for x in ("k", "v")
    )
    own_k, own_v = (problem[f"suffix_{x}"][:, :own].transpose(1, 2) for x in ("k", "v"))

    def function(q: Tensor) -> Tensor:
        query = q.unflatten(1, (own_k.shape[1], -1))  # [S, Hkv, R, D]
        rows = query.unflatten(0, (prompts, generations)).transpose(1, 2).flatten(2, 3)
        shared, shared_sum = (
            x.unflatten(2, (generations, -1)).transpose(1, 2).flatten(0, 1)
            for x in flash_rows(rows, prompt_k, prompt_v)
        )
        output, own_sum = flash_rows(query, own_k, own_v)
        return merge(output, own_sum, shared, shared_sum).flatten(1, 2)

    return function


def peer(
    name: str,
    make: Callable[[Problem], Decode],
    wrap: Callable[[Decode], Decode] = identity,
    modules: tuple[str, ...] = (),
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> Provider:
    """A peer."""
    return Provider(name, lambda p: decode_call(p, wrap(make(p))), modules=modules, devices=devices)


QWEN = (14, 2, 64)
CASES = (
    Case(
        "prefix_decode",
        FORWARD,
        ("N", "P", "G", "C", "Hq", "Hkv", "D"),
        {
            "small": (1, 256, 8, 32, *QWEN),
            "full": (8, 1500, 8, 100, *QWEN),
            "cpu": (4, 976, 8, 32, *QWEN),
            "full-g16": (8, 1500, 16, 100, *QWEN),
        },
        decode_cost,
        decode_problem,
        (
            # Not strict: in bf16 the output itself is rounded by more than that bound.
            *(replace(provider, strict=False) for provider in ours(our_decode)),
            peer("repeated: SDPA", sdpa),
            peer("repeated: SDPA GQA-as-rows", sdpa_rows),
            peer("two-pass flash (Hydragen)", two_pass),
            peer("repeated: flash_varlen", varlen),
            peer("repeated: flash-attn", flash_attn, modules=("flash_attn",), devices=("cuda",)),
            peer("torch eager", eager),
            peer("torch.compile", eager, compiled),
        ),
    ),
)
