"""Sampling in plain torch: the definition, and what runs on a CPU.

A token is kept by a threshold on its logit in fp32 and not on its probability: the division and the
exponential round differently from one implementation to the next, and would make or break ties.

Shapes: S sequences, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastomni_kernels.philox import philox_uniform

# The smallest normal fp32: a smaller top_p would be rounded to 0, which keeps no token.
_SMALLEST_TOP_P = torch.finfo(torch.float32).tiny


def draw(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    truncated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw in plain torch; arguments and returns are those of the operator."""
    narrow = logits.to(torch.float32)
    if is_off(top_k, top_p, min_p, logits.shape[1]):
        log_p = (narrow / temperature).log_softmax(-1)
        tokens, _ = _invert(log_p.exp(), seeds, positions)
        logprobs = log_p.gather(-1, tokens).squeeze(-1)
        copy = logprobs.clone() if truncated else logprobs.new_empty(0)
        return tokens.squeeze(-1), logprobs, copy
    distances = (narrow - narrow.amax(-1, keepdim=True)) * (1.0 / temperature)
    masses = distances.exp()
    total = masses.cumsum(-1)[:, -1:]
    kept = kept_tokens(narrow, distances, masses, total, top_k, top_p, min_p)
    tokens, kept_total = _invert(masses.masked_fill(~kept, 0.0), seeds, positions)
    reached = distances.gather(-1, tokens)
    logprobs, after = ((reached - x.log()).squeeze(-1) for x in (total, kept_total))
    return tokens.squeeze(-1), logprobs, after if truncated else after.new_empty(0)


def kept_tokens(
    narrow: Tensor,
    distances: Tensor,
    masses: Tensor,
    total: Tensor,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Tensor:
    """Which tokens may be drawn.

    Args:
        narrow: [S, V] fp32 logits.
        distances: [S, V] fp32, (logit - largest) / temperature.
        masses: [S, V] fp32, exp(distances).
        total: [S, 1] fp32, the sum of the masses.
        top_k: as in `sample`, as are the other rules.
        top_p: see there.
        min_p: see there.

    Returns:
        [S, V] bool.
    """
    kept = distances >= log_min_p(min_p)
    if 0 < top_k < narrow.shape[1] or top_p < 1.0:
        kept &= narrow >= _threshold(narrow, masses, total, top_k, top_p)
    return kept


def is_off(top_k: int, top_p: float, min_p: float, vocabulary: int) -> bool:
    """Whether these rules keep every token."""
    return (top_k == 0 or top_k >= vocabulary) and top_p >= 1.0 and min_p == 0.0


def log_min_p(min_p: float) -> float:
    """The least (logit - largest) / temperature that min-p keeps."""
    return math.log(min_p) if min_p > 0.0 else -math.inf


def at_least_tiny(top_p: float) -> float:
    """top_p as an fp32 above 0, so that the most likely token passes."""
    return max(top_p, _SMALLEST_TOP_P)


def _threshold(narrow: Tensor, masses: Tensor, total: Tensor, top_k: int, top_p: float) -> Tensor:
    """The smallest logit [S, 1] that top-k and top-p keep."""
    # Sorting a whole vocabulary takes ten times as long as finding a few of its tokens.
    first = top_k if 0 < top_k < narrow.shape[1] else narrow.shape[1]
    ordered, order = narrow.topk(first, dim=-1)
    if top_p >= 1.0:
        return ordered[:, -1:]
    # Mass of all tokens further ahead. Among equal logits the first has the mass of those above it
    # before it, so if any of them passes it does, and brings the others along.
    before = masses.gather(-1, order).cumsum(-1).roll(1, -1)
    before[:, 0] = 0.0
    passing = (before < at_least_tiny(top_p) * total).sum(-1, keepdim=True)
    # None passes where there is no distribution.
    return ordered.gather(-1, (passing - 1).clamp_(min=0))


def _invert(weights: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [S, 1] at the cumulative weight u * total, and the total [S, 1]."""
    cumulative = weights.cumsum(-1)
    if cumulative.device.type != "cpu":
        # Sums of a parallel scan may fall; made to stay level where there is no weight.
        cumulative = cumulative.masked_fill(weights == 0, 0.0).cummax(-1).values
    total = cumulative[:, -1:]
    # The first token whose cumulative mass exceeds u * total: u < 1 makes u * total < total, and a
    # token of no mass never is the first, so neither the end nor a truncated token is reached.
    target = philox_uniform(seeds, positions)[:, None] * total
    tokens = torch.searchsorted(cumulative, target, right=True)
    return tokens.clamp_(max=weights.shape[-1] - 1), total
