"""Cases of flash_varlen: attention within packed sequences, causal as in a decoder and not.

Towers see all keys of equally long sequences ("bidirectional"); prompts and training rows are
causal, of different lengths. The first sequence is the longest, the last the shortest, and the
others lie evenly between them.

Shapes: B sequences of Lmin to Lmax rows, T rows of all, Hq query heads, Hkv key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastomni_kernels
from bench.cases import (
    FORWARD,
    TRAINING,
    Answer,
    Call,
    Case,
    Cost,
    Problem,
    Provider,
    gradients,
)
from bench.cases_policy import compiled, identity
from bench.definitions import exact_attention, generator

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

DIMENSIONS = ("B", "Lmax", "Lmin", "Hq", "Hkv", "D")

# Decoder: Qwen2.5-0.5B's heads over prompts of about 976 tokens (8 frames of 98 tokens, sound and
# words), one alone, several, and as many of one length; rows of supervised training; the tiny
# preset's rows.
CAUSAL_SIZES = {"small": (4, 256, 208, 14, 2, 64), "full": (8, 1500, 1178, 14, 2, 64)}
CAUSAL_SWEEPS = {
    "prefill": (
        (1, 976, 976, 14, 2, 64),
        (4, 1032, 920, 14, 2, 64),
        (8, 1032, 920, 14, 2, 64),
        (8, 976, 976, 14, 2, 64),
    ),
    "sft": ((4, 1240, 1010, 14, 2, 64),),
    "tiny": ((16, 128, 83, 4, 2, 32),),
}
# Towers: SigLIP-base over 8 frames, Whisper-large-v3 over one window and four, and the tiny
# preset's towers over 16 frames and 4 windows.
BIDIRECTIONAL_SIZES = {"small": (4, 196, 196, 12, 12, 64), "full": (8, 1500, 1500, 20, 20, 64)}
BIDIRECTIONAL_SWEEPS = {
    "siglip": ((8, 196, 196, 12, 12, 64),),
    "whisper": ((1, 1500, 1500, 20, 20, 64), (4, 1500, 1500, 20, 20, 64)),
    "tiny": ((16, 16, 16, 4, 4, 24), (4, 102, 102, 4, 4, 24)),
}


def sequence_lengths(sequences: int, longest: int, shortest: int) -> list[int]:
    """B lengths from the longest down to the shortest, evenly."""
    last = max(1, sequences - 1)
    return [longest - i * (longest - shortest) // last for i in range(sequences)]


def attention_cost(mode: str, causal: bool) -> Callable[[Sequence[int], int], Cost]:
    """All of each square of scores, or half; the backward's five products to the forward's two.

    Forward reads q, k, v and writes the output; backward reads those and the output's gradient and
    writes three gradients.
    """
    factor, q_passes, k_passes = (4, 2, 2) if mode == FORWARD else (14, 6, 6)

    def cost(sizes: Sequence[int], itemsize: int) -> Cost:
        *lengths_of, heads, key_heads, size = sizes
        lengths = sequence_lengths(*lengths_of)
        rows = sum(lengths)
        pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
        elements = (q_passes * heads + k_passes * key_heads) * rows * size
        text = (
            f"bytes ({q_passes} Hq + {k_passes} Hkv) T D e, "
            f"FLOPs {factor} Hq D sum L {'(L + 1) / 2' if causal else 'L'}, e = {itemsize}"
        )
        return Cost(float(elements * itemsize), float(factor * heads * size * pairs), text)

    return cost


def attention_problem(
    mode: str, causal: bool
) -> Callable[[Sequence[int], torch.device, torch.dtype], Problem]:
    """Normal queries, keys and values."""

    def make(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
        *lengths_of, heads, key_heads, size = sizes
        if heads % key_heads:
            raise ValueError(f"flash_varlen: Hq={heads} is no multiple of Hkv={key_heads}")
        if lengths_of[1] < lengths_of[2]:
            raise ValueError(f"flash_varlen: Lmax={lengths_of[1]} is below Lmin={lengths_of[2]}")
        lengths = sequence_lengths(*lengths_of)
        draw, rows = generator(device), sum(lengths)

        def normal(number: int) -> Tensor:
            values = torch.randn(rows, number, size, generator=draw, device=device)
            return values.to(dtype)

        inputs = {"q": normal(heads), "k": normal(key_heads), "v": normal(key_heads)}
        seed = normal(heads)
        definition = exact_attention if causal else exact_bidirectional
        q, k, v = inputs.values()
        exact = definition(q, k, v, lengths, seed if mode == TRAINING else None)
        if mode == TRAINING:
            for x in inputs.values():
                x.requires_grad_()
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return Problem(
            {**inputs, "seed": seed, "offsets": offsets},
            exact,
            settings={"lengths": lengths, "causal": causal},
        )

    return make


def exact_bidirectional(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], grad_output: Tensor | None
) -> Answer:
    """Attention to all keys of the own sequence, in float64, with its gradients."""
    names = ("output",) if grad_output is None else ("output", "grad_q", "grad_k", "grad_v")
    pieces: dict[str, list[Tensor]] = {name: [] for name in names}
    seeds = (q if grad_output is None else grad_output).split(list(lengths))
    parts = (x.detach().double().split(list(lengths)) for x in (q, k, v))
    for query, key, value, seed in zip(*parts, seeds, strict=True):
        leaves = [x.requires_grad_(grad_output is not None) for x in (query, key, value)]
        repeat = query.shape[1] // key.shape[1]
        keys, values = (x.repeat_interleave(repeat, 1) for x in leaves[1:])
        scores = torch.einsum("qhd,khd->hqk", query, keys) / query.shape[-1] ** 0.5
        output = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        found = () if grad_output is None else torch.autograd.grad(output, leaves, seed.double())
        for name, piece in zip(names, (output.detach(), *found), strict=True):
            pieces[name].append(piece)
    return {name: torch.cat(x) for name, x in pieces.items()}


def attention_call(problem: Problem, function: Attention, mode: str) -> Call:
    """The call of any function (q, k, v) -> output."""
    return _call(function, {name: problem[name] for name in ("q", "k", "v")}, problem["seed"], mode)


def _call(function: Attention, leaves: Mapping[str, Tensor], seed: Tensor, mode: str) -> Call:
    def call() -> Answer:
        output = function(*leaves.values())
        answer = {"output": output.detach()}
        if mode == TRAINING:
            answer |= gradients([output], leaves, [seed])
        return answer

    return call


def ours(problem: Problem, backend: str) -> Attention:
    """fastomni_kernels.flash_varlen."""
    offsets, longest = problem["offsets"], max(problem.settings["lengths"])
    causal = problem.settings["causal"]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastomni_kernels.flash_varlen(
            q, k, v, offsets, offsets, longest, longest, causal=causal, backend=backend
        )

    return function


def sdpa(problem: Problem) -> Attention:
    """torch's scaled_dot_product_attention, one sequence at a time."""
    lengths, causal = problem.settings["lengths"], problem.settings["causal"]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
            query, key, value = (x.transpose(0, 1)[None] for x in parts)
            output = F.scaled_dot_product_attention(
                query, key, value, is_causal=causal, enable_gqa=True
            )
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)

    return function


