"""Log-probability and entropy of chosen tokens, from logits or from hidden states and the head.

Both functions check their arguments and call an operator; the operator chooses the implementation.
The decision that is not obvious: the operators keep the log-sum-exp and the entropy of each row
and make everything else again in the backward, so nothing of the size of the logits is saved.

Shapes: M completion tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastomni_kernels import chunked_logprobs, dispatch, library
from fastomni_kernels.checks import (
    check_float,
    check_id_range,
    check_ids,
    check_shape,
    check_temperature,
    require,
)
from fastomni_kernels.chunked_logprobs import DEFAULT_CHUNK_BYTES


def gather_logprobs(
    logits: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = True,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each id, and the entropy, under softmax(logits / temperature).

    Args:
        logits: [M, V] any float dtype and strides; -inf for tokens that cannot be.
        ids: [M] int64. Ids outside the vocabulary are refused on the CPU; on a GPU, where looking
            would stop the stream, they give NaN.
        temperature: 1e-6 to 1e6; divides the logits in fp32.
        with_entropy: False saves part of the forward; the entropy returned is then all zeros and
            carries no gradient.
        inplace_backward: the backward writes the gradient over the logits, which saves memory of
            their size. They hold no logits afterwards, and whoever goes through them again in a
            backward gets an error. Without gradients it means nothing; under `torch.compile` the
            gradient gets memory of its own all the same.
        backend: "auto", "triton" or "reference".

    Returns:
        (logprobs, entropy), each [M] fp32 (fp64 for fp64 logits), nats; both differentiable, once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, ids out of range on the CPU, a
            temperature out of range, or logits whose memory cannot take a gradient.
    """
    name = "gather_logprobs"
    if not torch.compiler.is_compiling():
        check_shape(name, "logits", logits, ("M", "V"))
        require(
            logits.shape[1] > 0,
            f"{name}: logits has shape {list(logits.shape)}; V must be 1 or more",
        )
        check_shape(name, "ids", ids, (logits.shape[0],))
        check_float(name, logits=logits)
        check_ids(name, ids, logits)
        check_temperature(name, temperature)
        if inplace_backward and logits.requires_grad and torch.is_grad_enabled():
            _check_overwritable(name, logits)
    operator = torch.ops.fastomni.gather_logprobs
    settings = (temperature, with_entropy, inplace_backward, backend)
    logprobs, entropy, _ = operator(logits, ids, *settings)
    return logprobs, entropy


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = True,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return `gather_logprobs(hidden @ weight.T, ids, temperature)` without ever having the logits.

    Args:
        hidden: [M, H] rows that predict the tokens; any float dtype.
        weight: [V, H] of the language-model head; any float dtype.
        ids: [M] int64. Ids outside the vocabulary are refused on the CPU; on a GPU, where looking
            would stop the stream, they give NaN.
        temperature: 1e-6 to 1e6; divides the logits in fp32.
        with_entropy: False saves part of the forward; the entropy returned is then all zeros and
            carries no gradient.
        chunk_bytes: bound on the logits, working copies and widened weights that exist at a time
            where plain torch runs (the kernels have tiles of their own). It changes speed and
            memory, results only by rounding.
        backend: "auto", "triton" or "reference".

    Returns:
        (logprobs, entropy), each [M] fp32 (fp64 for fp64 inputs), nats; differentiable, once, in
        hidden and weight, through log-probs and entropy both.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, ids out of range on the CPU, a
            temperature out of range, or no room for chunks.
    """
    name = "linear_logprobs"
    if not torch.compiler.is_compiling():
        check_shape(name, "hidden", hidden, ("M", "H"))
        check_shape(name, "weight", weight, ("V", hidden.shape[1]))
        require(
            len(weight) > 0, f"{name}: weight has shape {list(weight.shape)}; V must be 1 or more"
        )
        check_shape(name, "ids", ids, (hidden.shape[0],))
        check_float(name, hidden=hidden, weight=weight)
        check_ids(name, ids, hidden)
        check_temperature(name, temperature)
        require(chunk_bytes > 0, f"{name}: chunk_bytes={chunk_bytes}; it must be positive")
    operator = torch.ops.fastomni.linear_logprobs
    arguments = (temperature, with_entropy, chunk_bytes, backend)
    logprobs, entropy, _ = operator(hidden, weight, ids, *arguments)
    return logprobs, entropy


def _check_overwritable(name: str, logits: Tensor) -> None:
    require(
        not logits.is_leaf,
        f"{name}: inplace_backward=True would overwrite logits that are a leaf of the graph (a "
        "parameter or an input), whose values somebody keeps; use it for logits that a model has "
        "just made",
    )
    expanded = any(s == 0 and n > 1 for s, n in zip(logits.stride(), logits.shape, strict=True))
    require(
        not expanded,
        f"{name}: inplace_backward=True needs memory of its own for every logit, but the logits "
        f"are expanded (strides {list(logits.stride())}); call .contiguous() on them first",
    )


def _statistics_like(x: Tensor, rows: int | torch.SymInt, dtype: torch.dtype) -> list[Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    return [x.new_empty((rows,), dtype=wide) for _ in range(3)]


def _gather(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    with_entropy: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_id_range("gather_logprobs", ids, logits.shape[1])
    if dispatch.choose("gather_logprobs", backend, logits.device) == "triton":
        from fastomni_kernels.triton_kernels import gather_logprobs as kernels

        return kernels.forward(logits, ids, temperature, with_entropy)
    return chunked_logprobs.gather_forward(logits, ids, temperature, with_entropy)


def _gather_fake(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(_statistics_like(logits, logits.shape[0], logits.dtype))


def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, ctx.temperature, with_entropy, ctx.inplace, ctx.backend = inputs
    _, entropy, normaliser = output
    ctx.overwritten = False
    ctx.mark_non_differentiable(normaliser, *([] if with_entropy else [entropy]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, ids, normaliser, entropy)


def _gather_gradient(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    unused = (None,) * 5
    if grad_logprobs is None and grad_entropy is None:
        return None, *unused
    if ctx.overwritten:
        raise RuntimeError(
            "gather_logprobs: the first backward wrote the gradient over the logits "
            "(inplace_backward=True), so there can be no second one; use inplace_backward=False "
            "to go through the graph again"
        )
    logits = ctx.saved_tensors[0]
    arguments = (*ctx.saved_tensors, grad_logprobs, grad_entropy, ctx.temperature, ctx.backend)
    if not ctx.inplace or torch.compiler.is_compiling():
        return torch.ops.fastomni.gather_logprobs_backward(*arguments), *unused
    ctx.overwritten = True
    torch.ops.fastomni.gather_logprobs_backward_(*arguments)
    # Whoever else saved these logits for a backward is told by torch that they have changed.
    torch.autograd.graph.increment_version(logits)
    return logits.detach(), *unused


def _gather_backward(logits: Tensor, *rest: Any) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gather_gradient(out, logits, *rest)
    return out


def _gather_backward_overwriting(logits: Tensor, *rest: Any) -> None:
    _write_gather_gradient(logits, logits, *rest)


def _write_gather_gradient(out: Tensor, logits: Tensor, *rest: Any) -> None:
    *given, backend = rest
    arguments = (logits, *given, out)
    if dispatch.choose("gather_logprobs", backend, logits.device) == "triton":
        from fastomni_kernels.triton_kernels import gather_logprobs as kernels

        kernels.backward(*arguments)
    else:
        chunked_logprobs.gather_backward(*arguments)


def _gather_backward_fake(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _linear(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float,
    with_entropy: bool,
    chunk_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_id_range("linear_logprobs", ids, weight.shape[0])
    if dispatch.choose("linear_logprobs", backend, hidden.device) == "triton":
        from fastomni_kernels.triton_kernels import linear_logprobs as kernels

        return kernels.forward(hidden, weight, ids, temperature, with_entropy)
    return chunked_logprobs.linear_forward(
        hidden, weight, ids, temperature, with_entropy, chunk_bytes
    )


def _linear_fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return tuple(_statistics_like(hidden, hidden.shape[0], dtype))


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, ids, ctx.temperature, with_entropy, ctx.chunk_bytes, ctx.backend = inputs
    _, entropy, normaliser = output
    ctx.mark_non_differentiable(normaliser, *([] if with_entropy else [entropy]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, ids, normaliser, entropy)


def _linear_gradient(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    unused = (None,) * 5
    if grad_logprobs is None and grad_entropy is None:
        return None, None, *unused
    needed = ctx.needs_input_grad[:2]
    grads = torch.ops.fastomni.linear_logprobs_backward(
        *ctx.saved_tensors,
        grad_logprobs,
        grad_entropy,
        ctx.temperature,
        *needed,
        ctx.chunk_bytes,
        ctx.backend,
    )
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *unused


def _linear_backward(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight; one that is not needed is an empty tensor."""
    *given, chunk_bytes, backend = rest
    if dispatch.choose("linear_logprobs", backend, hidden.device) == "triton":
        arguments = (hidden, weight, *given)
        from fastomni_kernels.triton_kernels import linear_logprobs as kernels

        grads = kernels.backward(*arguments)
    else:
        grads = chunked_logprobs.linear_backward(*(hidden, weight, *given, chunk_bytes))
    grad_hidden, grad_weight = (
        x.new_empty(0) if grad is None else grad.to(x.dtype)
        for grad, x in zip(grads, (hidden, weight), strict=True)
    )
    return grad_hidden, grad_weight


