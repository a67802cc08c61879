"""Compiles every shipped kernel for machines that are not there, and reads what it needs.

No GPU is used: Triton's wheel carries the assemblers of both vendors and NVIDIA's disassembler.
Registers, spills and tensor-core instructions come from the machine code, not from the compiler's
plans. The decision that is not obvious: Triton's cache is left aside, so that the seconds are those
of a compilation and a machine's old entries decide nothing.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, KernelInterface

from fastomni_kernels import triton_kernels
from fastomni_kernels.triton_kernels.variants import Variant

KIB = 2**10

# Machine instructions of the tensor cores: HMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100) and their
# kin for other types; v_mfma on AMD.
_TENSOR_CORES = re.compile(r"\b(?:[A-Z]MMA|[A-Z]GMMA|UTC[A-Z]*MMA)\b|\bv_s?mfmac?_\w+")
_SPILLS = re.compile(r"\b(?:STL|LDL)\b")
_ASYNC_COPIES = re.compile(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b|\b\w+_load_lds_\w+")
_TENSOR_MEMORY_COLUMNS = 512  # of an sm_100 multiprocessor (PTX ISA, tensor memory)


@dataclass(frozen=True)
class Target:
    """A machine that kernels are compiled for.

    Attributes:
        gpu: as Triton names it.
        shared_limit: bytes of shared memory that one program may ask for.
        refuse_spills: whether a spilled register is a problem, or only reported.
    """

    gpu: GPUTarget
    shared_limit: int
    refuse_spills: bool = False


# Shared memory: CUDA C++ Programming Guide, table "Technical Specifications per Compute
# Capability"; AMD's CDNA3 instruction set guide (LDS).
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KIB, refuse_spills=True),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KIB),
}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one compiled kernel needs.

    Attributes:
        registers: per thread (AMD: vector registers).
        spills: instructions that move registers to and from local memory. AMD: spilled registers;
            scalar ones may go to lanes of vector registers, which costs no stack.
        stack_bytes: local memory per thread.
        shared_bytes: shared memory of one program.
        tensor_memory_columns: of sm_100's tensor memory.
        tensor_cores: how often each tensor-core instruction occurs, by name.
        async_copies: instructions that copy global to shared memory past the registers.
        binary_bytes: size of the binary.
        seconds: that the compilation took.
    """

    registers: int
    spills: int
    stack_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    tensor_cores: dict[str, int]
    async_copies: int
    binary_bytes: int
    seconds: float


def kernel_modules() -> list[ModuleType]:
    """The files of `fastomni_kernels.triton_kernels`, in alphabetical order."""
    package = triton_kernels
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


@cache
def variants(target: str) -> tuple[Variant, ...]:
    """All variants that ship for a target ("sm_90"), of all files of kernels.

    Raises:
        ValueError: an unknown target, a name listed twice, or TRITON_INTERPRET is set.
    """
    _refuse_interpreter()
    _target(target)
    found: dict[str, Variant] = {}
    for module in kernel_modules():
        for variant in module.shipped(target) if hasattr(module, "shipped") else ():
            if variant.name in found:
                raise ValueError(
                    f"{module.__name__}: a variant named {variant.name!r} is already listed for "
                    f"{target}; names must be unique, so that a report says which one it means"
                )
            found[variant.name] = variant
    return tuple(found.values())


def unlisted(target: str, modules: Sequence[ModuleType] | None = None) -> list[str]:
    """Kernels that no variant compiles, as "module.function"; functions that kernels call are none.

    Args:
        target: one of `TARGETS`.
        modules: to look in; by default all files of kernels.
    """
    searched = kernel_modules() if modules is None else modules
    functions = [function for module in searched for function in _jit_functions(module)]
    called = {id(name) for function in functions for name in _mentions(function)}
    listed = {
        id(_innermost(variant.kernel))
        for module in searched
        for variant in (module.shipped(target) if hasattr(module, "shipped") else ())
    }
    return [
        f"{function.fn.__module__}.{function.fn.__name__}"
        for function in functions
        if id(function) not in called | listed
    ]


def compile_variant(variant: Variant, target: str) -> Resources:
    """Compile one variant and read its needs from the binary.

    Args:
        variant: what to compile.
        target: one of `TARGETS`.

    Raises:
        ValueError: an unknown target, TRITON_INTERPRET is set, or the variant leaves an argument
            of its kernel without a type or a value.
        Exception: whatever Triton raises on a kernel that does not compile.
    """
    _refuse_interpreter()
    machine = _target(target)
    source = _source(variant)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        begin = time.perf_counter()
        with warnings.catch_warnings():
            # Left unset, as launches leave it: what is compiled here is what runs there.
            warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
            kernel = triton.compile(source, target=machine.gpu, options=options)
        seconds = time.perf_counter() - begin
        code = "cubin" if machine.gpu.backend == "cuda" else "hsaco"
        read = _read_nvidia(kernel) if code == "cubin" else _read_amd(kernel)
    return Resources(
        **read,
        # Dynamic: the launch asks for it, so that it stands beside the binary and not in it.
        shared_bytes=kernel.metadata.shared,
        tensor_memory_columns=getattr(kernel.metadata, "tmem_size", None) or 0,
        binary_bytes=len(kernel.asm[code]),
        seconds=seconds,
    )


