"""Which implementation of a function runs, and why.

Two exist: `triton` (the kernels) and `reference` (plain torch, which is what runs on a CPU). The
order of wishes: the argument `backend`, then the environment variable FASTOMNI_KERNELS, then the
device. Every choice is remembered with its reason and told once to the logger `fastomni_kernels`.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch

ENVIRONMENT_VARIABLE = "FASTOMNI_KERNELS"
BACKENDS = ("auto", "triton", "reference")

_logger = logging.getLogger("fastomni_kernels")

# (function, backend) -> reason, in the order in which choices were first made.
choices: dict[tuple[str, str], str] = {}


def choose(function: str, requested: str, device: torch.device, has_kernel: bool = True) -> str:
    """Return "triton" or "reference" for one call.

    Args:
        function: name of the public function, for messages.
        requested: the call's own `backend`, "auto" where it has no wish.
        device: where the tensors are.
        has_kernel: whether the function has a Triton kernel (for these arguments).

    Raises:
        ValueError: an unknown name, or `triton` where it cannot run.
    """
    backend, reason = explain(function, requested, device, has_kernel)
    if (function, backend) not in choices:
        choices[function, backend] = reason
        _logger.info("%s runs as %s: %s", function, backend, reason)
    return backend


def explain(
    function: str, requested: str, device: torch.device, has_kernel: bool = True
) -> tuple[str, str]:
    """Return what `choose` would choose, and the reason, without remembering it."""
    wish, origin = requested, "asked for by the argument backend"
    word = f"backend {requested!r}"
    if wish == "auto":
        wish = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"  # empty is as good as not set
        word = f"{ENVIRONMENT_VARIABLE}={wish}"
        origin = f"asked for by {word}"
    if wish not in BACKENDS:
        raise ValueError(f"{function}: {word} is unknown; use one of {', '.join(BACKENDS)}")
    if wish == "reference":
        return "reference", origin
    if not has_kernel:
        if requested == "triton":
            raise ValueError(f"{function}: has no Triton kernel; use backend='reference'")
        return "reference", "it has no Triton kernel"
    if wish == "auto" and device.type != "cuda":  # before anything that imports triton
        return "reference", f"the tensors are on {device.type}"
    obstacle = triton_obstacle(device)
    if wish == "triton":
        if obstacle:
            raise ValueError(f"{function}: backend 'triton' was {origin}, but {obstacle}")
        return "triton", origin
    return ("reference", obstacle) if obstacle else ("triton", f"the tensors are on {device}")


def triton_obstacle(device: torch.device) -> str:
    """Return why Triton kernels cannot run on `device`; empty where they can."""
    if not triton_installed():
        return "triton is not installed; run: pip install triton"
    if device.type == "cuda" or interpreted():
        return ""
    return (
        f"the tensors are on {device.type}, where kernels run in Triton's interpreter only; set "
        "TRITON_INTERPRET=1 before Python starts, or use backend='reference'"
    )


@cache
def triton_installed() -> bool:
    """Whether `import triton` would find something."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; imports triton."""
    import triton

    return bool(triton.knobs.runtime.interpret)