def padded_call(problem: Problem, mode: str) -> Call:
    """torch's scaled_dot_product_attention on one padded batch, with a mask where one is needed.

    It is given the inputs as a padded batch, and the answer is cut out of one (`unpadded`).
    """
    lengths, causal = problem.settings["lengths"], problem.settings["causal"]
    device, longest = problem["q"].device, max(lengths)

    def pad(x: Tensor) -> Tensor:
        batch = x.new_zeros(len(lengths), longest, *x.shape[1:])
        batch[real_rows(problem)] = x.detach()
        return batch.transpose(1, 2)

    leaves = {name: pad(problem[name]).requires_grad_(mode == TRAINING) for name in ("q", "k", "v")}
    mask = None
    if causal or min(lengths) < longest:
        position = torch.arange(longest, device=device)
        seen = position < torch.tensor(lengths, device=device)[:, None]
        mask = seen[:, None, None]
        if causal:
            mask = mask & (position <= position[:, None])

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    return _call(function, leaves, pad(problem["seed"]), mode)


def real_rows(problem: Problem) -> Tensor:
    """Which rows [B, Lmax] of a padded batch are rows of the problem."""
    lengths = torch.tensor(problem.settings["lengths"], device=problem["q"].device)
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def unpadded(problem: Problem, answer: Answer) -> Answer:
    """The packed rows [T, heads, D] of answers that are padded batches [B, heads, Lmax, D]."""
    return {name: x.transpose(1, 2)[real_rows(problem)] for name, x in answer.items()}


