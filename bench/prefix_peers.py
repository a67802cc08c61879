"""Who else can compute what prefix_attention does: on repeated rows, or on shared ones.

Repeated rows are what trainers without sharing run on: G causal sequences per prompt, packed or
padded. A gradient that arrives at a prompt's row is divided among its copies, so that the copies'
gradients add up to those of the shared rows.

Shapes: N prompts, G completions each, T packed shared rows, B = N G repeated sequences of up to L
rows, Hq query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import cases_attention
from bench.cases import TRAINING, Answer, Call, Problem, Provider, gradients
from bench.cases_attention import Attention, attention_call
from bench.cases_policy import compiled
from fastomni_kernels import GroupLayout

LEAVES = ("q", "k", "v")

# Repeated rows


def repeat(problem: Problem) -> Problem:
    """Return the problem on repeated rows, packed; made once and shared by all peers."""
    if "repeated" not in problem.settings:
        layout: GroupLayout = problem.settings["layout"]
        rows = layout.repeat_rows
        copies = torch.bincount(rows, minlength=layout.num_rows)
        share = problem["seed"] / copies[:, None, None].to(problem["seed"].dtype)
        inputs = {name: problem[name].detach()[rows] for name in LEAVES}
        for name, x in inputs.items():
            x.requires_grad_(problem[name].requires_grad)
        offsets = layout.repeated().cu_groups
        lengths = [stop - start for start, stop in pairwise(layout.repeated().group_offsets)]
        problem.settings["repeated"] = Problem(
            {**inputs, "seed": share[rows], "offsets": offsets},
            {},
            settings={"lengths": lengths, "causal": True},
        )
    repeated: Problem = problem.settings["repeated"]
    return repeated


def fold(problem: Problem, answer: Answer) -> Answer:
    """Add up the gradients of all copies of a row, in float64; outputs stay as they are."""
    rows = problem.settings["layout"].repeat_rows
    folded = {"output_repeated": answer.pop("output")}
    for name, grad in answer.items():
        shape = problem[name.removeprefix("grad_")].shape
        total = torch.zeros(shape, dtype=torch.float64, device=grad.device)
        folded[name] = total.index_add_(0, rows, grad.double())
    return folded


def places(problem: Problem) -> tuple[Tensor, Tensor]:
    """Sequence and position of each repeated row in a padded batch."""
    lengths = torch.tensor(repeat(problem).settings["lengths"])
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    starts = (lengths.cumsum(0) - lengths)[sequence]
    device = problem["q"].device
    return sequence.to(device), (torch.arange(len(sequence)) - starts).to(device)


def padded_sdpa(problem: Problem, mode: str, enable_gqa: bool) -> Call:
    """torch's scaled_dot_product_attention on a batch padded on the right, as trainers call it.

    Args:
        problem: on shared rows.
        mode: with the backward or without.
        enable_gqa: whether torch shares the key heads; else they are repeated first, as
            transformers does.
    """
    repeated = repeat(problem)
    at = places(problem)
    lengths = repeated.settings["lengths"]

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(len(lengths), max(lengths), *x.shape[1:])
        padded[at] = x.detach()
        return padded.requires_grad_(x.requires_grad)

    leaves = {name: pad(repeated[name]) for name in LEAVES}
    seed = pad(repeated["seed"])
    group = problem["q"].shape[1] // problem["k"].shape[1]

    def call() -> Answer:
        query, key, value = (x.transpose(1, 2) for x in leaves.values())
        if not enable_gqa:
            key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=enable_gqa
        ).transpose(1, 2)
        answer = {"output": output.detach()}
        if mode == TRAINING:
            answer |= gradients([output], leaves, [seed])
        return answer

    return call


def fold_padded(problem: Problem, answer: Answer) -> Answer:
    """The same from a padded batch."""
    at = places(problem)
    return fold(problem, {name: x[at] for name, x in answer.items()})


@dataclass(frozen=True)
class Repeated:
    """A peer on repeated rows.

    Attributes:
        name: as it is printed.
        prepare: (problem on shared rows, mode) -> call.
        finish: see `Provider`.
        modules: that must be installed.
        devices: device types it runs on.
        in_sweeps: see `Provider`.
    """

    name: str
    prepare: Callable[[Problem, str], Call]
    finish: Callable[[Problem, Answer], Answer] = fold
    modules: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    in_sweeps: bool = True


def packed(make: Callable[[Problem], Attention]) -> Callable[[Problem, str], Call]:
    """A peer that takes packed repeated rows."""
    return lambda problem, mode: attention_call(repeat(problem), make(repeat(problem)), mode)


def our_varlen(problem: Problem) -> Attention:
    """fastomni_kernels.flash_varlen with the backend that it chooses."""
    return cases_attention.ours(problem, "auto")


# `bench.sharing` knows these by their names.
REPEATED = (
    Repeated("repeated: SDPA padded", lambda p, mode: padded_sdpa(p, mode, True), fold_padded),
    Repeated(
        "repeated: SDPA + repeat_kv", lambda p, mode: padded_sdpa(p, mode, False), fold_padded
    ),
    # With equal lengths, as sweeps have them, this is the padded batch in many small calls.
    Repeated("repeated: SDPA per sequence", packed(cases_attention.sdpa), in_sweeps=False),
    Repeated("repeated: flash_varlen", packed(our_varlen)),
    Repeated("repeated: torch varlen", packed(cases_attention.torch_varlen), devices=("cuda",)),
    Repeated(
        "repeated: flash-attn",
        packed(cases_attention.flash_attn),
        modules=("flash_attn",),
        devices=("cuda",),
    ),
)


def on_repeated_rows(mode: str, peer: Repeated) -> Provider:
    """The provider of a peer in one mode."""
    return Provider(
        peer.name,
        lambda problem: peer.prepare(problem, mode),
        modules=peer.modules,
        devices=peer.devices,
        in_sweeps=peer.in_sweeps,
        finish=peer.finish,
    )


# Shared rows


def _segments(layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """Return group [T] and part [T] of each row, part 0 being the prompt; int32."""
    groups: list[int] = []
    parts: list[int] = []
    lengths: list[int] = []
    for i, prompt in enumerate(layout.prompt_lengths):
        own = (prompt, *layout.completion_lengths[i])
        groups += [i] * len(own)
        parts += range(len(own))
        lengths += own
    counts = torch.tensor(lengths)
    group, part = (
        torch.repeat_interleave(torch.tensor(x, dtype=torch.int32), counts) for x in (groups, parts)
    )
    return group.to(layout.device), part.to(layout.device)


def flex(problem: Problem) -> Attention:
    """FlexAttention with the block mask of the packed rows, compiled for their number."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layout = problem.settings["layout"]
    group, part = _segments(layout)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_part = (part[key] == 0) | (part[key] == part[query])
        return (key <= query) & (group[key] == group[query]) & same_part

    rows = layout.num_rows
    mask = create_block_mask(seen, None, None, rows, rows, device=str(layout.device))
    attend = compiled(flex_attention)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
        output: Tensor = attend(query, key, value, block_mask=mask, enable_gqa=True)
        return output[0].transpose(0, 1)

    return function


def eager(problem: Problem) -> Attention:
    """Scores, mask, softmax and product, one group at a time."""
    layout = problem.settings["layout"]
    bounds = list(pairwise(layout.group_offsets))
    _, part = _segments(layout)
    hidden = []
    for start, stop in bounds:
        own = part[start:stop]
        hidden.append(~((own == 0) | (own == own[:, None])).tril())

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for (start, stop), mask in zip(bounds, hidden, strict=True):
            query, key, value = (x[start:stop].transpose(0, 1) for x in (q, k, v))
            repeat_heads = len(query) // len(key)
            key, value = (x.repeat_interleave(repeat_heads, 0) for x in (key, value))
            scores = query @ key.transpose(1, 2) * q.shape[2] ** -0.5
            weights = scores.masked_fill(mask, -torch.inf).softmax(-1, dtype=torch.float32)
            outputs.append((weights.to(v.dtype) @ value).transpose(0, 1))
        return torch.cat(outputs)

    return function
