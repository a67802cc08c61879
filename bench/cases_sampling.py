"""Cases of sample: a token and its log-probability, from all words and from a truncated choice.

What is drawn is random, so the answer that is checked is made of it: the log-probability against
the exact one of the token that was returned, whether that token could be drawn at all, and whether
the tokens are as likely, together, as draws are. transformers truncates one rule after another and
renormalises in between, which keeps a part of what all rules together keep; its log-probability is
that before truncation, as everybody's.

Shapes: S sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fastomni_kernels
from bench.cases import FORWARD, Answer, Call, Case, Cost, Problem, Provider
from bench.cases_policy import compiled, identity, ours
from bench.definitions import LOGIT_SPREAD, generator, row_chunks

TRUNCATED = "truncated"
TEMPERATURE = 0.9
TOP_K, TOP_P, MIN_P = 50, 0.9, 0.05
# Standard deviations by which the tokens' summed surprise may miss its expectation.
LARGEST_DEVIATION = 5.0
# Rounding may move a word across a threshold of mass or probability by this much.
TOLERANCE = 1e-3

# Errors of log-probabilities are measured against this many nats.
LOGPROB_SIZE = 10.0

# Logits -> tokens [S], log-probabilities [S].
Sampler = Callable[[Tensor], tuple[Tensor, Tensor]]


def sample_cost(mode: str) -> Callable[[Sequence[int], int], Cost]:
    """The logits are read once; scale, subtract, exp and add, and two comparisons to truncate."""
    operations = 4 if mode == FORWARD else 6

    def cost(sizes: Sequence[int], itemsize: int) -> Cost:
        sequences, vocabulary = sizes
        elements = sequences * vocabulary
        text = f"bytes S V e + 20 S, FLOPs {operations} S V, e = {itemsize}"
        return Cost(elements * itemsize + 20.0 * sequences, float(operations * elements), text)

    return cost


def possible(log_p: Tensor) -> Tensor:
    """Words [S, V] that top-k, top-p and min-p of the full distribution may let through."""
    ordered, order = log_p.sort(-1, descending=True)
    mass = ordered.exp()
    kept = mass.cumsum(-1) - mass < TOP_P + TOLERANCE
    kept &= mass >= MIN_P * mass[:, :1] * (1 - TOLERANCE)
    kept[:, TOP_K:] = False
    return torch.zeros_like(kept).scatter_(1, order, kept)


def sample_problem(mode: str) -> Callable[[Sequence[int], torch.device, torch.dtype], Problem]:
    """Normal logits above which a few words stand out, as a trained policy has them."""

    def make(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
        sequences, vocabulary = sizes
        draw = generator(device)
        logits = torch.randn(sequences, vocabulary, generator=draw, device=device) * LOGIT_SPREAD
        likely = min(20, vocabulary)
        ids = torch.rand(sequences, vocabulary, generator=draw, device=device).topk(likely).indices
        # Alike enough that the likeliest word is no likely draw for all sequences at once.
        lifted = 12 + 0.7 * torch.randn(sequences, likely, generator=draw, device=device)
        logits = logits.scatter_(1, ids, lifted).to(dtype)
        seeds = torch.randint(2**62, (sequences,), generator=draw, device=device)
        inputs = {"logits": logits, "seeds": seeds, "positions": torch.zeros_like(seeds)}
        problem = Problem(inputs, {"logprobs": torch.zeros(sequences, device=device).double()})
        log_ps, allowed = [], []
        for rows in row_chunks(sequences, vocabulary):
            log_p = (logits[rows].double() / TEMPERATURE).log_softmax(-1)
            log_ps.append(log_p)
            allowed.append(possible(log_p) if mode == TRUNCATED else log_p > -torch.inf)
        problem.settings["log_p"] = torch.cat(log_ps)
        problem.settings["possible"] = torch.cat(allowed)
        problem.scales["logprobs"] = LOGPROB_SIZE
        problem.exact["tokens"] = torch.zeros((), dtype=torch.float64, device=device)
        return problem

    return make


def judge(problem: Problem, answer: Answer, alike: bool = True) -> Answer:
    """Turn what was drawn into errors, which should be nothing.

    Args:
        problem: holds the exact distribution.
        answer: `tokens` [S] and `logprobs` [S].
        alike: whether the tokens are drawn from that very distribution.

    Returns:
        `logprobs`: [S] differences from the exact log-probability of the token returned; `tokens`:
        1 where a token could not be drawn or all of them are too likely or too unlikely, else 0.
    """
    log_p, allowed = problem.settings["log_p"], problem.settings["possible"]
    index = answer["tokens"][:, None]
    reached = log_p.gather(1, index)[:, 0]
    wrong = ~allowed.gather(1, index).all()
    if alike:
        drawn_from = log_p.masked_fill(~allowed, -torch.inf).softmax(1)
        mean = (drawn_from * log_p).sum(1)
        variance = (drawn_from * log_p.square()).sum(1) - mean.square()
        deviation = (reached - mean).sum().abs() / variance.sum().sqrt().clamp(min=1e-9)
        wrong |= deviation > LARGEST_DEVIATION
    return {"logprobs": answer["logprobs"] - reached, "tokens": wrong.double()}


def judge_possible(problem: Problem, answer: Answer) -> Answer:
    """The same for a sampler that keeps a part of the words that could be kept."""
    return judge(problem, answer, alike=False)


def sample_call(problem: Problem, function: Sampler) -> Call:
    """The call of any sampler."""
    logits = problem["logits"]

    def call() -> Answer:
        tokens, logprobs = function(logits)
        return {"tokens": tokens, "logprobs": logprobs}

    return call


def our_sample(problem: Problem, backend: str, mode: str) -> Call:
    """fastomni_kernels.sample."""
    top_k, top_p, min_p = (TOP_K, TOP_P, MIN_P) if mode == TRUNCATED else (0, 1.0, 0.0)
    seeds, positions = problem["seeds"], problem["positions"]

    def function(logits: Tensor) -> tuple[Tensor, Tensor]:
        drawn = fastomni_kernels.sample(
            logits, seeds, positions, TEMPERATURE, top_k, top_p, min_p, backend=backend
        )
        return drawn.tokens, drawn.logprobs

    return sample_call(problem, function)


def keep(log_p: Tensor) -> Tensor:
    """Log-probabilities [S, V] with -inf for what the rules leave out."""
    ordered = log_p.sort(-1, descending=True).values
    mass = ordered.exp()
    kept = (mass.cumsum(-1) - mass < TOP_P) & (mass >= MIN_P * mass[:, :1])
    last = kept[:, :TOP_K].sum(-1, keepdim=True) - 1
    return log_p.masked_fill(log_p < ordered.gather(1, last), -torch.inf)


def with_logprobs(log_p: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [S] of [S, 1], and their log-probabilities."""
    return tokens[:, 0], log_p.gather(1, tokens)[:, 0]