def eager(problem: Problem) -> Attention:
    """Scores, mask, softmax and product, one sequence at a time."""
    lengths, causal = problem.settings["lengths"], problem.settings["causal"]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for query, key, value in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
            repeat = q.shape[1] // k.shape[1]
            key, value = (x.repeat_interleave(repeat, 1).transpose(0, 1) for x in (key, value))
            scores = query.transpose(0, 1) @ key.transpose(1, 2) * q.shape[2] ** -0.5
            if causal:
                future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
                scores = scores.masked_fill(future, -torch.inf)
            weights = scores.softmax(-1, dtype=torch.float32)
            outputs.append((weights.to(v.dtype) @ value).transpose(0, 1))
        return torch.cat(outputs)

    return function


def torch_varlen(problem: Problem) -> Attention:
    """torch.nn.attention.varlen."""
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = problem["offsets"], max(problem.settings["lengths"])
    window = (-1, 0) if problem.settings["causal"] else (-1, -1)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = varlen_attn(
            q, k, v, offsets, offsets, longest, longest, window_size=window, enable_gqa=True
        )
        assert isinstance(output, Tensor)  # a pair only where the log-sum-exp is asked for
        return output

    return function


def flash_attn(problem: Problem) -> Attention:
    """flash-attn 2's own entry point."""
    from flash_attn import flash_attn_varlen_func

    offsets, longest = problem["offsets"], max(problem.settings["lengths"])
    causal = problem.settings["causal"]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest, causal=causal)

    return function


def providers(mode: str) -> tuple[Provider, ...]:
    """All backends of ours that the machine has, and the peers."""

    def provider(
        name: str,
        make: Callable[[Problem], Attention],
        wrap: Callable[[Attention], Attention] = identity,
        **settings: Any,
    ) -> Provider:
        return Provider(name, lambda p: attention_call(p, wrap(make(p)), mode), **settings)

    def backend(name: str, **settings: Any) -> Provider:
        settings["ours"] = True
        return provider(f"fastomni {name}", lambda p: ours(p, name), identity, **settings)

    gpu = ("cuda",)
    return (
        backend("sdpa", devices=("cpu",), obstacle="is for CPU tensors"),
        backend("torch", devices=gpu),
        backend("flash-attn", modules=("flash_attn",), devices=gpu),
        backend("reference"),
        provider("torch SDPA", sdpa),
        Provider("torch SDPA padded", lambda p: padded_call(p, mode), finish=unpadded),
        provider("torch eager", eager),
        provider("torch.compile", eager, compiled),
        provider("torch varlen", torch_varlen, devices=gpu),
        provider("flash-attn", flash_attn, modules=("flash_attn",), devices=gpu),
    )


def attention_case(mode: str, causal: bool) -> Case:
    """flash_varlen in one mode, causal or not."""
    return Case(
        "flash_varlen" if causal else "flash_varlen-bidirectional",
        mode,
        DIMENSIONS,
        CAUSAL_SIZES if causal else BIDIRECTIONAL_SIZES,
        attention_cost(mode, causal),
        attention_problem(mode, causal),
        providers(mode),
        sweeps=CAUSAL_SWEEPS if causal else BIDIRECTIONAL_SWEEPS,
    )


CASES = tuple(
    attention_case(mode, causal) for causal in (False, True) for mode in (FORWARD, TRAINING)
)
