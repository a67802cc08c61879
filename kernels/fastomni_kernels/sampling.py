"""Sampling from logits: temperature, top-k, top-p, min-p; the token and its log-probability.

The random number is not drawn from a generator: it is one Philox-4x32-10 value of (seed, position),
so a sequence's tokens depend on nothing but its own seed and logits, whatever shares its batch and
however often the step is run. The token is the inverse of the cumulative distribution in vocabulary
order, in fp32. The log-probability is that of the tempered, untruncated distribution: it is what
the trainer computes for the same token.

Shapes: S sequences, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastomni_kernels.checks import check_float, check_shape, check_temperature, require

# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): Random123's philox.h.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF
# The largest fp32 below 2 ** -31, as triton.language.random uses it: the product stays below 1.
_UNIFORM_SCALE = 4.6566127342e-10


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Apply Philox-4x32-10.

    Args:
        counter: [4, ...] int64 holding 32-bit words.
        key: [2, ...] int64 holding 32-bit words.

    Returns:
        [4, ...] int64 holding 32-bit words.
    """
    ones = (1,) * (counter.dim() - 1)
    multipliers, steps = (
        torch.tensor(words, dtype=torch.int64, device=counter.device).view(2, *ones)
        for words in (_MULTIPLIERS, _KEY_STEPS[::-1])
    )
    # Words 0 and 2 are multiplied, words 3 and 1 mixed into the products: kept as these two pairs,
    # a round is one operation each for both. Bits above a word are cut off once, after the mixing.
    multiplied, mixed = counter[0::2], counter[1::2].flip(0)
    rounds = torch.arange(_ROUNDS, device=counter.device).view(-1, 1, *ones)
    for round_key in key.flip(0) + rounds * steps:
        # The 64-bit product wraps around the sign; its two halves are right all the same.
        product = multiplied * multipliers
        multiplied = (product >> 32).bitwise_xor_(mixed).bitwise_xor_(round_key)
        multiplied = multiplied.bitwise_and_(_MASK).flip(0)
        mixed = product
    mixed = mixed & _MASK
    return torch.stack([multiplied[0], mixed[1], multiplied[1], mixed[0]])


def philox_uniform(seeds: Tensor, positions: int | Tensor) -> Tensor:
    """Return one uniform number per (seed, position), as triton.language.rand makes it.

    Args:
        seeds: int64, any shape; both 32-bit halves are the key.
        positions: a host int, or int64 that broadcasts with `seeds`; the counter's first word.

    Returns:
        fp32 in [0, 1), of the broadcast shape.
    """
    index = torch.as_tensor(positions, dtype=torch.int64, device=seeds.device)
    seeds, index = torch.broadcast_tensors(seeds, index)
    zeros = torch.zeros_like(index)
    counter = torch.stack([index & _MASK, zeros, zeros, zeros])
    word = philox(counter, torch.stack([seeds & _MASK, (seeds >> 32) & _MASK]))[0]
    # Triton reads the word as int32 and folds a negative x to -x - 1.
    folded = torch.where(word > _MASK >> 1, _MASK - word, word)
    return folded.to(torch.float32) * _UNIFORM_SCALE


def truncation_mask(probabilities: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor | None:
    """Say which tokens may be sampled, or None where all may.

    Each rule reads the probabilities as they are, and a token must pass all of them. A rule is a
    threshold on the probability, so tokens that tie with the last one let through pass too.

    Args:
        probabilities: [S, V] fp32, tempered.
        top_k: keep the `top_k` most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose mass reaches `top_p` > 0; 1 keeps
            all.
        min_p: keep tokens at least `min_p` times as likely as the most likely one; 0 keeps all.

    Returns:
        [S, V] bool; the most likely token always passes.
    """
    thresholds = []
    if 0 < top_k < probabilities.shape[-1]:
        thresholds.append(probabilities.topk(top_k, dim=-1).values[:, -1:])
    if top_p < 1.0:
        ordered = probabilities.sort(dim=-1, descending=True).values
        # A token stays while the mass before it falls short; before the first one there is none.
        before = ordered.cumsum(-1) - ordered
        last = (before < top_p).sum(-1, keepdim=True) - 1
        thresholds.append(ordered.gather(-1, last))
    if min_p > 0.0:
        thresholds.append(min_p * probabilities.amax(-1, keepdim=True))
    if not thresholds:
        return None
    return probabilities >= torch.stack(thresholds).amax(0)


def _draw(
    logits: Tensor,
    seeds: Tensor,
    position: int | Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Draw one token per sequence.

    Args:
        logits: [S, V], -inf allowed for tokens that cannot be.
        seeds: [S] int64, one per sequence.
        position: index of the token within its completion, one host int or [S] int64.
        temperature: 1e-6 to 1e6; divides the logits in fp32.
        top_k: see `truncation_mask`; 0 is off.
        top_p: see `truncation_mask`; 1 is off.
        min_p: see `truncation_mask`; 0 is off.

    Returns:
        tokens: [S] int64.
        logprobs: [S] fp32, nats, under softmax(logits / temperature) before any truncation.

    Raises:
        ValueError: a row on the CPU without a distribution (NaN, +inf, or nothing but -inf); on a
            GPU looking would stop the stream, and such a row yields a NaN log-probability.
    """
    log_p = (logits.to(torch.float32) / temperature).log_softmax(-1)
    weights = log_p.exp()
    kept = truncation_mask(weights, top_k, top_p, min_p)
    if kept is not None:
        weights = weights.masked_fill(~kept, 0.0)
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    if total.device.type == "cpu" and not bool(torch.isfinite(total).all()):
        rows = (~torch.isfinite(total[:, 0])).nonzero().flatten().tolist()
        raise ValueError(
            f"sample: logits of sequences {rows[:8]} are NaN, +inf or all -inf, so they have no "
            "distribution; the model's weights or inputs are not finite"
        )
    # The first token whose cumulative mass exceeds u * total: u < 1 makes u * total < total, and a
    # token of no mass never is the first, so neither the end nor a truncated token is reached.
    target = philox_uniform(seeds, position)[:, None] * total
    tokens = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[-1] - 1)
    return tokens.squeeze(-1), log_p.gather(-1, tokens).squeeze(-1)


def sample(
    logits: Tensor,
    seeds: Tensor,
    position: int | Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Draw one token per sequence; see `_draw`.

    Raises:
        ValueError: shapes, dtypes or numbers out of range, or (on the CPU) logits that are no
            distribution.
    """
    name = "sample"
    check_shape(name, "logits", logits, ("S", "V"))
    check_shape(name, "seeds", seeds, (logits.shape[0],))
    check_float(name, logits=logits)
    require(seeds.dtype == torch.int64, f"{name}: seeds are {seeds.dtype}; use torch.int64")
    if isinstance(position, Tensor):
        check_shape(name, "position", position, (logits.shape[0],))
    check_temperature(name, temperature)
    require(top_k >= 0, f"{name}: top_k={top_k}; use 0 (off) or a number of tokens")
    require(0 < top_p <= 1, f"{name}: top_p={top_p}; it must be in (0, 1], 1 is off")
    require(0 <= min_p <= 1, f"{name}: min_p={min_p}; it must be in [0, 1], 0 is off")
    return _draw(logits, seeds, position, temperature, top_k, top_p, min_p)
