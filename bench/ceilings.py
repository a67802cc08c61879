"""What this machine can do at best, measured in the same run as the kernels.

Two numbers: bytes per second of a copy between buffers far larger than the caches, and
floating-point operations per second of a large square matrix product in the type the kernels
compute in. They are measured before and after the kernels, and the best try counts, because they
are ceilings. A kernel whose tensors stay in a CPU's cache may exceed the first; the report then
shows a share above one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Of each of the two buffers of a copy: several times any cache.
COPY_BYTES = {"cpu": 512 * 2**20, "cuda": 2**30}
# Side of the matrix product: large enough for the full rate, and a fraction of a second on a CPU.
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
TRIES = 7


@dataclass(frozen=True)
class Ceilings:
    """Best rates of the machine.

    Attributes:
        bytes_per_s: read plus written.
        flops_per_s: by name of the element type.
    """

    bytes_per_s: float
    flops_per_s: dict[str, float]

    def best(self, other: Ceilings) -> Ceilings:
        """Return the better of two measurements, rate by rate."""
        flops = {name: max(x, other.flops_per_s[name]) for name, x in self.flops_per_s.items()}
        return Ceilings(max(self.bytes_per_s, other.bytes_per_s), flops)


def type_name(dtype: torch.dtype) -> str:
    """torch.float32 -> float32."""
    return str(dtype).removeprefix("torch.")


def measure_ceilings(device: torch.device, scale: float = 1.0) -> Ceilings:
    """Measure both rates.

    Args:
        device: where.
        scale: factor of the sizes; below 1 the caches help, and the rates are no ceilings.
    """
    elements = int(COPY_BYTES[device.type] * scale) // 4
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    bytes_per_s = 8 * elements / _best_seconds(lambda: target.copy_(source), device)
    half = (torch.bfloat16,) if device.type == "cuda" else ()
    side = int(MATMUL_SIDE[device.type] * scale)
    flops_per_s = {type_name(x): _matmul_rate(side, x, device) for x in (torch.float32, *half)}
    return Ceilings(bytes_per_s, flops_per_s)


def _matmul_rate(side: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * side**3 / _best_seconds(lambda: torch.mm(left, right, out=product), device)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    work()
    best = float("inf")
    for _ in range(TRIES):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            stop.record()
            torch.cuda.synchronize(device)
            best = min(best, start.elapsed_time(stop) / 1e3)
        else:
            begin = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - begin)
    return best