def problems(resources: Resources, variant: Variant, target: str) -> list[str]:
    """What is wrong with a compiled variant, one sentence each; empty where nothing is.

    `has_dot` says what is expected. An fp32 dot with input_precision="ieee" runs without tensor
    cores on NVIDIA; finding some there means that it runs as TF32, with 10 bits of mantissa.
    """
    machine = _target(target)
    found = []
    if resources.spills and machine.refuse_spills:
        found.append(
            f"{resources.spills} spills ({resources.registers} registers, "
            f"{resources.stack_bytes} bytes of stack); use smaller tiles or more warps"
        )
    if resources.shared_bytes > machine.shared_limit:
        found.append(
            f"{resources.shared_bytes / KIB:.0f} KiB of shared memory, {target} has "
            f"{machine.shared_limit / KIB:.0f}; use smaller tiles or fewer stages"
        )
    if resources.tensor_memory_columns > _TENSOR_MEMORY_COLUMNS:
        found.append(
            f"{resources.tensor_memory_columns} columns of tensor memory, {target} has "
            f"{_TENSOR_MEMORY_COLUMNS}; use smaller tiles"
        )
    if variant.has_dot and not resources.tensor_cores:
        found.append("no tensor-core instruction, though has_dot says that it has a dot")
    # AMD's matrix cores multiply true fp32, NVIDIA's true fp64 (DMMA): these are no surprise.
    rounded = {
        name: count
        for name, count in resources.tensor_cores.items()
        if (name != "DMMA" if machine.gpu.backend == "cuda" else "xf32" in name)
    }
    if rounded and not variant.has_dot:
        found.append(
            f"tensor-core instructions ({_counts(rounded)}), though has_dot says that there are "
            "none; give an fp32 dot input_precision='ieee', or set has_dot"
        )
    return found


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise ValueError(f"target {name!r} is unknown; use one of {', '.join(TARGETS)}")
    return TARGETS[name]


def _refuse_interpreter() -> None:
    if triton.knobs.runtime.interpret:
        raise ValueError(
            "TRITON_INTERPRET is set: kernels were made for Triton's interpreter, and it and the "
            "compiler cannot share a process; start one without that variable"
        )


def _source(variant: Variant) -> Any:
    """The variant as Triton's launcher would hand it to the compiler."""
    kernel = variant.kernel
    if not isinstance(kernel, JITFunction):
        raise ValueError(f"{variant.name}: its kernel is {kernel!r}, not a function of triton.jit")
    names = list(kernel.arg_names)
    given = [*variant.signature, *variant.constexprs]
    if sorted(given) != sorted(names):
        wrong = sorted((Counter(names) - Counter(given)) + (Counter(given) - Counter(names)))
        raise ValueError(
            f"{variant.name}: each argument of {kernel.fn.__name__} must be in signature or in "
            f"constexprs, and nothing else; look at {', '.join(wrong)}"
        )
    free = [
        parameter.name
        for parameter in kernel.params
        if parameter.name in variant.divisible_by_16
        and (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    ]
    unknown = [name for name in variant.divisible_by_16 if name not in variant.signature]
    if free or unknown:
        raise ValueError(
            f"{variant.name}: divisible_by_16 names {', '.join(free + unknown)}, which a launch "
            "does not specialise; leave them out"
        )
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible_by_16
    }
    return ASTSource(kernel, signature, dict(variant.constexprs), attributes)


def _read_nvidia(kernel: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        text = _cuobjdump("-res-usage", path)
        usage = {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", text)}
        stack_bytes = usage["STACK"] + usage["LOCAL"]
        # Disassembling takes as long as compiling. Nothing is spilled where there is no local
        # memory, and the assembler adds no tensor-core instruction or copy to what it is given.
        worth_reading = stack_bytes or any(
            word in kernel.asm["ptx"] for word in ("mma", "cp.async")
        )
        code = _cuobjdump("-sass", path) if worth_reading else ""
    return {
        "registers": usage["REG"],
        "spills": len(_SPILLS.findall(code)),
        "stack_bytes": stack_bytes,
        "tensor_cores": dict(Counter(_TENSOR_CORES.findall(code))),
        "async_copies": len(_ASYNC_COPIES.findall(code)),
    }


def _cuobjdump(option: str, path: Path) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_amd(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]
    usage = {
        name: int(number) for name, number in re.findall(r"^ +\.(\w+): +(\d+)$", text, re.MULTILINE)
    }
    return {
        "registers": usage["vgpr_count"],
        "spills": usage["vgpr_spill_count"] + usage["sgpr_spill_count"],
        "stack_bytes": usage["private_segment_fixed_size"],
        "tensor_cores": dict(Counter(_TENSOR_CORES.findall(text))),
        "async_copies": len(_ASYNC_COPIES.findall(text)),
    }


def _jit_functions(module: ModuleType) -> list[JITFunction]:
    """The functions under `triton.jit` that a file defines, out of their decorators."""
    values = [_innermost(value) for value in vars(module).values()]
    return [
        value
        for value in values
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__
    ]


def _innermost(value: Any) -> Any:
    while isinstance(value, KernelInterface) and not isinstance(value, JITFunction):
        value = value.fn
    return value


def _mentions(function: JITFunction) -> list[JITFunction]:
    """The functions under `triton.jit` that a function's source names."""
    names = function.fn.__globals__
    nodes = list(ast.walk(function.parse()))
    values = [names.get(node.id) for node in nodes if isinstance(node, ast.Name)]
    values += [
        getattr(names.get(node.value.id), node.attr, None)
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    return [value for value in values if isinstance(value, JITFunction) and value is not function]


def _counts(instructions: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in instructions.items())
