"""One decode step of all sequences, which read their prompt's keys and values together.

The function checks its arguments and calls an operator, which chooses the implementation: one
operator that is pure, and one that also writes the newest keys and values into the caches. The
decision that is not obvious: all lengths are tensors on the device, of which the kernels read
nothing back, so that a CUDA graph may hold a step and the same graph serves sequences that end.

Shapes: N prompts, S sequences, U rows of all prompts, C_max places of a sequence's own tokens, Hq
query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastomni_kernels import dispatch, library, shared_decode
from fastomni_kernels.checks import check_float, check_heads, check_kind, check_shape, require

_NAME = "prefix_decode"
# What the kernel's tiles are made for.
LARGEST_HEAD = 128
MOST_HEADS_TOGETHER = 64
_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def prefix_decode(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_offsets: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Tensor,
    prompt_of: Tensor,
    *,
    new_k: Tensor | None = None,
    new_v: Tensor | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from the newest token of each sequence to its prompt and its own tokens.

    For rollouts, that is, without gradients. On a GPU the kernels run, read nothing back and do not
    depend on values in what they launch or allocate; a sequence's result has the same bits whatever
    shares its batch. Plain torch reads offsets and lengths back, and what shares the batch may
    change its rounding.

    Args:
        q: [S, Hq, D] queries of the newest tokens, any float dtype, that of all keys and values.
        prefix_k: [U, Hkv, D] keys of all prompts, packed; query head h reads key head
            h // (Hq / Hkv). There may be more rows than prompts take.
        prefix_v: [U, Hkv, D] values of all prompts.
        prefix_offsets: [N + 1] int32, where each prompt begins and ends in them.
        suffix_k: [S, C_max, Hkv, D] keys of the sequences' own tokens.
        suffix_v: [S, C_max, Hkv, D] values of the sequences' own tokens.
        suffix_lengths: [S] int32, how many of those are valid, the newest token counted in. More
            than C_max reads all C_max and stores nothing.
        prompt_of: [S] int32, the prompt of each sequence, in any order. A number outside 0..N-1
            is a sequence not in use, and how a caller freezes one that has ended: its result is
            zeros and its cache is left as it is.
        new_k: [S, Hkv, D] keys of the newest tokens, to be stored at place suffix_lengths - 1 of
            suffix_k, in place; by default they are there already.
        new_v: [S, Hkv, D] values of the newest tokens; goes with `new_k`.
        rotation: cosines and signed sines (those of the first half of D negated), each [S, 1, D],
            by which q and `new_k` are to be rotated, in fp32 and rounded once; by default they are
            rotated already.
        scale: factor of the scores, D ** -0.5 by default.
        backend: "auto", "triton" or "reference".

    Returns:
        [S, Hq, D] in q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other; gradients are wanted;
            caches that cannot be written; on a CPU, prompts that do not lie in prefix_k.
    """
    caches = (prefix_k, prefix_v, prefix_offsets, suffix_k, suffix_v, suffix_lengths, prompt_of)
    if not torch.compiler.is_compiling():
        _check(q, *caches)
        _check_new(q, suffix_k, suffix_v, new_k, new_v, rotation)
        require(
            scale is None or math.isfinite(scale),
            f"{_NAME}: scale={scale}; it must be a finite number",
        )
    settings = (q.shape[-1] ** -0.5 if scale is None else float(scale), backend)
    angles = (None, None) if rotation is None else rotation
    if new_k is None or new_v is None:
        return torch.ops.fastomni.prefix_decode(q, *caches, *angles, *settings)
    return torch.ops.fastomni.prefix_decode_append(q, *caches, new_k, new_v, *angles, *settings)


def _check(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_offsets: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Tensor,
    prompt_of: Tensor,
) -> None:
    check_shape(_NAME, "q", q, ("S", "Hq", "D"))
    sequences, _, head_size = q.shape
    check_shape(_NAME, "prefix_k", prefix_k, ("U", "Hkv", head_size))
    check_shape(_NAME, "prefix_v", prefix_v, prefix_k.shape)
    check_shape(_NAME, "suffix_k", suffix_k, (sequences, "C_max", *prefix_k.shape[1:]))
    check_shape(_NAME, "suffix_v", suffix_v, suffix_k.shape)
    check_heads(_NAME, q, prefix_k.shape[1])
    require(head_size > 0, f"{_NAME}: q has shape {list(q.shape)}; D must be 1 or more")
    check_shape(_NAME, "prefix_offsets", prefix_offsets, ("N + 1",))
    require(len(prefix_offsets) > 0, f"{_NAME}: prefix_offsets is empty; it must hold N + 1 rows")
    check_shape(_NAME, "suffix_lengths", suffix_lengths, (sequences,))
    check_shape(_NAME, "prompt_of", prompt_of, (sequences,))
    heads = {"prefix_k": prefix_k, "prefix_v": prefix_v, "suffix_k": suffix_k, "suffix_v": suffix_v}
    check_float(_NAME, q=q)
    _check_heads_alike(q, {"q": q} | heads)
    counts = {"prefix_offsets": prefix_offsets, "suffix_lengths": suffix_lengths}
    for name, x in (counts | {"prompt_of": prompt_of}).items():
        if x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(
                f"{_NAME}: {name} is {x.dtype} on {x.device}; it must be torch.int32 on "
                f"{q.device}, where q is"
            )


