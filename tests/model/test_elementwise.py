"""The decoder's norm, rotation and gate: liger-kernel's against plain torch, and which one runs.

liger's Triton kernels run in Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastomni.model import OmniModel, elementwise
from fastomni.model.decoder import KeyValueCache, rotary
from fastomni.model.elementwise import implementation, rms_norm, rotate, swiglu
from fastomni_kernels import GroupLayout, prefix_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA = torch.device("cuda")
MakeModel = Callable[..., OmniModel]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "implementation", lambda *_: (name, "for this test"))


def case(function: str, rows: int, dtype: torch.dtype) -> tuple[Callable[..., Any], list[Tensor]]:
    """A function of tensors that train, and those tensors."""
    if function == "rms_norm":
        inputs = [random(rows, 24, seed=0, dtype=dtype), random(24, seed=1, dtype=dtype)]
        return lambda hidden, weight: rms_norm(hidden, weight, 1e-6), inputs
    if function == "swiglu":
        return swiglu, [random(rows, 2 * 24, seed=0, dtype=dtype)]
    angles = random(rows, 4, seed=2)
    rotation = (
        torch.cat([angles.cos()] * 2, dim=-1)[:, None].to(dtype),
        torch.cat((-angles.sin(), angles.sin()), dim=-1)[:, None].to(dtype),
    )
    # The values of a fused projection stand behind queries and keys.
    heads = random(rows, 7, 8, seed=0, dtype=dtype)
    return lambda heads: torch.cat(rotate(heads[:, :5], rotation, 3), dim=1), [heads]


def run(
    function: str, rows: int, dtype: torch.dtype = torch.float32, backwards: int = 1
) -> tuple[Tensor, list[list[Tensor]]]:
    """Output, and gradients of each of so many backwards; holders of tensors see no change."""
    compute, inputs = case(function, rows, dtype)
    for x in inputs:
        x.requires_grad_()
    before = [x.detach().clone() for x in inputs]
    out = compute(*inputs)
    direction = random(*out.shape, seed=9, dtype=dtype)
    held = direction.clone()
    gradients = [
        list(torch.autograd.grad(out, inputs, direction, retain_graph=True))
        for _ in range(backwards)
    ]
    assert torch.equal(direction, held)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    return out.detach(), gradients


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """liger-kernel is taken for tensors on any device."""
    pytest.importorskip("liger_kernel")
    take("liger", monkeypatch)
    if DEVICE == "cpu":
        import triton.language as tl
        from triton.runtime import interpreter

        original = interpreter._implicit_cvt

        def convert(argument: Any) -> Any:
            """A float argument as the compiler sees it; the interpreter leaves it a float."""
            if not isinstance(argument, float):
                return original(argument)
            handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)

        monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
        # libdevice's function is a call into a library of the GPU.
        monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: tl.math.rsqrt(x))


# The interpreter's bfloat16 is garbage.
DTYPES = [torch.float32, torch.float16 if DEVICE == "cpu" else torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("function", elementwise.OPERATIONS)
def test_liger_gives_the_values_and_gradients_of_plain_torch(
    function: str,
    rows: int,
    dtype: torch.dtype,
    liger: None,
    monkeypatch: pytest.MonkeyPatch,
    poisoned_memory: None,
) -> None:
    found, (found_gradients,) = run(function, rows, dtype)
    take("torch", monkeypatch)
    wanted, (wanted_gradients,) = run(function, rows, dtype)
    # Half types: one rounding more or less.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    for a, b in zip(found_gradients, wanted_gradients, strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=5 * tolerance)


@pytest.mark.parametrize("function", elementwise.OPERATIONS)
def test_a_second_backward_through_liger_gives_the_same(function: str, liger: None) -> None:
    _, (first, second) = run(function, 3, backwards=2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_norm_s_weight_may_be_frozen_or_of_another_type(liger: None) -> None:
    hidden = random(3, 24, seed=0).requires_grad_()
    rms_norm(hidden, random(24, seed=1), 1e-6).sum().backward()
    assert hidden.grad is not None
    mixed = rms_norm(hidden.detach().bfloat16(), random(24, seed=1), 1e-6)
    assert mixed.dtype == torch.float32  # as the product of the two types is


@pytest.mark.parametrize("function", elementwise.OPERATIONS)
def test_no_rows_give_no_rows(function: str, liger: None) -> None:
    compute, inputs = case(function, 0, torch.float32)
    assert compute(*inputs).shape[0] == 0


def test_plain_torch_is_the_released_arithmetic_bit_for_bit() -> None:
    hidden, weight = random(4, 24, seed=0), random(24, seed=1)
    normed = F.rms_norm(hidden, (24,), None, 1e-6)
    assert torch.equal(rms_norm(hidden, weight, 1e-6), weight * normed)
    gate, up = hidden.chunk(2, dim=-1)
    assert torch.equal(swiglu(hidden), F.silu(gate) * up)
    cosines, sines, heads = (
        random(4, 1, 8, seed=2),
        random(4, 1, 8, seed=3),
        random(4, 5, 8, seed=4),
    )
    rotated = torch.cat(rotate(heads, (cosines, sines), 3), dim=1)
    assert torch.equal(rotated, heads * cosines + heads.roll(4, dims=-1) * sines)


LAYOUT = ((5, 3), ((4, 2), (1, 3)))


def test_decoding_rotates_as_training_does_bit_for_bit() -> None:
    """In fp32 and plain torch; half types are rounded once by the decoder's operator."""
    heads, angles = random(5, 8, 8, seed=0).cpu(), random(5, 4, seed=2).cpu()
    rotation = (
        torch.cat([angles.cos()] * 2, dim=-1)[:, None],
        torch.cat((-angles.sin(), angles.sin()), dim=-1)[:, None],
    )
    _, keys = rotate(heads, rotation, 4)
    offsets, lengths, prompt_of = (
        torch.tensor(x, dtype=torch.int32) for x in ([0, 0], [1] * 5, [0] * 5)
    )
    caches = torch.zeros(5, 1, 4, 8), torch.zeros(5, 1, 4, 8)
    q, new = heads.split(4, dim=1)
    counts = (lengths, prompt_of)
    nothing = (new[:0], new[:0], offsets)
    options: dict[str, Any] = {"new_k": new, "new_v": new, "rotation": rotation}
    attended = prefix_decode(q, *nothing, *caches, *counts, **options)
    assert torch.equal(caches[0][:, 0], keys) and torch.equal(caches[1][:, 0], new)
    assert torch.equal(attended, new)  # each sequence sees its newest token alone