def _linear_backward_fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_hidden, need_weight = rest[-4:-2]
    grad_hidden, grad_weight = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for x, need in ((hidden, need_hidden), (weight, need_weight))
    )
    return grad_hidden, grad_weight


_SAVED = "Tensor ids, Tensor normaliser, Tensor entropy"
_GRADS = "Tensor? grad_logprobs, Tensor? grad_entropy, float temperature"

library.define(
    "gather_logprobs(Tensor logits, Tensor ids, float temperature, bool with_entropy, "
    "bool inplace_backward, str backend) -> (Tensor logprobs, Tensor entropy, Tensor normaliser)",
    _gather,
    _gather_fake,
    setup_context=_gather_context,
    backward=_gather_gradient,
)
library.define(
    f"gather_logprobs_backward(Tensor logits, {_SAVED}, {_GRADS}, str backend) -> Tensor",
    _gather_backward,
    _gather_backward_fake,
)
library.define(
    f"gather_logprobs_backward_(Tensor(a!) logits, {_SAVED}, {_GRADS}, str backend) -> ()",
    _gather_backward_overwriting,
    lambda *_: None,
)
library.define(
    "linear_logprobs(Tensor hidden, Tensor weight, Tensor ids, float temperature, "
    "bool with_entropy, int chunk_bytes, str backend) "
    "-> (Tensor logprobs, Tensor entropy, Tensor normaliser)",
    _linear,
    _linear_fake,
    setup_context=_linear_context,
    backward=_linear_gradient,
)
library.define(
    f"linear_logprobs_backward(Tensor hidden, Tensor weight, {_SAVED}, {_GRADS}, "
    "bool need_hidden, bool need_weight, int chunk_bytes, str backend) "
    "-> (Tensor grad_hidden, Tensor grad_weight)",
    _linear_backward,
    _linear_backward_fake,
)
