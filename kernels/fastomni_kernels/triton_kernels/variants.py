"""What a kernel is compiled as: every file of kernels lists the variants it ships.

A launcher and its list of variants take tile sizes and warps from the same place in their file, so
that what is checked ahead of time (`fastomni_kernels.aot`) is what runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One compilation of one kernel.

    Attributes:
        name: "<kernel>-<dtype>-<what differs>", unique within the library.
        kernel: the function under `triton.jit`.
        signature: type of each argument that is not constexpr, in Triton's words ("*bf16", "i32").
        constexprs: value of each constexpr argument.
        num_warps: warps of one program.
        num_stages: stages of software pipelining.
        divisible_by_16: arguments that are multiples of 16 whenever the kernel runs on the shapes
            of real models (pointers of torch's allocator, strides), as Triton specialises them.
        has_dot: whether tensor-core instructions are expected.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible_by_16: tuple[str, ...] = ()
    has_dot: bool = False
