"""The float64 definitions that answers are judged by, in textbook torch, and random problems.

Everything here is written with torch's own log_softmax, softmax and autograd and shares no line
with the kernels. Sweeps go over rows in chunks, so that the exact answer of the largest size fits
where the inputs fit.

Shapes: M completion tokens, S completions of C tokens each, N prompts, G completions per prompt,
H hidden, V vocabulary, T packed rows, Hq query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from bench.cases import Answer

# Settings of the policy loss that all implementations share: GRPO's clip, R1-Omni's weight of the
# KL, and the mean over all tokens of the batch ("dapo"), which is TRL's default.
CLIP, BETA = 0.2, 0.04
# Differences of the old policy and of the reference from the new one, drawn per token. All ratios
# lie well inside or well outside the clip's range (at its edge rounding would decide on which side
# a token falls), and no KL is next to nothing (its gradient would be all rounding).
DRIFT = (-0.4, -0.1, 0.0, 0.05, 0.1, 0.4)
DISTANCE = (-0.5, -0.2, 0.1, 0.3)
# Standard deviation of the logits of words that were not sampled.
LOGIT_SPREAD = 1.5
# Bytes of float64 logits made at once.
CHUNK_BYTES = 256 * 2**20


def token_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-prob of each id [M] and entropy [M] of logits [M, V]: the textbook's two lines."""
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, ids[:, None]).squeeze(-1), entropy


def token_loss(
    logprobs: Tensor, old_logprobs: Tensor, reference_logprobs: Tensor, advantages: Tensor
) -> Tensor:
    """Loss of each token [M]: PPO's clip (arXiv:2402.03300, eq. 3) and the k3 penalty."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    difference = reference_logprobs - logprobs
    penalty = difference.exp() - difference - 1
    return BETA * penalty - torch.minimum(ratio * advantages, clipped * advantages)


def row_chunks(rows: int, columns: int) -> list[slice]:
    """Slices of rows whose float64 logits stay within CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES // (8 * columns))
    return [slice(start, start + step) for start in range(0, rows, step)]


