"""Registers operators with torch, so that autograd, `torch.compile` and opcheck know them.

An operator is opaque to the compiler: which implementation runs is decided inside it, when it runs
(`dispatch.choose`). Inside an operator autocast is off: what is computed in fp32 stays there. The
decision that is not obvious: the low-level `Library` is used instead of `torch.library.custom_op`,
whose first call imports the whole compiler (over a second).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch

NAMESPACE = "fastomni"

# Definitions live as long as this object.
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_UNSAFE_IN_GRAPHS = (torch.Tag.cudagraph_unsafe,)


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    reads_host: bool = False,
) -> Callable[..., Any]:
    """Register one operator of the namespace `fastomni`.

    Args:
        schema: name, arguments and returns in torch's schema language. Returns must not share
            memory with arguments or with each other.
        implementation: runs on any device; sees plain tensors, below autograd.
        fake: shapes, dtypes and devices of the returns, computed from those of the arguments.
        setup_context: called as f(ctx, inputs, output) after a forward that needs gradients.
        backward: called as f(ctx, *output_gradients); returns one gradient (or None) per argument.
            It must be made of torch functions and registered operators.
        reads_host: whether it reads numbers on the host, which a CUDA graph would not read again:
            torch.compile then leaves it out of its graphs.

    Returns:
        The operator, `torch.ops.fastomni.<name>.default`.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_UNSAFE_IN_GRAPHS if reads_host else ())
    wrapped = _on_its_device(implementation)
    torch.library.impl(_LIBRARY, name, "CompositeExplicitAutograd")(wrapped)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}",
            _once(name, backward),
            setup_context=setup_context,
            lib=_LIBRARY,
        )
    return getattr(torch.ops.fastomni, name).default


def _on_its_device(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Run with the tensors' GPU as the current one, which is where Triton launches; no autocast."""

    @wraps(implementation)
    def call(*arguments: Any) -> Any:
        device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
        with ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            if torch.is_autocast_enabled(device.type):
                stack.enter_context(torch.autocast(device.type, enabled=False))
            return implementation(*arguments)

    return call


def _once(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(backward)
    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(f"{name}: its gradient has no gradient; leave create_graph off")
        return backward(*arguments)

    return call
