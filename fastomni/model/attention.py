"""Which attention the decoder runs on: the setting `model.attention`.

`prefix` is the attention that reads a prompt once for all its completions: Triton kernels on a GPU,
dense pieces in plain torch elsewhere. `reference` is the definition, slow and for comparison.
`auto` leaves it to the kernels' own choice (FASTOMNI_KERNELS, the device, what the kernels take).

Shapes: T packed rows, S sequences, N prompts, Hq query heads, Hkv key/value heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastomni_kernels import GroupLayout, dispatch, prefix_attention, prefix_decode, reference

MODES = ("auto", "prefix", "reference")


def packed_attention(mode: str, q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout) -> Tensor:
    """Attention of packed rows [T, Hq, D], each completion over its prompt and itself.

    Args:
        mode: one of `MODES`.
        q: [T, Hq, D].
        k: [T, Hkv, D].
        v: [T, Hkv, D].
        layout: the rows.

    Raises:
        ValueError: `prefix` on a GPU whose kernels cannot take these heads.
    """
    if mode == "reference":
        _tell("prefix_attention")
        return reference.prefix_attention(q, k, v, layout)
    return prefix_attention(q, k, v, layout, backend=_backend(mode, q.device))


def decode_attention(mode: str, *tensors: Tensor, **options: Any) -> Tensor:
    """One decode step [S, Hq, D]; arguments are those of `fastomni_kernels.prefix_decode`."""
    if mode == "reference":
        _tell("prefix_decode")
        return reference.prefix_decode(*tensors, **options)
    return prefix_decode(*tensors, **options, backend=_backend(mode, tensors[0].device))


def _backend(mode: str, device: torch.device) -> str:
    return "triton" if mode == "prefix" and device.type == "cuda" else "auto"


def _tell(function: str) -> None:
    """Reports of a run name the definition as what ran."""
    dispatch.choices.setdefault((function, "definition"), "asked for by model.attention=reference")