def exact_linear_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return float64 log-probs [M] and entropies [M] of `hidden @ weight.T`."""
    with torch.no_grad():
        wide = weight.double().T
        parts = [
            token_logprobs(hidden[rows].double() @ wide, ids[rows])
            for rows in row_chunks(len(ids), len(weight))
        ]
    logprobs, entropy = (torch.cat(x) for x in zip(*parts, strict=True))
    return logprobs, entropy


def exact_linear_gradients(
    hidden: Tensor, weight: Tensor, ids: Tensor, grad_logprobs: Tensor
) -> Answer:
    """Return float64 gradients of sum(grad_logprobs * log-probs) for hidden and weight."""
    wide = weight.detach().double().requires_grad_()
    grad_hidden = []
    for rows in row_chunks(len(ids), len(weight)):
        part = hidden[rows].detach().double().requires_grad_()
        logprobs = (part @ wide.T).log_softmax(-1).gather(-1, ids[rows, None]).squeeze(-1)
        torch.autograd.backward(logprobs, grad_logprobs[rows].double(), inputs=[part, wide])
        assert part.grad is not None
        grad_hidden.append(part.grad)
    assert wide.grad is not None
    return {"grad_hidden": torch.cat(grad_hidden), "grad_weight": wide.grad}


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], grad_output: Tensor | None
) -> Answer:
    """Causal attention within each of the packed sequences, in float64, with its gradients."""
    return _exact_pieces(q, k, v, [([], rows) for rows in _stretches(0, lengths)], grad_output)


def exact_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompts: Sequence[int],
    completions: Sequence[Sequence[int]],
    grad_output: Tensor | None,
) -> Answer:
    """The same where every completion sees the prompt of its group too: [prompt | c1 | .. | cG]."""
    pieces: list[tuple[list[slice], slice]] = []
    first = 0
    for prompt, own in zip(prompts, completions, strict=True):
        rows, *parts = _stretches(first, [prompt, *own])
        pieces += [([], rows), *(([rows], part) for part in parts)]
        first = parts[-1].stop if parts else rows.stop
    return _exact_pieces(q, k, v, pieces, grad_output)


def _stretches(first: int, lengths: Sequence[int]) -> list[slice]:
    bounds = [first, *(first + stop for stop in accumulate(lengths))]
    return [slice(*pair) for pair in pairwise(bounds)]


def _exact_pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Sequence[tuple[list[slice], slice]],
    grad_output: Tensor | None,
) -> Answer:
    """Attend in float64, one piece after another, so that only one's scores exist at a time.

    Args:
        q: [T, Hq, D].
        k: [T, Hkv, D].
        v: [T, Hkv, D].
        pieces: (rows seen by all, own rows, which see themselves causally); own rows cover all T.
        grad_output: [T, Hq, D] where gradients are wanted.
    """
    inputs = dict(zip(("q", "k", "v"), (q, k, v), strict=True))
    answer = {"output": torch.zeros_like(q, dtype=torch.float64)}
    if grad_output is not None:
        answer |= {
            f"grad_{name}": torch.zeros_like(x, dtype=torch.float64) for name, x in inputs.items()
        }
    for seen, own in pieces:
        rows = {"q": [own], "k": [*seen, own], "v": [*seen, own]}
        parts = {
            name: torch.cat([x[r] for r in rows[name]]).detach().double()
            for name, x in inputs.items()
        }
        for x in parts.values():
            x.requires_grad_(grad_output is not None)
        output = causal_attention(parts["q"], parts["k"], parts["v"])
        answer["output"][own] = output.detach()
        if grad_output is None:
            continue
        found = torch.autograd.grad(output, list(parts.values()), grad_output[own].double())
        for (name, stretches), grad in zip(rows.items(), found, strict=True):
            lengths = [r.stop - r.start for r in stretches]
            for r, part in zip(stretches, grad.split(lengths), strict=True):
                answer[f"grad_{name}"][r] += part
    return answer


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of L queries [L, Hq, D] that are the last of K rows, to keys [K, Hkv, D]."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    future = torch.ones(scores.shape[1:], dtype=torch.bool, device=query.device)
    weights = scores.masked_fill(future.triu(1 + len(key) - len(query)), -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def completions(tokens: int) -> tuple[int, int]:
    """Cut M tokens into completions of equal length; returns (number, tokens of each).

    Equal, so that peers that want padded rows waste nothing on padding.
    """
    number = math.gcd(tokens, 64 if tokens >= 4096 else 8)
    return number, tokens // number


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    """A seeded source of random numbers on a device."""
    return torch.Generator(device).manual_seed(seed)


def random_lift(tokens: int, vocabulary: int, draw: torch.Generator) -> Tensor:
    """Return what to add to the sampled word's logit [M, 1] for a log-odds of -4 to 4.

    The other words' log-sum-exp is log V + spread^2 / 2 for normal logits.
    """
    middle = math.log(vocabulary) + LOGIT_SPREAD**2 / 2
    odds = torch.empty(tokens, 1, device=draw.device).uniform_(-4, 4, generator=draw)
    return odds + middle


def random_head(
    tokens: int, width: int, vocabulary: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden [M, H], weight [V, H] and ids [M] as a trained policy has them.

    The sampled word stands out of the vocabulary so that its probability is anything from 2 to 98
    percent: gradients of every size occur, and none is all rounding.
    """
    draw = generator(device)
    weight = torch.randn(vocabulary, width, generator=draw, device=device)
    weight *= LOGIT_SPREAD / width**0.5
    ids = torch.randint(vocabulary, (tokens,), generator=draw, device=device)
    hidden = torch.randn(tokens, width, generator=draw, device=device)
    lift = random_lift(tokens, vocabulary, draw)
    hidden += lift * weight[ids] / weight[ids].square().sum(-1, keepdim=True)
    return hidden.to(dtype), weight.to(dtype), ids


def random_policy(logprobs: Tensor) -> dict[str, Tensor]:
    """Old and reference log-probs [M] around given ones, and advantages [S]; all fp32."""
    draw = generator(logprobs.device, seed=1)

    def pick(values: Sequence[float]) -> Tensor:
        index = torch.randint(len(values), logprobs.shape, generator=draw, device=draw.device)
        return torch.tensor(values, device=draw.device)[index]

    middle = logprobs.float()
    inputs = {
        "old_logprobs": middle + pick(DRIFT),
        "reference_logprobs": middle + pick(DISTANCE),
    }
    number, _ = completions(len(logprobs))
    inputs["advantages"] = torch.randn(number, generator=draw, device=draw.device)
    return inputs
