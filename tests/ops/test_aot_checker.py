"""What the check of compiled kernels finds: each toy does what a shipped kernel must not do.

Triton's interpreter and its compiler cannot share a process. This file is the script of a process
without TRITON_INTERPRET, which compiles the small kernels below.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402 (after the skip)

from fastomni_kernels import aot  # noqa: E402
from fastomni_kernels.triton_kernels.variants import Variant  # noqa: E402


@triton.jit
def _double(values):
    return values + values


@triton.jit
def doubling_kernel(source, target, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(target + places, _double(tl.load(source + places)))


@triton.jit
def spilling_kernel(source, target, SIZE: tl.constexpr):
    """Holds SIZE numbers in the registers of one warp: the maximum is known after all are read."""
    places = tl.arange(0, SIZE)
    values = tl.load(source + places)
    tl.store(target + places, values - tl.max(values, 0))


@triton.jit(do_not_specialize=["length"])
def product_kernel(
    left,
    right,
    target,
    stride,
    length,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[ROWS, length] @ [length, COLUMNS]; rows and columns are `stride` numbers apart."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    depth = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, length, DEPTH):
        a = tl.load(left + rows * stride + first + depth[None, :])
        b = tl.load(right + columns * stride + first + depth[:, None])
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(target + rows * COLUMNS + columns, total)


@triton.jit
def forgotten_kernel(target):
    tl.store(target, 1.0)


ALIGNED = ("left", "right", "target", "stride")


def product(
    name: str, kind: str, has_dot: bool, precision: str = "ieee", **changes: Any
) -> Variant:
    """A variant of `product_kernel` for operands of one type."""
    edge, depth = (128, 64) if kind == "bf16" else (32, 32)
    tile = {"ROWS": edge, "COLUMNS": edge, "DEPTH": depth}
    signature = {"left": f"*{kind}", "right": f"*{kind}", "target": "*fp32", "stride": "i32"}
    settings: dict[str, Any] = {"num_warps": 8, "divisible_by_16": ALIGNED, **changes}
    return Variant(
        name=name,
        kernel=product_kernel,
        signature={**signature, "length": "i32"},
        constexprs={**tile, "PRECISION": precision},
        has_dot=has_dot,
        **settings,
    )


def vectors(name: str, kernel: Any, size: int, num_warps: int) -> Variant:
    """A variant of a kernel that reads SIZE numbers and writes as many."""
    signature = {"source": "*fp32", "target": "*fp32"}
    return Variant(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs={"SIZE": size},
        num_warps=num_warps,
        divisible_by_16=("source", "target"),
    )


def shipped(target: str) -> list[Variant]:
    """All kernels of this file that others do not call, but for `forgotten_kernel`."""
    return [
        vectors("fitting", doubling_kernel, 1024, num_warps=4),
        vectors("spilling", spilling_kernel, 16384, num_warps=1),
        product("dot", "bf16", has_dot=True, num_stages=2),
        product("too-many-stages", "bf16", has_dot=True, num_stages=9),
        product("exact", "fp32", has_dot=False),
        product("rounded", "fp32", has_dot=False, precision="tf32"),
    ]


# Variant and target of each compilation: all toys for sm_90, and a dot for every target.
CASES = [(each.name, "sm_90") for each in shipped("sm_90")]
CASES += [("dot", target) for target in aot.TARGETS if target != "sm_90"]
CASES += [("exact", "gfx942")]


def compile_toys() -> dict[str, Any]:
    """What the process of its own does: results by "variant target", and what else was asked."""
    found: dict[str, Any] = {}
    toys = {each.name: each for each in shipped("sm_90")}
    for name, target in CASES:
        resources = aot.compile_variant(toys[name], target)
        found[f"{name} {target}"] = {
            "resources": dataclasses.asdict(resources),
            "problems": aot.problems(resources, toys[name], target),
        }
    found["unlisted"] = aot.unlisted("sm_90", [sys.modules[__name__]])
    found["unlisted in the library"] = {target: aot.unlisted(target) for target in aot.TARGETS}
    found["listed"] = {
        target: sorted({each.kernel.fn.__module__ for each in aot.variants(target)})
        for target in aot.TARGETS
    }
    fitting = toys["fitting"]
    wrong = {
        "untyped": dataclasses.replace(fitting, signature={"source": "*fp32"}),
        "unknown": dataclasses.replace(fitting, constexprs={"SIZE": 64, "WIDTH": 1}),
        "not specialised": product("p", "bf16", True, divisible_by_16=("left", "length")),
        "no kernel": dataclasses.replace(fitting, kernel=print),
    }
    for name, variant in wrong.items():
        try:
            aot.compile_variant(variant, "sm_90")
        except ValueError as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def toys(python_environment: dict[str, str], tmp_path_factory: Any) -> dict[str, Any]:
    """The results of `compile_toys`."""
    kept = {k: v for k, v in python_environment.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__],
        cwd=tmp_path_factory.mktemp("toys"),
        env=kept,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_of_the_library_is_listed(toys: dict[str, Any], repository: Path) -> None:
    assert toys["unlisted in the library"] == {target: [] for target in aot.TARGETS}
    folder = repository / "kernels" / "fastomni_kernels" / "triton_kernels"
    files = {
        f"fastomni_kernels.triton_kernels.{path.stem}"
        for path in folder.glob("*.py")
        if "\ndef shipped(" in path.read_text(encoding="utf-8")
    }
    assert files
    # A file may list the kernels of another, which has no list of its own.
    for target in aot.TARGETS:
        assert set(toys["listed"][target]) >= files


def test_a_kernel_that_no_variant_compiles_is_named(toys: dict[str, Any]) -> None:
    assert toys["unlisted"] == ["__main__.forgotten_kernel"]


def test_a_kernel_that_fits_has_no_problem(toys: dict[str, Any]) -> None:
    outcome = toys["fitting sm_90"]
    assert outcome["problems"] == []
    needs = outcome["resources"]
    assert needs["spills"] == needs["stack_bytes"] == needs["shared_bytes"] == 0
    assert needs["tensor_cores"] == {}
    assert needs["seconds"] > 0


def test_spills_are_found(toys: dict[str, Any]) -> None:
    needs = toys["spilling sm_90"]["resources"]
    # 512 numbers per thread and at most 255 registers: 257 are stored and loaded, 16 bytes at most
    # by one instruction.
    assert needs["stack_bytes"] >= 4 * 257
    assert needs["spills"] >= 2 * 257 / 4
    (problem,) = toys["spilling sm_90"]["problems"]
    assert problem.startswith(f"{needs['spills']} spills ({needs['registers']} registers, ")


def test_too_much_shared_memory_is_found(toys: dict[str, Any]) -> None:
    needs = toys["too-many-stages sm_90"]["resources"]
    stage = 2 * 128 * 64 * 2  # a tile of each operand; one buffer may be saved
    assert needs["shared_bytes"] in (8 * stage, 9 * stage)
    (problem,) = toys["too-many-stages sm_90"]["problems"]
    assert f"{needs['shared_bytes'] // 1024} KiB of shared memory, sm_90 has 227" in problem


def test_a_dot_runs_on_each_targets_tensor_cores(toys: dict[str, Any]) -> None:
    names = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    for target, name in names.items():
        assert set(toys[f"dot {target}"]["resources"]["tensor_cores"]) == {name}
        assert toys[f"dot {target}"]["problems"] == []
    (name,) = toys["dot gfx942"]["resources"]["tensor_cores"]
    assert name.startswith("v_mfma_f32_") and name.endswith("bf16")
    assert toys["dot sm_100"]["resources"]["tensor_memory_columns"] == 128
    assert toys["dot sm_90"]["resources"]["tensor_memory_columns"] == 0
    for target in ("sm_80", "sm_90", "sm_100"):
        assert toys[f"dot {target}"]["resources"]["async_copies"] > 0


def test_tensor_cores_are_where_they_are_expected(toys: dict[str, Any]) -> None:
    assert toys["exact sm_90"]["resources"]["tensor_cores"] == {}
    assert toys["exact sm_90"]["problems"] == []
    needs = aot.Resources(**toys["exact sm_90"]["resources"])
    (problem,) = aot.problems(needs, product("p", "fp32", has_dot=True), "sm_90")
    assert problem.startswith("no tensor-core instruction")
    (problem,) = toys["rounded sm_90"]["problems"]
    assert "MMA" in problem and "input_precision='ieee'" in problem
    # AMD's matrix cores multiply true fp32.
    names = set(toys["exact gfx942"]["resources"]["tensor_cores"])
    assert names and names <= {"v_mfma_f32_16x16x4_f32", "v_mfma_f32_32x32x2_f32"}
    assert toys["exact gfx942"]["problems"] == []


def test_variants_that_say_something_wrong_are_refused(toys: dict[str, Any]) -> None:
    assert "look at target" in toys["untyped"]
    assert "look at WIDTH" in toys["unknown"]
    assert "divisible_by_16 names length" in toys["not specialised"]
    assert "not a function of triton.jit" in toys["no kernel"]


@pytest.mark.parametrize(
    ("target", "changes", "words"),
    [
        ("sm_90", {"spills": 1}, "1 spills"),
        ("sm_80", {"spills": 1}, ""),
        ("sm_80", {"shared_bytes": 163 * 1024 + 1}, "sm_80 has 163"),
        ("sm_90", {"shared_bytes": 227 * 1024}, ""),
        ("gfx942", {"shared_bytes": 65537}, "gfx942 has 64"),
        ("sm_100", {"tensor_memory_columns": 513}, "513 columns"),
        ("sm_90", {"tensor_cores": {"HMMA": 4}}, "4 HMMA"),
        ("sm_90", {"tensor_cores": {"DMMA": 4}}, ""),
        ("gfx942", {"tensor_cores": {"v_mfma_f32_16x16x8_xf32": 4}}, "xf32"),
    ],
)
def test_limits_are_those_of_the_target(target: str, changes: dict[str, Any], words: str) -> None:
    needs = aot.Resources(
        **{field.name: 0 for field in dataclasses.fields(aot.Resources)} | {"tensor_cores": {}}
    )
    variant = vectors("any", doubling_kernel, 64, num_warps=4)
    found = aot.problems(dataclasses.replace(needs, **changes), variant, target)
    assert len(found) == bool(words)
    assert words in "".join(found)


def test_unknown_targets_are_refused() -> None:
    variant = vectors("any", doubling_kernel, 64, num_warps=4)
    with pytest.raises(ValueError, match="'sm_70' is unknown; use one of sm_80, sm_90"):
        aot.problems(None, variant, "sm_70")  # type: ignore[arg-type]


if __name__ == "__main__":
    print(json.dumps(compile_toys()))
