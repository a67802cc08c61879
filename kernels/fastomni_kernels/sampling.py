"""Sampling from logits: temperature, top-k, top-p, min-p; the token and its log-probability.

The random number is not drawn from a generator: it is one Philox-4x32-10 value of (seed, position),
so a sequence's tokens depend on nothing but its own seed and logits, whatever shares its batch and
however often the step is run, in a CUDA graph too. The token is the inverse of the cumulative
distribution in vocabulary order, in fp32. The log-probability is that of the tempered, untruncated
distribution: it is what the trainer computes for the same token.

Shapes: S sequences, V vocabulary.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastomni_kernels import dispatch, library, plain_sampling
from fastomni_kernels.checks import check_float, check_shape, check_temperature, require

# A position is one word of Philox's counter, which Triton reads as int32.
_POSITIONS = 2**31


class Sample(NamedTuple):
    """What `sample` returns.

    Attributes:
        tokens: [S] int64.
        logprobs: [S] fp32, nats, under softmax(logits / temperature) before any truncation.
        truncated_logprobs: [S] fp32, nats, under the distribution that was drawn from; None where
            not asked for. Without truncation they equal `logprobs`.
    """

    tokens: Tensor
    logprobs: Tensor
    truncated_logprobs: Tensor | None


def sample(
    logits: Tensor,
    seeds: Tensor,
    position: int | Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    truncated_logprobs: bool = False,
    backend: str = "auto",
) -> Sample:
    """Draw one token per sequence; no gradient flows through it.

    Each rule of truncation reads the full tempered distribution, and a token must pass all of them.
    Where several are on this differs from transformers and vLLM, whose rules come one after another
    and renormalise in between: there top-p is a share of what top-k left, and keeps fewer tokens.
    A rule is a threshold on the logit in fp32, so tokens that tie with the last one let through
    pass too; the most likely token always passes.

    Args:
        logits: [S, V] any float dtype and strides, -inf for tokens that cannot be.
        seeds: [S] int64, one per sequence.
        position: index of the token within its completion, [S] int64 or one int below 2 ** 31. A
            CUDA graph would repeat an int for ever, so that one is refused during its capture.
        temperature: 1e-6 to 1e6; divides the logits in fp32.
        top_k: keep tokens that fewer than `top_k` others exceed; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose mass reaches `top_p`; 1 keeps all.
        min_p: keep tokens at least `min_p` times as likely as the most likely one; 0 keeps all
            (arXiv:2407.01082).
        truncated_logprobs: whether to return the log-probabilities after truncation too.
        backend: "auto", "triton" or "reference".

    Returns:
        Tokens and their log-probabilities. The kernels give a sequence the same bits in every
        batch. So does plain torch on a CPU; on a GPU its sums depend on the number of rows.

    Raises:
        ValueError: shapes, dtypes, devices or numbers out of range, an int position in the capture
            of a CUDA graph, or a row on the CPU without a distribution (NaN, +inf, or nothing but
            -inf). On a GPU, where looking would stop the stream, such a row yields some token and
            a NaN log-probability.
    """
    if not torch.compiler.is_compiling():
        _check(logits, seeds, position, temperature, top_k, top_p, min_p)
    if not isinstance(position, Tensor):
        position = torch.full_like(seeds, position)
    rules = (float(temperature), int(top_k), float(top_p), float(min_p))
    tokens, logprobs, truncated = torch.ops.fastomni.sample(
        logits.detach(), seeds, position, *rules, truncated_logprobs, backend
    )
    return Sample(tokens, logprobs, truncated if truncated_logprobs else None)


def _check(
    logits: Tensor,
    seeds: Tensor,
    position: int | Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    name = "sample"
    check_shape(name, "logits", logits, ("S", "V"))
    check_float(name, logits=logits)
    sequences, vocabulary = logits.shape
    require(vocabulary > 0, f"{name}: logits has shape {[*logits.shape]}; V must be 1 or more")
    counters = {"seeds": seeds}
    if isinstance(position, Tensor):
        counters["position"] = position
    else:
        _check_host_position(name, position, logits)
    for word, x in counters.items():
        check_shape(name, word, x, (sequences,))
        require(x.dtype == torch.int64, f"{name}: {word} is {x.dtype}; use torch.int64")
        require(
            x.device == logits.device,
            f"{name}: {word} lies on {x.device}, logits on {logits.device}; move them together",
        )
    check_temperature(name, temperature)
    require(
        isinstance(top_k, int) and not isinstance(top_k, bool) and top_k >= 0,
        f"{name}: top_k={top_k!r}; use 0 (off) or a number of tokens",
    )
    for word, share in (("top_p", top_p), ("min_p", min_p)):
        number = isinstance(share, Real) and not isinstance(share, bool)
        require(number, f"{name}: {word}={share!r}; it must be a number from 0 to 1")
    require(0 < top_p <= 1, f"{name}: top_p={top_p}; it must be in (0, 1], 1 is off")
    require(0 <= min_p <= 1, f"{name}: min_p={min_p}; it must be in [0, 1], 0 is off")


def _check_host_position(name: str, position: int, logits: Tensor) -> None:
    require(
        isinstance(position, int) and not isinstance(position, bool),
        f"{name}: position is of type {type(position).__name__}; use an int or [S] torch.int64",
    )
    require(
        0 <= position < _POSITIONS,
        f"{name}: position={position}; it must be from 0 to 2 ** 31 - 1",
    )
    require(
        not (logits.is_cuda and torch.cuda.is_current_stream_capturing()),
        f"{name}: position={position} would stay the same in every replay of the CUDA graph that "
        "is being captured; use a [S] int64 tensor that the graph advances",
    )


def _implementation(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    truncated: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (logits, seeds, positions, temperature, top_k, top_p, min_p, truncated)
    if dispatch.choose("sample", backend, logits.device) == "triton":
        from fastomni_kernels.triton_kernels import sampling as kernels

        results = kernels.forward(*arguments)
    else:
        results = plain_sampling.draw(*arguments)
    if logits.device.type == "cpu" and bool(results[1].isnan().any()):
        rows = results[1].isnan().nonzero().flatten().tolist()
        raise ValueError(
            f"sample: logits of sequences {rows[:8]} are NaN, +inf or all -inf, so they have no "
            "distribution; the model's weights or inputs are not finite"
        )
    return results


def _fake(logits: Tensor, seeds: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    sequences, truncated = logits.shape[0], settings[-2]
    logprobs, after = (
        logits.new_empty(count, dtype=torch.float32)
        for count in (sequences, sequences if truncated else 0)
    )
    return logits.new_empty(sequences, dtype=torch.int64), logprobs, after


library.define(
    "sample(Tensor logits, Tensor seeds, Tensor positions, float temperature, int top_k, "
    "float top_p, float min_p, bool truncated, str backend) "
    "-> (Tensor tokens, Tensor logprobs, Tensor truncated_logprobs)",
    _implementation,
    _fake,
)
