"""Two passes of flash attention, merged by their log-sum-exps, as Hydragen does (arXiv:2402.05099).

Forward only: Hydragen is for inference. A backward would have to pass through the log-sum-exp of
both passes, and no public flash attention hands that gradient on; what ours does instead (each pass
differentiated with the merged output and sum) takes torch's internal operators.

Shapes: T query rows, U key rows, Hq query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from bench.cases import Problem
from bench.cases_attention import Attention


@dataclass(frozen=True)
class Stretches:
    """Sequences of queries and their keys, both packed.

    Attributes:
        queries: lengths of the sequences in q.
        keys: lengths in k and v.
        offsets: 0 and the ends in q and in k, int32 on the device.
    """

    queries: list[int]
    keys: list[int]
    offsets: tuple[Tensor, Tensor]

    @classmethod
    def build(cls, queries: list[int], keys: list[int], device: torch.device) -> Stretches:
        """From host lists."""
        first, second = (
            torch.tensor([0, *accumulate(x)], dtype=torch.int32, device=device)
            for x in (queries, keys)
        )
        return cls(queries, keys, (first, second))


def flash_with_lse(
    q: Tensor, k: Tensor, v: Tensor, stretches: Stretches, causal: bool
) -> tuple[Tensor, Tensor]:
    """Flash attention of packed sequences with its log-sum-exp; no gradient passes through that.

    Args:
        q: [T, Hq, D].
        k: [U, Hkv, D].
        v: [U, Hkv, D].
        stretches: the sequences.
        causal: whether query i of a sequence sees no later key.

    Returns:
        output: [T, Hq, D].
        log-sum-exp: [T, Hq], natural.
    """
    if q.device.type == "cuda":
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        longest = max(stretches.queries), max(stretches.keys)
        window = (-1, 0) if causal else (-1, -1)
        output, lse = varlen_attn(
            q, k, v, *stretches.offsets, *longest, window_size=window, enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        # Documented as [T, Hq], given as [Hq, T] (torch 2.13).
        return output, lse if lse.shape == output.shape[:2] else lse.T
    outputs, sums = [], []
    parts = zip(
        q.split(stretches.queries), k.split(stretches.keys), v.split(stretches.keys), strict=True
    )
    for query, key, value in parts:
        # [Hkv, heads of one, L, D]: a key head that several read is expanded, not copied.
        query = query.unflatten(1, (key.shape[1], -1)).permute(1, 2, 0, 3)
        shared = query.shape[1]
        key, value = (x.transpose(0, 1)[:, None].expand(-1, shared, -1, -1) for x in (key, value))
        part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal
        )
        outputs.append(part.permute(2, 0, 1, 3).flatten(1, 2))
        sums.append(lse.permute(2, 0, 1).flatten(1))
    return torch.cat(outputs), torch.cat(sums)


def attention(problem: Problem) -> Attention:
    """Own rows causally, the rows of all completions to their prompt, and the two merged."""
    layout = problem.settings["layout"]
    device = problem["q"].device
    parts = [
        length
        for prompt, own in zip(layout.prompt_lengths, layout.completion_lengths, strict=True)
        for length in (prompt, *own)
    ]
    own_pass = Stretches.build(parts, parts, device)
    prompt_pass = Stretches.build(
        [sum(own) for own in layout.completion_lengths], list(layout.prompt_lengths), device
    )
    prompts, rows = layout.prompt_rows, layout.completion_rows

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output, own_sum = flash_with_lse(q, k, v, own_pass, True)
        shared, prompt_sum = flash_with_lse(q[rows], k[prompts], v[prompts], prompt_pass, False)
        return output.index_copy(0, rows, merge(output[rows], own_sum[rows], shared, prompt_sum))

    return function


def merge(first: Tensor, first_sum: Tensor, second: Tensor, second_sum: Tensor) -> Tensor:
    """Join attentions [T, Hq, D] of the same queries to different keys by their sums [T, Hq]."""
    weight = torch.sigmoid(first_sum - second_sum).unsqueeze(-1)
    return torch.lerp(second.float(), first.float(), weight.float()).to(first.dtype)
