"""The kernels are compiled once for all lengths, as what ships (`fastomni_kernels.aot`).

Triton compiles a kernel anew when a constexpr argument changes, when an integer becomes 1 or stops
being a multiple of 16, when a pointer's alignment changes. A process without TRITON_INTERPRET, of
which this file is the script, calls the launchers with CPU tensors under a driver that says that it
is an H100: the decision falls where it always does, in `JITFunction.run`. The hook before a
compilation then takes the place of the compiler, so that nothing is compiled and nothing runs; one
test compares what it counts with what is compiled.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402 (after the skip)

from fastomni_kernels import GroupLayout, aot  # noqa: E402
from fastomni_kernels.loss_definition import LossSettings  # noqa: E402
from fastomni_kernels.triton_kernels import (  # noqa: E402
    advantages,
    gather_logprobs,
    linear_logprobs,
    policy_loss,
    prefix_attention,
    prefix_decode,
    sampling,
)
from fastomni_kernels.triton_kernels.variants import Variant  # noqa: E402

HIDDEN, VOCABULARY = 896, 151_936  # of the 0.5B model
EDGES = {1, 2, 15, 16, 17, 32, 100, 127, 128, 129, 256, 1000, 1024, 4096, 12_800}
LENGTHS = sorted(EDGES | set(range(200, 200 + 35 * 37, 37)))
FEW_LENGTHS = (1, 15, 16, 17, 32)
TARGET = "sm_90"


@triton.jit(do_not_specialize=["length"])
def steady_kernel(values, length, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(values + places, 0.0, places < length)


@triton.jit
def specialised_kernel(values, length, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(values + places, 0.0, places < length)


@triton.jit
def constexpr_kernel(values, LENGTH: tl.constexpr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(values + places, 0.0, places < LENGTH)


class Driver:
    """What a launch asks of Triton's driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return aot.TARGETS[TARGET].gpu


Launch = dict[str, Any]


