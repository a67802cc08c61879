"""Philox-4x32-10 in plain torch, word for word what triton.language.random computes.

A counter-based generator has no state: a number is a function of its key and counter alone, so it
does not matter what else was drawn, or how often. Words of 32 bits are kept in int64, because torch
has few operations on unsigned words.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def philox_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Return one uniform number per (seed, position), as triton.language.rand makes it.

    Args:
        seeds: int64, any shape; both 32-bit halves are the key.
        positions: int64 that broadcasts with `seeds`; its lower 32 bits are the counter's first
            word.

    Returns:
        fp32 in [0, 1), of the broadcast shape.
    """
    seeds, positions = torch.broadcast_tensors(seeds, positions)
    zeros = torch.zeros_like(positions)
    counter = torch.stack([positions & _MASK, zeros, zeros, zeros])
    word = philox(counter, torch.stack([seeds & _MASK, (seeds >> 32) & _MASK]))[0]
    # Triton reads the word as int32 and folds a negative x to -x - 1.
    folded = torch.where(word > _MASK >> 1, _MASK - word, word)
    return folded.to(torch.float32) * _UNIFORM_SCALE