def multinomial(mode: str) -> Sampler:
    """softmax, sort to truncate, torch.multinomial."""

    def function(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (logits.float() / TEMPERATURE).log_softmax(-1)
        kept = keep(log_p) if mode == TRUNCATED else log_p
        return with_logprobs(log_p, torch.multinomial(kept.exp(), 1))

    return function


def gumbel_max(mode: str) -> Sampler:
    """The largest p / e of exponential e, which is the largest log p plus Gumbel noise.

    Also what is compiled: torch.compile has no multinomial of its own.
    """

    def function(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (logits.float() / TEMPERATURE).log_softmax(-1)
        kept = keep(log_p) if mode == TRUNCATED else log_p
        noise = torch.empty_like(kept).exponential_()
        return with_logprobs(log_p, (kept.exp() / noise).argmax(-1, keepdim=True))

    return function


def few(logits: Tensor) -> tuple[Tensor, Tensor]:
    """torch.topk first, so that the other rules look at TOP_K words; draws among those."""
    scaled = logits.float() / TEMPERATURE
    values, ids = scaled.topk(min(TOP_K, scaled.shape[1]), -1)
    log_p = values - scaled.logsumexp(-1, keepdim=True)
    mass = log_p.exp()
    kept = (mass.cumsum(-1) - mass < TOP_P) & (mass >= MIN_P * mass[:, :1])
    place = torch.multinomial(mass * kept, 1)
    return ids.gather(1, place)[:, 0], log_p.gather(1, place)[:, 0]


def transformers_warpers(mode: str) -> Sampler:
    """transformers' warpers in the order of its `generate`, softmax and multinomial."""
    from transformers.generation import logits_process

    warpers: list[Any] = [logits_process.TemperatureLogitsWarper(TEMPERATURE)]
    if mode == TRUNCATED:
        warpers += [
            logits_process.TopKLogitsWarper(TOP_K),
            logits_process.TopPLogitsWarper(TOP_P),
            logits_process.MinPLogitsWarper(MIN_P),
        ]
    no_ids = torch.empty(0, 0, dtype=torch.int64)

    def function(logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.float()
        for warper in warpers:
            scores = warper(no_ids, scores)
        tokens = torch.multinomial(scores.softmax(-1), 1)
        return with_logprobs((logits.float() / TEMPERATURE).log_softmax(-1), tokens)

    return function


def sample_case(mode: str) -> Case:
    """sample from all words ("forward") or with all three rules ("truncated")."""

    def peer(
        name: str,
        make: Callable[[], Sampler],
        wrap: Callable[[Sampler], Sampler] = identity,
        finish: Callable[[Problem, Answer], Answer] = judge,
        modules: tuple[str, ...] = (),
    ) -> Provider:
        return Provider(
            name, lambda p: sample_call(p, wrap(make())), modules=modules, finish=finish
        )

    # Not strict: our path on a CPU is torch's log_softmax, with its error.
    our_providers = (
        replace(provider, finish=judge, strict="cpu" not in provider.devices)
        for provider in ours(lambda p, backend: our_sample(p, backend, mode))
    )
    return Case(
        "sample",
        mode,
        ("S", "V"),
        {"small": (8, 18992), "full": (64, 151936), "cpu": (16, 151936)},
        sample_cost(mode),
        sample_problem(mode),
        (
            *our_providers,
            peer("softmax + multinomial", lambda: multinomial(mode)),
            *([peer("topk + multinomial", lambda: few)] if mode == TRUNCATED else ()),
            peer(
                "transformers warpers",
                lambda: transformers_warpers(mode),
                finish=judge_possible,
                modules=("transformers",),
            ),
            peer("Gumbel-max", lambda: gumbel_max(mode)),
            peer("torch.compile", lambda: gumbel_max(mode), compiled),
        ),
    )


CASES = (sample_case(FORWARD), sample_case(TRUNCATED))