@contextmanager
def recorded() -> Iterator[dict[str, Launch]]:
    """Kernels that launches would compile, by Triton's own key; none is compiled or launched."""
    launches: dict[str, Launch] = {}

    def instead_of_compiling(*, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        kernel = fn.jit_function
        names = kernel.arg_names
        launches[f"{fn.module}.{fn.name} {key}"] = {
            "kernel": kernel,
            "signature": compile["signature"],
            "constants": {names[path[0]]: value for path, value in compile["constants"].items()},
            "num_warps": compile["num_warps"],
            "num_stages": compile["num_stages"],
        }
        return True

    triton.knobs.runtime.jit_cache_hook = instead_of_compiling
    yield launches
    triton.knobs.runtime.jit_cache_hook = None


def differences(launch: Launch, variant: Variant) -> list[str]:
    """What a launch has other than a variant: types, constexpr arguments, warps, stages."""
    found = [
        f"{name}={launch[name]} (listed: {getattr(variant, name)})"
        for name in ("num_warps", "num_stages")
        if launch[name] != getattr(variant, name)
    ]
    constants, signature = launch["constants"], launch["signature"]
    for name, value in variant.constexprs.items():
        if name not in constants or constants[name] != value:
            found.append(f"{name}={constants.get(name, signature[name])} (listed: {value})")
    for name, kind in variant.signature.items():
        became_constexpr = kind.startswith("i") and constants.get(name) == 1
        if signature[name] != {"*i1": "*u1"}.get(kind, kind) and not became_constexpr:
            found.append(f"{name}: {signature[name]} (listed: {kind})")
    return found


def loss_settings(length: int, **changes: Any) -> LossSettings:
    """Settings of the loss of `length` tokens: the default, but for the changes."""
    settings = LossSettings(
        token_weight=1 / length,
        policy="clip",
        ratio="token",
        kl="k3",
        beta=0.04,
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=float("inf"),
        cispo_max=5.0,
        sapo_positive=1.0,
        sapo_negative=1.05,
        mismatch="none",
        mismatch_min=float("-inf"),
        mismatch_max=2.0,
        entropy_coef=0.0,
    )
    return settings._replace(**changes)


def loss_call(length: int, sequences: int, settings: LossSettings) -> None:
    """One launch on M = `length` tokens of S sequences."""
    entropy, reference, old, rollout = (torch.empty(length) for _ in range(4))
    policy_loss.forward(
        torch.empty(length),
        entropy,
        reference,
        old,
        None if settings.mismatch == "none" else rollout,
        torch.empty(sequences),
        torch.empty(sequences + 1, dtype=torch.int32),
        torch.empty(sequences),
        settings,
    )


def gather_call(length: int, vocabulary: int, dtype: torch.dtype) -> None:
    """Both launches on [M, V] logits, with the entropy."""
    logits, ids = torch.empty(length, vocabulary, dtype=dtype), torch.empty(length).long()
    logprobs, entropy, normaliser = gather_logprobs.forward(logits, ids, 0.9, True)
    gather_logprobs.backward(
        logits, ids, normaliser, entropy, logprobs, entropy, 0.9, torch.empty_like(logits)
    )


def linear_call(length: int, hidden_size: int, vocabulary: int, dtype: torch.dtype) -> None:
    """All launches on [M, H] hidden states and a [V, H] head, with the entropy."""
    hidden = torch.empty(length, hidden_size, dtype=dtype)
    weight, ids = torch.empty(vocabulary, hidden_size, dtype=dtype), torch.empty(length).long()
    logprobs, entropy, normaliser = linear_logprobs.forward(hidden, weight, ids, 0.9, True)
    linear_logprobs.backward(
        hidden, weight, ids, normaliser, entropy, logprobs, entropy, 0.9, True, True
    )


def attention_call(length: int, dtype: torch.dtype) -> None:
    """All launches on two completions of a prompt of `length` tokens, with the 0.5B model's heads.

    The second completion is so long that even one prompt token has its queries in several pieces.
    """
    layout = GroupLayout.build([length], [[length // 2 + 1, 600]])
    q, k, v = (torch.empty(layout.num_rows, heads, 64, dtype=dtype) for heads in (14, 2, 2))
    out, lse = prefix_attention.forward(q, k, v, layout, 0.125)
    prefix_attention.backward(out, q, k, v, out, lse, layout, 0.125)


def sample_call(length: int, vocabulary: int, dtype: torch.dtype, *rules: Any) -> None:
    """All launches on [S, V] logits."""
    seeds = torch.empty(length).long()
    logits = torch.empty(length, vocabulary, dtype=dtype)
    sampling.forward(logits, seeds, seeds, 0.9, *rules, True)


def decode_call(sequences: int, places: int, rows: int, dtype: torch.dtype) -> None:
    """Both launches with the heads of the 0.5B model, appending and rotating."""
    q, angles = (torch.empty(sequences, n, 64, dtype=dtype) for n in (14, 1))
    new = torch.empty(sequences, 2, 64, dtype=dtype)
    prefix = torch.empty(rows, 2, 64, dtype=dtype)
    suffix = torch.empty(sequences, places, 2, 64, dtype=dtype)
    offsets, counts = (torch.empty(n, dtype=torch.int32) for n in (rows + 1, sequences))
    caches = (prefix, prefix, offsets, suffix, suffix, counts, counts)
    prefix_decode.forward(q, *caches, new, new, angles, angles, 0.125)


def calls_of_all_launchers(
    hidden: int, vocabulary: int, dtype: torch.dtype
) -> dict[str, Callable[[int], None]]:
    """Name -> a call of one launcher for a length."""
    masked = {"ratio": "sequence", "mismatch": "sequence_mask"}
    return {
        "group_advantages": lambda n: advantages.forward(
            torch.empty(n, 8, 2), 1e-4, "group", "mean", [1.0, 0.5], "sum_then_normalize"
        ),
        "policy_loss, more tokens": lambda n: loss_call(n, 8, loss_settings(n)),
        "policy_loss, more sequences": lambda n: loss_call(2 * n, n, loss_settings(n, **masked)),
        "gather_logprobs": lambda n: gather_call(n, vocabulary, dtype),
        "linear_logprobs": lambda n: linear_call(n, hidden, vocabulary, dtype),
        "prefix_attention": lambda n: attention_call(n, dtype),
        "prefix_decode, more sequences": lambda n: decode_call(n, 64, n, dtype),
        "prefix_decode, more places": lambda n: decode_call(8, n, 64, dtype),
        "sample": lambda n: sample_call(n, vocabulary, dtype, 0, 1.0, 0.0),
        "sample, top-k and top-p": lambda n: sample_call(n, vocabulary, dtype, 50, 0.9, 0.0),
        "sample, min-p": lambda n: sample_call(n, vocabulary, dtype, 0, 1.0, 0.1),
    }


def counts_of(call: Callable[[int], Any], lengths: list[int] | tuple[int, ...]) -> dict[str, int]:
    """How often each kernel would be compiled by calls for all lengths."""
    with recorded() as launches:
        for length in lengths:
            call(length)
    return dict(Counter(launch["kernel"].fn.__name__ for launch in launches.values()))


def compiled_for(call: Callable[[int], Any], lengths: tuple[int, ...]) -> int:
    """How often Triton really compiles for calls that do not launch."""
    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **_: compiled.append(1)
    for length in lengths:
        call(length)
    triton.knobs.runtime.jit_post_compile_hook = None
    return len(compiled)


def toy_counts() -> dict[str, Any]:
    """Counts for the kernels of this file: over all lengths, over a few, and truly compiled."""
    values = torch.empty(64)
    found: dict[str, Any] = defaultdict(dict)
    for kernel in (steady_kernel, specialised_kernel, constexpr_kernel):
        name = kernel.fn.__name__

        def launch(length: int, kernel: Any = kernel) -> None:
            kernel[(1,)](values, length, SIZE=64)

        def compile_only(length: int, kernel: Any = kernel) -> None:
            kernel.run(values, length, SIZE=64, grid=(1,), warmup=True)

        found[name]["all"] = counts_of(launch, LENGTHS)[name]
        found[name]["few"] = counts_of(launch, FEW_LENGTHS)[name]
        found[name]["compiled"] = compiled_for(compile_only, FEW_LENGTHS)
    return found


def strangers() -> list[str]:
    """Launches at the 0.5B model's sizes that are no shipped variant, and how they differ."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, call in calls_of_all_launchers(HIDDEN, VOCABULARY, dtype).items():
            with recorded() as launches:
                call(128)
            for launch in launches.values():
                listed = [v for v in aot.variants(TARGET) if v.kernel is launch["kernel"]]
                nearest = min((differences(launch, v) for v in listed), key=len, default=["all"])
                if nearest:
                    kernel = launch["kernel"].fn.__name__
                    found.append(f"{name} in {dtype}: {kernel}: {', '.join(nearest)}")
    return found


def report() -> dict[str, Any]:
    """What the process of its own finds."""
    triton.runtime.driver.set_active(Driver())
    torch.zeros = torch.empty  # values do not matter, and memory that nobody touches costs nothing
    calls = calls_of_all_launchers(64, 4096, torch.bfloat16)
    return {
        "toys": toy_counts(),
        "launchers": {name: counts_of(call, LENGTHS) for name, call in calls.items()},
        "kernels": sorted({variant.kernel.fn.__name__ for variant in aot.variants(TARGET)}),
        "strangers": strangers(),
    }


@pytest.fixture(scope="module")
def found(python_environment: dict[str, str], tmp_path_factory: Any) -> dict[str, Any]:
    """The report of a process that does not interpret kernels."""
    kept = {k: v for k, v in python_environment.items() if k != "TRITON_INTERPRET"}
    folder = tmp_path_factory.mktemp("compilations")
    done = subprocess.run(
        [sys.executable, __file__],
        cwd=folder,
        env={**kept, "TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_fifty_lengths_are_tried() -> None:
    assert len(LENGTHS) == 50
    assert {1, 15, 16, 17, 32, 100, 128} <= set(LENGTHS)


def test_the_count_is_that_of_real_compilations(found: dict[str, Any]) -> None:
    counts = {name: (count["few"], count["compiled"]) for name, count in found["toys"].items()}
    # 1, 15, 16, 17 and 32 as an integer argument: one, a multiple of 16, or anything else.
    assert counts == {
        "steady_kernel": (1, 1),
        "specialised_kernel": (3, 3),
        "constexpr_kernel": (5, 5),
    }


def test_a_kernel_compiled_per_length_is_caught(found: dict[str, Any]) -> None:
    counts = {name: count["all"] for name, count in found["toys"].items()}
    assert counts == {"steady_kernel": 1, "specialised_kernel": 3, "constexpr_kernel": 50}


def test_each_kernel_is_compiled_once_for_all_lengths(found: dict[str, Any]) -> None:
    for name, counts in found["launchers"].items():
        assert counts, name
        assert set(counts.values()) == {1}, (name, counts)


def test_each_kernel_of_the_library_is_tried(found: dict[str, Any]) -> None:
    tried = {kernel for counts in found["launchers"].values() for kernel in counts}
    assert sorted(tried) == found["kernels"]


def test_what_is_launched_is_what_ships(found: dict[str, Any]) -> None:
    assert not found["strangers"], "\n".join(found["strangers"])


if __name__ == "__main__":
    print(json.dumps(report()))
