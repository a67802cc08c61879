"""The fast implementations behind `flash_varlen`: what each needs, and how it is called.

Nothing is imported before a call could use it; a package that is installed but broken is an
obstacle with its reason, never an error of its own.

Shapes: B sequences, T query rows and U key rows of all sequences, Hq query heads, Hkv key-value
heads, D head size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Offsets of queries and keys [B + 1], longest sequence of queries and of keys.
Sequences = tuple[Tensor, Tensor, int, int]

HALF = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256

# varlen_attn has `enable_gqa` since torch 2.12 (pytorch/pytorch#179468).
TORCH_SHARES_HEADS = torch.__version__ >= "2.12"


@dataclass(frozen=True)
class Release:
    """One of the packages called flash-attn.

    Attributes:
        version: 4, 3 or 2.
        modules: where it may be imported from, in order.
        capabilities: major compute capabilities of NVIDIA GPUs it is used on; empty: 8 and newer.
        largest_head: largest head size it is used for.
    """

    version: int
    modules: tuple[str, ...]
    capabilities: tuple[int, ...]
    largest_head: int


# Newest first. The limits are those of the packages' own checks: flash_attn/cute/interface.py of
# 4.0.0b36 (_validate_head_dims: heads over 128 on some GPUs only), hopper/flash_api.cpp of 3.0.0
# and csrc/flash_attn/flash_api.cpp of 2.8.3.
RELEASES = (
    Release(4, ("flash_attn.cute",), (9, 10, 11), 128),
    Release(3, ("flash_attn_interface", "flash_attn_3.flash_attn_interface"), (9,), 256),
    Release(2, ("flash_attn",), (), 256),
)


def head_class(head_size: int) -> int:
    """Return the smaller of 128 and 256 that holds a head size flash kernels take; 0 where none.

    A class and not the size, so that a compiled call whose sizes are symbols can still choose.
    """
    if head_size % 8 or head_size > LARGEST_HEAD:
        return 0
    return 128 if head_size <= 128 else LARGEST_HEAD


def attempt(
    wish: str, device: torch.device, dtype: torch.dtype, size_class: int
) -> tuple[str, str]:
    """Return the backend that a wish comes to and "", or "" and what is in its way."""
    if wish == "sdpa":
        if device.type == "cpu":
            return "sdpa", ""
        return "", f"the tensors are on {device.type}; it is torch's CPU flash kernel"
    if device.type != "cuda":
        return "", f"the tensors are on {device.type}"
    if dtype not in HALF:
        return "", f"the tensors are {dtype}; flash kernels take torch.float16 and torch.bfloat16"
    if not size_class:
        return "", f"the head size is over {LARGEST_HEAD} or no multiple of 8"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return "", f"the compute capability is {major}.{minor}; flash kernels need 8.0"
    if wish == "torch":
        if torch.backends.cuda.is_flash_attention_available():
            return "torch", ""
        return "", "torch was built without flash attention"
    obstacles = []
    for release in RELEASES:
        obstacle = _obstacle(release, major, minor, size_class)
        if not obstacle:
            return f"flash-attn {release.version}", ""
        obstacles.append(f"{release.version} {obstacle}")
    return "", ", ".join(obstacles)


def _obstacle(release: Release, major: int, minor: int, size_class: int) -> str:
    if release.capabilities and torch.version.hip:
        return "needs an NVIDIA GPU"
    if release.capabilities and major not in release.capabilities:
        return f"is not for compute capability {major}.{minor}"
    if size_class > release.largest_head:
        return f"is not for heads over {release.largest_head}"
    return imported(release.version)[1]


@cache
def imported(version: int) -> tuple[Callable[..., Any] | None, str]:
    """Return `flash_attn_varlen_func` of a flash-attn release, or None and why there is none."""
    (release,) = (release for release in RELEASES if release.version == version)
    problem = "is not installed"
    for name in release.modules:
        try:
            return importlib.import_module(name).flash_attn_varlen_func, ""
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                problem = f"cannot be loaded ({error})"
        except AttributeError:
            continue  # release 4 alone makes a package flash_attn that holds no release 2
        except Exception as error:  # a build for another torch or driver may raise anything
            problem = f"cannot be loaded ({type(error).__name__}: {error})"
    return None, problem


def flash_attn(
    version: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    causal: bool,
    scale: float,
) -> Tensor:
    """Call a flash-attn package: 2.7 to 2.8.3, 3.0.0 and 4.0.0b36 take these keywords alike.

    Keywords, because release 4 has `qv` where the others have `cu_seqlens_q`. Release 4, and early
    builds of 3, return the log-sum-exp too.
    """
    function, problem = imported(version)
    if function is None:
        raise ValueError(f"flash_varlen: flash-attn {version} {problem}")
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = sequences
    result = function(
        *_rows_contiguous(q, k, v),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=scale,
        causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return result[0] if isinstance(result, tuple) else result


def torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, causal: bool, scale: float
) -> Tensor:
    """Call torch.nn.attention.varlen.varlen_attn, which is causal through its window.

    torch 2.11 has no `enable_gqa` and documents equal head counts: keys are repeated there.
    """
    from torch.nn.attention.varlen import varlen_attn

    shared: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if TORCH_SHARES_HEADS:
            shared["enable_gqa"] = True
        else:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    window = (-1, 0) if causal else (-1, -1)
    q, k, v = _rows_contiguous(q, k, v)
    out = varlen_attn(q, k, v, *sequences, scale=scale, window_size=window, **shared)
    assert isinstance(out, Tensor)  # a tuple only where the log-sum-exp was asked for
    return out


def _rows_contiguous(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors as flash kernels take them: any strides, but the last is 1."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return q, k, v