def _check_new(
    q: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    new_k: Tensor | None,
    new_v: Tensor | None,
    rotation: tuple[Tensor, Tensor] | None,
) -> None:
    require(
        (new_k is None) == (new_v is None),
        f"{_NAME}: {'new_v' if new_k is None else 'new_k'} is given alone; new_k and new_v go "
        "together",
    )
    if new_k is not None and new_v is not None:
        for name, x in (("new_k", new_k), ("new_v", new_v)):
            check_shape(_NAME, name, x, (len(q), *suffix_k.shape[2:]))
        _check_heads_alike(q, {"new_k": new_k, "new_v": new_v})
    if rotation is not None:
        check_kind(_NAME, "rotation", rotation, tuple)
        require(len(rotation) == 2, f"{_NAME}: rotation must be a pair: cosines, signed sines")
        for name, x in zip(("cosines", "sines"), rotation, strict=True):
            check_shape(_NAME, name, x, (len(q), 1, q.shape[2]))
        check_float(_NAME, q=q, cosines=rotation[0], sines=rotation[1])
        if q.shape[2] % 2:
            raise ValueError(
                f"{_NAME}: a head of D={q.shape[2]} cannot be rotated; its two halves pair up"
            )


def _check_heads_alike(q: Tensor, tensors: dict[str, Tensor]) -> None:
    dtype, device, grad = q.dtype, q.device, torch.is_grad_enabled()
    for name, x in tensors.items():
        if x.dtype != dtype or x.device != device:
            raise ValueError(
                f"{_NAME}: q is {dtype} on {device}, {name} is {x.dtype} on {x.device}; they must "
                "agree"
            )
        if grad and x.requires_grad:
            raise ValueError(
                f"{_NAME}: {name} requires a gradient and there is none; call it under "
                "torch.no_grad(), or use prefix_attention for training"
            )


def _together(cache: Tensor) -> bool:
    """Whether heads and their elements lie side by side."""
    *_, heads, size = cache.shape
    return cache.numel() == 0 or (
        (size == 1 or cache.stride(-1) == 1) and (heads == 1 or cache.stride(-2) == size)
    )


def kernel_obstacle(q: Tensor, key_heads: int) -> str:
    """Return why the kernel cannot take q [S, Hq, D]; empty where it can."""
    _, query_heads, head_size = q.shape
    together = query_heads // key_heads
    if head_size > LARGEST_HEAD:
        return f"its kernel takes heads of up to {LARGEST_HEAD}, not {head_size}"
    if together > MOST_HEADS_TOGETHER:
        return f"its kernel takes {MOST_HEADS_TOGETHER} query heads per key head, not {together}"
    # On a CPU the kernel can only be interpreted, and takes fp64 for the sake of tests.
    if q.dtype in _KERNEL_TYPES or (q.dtype == torch.float64 and q.device.type == "cpu"):
        return ""
    return f"its kernel does not take {q.dtype}"


def _run(
    backend: str,
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_offsets: Tensor,
    *rest: Any,
) -> Tensor:
    if q.device.type == "cpu":
        _check_offsets(prefix_offsets.tolist(), len(prefix_k))
    obstacle = kernel_obstacle(q, prefix_k.shape[1])
    require(not (obstacle and backend == "triton"), f"{_NAME}: {obstacle}; use 'reference'")
    arguments = (q, prefix_k, prefix_v, prefix_offsets, *rest)
    if dispatch.choose(_NAME, backend, q.device, has_kernel=not obstacle) == "triton":
        from fastomni_kernels.triton_kernels import prefix_decode as kernels

        return kernels.forward(*arguments)
    return shared_decode.prefix_decode(*arguments)


def _check_offsets(offsets: list[int], rows: int) -> None:
    """Refuse prompts outside the rows; on a GPU, where looking would stop the stream, none are."""
    rising = all(start <= stop for start, stop in pairwise(offsets))
    require(
        rising and offsets[0] >= 0 and offsets[-1] <= rows,
        f"{_NAME}: prefix_offsets go from {offsets[0]} to {offsets[-1]}"
        f"{'' if rising else ', not rising,'} but prefix_k has {rows} rows; prompts lie one after "
        "another within them",
    )


def _pure(q: Tensor, *rest: Any) -> Tensor:
    *caches, cosines, sines, scale, backend = rest
    return _run(backend, q, *caches, None, None, cosines, sines, scale)


def _append(q: Tensor, *rest: Any) -> Tensor:
    *arguments, backend = rest
    for name, cache in zip(("suffix_k", "suffix_v"), arguments[3:5], strict=True):
        require(
            _together(cache),
            f"{_NAME}: {name} has strides {cache.stride()}; to be written in place, its last two "
            "dimensions must be contiguous, as torch.empty(S, C_max, Hkv, D) makes it",
        )
        require(
            not cache.is_inference() or torch.is_inference_mode_enabled(),
            f"{_NAME}: {name} was made in inference mode and cannot be written outside of it; make "
            "the caches under torch.no_grad()",
        )
    return _run(backend, q, *arguments)


def _fake(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_PREFIX = "Tensor q, Tensor prefix_k, Tensor prefix_v, Tensor prefix_offsets"
_SETTINGS = "Tensor? cosines, Tensor? sines, float scale, str backend"

library.define(
    f"prefix_decode({_PREFIX}, Tensor suffix_k, Tensor suffix_v, Tensor suffix_lengths, "
    f"Tensor prompt_of, {_SETTINGS}) -> Tensor",
    _pure,
    _fake,
)
library.define(
    f"prefix_decode_append({_PREFIX}, Tensor(a!) suffix_k, Tensor(b!) suffix_v, "
    f"Tensor suffix_lengths, Tensor prompt_of, Tensor new_k, Tensor new_v, {_SETTINGS}) -> Tensor",
    _append,
    _fake,
)
