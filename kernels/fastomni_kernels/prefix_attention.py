"""Attention of packed groups: each completion sees its whole prompt, and itself causally.

The public function checks its arguments and calls an operator; the operator chooses the
implementation: the Triton kernel, `dense_attention` on a CPU, `prefix_reference` elsewhere. The
decision that is not obvious: the operator takes the layout as one tensor of lengths on the CPU.
Host integers would be constants of a compiled graph, which would be compiled anew for each batch.

Shapes: N prompts, S completions, T packed rows, Hq query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastomni_kernels import dense_attention, dispatch, library, prefix_reference
from fastomni_kernels.checks import check_float, check_heads, check_kind, check_shape, require
from fastomni_kernels.flash_varlen import explain, flash_varlen
from fastomni_kernels.layout import GroupLayout

_NAME = "prefix_attention"


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: GroupLayout,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend within each group: prompts causally, completions to their prompt and themselves.

    A prompt's keys and values are read once per group and their gradient is summed over its
    completions in fp32. On a GPU, rows that share nothing (no prompt has two completions, as in
    prefill and supervised training) are causal sequences and go to `flash_varlen` where that has a
    fast kernel, unless a backend is asked for or `torch.compile` is tracing. Our own kernels add in
    a fixed order; those of other libraries do under `torch.use_deterministic_algorithms(True)`.
    Lengths are read on the host, so a CUDA graph cannot hold it; `prefix_decode` is made for that.

    Args:
        q: [T, Hq, D] queries of the packed rows, any float dtype and strides.
        k: [T, Hkv, D] keys; Hkv divides Hq, and query head h reads key head h // (Hq / Hkv).
        v: [T, Hkv, D] values.
        layout: the rows.
        scale: factor of the scores, D ** -0.5 by default.
        backend: "auto", "triton" or "reference" (plain torch).

    Returns:
        [T, Hq, D] in q's dtype; differentiable once in q, k and v. Half precision is summed in
        fp32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other or the layout, or a
            backend that is unknown or cannot run here.
    """
    if not torch.compiler.is_compiling():
        _check(q, k, v, layout, scale)
        if _goes_to_varlen(q, layout, backend):
            return causal_attention(q, k, v, layout, scale)
    factor = q.shape[2] ** -0.5 if scale is None else float(scale)
    out, _ = torch.ops.fastomni.prefix_attention(q, k, v, layout.lengths, factor, backend)
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, scale: float | None) -> None:
    check_kind(_NAME, "layout", layout, GroupLayout)
    check_shape(_NAME, "q", q, (layout.num_rows, "Hq", "D"))
    check_shape(_NAME, "k", k, (layout.num_rows, "Hkv", q.shape[2]))
    check_shape(_NAME, "v", v, tuple(k.shape))
    check_heads(_NAME, q, k.shape[1])
    require(
        q.shape[1] > 0 and q.shape[2] > 0,
        f"{_NAME}: q has shape {list(q.shape)}; Hq and D must be 1 or more",
    )
    check_float(_NAME, q=q, k=k, v=v)
    require(
        q.dtype == k.dtype == v.dtype,
        f"{_NAME}: q is {q.dtype}, k is {k.dtype}, v is {v.dtype}; they must agree",
    )
    require(
        scale is None or math.isfinite(scale), f"{_NAME}: scale={scale}; it must be a finite number"
    )


def _goes_to_varlen(q: Tensor, layout: GroupLayout, backend: str) -> bool:
    """Whether another library's kernel for causal sequences does the work."""
    if q.device.type == "cpu" or backend != "auto" or shares_prompts(layout):
        return False
    if (os.environ.get(dispatch.ENVIRONMENT_VARIABLE) or "auto") != "auto":
        return False
    return explain("auto", q.device, q.dtype, q.shape[2])[0] != "reference"


def shares_prompts(layout: GroupLayout) -> bool:
    """Whether any prompt has more than one completion."""
    return any(len(completions) > 1 for completions in layout.completion_lengths)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, scale: float | None = None
) -> Tensor:
    """Attention of groups with one completion at most: each is one causal sequence."""
    offsets = layout.group_offsets
    longest = max(stop - start for start, stop in pairwise(offsets))
    rows = layout.cu_groups.to(q.device)
    return flash_varlen(q, k, v, rows, rows, longest, longest, causal=True, scale=scale)


# Every layer of a model comes with the same lengths, twice; a layout keeps what was made for it.
@lru_cache(maxsize=32)
def _layout_of(numbers: tuple[int, ...], device: torch.device) -> GroupLayout:
    """Return the layout whose `lengths` are these numbers."""
    prompts = numbers[1 : numbers[0] + 1]
    counts = numbers[numbers[0] + 1 : 2 * numbers[0] + 1]
    rest = iter(numbers[2 * numbers[0] + 1 :])
    completions = [[next(rest) for _ in range(count)] for count in counts]
    return GroupLayout.build(prompts, completions, device)


def _chosen(q: Tensor, k: Tensor, backend: str) -> str:
    """Return "triton" or "reference", whichever runs."""
    require(
        q.device.type != "cuda" or not torch.cuda.is_current_stream_capturing(),
        f"{_NAME}: a CUDA graph is being captured, which would replay this batch's lengths for "
        "every other; leave this call out of the graph (prefix_decode may be in one)",
    )
    obstacle = ""
    if dispatch.explain(_NAME, backend, q.device)[0] == "triton":
        from fastomni_kernels.triton_kernels import prefix_attention as kernels

        obstacle = kernels.obstacle(q.shape[1], k.shape[1], q.shape[2], q.dtype)
        require(
            not obstacle or backend != "triton",
            f"{_NAME}: the Triton kernel cannot take these tensors ({obstacle}); use "
            "backend='reference'",
        )
    return dispatch.choose(_NAME, backend, q.device, has_kernel=not obstacle)


def _plain_torch(device: torch.device) -> Any:
    """Return the module that computes it without a kernel."""
    return dense_attention if device.type == "cpu" else prefix_reference


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    layout = _layout_of(tuple(lengths.tolist()), q.device)
    require(
        layout.num_rows == q.shape[0],
        f"{_NAME}: lengths of {layout.num_rows} rows for {q.shape[0]} queries",
    )
    if _chosen(q, k, backend) == "triton":
        from fastomni_kernels.triton_kernels import prefix_attention as kernels

        return kernels.forward(q, k, v, layout, scale)
    return _plain_torch(q.device).forward(q, k, v, layout, scale)


def _forward_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide)


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = _layout_of(tuple(lengths.tolist()), q.device)
    arguments = (grad_out, q, k, v, out, lse, layout, scale)
    if _chosen(q, k, backend) == "triton":
        from fastomni_kernels.triton_kernels import prefix_attention as kernels

        return kernels.backward(*arguments)
    return _plain_torch(q.device).backward(*arguments)


def _backward_fake(grad_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in rest[:3])


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lengths, ctx.scale, ctx.backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, lengths)


def _gradients(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    unused = (None,) * 3
    if grad_out is None:
        return None, None, None, *unused
    settings = (ctx.scale, ctx.backend)
    return *_backward_operator(grad_out, *ctx.saved_tensors, *settings), *unused


_INPUTS = "Tensor q, Tensor k, Tensor v"
_SETTINGS = "Tensor lengths, float scale, str backend"

_backward_operator = library.define(
    f"prefix_attention_backward(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    reads_host=True,
)
library.define(
    f"prefix_attention({_INPUTS}, {_SETTINGS}) -> (Tensor out, Tensor lse)",
    _forward,
    _forward_fake,
    setup_context=_context,
    backward=_gradients,
    reads_host=True,
)