def decode(model: OmniModel) -> tuple[Tensor, list[Tensor]]:
    """Hidden states of packed groups and of one decode step, and all gradients of the former."""
    decoder = model.decoder.requires_grad_()
    layout = GroupLayout.build(*LAYOUT, DEVICE)
    hidden = decoder(random(layout.num_rows, 16, seed=5), layout)
    parameters = [p for p in decoder.parameters() if p is not decoder.embed_tokens.weight]
    gradients = torch.autograd.grad(hidden.square().sum(), parameters)
    offsets, prompt_of = (
        torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 5, 8], [0, 0, 1, 1])
    )
    cache = KeyValueCache(offsets, prompt_of, torch.zeros_like(prompt_of), [], [])
    with torch.no_grad():
        decoder(random(8, 16, seed=6), GroupLayout.build(LAYOUT[0], ((), ()), DEVICE), cache)
        cache.suffix = [
            tuple(torch.zeros(4, 3, *x.shape[1:], device=DEVICE) for x in layer)
            for layer in cache.prefix
        ]
        positions = torch.tensor([5, 5, 3, 3], device=DEVICE)
        step = decoder.decode_step(random(4, 16, seed=7), positions, cache)
    return torch.cat((hidden.detach(), step)), list(gradients)


def test_the_whole_decoder_runs_on_liger(
    make_model: MakeModel, liger: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model().to(DEVICE)
    found, found_gradients = decode(model)
    take("torch", monkeypatch)
    wanted, wanted_gradients = decode(model)
    assert not torch.equal(found, wanted)  # another arithmetic did run
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(found_gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_liger_rotates_by_the_decoder_s_angles(make_model: MakeModel, liger: None) -> None:
    config = make_model().decoder.config
    cosines, sines = rotary(torch.tensor([0, 3], device=DEVICE), config, torch.float64)
    heads = random(2, 3, config.head_dim, seed=0)
    queries, keys = rotate(heads, (cosines.float(), sines.float()), 2)
    half = config.head_dim // 2
    # A complex number of each pair, turned by position * theta ** (-i / half).
    turn = torch.tensor(
        [[p * config.rope_theta ** (-i / half) for i in range(half)] for p in (0, 3)],
        dtype=torch.float64,
        device=DEVICE,
    )
    pairs = torch.complex(heads[..., :half].double(), heads[..., half:].double())
    turned = pairs * torch.polar(torch.ones_like(turn), turn)[:, None]
    wanted = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(torch.cat((queries, keys), 1).double(), wanted, rtol=0, atol=1e-6)


# Which one runs.


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """liger is looked for again, and FASTOMNI_KERNELS is not set."""
    monkeypatch.delenv("FASTOMNI_KERNELS", raising=False)
    elementwise._liger.cache_clear()
    yield
    elementwise._liger.cache_clear()


def operations(*names: str) -> ModuleType:
    module = ModuleType("liger_kernel.ops")
    for name in names:
        setattr(module, name, object())
    return module


def test_on_a_cpu_liger_is_not_even_looked_for(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(function: str) -> None:
        raise AssertionError(function)

    monkeypatch.setattr(elementwise, "_liger", refuse)
    for function in elementwise.OPERATIONS:
        found = implementation(function, torch.device("cpu"), torch.float32)
        assert found == ("torch", "the tensors are on cpu")
    if DEVICE == "cpu":
        decode(make_model())


def test_on_a_gpu_liger_runs_where_it_can(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "liger_kernel.ops", operations(*elementwise.OPERATIONS.values())
    )
    for function in elementwise.OPERATIONS:
        found = implementation(function, CUDA, torch.bfloat16)
        assert found == ("liger", "the tensors are on a GPU")
        found = implementation(function, CUDA, torch.float64)
        assert found == ("torch", "the tensors are torch.float64")
    monkeypatch.setenv("FASTOMNI_KERNELS", "reference")
    found = implementation("swiglu", CUDA, torch.bfloat16)
    assert found == ("torch", "asked for by FASTOMNI_KERNELS=reference")


def test_an_older_liger_is_used_for_what_it_has(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = operations("LigerRMSNormFunction", "LigerRopeFunction", "LigerSiLUMulFunction")
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", older)
    assert implementation("rms_norm", CUDA, torch.bfloat16)[0] == "liger"
    assert implementation("swiglu", CUDA, torch.bfloat16) == (
        "torch",
        "this liger-kernel has no LigerFusedGateUpSiLUMulFunction; "
        "run: pip install -U liger-kernel",
    )


def test_without_liger_plain_torch_runs(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] == "liger_kernel":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    name, reason = implementation("rms_norm", CUDA, torch.bfloat16)
    assert name == "torch"
    assert reason == (
        "liger_kernel.ops is not installed; run in the folder that holds setup.py: "
        'pip install -e ".[liger]" --no-build-isolation'
    )
