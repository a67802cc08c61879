"""RMSNorm, rotary position embedding and SwiGLU: liger-kernel on a GPU, plain torch elsewhere.

The decision that is not obvious: liger's kernels save memory by writing over what they are given
(incoming gradients, and the tensors that are rotated), which another holder of those tensors would
notice. Here they get copies wherever such a holder may exist, so that any graph around these
functions is right, also one that is run backward twice.

Shapes: T rows, H hidden, I intermediate, Hq query heads, Hkv key/value heads, D head width.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastomni.extras import require
from fastomni_kernels import reference
from fastomni_kernels.dispatch import ENVIRONMENT_VARIABLE

# What each function takes from liger_kernel.ops; 0.8.2 has them all, 0.7 all but the last.
OPERATIONS = {
    "rms_norm": "LigerRMSNormFunction",
    "rotate": "LigerRopeFunction",
    "swiglu": "LigerFusedGateUpSiLUMulFunction",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def implementation(function: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Which implementation of a function runs, "liger" or "torch", and the reason.

    Args:
        function: one of `OPERATIONS`.
        device: where the tensors are.
        dtype: of the tensors.
    """
    if device.type != "cuda":
        return "torch", f"the tensors are on {device.type}"
    if os.environ.get(ENVIRONMENT_VARIABLE) == "reference":
        return "torch", f"asked for by {ENVIRONMENT_VARIABLE}=reference"
    if dtype not in DTYPES:
        return "torch", f"the tensors are {dtype}"
    operation, problem = _liger(function)
    return ("torch", problem) if operation is None else ("liger", "the tensors are on a GPU")


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm of the last axis, with its statistics in fp32.

    Args:
        hidden: [..., H].
        weight: [H].
        eps: added to the mean square.
    """
    operation = _operation("rms_norm", hidden)
    if operation is None or weight.dtype != hidden.dtype:
        normed = F.rms_norm(hidden.float(), (hidden.shape[-1],), None, eps)
        return weight * normed.to(hidden.dtype)
    # No offset of the weight; rounded where Llama rounds; the incoming gradient is left as it is.
    return operation.apply(hidden, weight, eps, 0.0, "llama", False)


def rotate(
    heads: Tensor, rotation: tuple[Tensor, Tensor], query_heads: int
) -> tuple[Tensor, Tensor]:
    """Rotates heads by position: the first half of D pairs with the second.

    Args:
        heads: [T, Hq + Hkv, D] queries, then keys.
        rotation: cosines and signed sines, each [T, 1, D], from `decoder.rotary`.
        query_heads: Hq.

    Returns:
        Queries [T, Hq, D] and keys [T, Hkv, D].
    """
    cosines, sines = rotation
    parts = (query_heads, heads.shape[1] - query_heads)
    if _operation("rotate", heads) is not None:
        # liger computes in the type of the angles.
        return _LigerRotation.apply(*heads.split(parts, dim=1), cosines.float(), sines.float())
    # As `prefix_decode` rotates, so that rollout and training agree.
    queries, keys = reference.rotated(heads, rotation).split(parts, dim=1)
    return queries, keys


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [..., I] of [..., 2 I], the gate first."""
    operation = _operation("swiglu", gate_up)
    if operation is not None:
        return operation.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _LigerRotation(torch.autograd.Function):
    """liger's rotation, which is in place forward and backward, on copies.

    The gradient of a rotation is the rotation back, that is, with the sines' signs turned.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cosines, sines)
        return _liger_rotated(queries, keys, cosines, -sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_queries: Tensor, grad_keys: Tensor) -> tuple[Tensor | None, ...]:
        cosines, sines = ctx.saved_tensors
        return *_liger_rotated(grad_queries, grad_keys, cosines, sines), None, None


def _liger_rotated(
    queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor
) -> tuple[Tensor, Tensor]:
    """Copies of [T, heads, D], rotated; liger reads the first half of cosines and sines alone."""
    operation, _ = _liger("rotate")
    # liger's [1, heads, T, D] in the memory order of [1, T, heads, D], in which it works.
    copies = (
        x.clone(memory_format=torch.contiguous_format)[None].transpose(1, 2)
        for x in (queries, keys)
    )
    rotated = operation.apply(*copies, cosines.transpose(0, 1), sines.transpose(0, 1))
    queries, keys = (x[0].transpose(0, 1) for x in rotated)
    return queries, keys


def _operation(function: str, x: Tensor) -> Any:
    """liger's autograd function where it is to be used for `x`, else None."""
    name, _ = implementation(function, x.device, x.dtype)
    return _liger(function)[0] if name == "liger" and x.numel() else None


@cache
def _liger(function: str) -> tuple[Any, str]:
    """liger's autograd function, or None and why it cannot be had."""
    try:
        operations = require("liger", "liger_kernel.ops")
    except ImportError as error:
        return None, str(error)
    name = OPERATIONS[function]
    operation = getattr(operations, name, None)
    if operation is None:
        return None, f"this liger-kernel has no {name}; run: pip install -U liger-kernel"
    return operation, ""
