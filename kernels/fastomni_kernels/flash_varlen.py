"""Attention of packed sequences through whichever fast implementation this machine has.

`flash_varlen` is one call over four backends: "flash-attn" (package 4, 3 or 2) and "torch" (the
flash kernel inside torch) on a GPU, "sdpa" (torch's CPU flash kernel) on a CPU, and "reference"
(plain torch, any device and float dtype). There is no Triton kernel of our own. The choice is made
from device, dtype, head size and what imports, and stands in `dispatch.choices`. The decision that
is not obvious: only "sdpa" and the reference are operators of ours, because they need the lengths
on the host, where `torch.compile` cannot see them; the fast backends of a GPU bring their own
autograd and are called as they are.

Shapes: B sequences, T query rows and U key rows of all sequences, Lq and Lk those of one, Hq query
heads, Hkv key-value heads, R = Hq / Hkv, D head size.
"""

from __future__ import annotations

import logging
import math
import os

import torch
from torch import Tensor

from fastomni_kernels import dispatch
from fastomni_kernels.checks import check_float, check_heads, check_shape, require
from fastomni_kernels.varlen_backends import attempt, flash_attn, head_class, torch_varlen
from fastomni_kernels.varlen_reference import reference_operator
from fastomni_kernels.varlen_sdpa import sdpa_operator

BACKENDS = ("auto", "flash-attn", "torch", "sdpa", "reference")
_NAME = "flash_varlen"

# What "auto" tries, in this order, and the reason it gives. No shape decides: on a CPU (fp32, two
# threads) sdpa was 1.0 to 2.5 times as fast as the reference forward, 1.1 to 3.4 times forward and
# backward, on all shapes of towers, prefill and training rows that bench/cases_attention.py names
# for a CPU. On a GPU nothing was timed: the newest release comes first.
_ON_CPU = (("sdpa",), "the tensors are on cpu, where it was never the slower one")
_ON_GPU = (("flash-attn", "torch"), "can run here (backends were not timed on a GPU)")

_logger = logging.getLogger("fastomni_kernels")


