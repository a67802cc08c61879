"""The public functions: arguments are checked here, then the device chooses the implementation.

Checks read shapes, dtypes, devices and host numbers only. The one exception is the range of token
ids, which is looked at on the CPU alone: on a GPU it would stop the stream in every call.

Shapes: N prompts, G completions per prompt, S sequences, T packed rows, M completion tokens, P_i
prompt tokens, H hidden, V vocabulary, Hq query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastomni_kernels import prefix_attention as cpu_attention
from fastomni_kernels import reference, sampling
from fastomni_kernels.layout import GroupLayout

__all__ = [
    "gather_logprobs",
    "group_advantages",
    "grpo_loss",
    "kl_penalty",
    "linear_logprobs",
    "prefix_attention",
    "prefix_decode",
    "sample",
]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check(function: str, name: str, x: Tensor, shape: Sequence[int | str]) -> None:
    """Refuse a tensor whose shape differs from `shape`; letters stand for any size."""
    fits = x.dim() == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, x.shape, strict=True)
    )
    wanted = ", ".join(map(str, shape))
    _require(fits, f"{function}: {name} has shape {list(x.shape)}; it must be [{wanted}]")


def _check_float(function: str, **tensors: Tensor) -> None:
    devices = {x.device for x in tensors.values()}
    for name, x in tensors.items():
        _require(
            x.is_floating_point(),
            f"{function}: {name} is {x.dtype}; it must be a float tensor",
        )
    _require(
        len(devices) == 1,
        f"{function}: {', '.join(tensors)} lie on {sorted(map(str, devices))}; move them together",
    )


def _check_ids(function: str, ids: Tensor, like: Tensor, vocabulary: int) -> None:
    _require(ids.dtype == torch.int64, f"{function}: ids are {ids.dtype}; they must be torch.int64")
    _require(
        ids.device == like.device,
        f"{function}: ids lie on {ids.device}, the rest on {like.device}; move them together",
    )
    if ids.device.type == "cpu" and len(ids):
        smallest, largest = (int(x) for x in ids.aminmax())
        _require(
            smallest >= 0 and largest < vocabulary,
            f"{function}: ids go from {smallest} to {largest} but the vocabulary has {vocabulary} "
            "entries; drop padding ids before the call",
        )


def _check_temperature(function: str, temperature: float) -> None:
    _require(
        math.isfinite(temperature) and temperature > 0,
        f"{function}: temperature={temperature}; it must be a positive number (greedy decoding is "
        "logits.argmax, not a temperature of 0)",
    )


def _check_heads(function: str, q: Tensor, key_heads: int) -> None:
    _require(
        key_heads > 0 and q.shape[1] % key_heads == 0,
        f"{function}: {q.shape[1]} query heads cannot be shared by {key_heads} key heads; the "
        "number of query heads must be a multiple",
    )


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, scale: float | None = None
) -> Tensor:
    """Attention of packed groups; see `reference.prefix_attention`.

    On the CPU it runs on dense pieces without any mask; elsewhere it is the definition.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other or the layout.
    """
    name = "prefix_attention"
    _check(name, "q", q, (layout.num_rows, "Hq", "D"))
    shape = (layout.num_rows, "Hkv", q.shape[2])
    _check(name, "k", k, shape)
    _check(name, "v", v, (layout.num_rows, k.shape[1], q.shape[2]))
    _check_heads(name, q, k.shape[1])
    _check_float(name, q=q, k=k, v=v)
    _require(
        q.dtype == k.dtype == v.dtype,
        f"{name}: q is {q.dtype}, k is {k.dtype}, v is {v.dtype}; they must agree",
    )
    if q.device.type == "cpu":
        return cpu_attention.prefix_attention(q, k, v, layout, scale)
    return reference.prefix_attention(q, k, v, layout, scale)


def prefix_decode(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prompt_lengths: Sequence[int],
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_length: int | Tensor,
    generations: int,
    scale: float | None = None,
) -> Tensor:
    """One decode step for all sequences; see `reference.prefix_decode`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    name = "prefix_decode"
    sequences = len(prompt_lengths) * generations
    _require(
        generations >= 1 and min(prompt_lengths, default=0) >= 1,
        f"{name}: generations={generations} and prompt_lengths={list(prompt_lengths)[:8]}; "
        "all must be 1 or more, and there must be a prompt",
    )
    _check(name, "q", q, (sequences, "Hq", "D"))
    _check(name, "prefix_k", prefix_k, (sum(prompt_lengths), "Hkv", q.shape[2]))
    _check(name, "prefix_v", prefix_v, prefix_k.shape)
    _check(name, "suffix_k", suffix_k, (sequences, "C_max", *prefix_k.shape[1:]))
    _check(name, "suffix_v", suffix_v, suffix_k.shape)
    _check_heads(name, q, prefix_k.shape[1])
    _check_float(
        name, q=q, prefix_k=prefix_k, prefix_v=prefix_v, suffix_k=suffix_k, suffix_v=suffix_v
    )
    if isinstance(suffix_length, Tensor):
        _check(name, "suffix_length", suffix_length, (sequences,))
    else:
        _require(
            0 <= suffix_length <= suffix_k.shape[1],
            f"{name}: suffix_length={suffix_length} but the suffix cache has "
            f"{suffix_k.shape[1]} places",
        )
    return reference.prefix_decode(
        q,
        prefix_k,
        prefix_v,
        prompt_lengths,
        suffix_k,
        suffix_v,
        suffix_length,
        generations,
        scale,
    )


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Centre and scale rewards within their group; see `reference.group_advantages`.

    Raises:
        ValueError: not [N, G] floats, fewer than two completions per group, or infinite rewards
            on the CPU.
    """
    name = "group_advantages"
    _check(name, "rewards", rewards, ("N", "G"))
    _check_float(name, rewards=rewards)
    _require(
        rewards.shape[1] >= 2,
        f"{name}: {rewards.shape[1]} completion per prompt leaves nothing to compare, every "
        "advantage would be 0; generate 2 or more (R1-Omni uses 8)",
    )
    _require(eps >= 0, f"{name}: eps={eps}; it must not be negative")
    if rewards.device.type == "cpu":
        _require(
            not bool(rewards.isinf().any()),
            f"{name}: a reward is infinite; mark a completion without a reward with NaN",
        )
    return reference.group_advantages(rewards, eps)


def gather_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-prob of each id and entropy from logits; see `reference.gather_logprobs`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, ids out of range on the CPU, or a
            temperature that is not positive.
    """
    name = "gather_logprobs"
    _check(name, "logits", logits, ("M", "V"))
    _check(name, "ids", ids, (logits.shape[0],))
    _check_float(name, logits=logits)
    _check_ids(name, ids, logits, logits.shape[1])
    _check_temperature(name, temperature)
    return reference.gather_logprobs(logits, ids, temperature)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = True,
    chunk_bytes: int = reference.DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each id and entropy without logits; see `reference.linear_logprobs`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, ids out of range on the CPU, a
            temperature that is not positive, or no room for chunks.
    """
    name = "linear_logprobs"
    _check(name, "hidden", hidden, ("M", "H"))
    _check(name, "weight", weight, ("V", hidden.shape[1]))
    _check(name, "ids", ids, (hidden.shape[0],))
    _check_float(name, hidden=hidden, weight=weight)
    _check_ids(name, ids, hidden, weight.shape[0])
    _check_temperature(name, temperature)
    _require(chunk_bytes > 0, f"{name}: chunk_bytes={chunk_bytes}; it must be positive")
    return reference.linear_logprobs(hidden, weight, ids, temperature, with_entropy, chunk_bytes)


def kl_penalty(logprobs: Tensor, reference_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """KL estimate of each token; see `reference.kl_penalty`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an unknown estimator.
    """
    name = "kl_penalty"
    _check(name, "logprobs", logprobs, ("M",))
    _check(name, "reference_logprobs", reference_logprobs, tuple(logprobs.shape))
    _check_float(name, logprobs=logprobs, reference_logprobs=reference_logprobs)
    return reference.kl_penalty(logprobs, reference_logprobs, estimator)


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    layout: GroupLayout,
    reference_logprobs: Tensor | None = None,
    beta: float = 0.0,
    old_logprobs: Tensor | None = None,
    reduction: str = "grpo",
    num_sequences: int | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO loss and metrics of packed completions; see `reference.grpo_loss`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, totals smaller than the layout's,
            an unknown reduction, or beta without reference log-probs.
    """
    name = "grpo_loss"
    tokens = (layout.num_completion_tokens,)
    given = {"logprobs": logprobs, "advantages": advantages}
    _check(name, "logprobs", logprobs, tokens)
    _check(name, "advantages", advantages, (layout.num_sequences,))
    for label, optional in (
        ("reference_logprobs", reference_logprobs),
        ("old_logprobs", old_logprobs),
    ):
        if optional is not None:
            _check(name, label, optional, tokens)
            given[label] = optional
    _check_float(name, **given)
    for label, total, part in (
        ("num_sequences", num_sequences, layout.num_sequences),
        ("num_tokens", num_tokens, layout.num_completion_tokens),
    ):
        _require(
            total is None or total >= max(part, 1),
            f"{name}: {label}={total} but this micro-batch alone has {part}; pass the total over "
            "all micro-batches",
        )
    return reference.grpo_loss(
        logprobs,
        advantages,
        layout,
        reference_logprobs,
        beta,
        old_logprobs,
        reduction,
        num_sequences,
        num_tokens,
    )


def sample(
    logits: Tensor,
    seeds: Tensor,
    position: int | Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Draw one token per sequence; see `sampling.sample`.

    Raises:
        ValueError: shapes, dtypes or numbers out of range, or (on the CPU) logits that are no
            distribution.
    """
    name = "sample"
    _check(name, "logits", logits, ("S", "V"))
    _check(name, "seeds", seeds, (logits.shape[0],))
    _check_float(name, logits=logits)
    _require(seeds.dtype == torch.int64, f"{name}: seeds are {seeds.dtype}; use torch.int64")
    if isinstance(position, Tensor):
        _check(name, "position", position, (logits.shape[0],))
    _check_temperature(name, temperature)
    _require(top_k >= 0, f"{name}: top_k={top_k}; use 0 (off) or a number of tokens")
    _require(0 < top_p <= 1, f"{name}: top_p={top_p}; it must be in (0, 1], 1 is off")
    _require(0 <= min_p <= 1, f"{name}: min_p={min_p}; it must be in [0, 1], 0 is off")
    return sampling.sample(logits, seeds, position, temperature, top_k, top_p, min_p)