def flash_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend within each of many packed sequences.

    A causal mask is aligned to the bottom right, as in flash-attn since 2.1: the last query sees
    all keys, query i sees keys up to i + Lk - Lq. A query that sees no key gives zeros.

    Args:
        q: [T, Hq, D] queries, sequence after sequence.
        k: [U, Hkv, D] keys; Hkv divides Hq, and query head h reads key head h // (Hq / Hkv).
        v: [U, Hkv, D] values.
        cu_seqlens_q: [B + 1] int32, 0 and the ends of the sequences in q; empty ones are allowed.
        cu_seqlens_k: [B + 1] int32, the same for k and v.
        max_seqlen_q: longest query sequence, rows (a larger number costs time only).
        max_seqlen_k: longest key sequence, rows.
        causal: whether a query sees no later key.
        scale: factor of the scores, D ** -0.5 by default.
        backend: "auto" takes sdpa on a CPU; elsewhere the first that can run of flash-attn (newest
            release), torch, reference, and under `torch.compile` torch before flash-attn.
            FASTOMNI_KERNELS=reference forces the reference; its value `triton` means nothing here.

    Returns:
        [T, Hq, D] in q's dtype; differentiable once in q, k and v. On a CPU half precision is
        computed in fp32.

    Raises:
        ValueError: shapes, dtypes, devices or offsets that do not fit, an unknown backend, or one
            that was asked for and cannot run here.
    """
    if not torch.compiler.is_compiling():
        _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)
    compiling = torch.compiler.is_compiling()
    chosen = _choose(backend, q.device, q.dtype, head_class(q.shape[2]), compiling)
    factor = q.shape[2] ** -0.5 if scale is None else float(scale)
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if chosen == "sdpa":
        out: Tensor = sdpa_operator(q, k, v, *sequences, causal, factor)[0]
        return out
    # Flash kernels of a GPU need not accept a launch over nothing.
    if chosen == "reference" or q.shape[0] == 0 or k.shape[0] == 0:
        return reference_operator(q, k, v, *sequences, causal, factor)
    if chosen == "torch":
        return torch_varlen(q, k, v, sequences, causal, factor)
    return flash_attn(int(chosen[-1]), q, k, v, sequences, causal, factor)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None,
) -> None:
    check_shape(_NAME, "q", q, ("T", "Hq", "D"))
    check_shape(_NAME, "k", k, ("U", "Hkv", q.shape[2]))
    check_shape(_NAME, "v", v, tuple(k.shape))
    check_heads(_NAME, q, k.shape[1])
    check_float(_NAME, q=q, k=k, v=v)
    require(
        q.dtype == k.dtype == v.dtype,
        f"{_NAME}: q is {q.dtype}, k is {k.dtype}, v is {v.dtype}; they must agree",
    )
    check_shape(_NAME, "cu_seqlens_q", cu_seqlens_q, ("B + 1",))
    check_shape(_NAME, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape))
    require(len(cu_seqlens_q) >= 1, f"{_NAME}: cu_seqlens_q is empty; it must begin with 0")
    for name, offsets, largest in (
        ("q", cu_seqlens_q, max_seqlen_q),
        ("k", cu_seqlens_k, max_seqlen_k),
    ):
        require(
            offsets.dtype == torch.int32 and offsets.device == q.device,
            f"{_NAME}: cu_seqlens_{name} is {offsets.dtype} on {offsets.device}; it must be "
            f"torch.int32 on {q.device}",
        )
        require(
            isinstance(largest, int) and largest >= 0,
            f"{_NAME}: max_seqlen_{name}={largest!r}; it must be a host integer, 0 or more",
        )
    require(
        scale is None or math.isfinite(scale), f"{_NAME}: scale={scale}; it must be a finite number"
    )


def explain(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    compiling: bool = False,
) -> tuple[str, str]:
    """Return the backend that would run ("flash-attn 2", "torch", "sdpa", "reference"), and why.

    Raises:
        ValueError: an unknown backend, or one that cannot run here.
    """
    return _decide(requested, device, dtype, head_class(head_size), compiling)


def _choose(
    requested: str, device: torch.device, dtype: torch.dtype, size_class: int, compiling: bool
) -> str:
    """Decide, and remember the choice with its reason."""
    backend, reason = _decide(requested, device, dtype, size_class, compiling)
    if (_NAME, backend) not in dispatch.choices:
        dispatch.choices[_NAME, backend] = reason
        _logger.info("%s runs as %s: %s", _NAME, backend, reason)
    return backend


# What torch.compiler.assume_constant_result sets; that function itself loads the whole compiler.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _decide(
    requested: str, device: torch.device, dtype: torch.dtype, size_class: int, compiling: bool
) -> tuple[str, str]:
    require(
        requested in BACKENDS,
        f"{_NAME}: backend {requested!r} is unknown; use one of {', '.join(BACKENDS)}",
    )
    environment = os.environ.get(dispatch.ENVIRONMENT_VARIABLE, "auto")
    origin = f"{dispatch.ENVIRONMENT_VARIABLE}={environment}"
    require(
        environment in dispatch.BACKENDS,
        f"{_NAME}: {origin} is unknown; use one of {', '.join(dispatch.BACKENDS)}",
    )
    if requested == "reference":
        return "reference", "asked for by the argument backend"
    if requested == "auto" and environment == "reference":
        return "reference", f"asked for by {origin}"
    order, reason = _ON_CPU if device.type == "cpu" else _ON_GPU
    if requested != "auto":
        order, reason = (requested,), "asked for by the argument backend"
    obstacles: list[str] = []
    for wish in reversed(order) if compiling else order:
        backend, obstacle = attempt(wish, device, dtype, size_class)
        if backend:
            return backend, "; ".join([reason, *obstacles])
        obstacles.append(f"{wish}: {obstacle}")
    require(requested == "auto", f"{_NAME}: backend {requested!r} cannot run, because {obstacle}")
    # One sentence where both stumble over the same thing.
    shared = {text.partition(": ")[2] for text in obstacles}
    return "reference", shared.pop() if len(shared) == 1 else "; ".join(obstacles)
