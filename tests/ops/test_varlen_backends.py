"""Which backend flash_varlen takes, why, and how each is called; no fast one need be installed."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastomni_kernels import dispatch, varlen_backends
from fastomni_kernels.flash_varlen import explain, flash_varlen
from fastomni_kernels.varlen_reference import reference_operator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA = torch.device("cuda")
MODULE = importlib.import_module("fastomni_kernels.flash_varlen")
FIRST = "can run here (backends were not timed on a GPU)"
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def packed(queries: int = 18, keys: int = 19) -> tuple[Any, ...]:
    """Arguments of a call over three sequences, one of them without queries."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(rows, heads, 8, generator=generator).to(DEVICE).requires_grad_()
        for rows, heads in ((queries, 6), (keys, 2), (keys, 2))
    )
    offsets = ([0, queries // 2, queries // 2, queries], [0, keys // 3, keys // 2, keys])
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in offsets)
    return q, k, v, cu_q, cu_k, queries, keys


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with an H100 and no flash-attn package; FASTOMNI_KERNELS unset."""
    monkeypatch.delenv("FASTOMNI_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NoFlashAttn(), *sys.meta_path])
    varlen_backends.imported.cache_clear()
    yield
    varlen_backends.imported.cache_clear()


class NoFlashAttn:
    """Finder to which no flash-attn package is installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in ("flash_attn", "flash_attn_interface", "flash_attn_3"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def install(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., Any]) -> None:
    """Put a package in place whose only content is its function."""
    package = ModuleType(name)
    package.flash_attn_varlen_func = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, package)
    varlen_backends.imported.cache_clear()


def test_torch_runs_where_no_package_is_installed(nothing_installed: None) -> None:
    assert explain("auto", CUDA, torch.bfloat16, 64) == (
        "torch",
        f"{FIRST}; flash-attn: 4 is not installed, 3 is not installed, 2 is not installed",
    )
    assert explain("torch", CUDA, torch.bfloat16, 64)[1] == "asked for by the argument backend"


def test_the_newest_package_for_the_device_runs(
    nothing_installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, name in ((2, "flash_attn"), (3, "flash_attn_interface"), (4, "flash_attn.cute")):
        install(monkeypatch, name, lambda: None)
        assert explain("auto", CUDA, torch.float16, 64) == (f"flash-attn {version}", FIRST)
    for size, version in ((128, 4), (136, 3), (256, 3)):
        assert explain("auto", CUDA, torch.float16, size)[0] == f"flash-attn {version}"
    for capability, version in (((8, 9), 2), ((10, 0), 4), ((12, 0), 2)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert explain("auto", CUDA, torch.float16, 64)[0] == f"flash-attn {version}"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 4))  # gfx942
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert explain("auto", CUDA, torch.float16, 64)[0] == "flash-attn 2"


def test_release_3_is_found_inside_its_package_too(
    nothing_installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "flash_attn_3.flash_attn_interface", lambda: None)
    assert explain("flash-attn", CUDA, torch.float16, 64)[0] == "flash-attn 3"


def test_while_compiling_torch_comes_first(
    nothing_installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "flash_attn", lambda: None)
    assert explain("auto", CUDA, torch.float16, 64, compiling=True)[0] == "torch"
    assert explain("flash-attn", CUDA, torch.float16, 64, compiling=True)[0] == "flash-attn 2"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert explain("auto", CUDA, torch.float16, 64, compiling=True)[0] == "flash-attn 2"


def test_a_broken_package_is_passed_over_with_its_reason(
    nothing_installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("built for another torch")

    monkeypatch.setitem(sys.modules, "flash_attn.cute", Broken("flash_attn.cute"))
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    varlen_backends.imported.cache_clear()
    backend, reason = explain("auto", CUDA, torch.float16, 64)
    assert backend == "torch"
    assert "4 cannot be loaded (RuntimeError: built for another torch)" in reason
    assert reason.endswith("2 is not installed")


@pytest.mark.parametrize(
    ("device", "dtype", "size", "capability", "reason"),
    [
        ("mps", torch.bfloat16, 64, (9, 0), "the tensors are on mps"),
        ("cuda", torch.float32, 64, (9, 0), "the tensors are torch.float32; flash kernels take"),
        ("cuda", torch.bfloat16, 264, (9, 0), "the head size is over 256 or no multiple of 8"),
        ("cuda", torch.bfloat16, 20, (9, 0), "the head size is over 256 or no multiple of 8"),
        ("cuda", torch.float16, 64, (7, 5), "the compute capability is 7.5; flash kernels need"),
    ],
)
def test_the_reference_runs_where_nothing_else_can(
    device: str,
    dtype: torch.dtype,
    size: int,
    capability: tuple[int, int],
    reason: str,
    nothing_installed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, "flash_attn", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    backend, why = explain("auto", torch.device(device), dtype, size)
    assert backend == "reference" and why.startswith(reason)
    for wish in ("flash-attn", "torch"):
        with pytest.raises(ValueError, match=f"backend {wish!r} cannot run, because {reason}"):
            explain(wish, torch.device(device), dtype, size)


def test_two_different_obstacles_are_both_told(
    nothing_installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert explain("auto", CUDA, torch.float16, 192) == (
        "reference",
        "flash-attn: 4 is not for heads over 128, 3 is not installed, 2 is not installed; "
        "torch: torch was built without flash attention",
    )


def test_the_environment_variable(nothing_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTOMNI_KERNELS", "reference")
    found = explain("auto", CUDA, torch.float16, 64)
    assert found == ("reference", "asked for by FASTOMNI_KERNELS=reference")
    assert explain("torch", CUDA, torch.float16, 64)[0] == "torch"
    monkeypatch.setenv("FASTOMNI_KERNELS", "triton")
    assert explain("auto", CUDA, torch.float16, 64)[0] == "torch"
    monkeypatch.setenv("FASTOMNI_KERNELS", "fast")
    with pytest.raises(ValueError, match="FASTOMNI_KERNELS=fast is unknown; use one of auto"):
        explain("auto", CUDA, torch.float16, 64)


def test_the_choice_is_remembered_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "choices", {})
    caplog.set_level(logging.INFO, "fastomni_kernels")
    for _ in range(2):
        flash_varlen(*packed(), backend="reference")
    reason = "asked for by the argument backend"
    assert dispatch.choices == {("flash_varlen", "reference"): reason}
    assert caplog.messages == [f"flash_varlen runs as reference: {reason}"]


# How the packages are called. The signatures are those of the releases named.


class Recorder:
    """Attends by the reference and keeps the arguments that a package was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def attend(self, **given: Any) -> Tensor:
        self.calls.append(given)
        q, k, v = given["q"], given["k"], given["v"]
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        lengths = (given[name] for name in LENGTHS)
        return reference_operator(q, k, v, *lengths, given["causal"], given["softmax_scale"])


RECORDER = Recorder()


# fmt: off
def release_2(  # 2.8.3: flash_attn/flash_attn_interface.py
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
) -> Any:
    assert dropout_p == 0.0 and window_size == (-1, -1) and not return_attn_probs
    return RECORDER.attend(**locals())


def release_3(  # 3.0.0: hopper/flash_attn_interface.py
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
    seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None,
    k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
) -> Any:
    assert qv is None and seqused_q is None and not return_attn_probs
    return RECORDER.attend(**locals())


def release_4(  # 4.0.0b36: flash_attn/cute/interface.py
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None,
    gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
    deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
    block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False,
    scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
) -> Any:
    assert qv is None and gather_kv_indices is None
    out = RECORDER.attend(**locals())
    return out, None  # the log-sum-exp, which is there only where gradients are needed


def varlen_attn_2_13(  # torch 2.12 and 2.13: torch/nn/attention/varlen.py
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
) -> Any:
    assert enable_gqa or query.shape[1] == key.shape[1]
    return varlen_attn_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale,
                            window_size=window_size, return_aux=return_aux)


def varlen_attn_2_11(  # torch 2.11: torch/nn/attention/varlen.py
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1),
) -> Any:
    assert window_size in ((-1, -1), (-1, 0)) and return_aux is None
    return RECORDER.attend(
        q=query, k=key, v=value, cu_seqlens_q=cu_seq_q, cu_seqlens_k=cu_seq_k, max_seqlen_q=max_q,
        max_seqlen_k=max_k, causal=window_size == (-1, 0), softmax_scale=scale)
# fmt: on


PACKAGES = [
    ("flash-attn 2", "flash_attn", release_2),
    ("flash-attn 3", "flash_attn_interface", release_3),
    ("flash-attn 4", "flash_attn.cute", release_4),
]


def assert_as_the_reference(causal: bool) -> dict[str, Any]:
    """A call that takes the installed stand-in gives the reference's values and gradients."""
    q, k, v, *rest = packed()
    v = v.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    RECORDER.calls.clear()
    out = flash_varlen(q, k, v, *rest, causal=causal)
    wanted = flash_varlen(q, k, v, *rest, causal=causal, backend="reference")
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)
    pairs = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, wanted)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    (call,) = RECORDER.calls
    assert call["causal"] is causal and call["softmax_scale"] == 8**-0.5
    assert [call[name] for name in LENGTHS[2:]] == [18, 19]
    return call


@pytest.mark.parametrize(("backend", "name", "function"), PACKAGES, ids=lambda x: str(x)[:12])
def test_each_package_is_called_as_its_release_wants(
    backend: str,
    name: str,
    function: Callable[..., Any],
    nothing_installed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MODULE, "attempt", lambda *_: (backend, ""))
    install(monkeypatch, name, function)
    for causal in (False, True):
        call = assert_as_the_reference(causal)
        assert call["deterministic"] is False
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert assert_as_the_reference(True)["deterministic"] is True


def test_a_tuple_with_the_log_sum_exp_of_an_early_release_3(
    nothing_installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "attempt", lambda *_: ("flash-attn 3", ""))
    install(monkeypatch, "flash_attn_interface", lambda *a, **k: (release_3(*a, **k), None))
    assert_as_the_reference(True)


@pytest.mark.parametrize(
    ("shares_heads", "function", "heads"),
    [(True, varlen_attn_2_13, 2), (False, varlen_attn_2_11, 6)],
)
def test_torch_is_called_with_shared_heads_or_repeated_keys(
    shares_heads: bool,
    function: Callable[..., Any],
    heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FASTOMNI_KERNELS", raising=False)
    monkeypatch.setattr(MODULE, "attempt", lambda *_: ("torch", ""))
    monkeypatch.setattr(varlen_backends, "TORCH_SHARES_HEADS", shares_heads)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    for causal in (False, True):
        assert assert_as_the_reference(causal)["k"].shape[1] == heads


def test_this_torch_has_the_arguments_that_it_is_called_with() -> None:
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    assert names.keys() >= {"scale", "window_size"}
    assert ("enable_gqa" in names) is varlen_backends.TORCH_SHARES_HEADS


def test_a_call_without_rows_never_reaches_a_flash_kernel(
    nothing_installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "attempt", lambda *_: ("flash-attn 2", ""))
    install(monkeypatch, "flash_attn", release_2)
    RECORDER.calls.clear()
    assert flash_varlen(*packed(0, 3)).shape == (0, 6, 8)
    assert flash_varlen(*packed(3, 0)).abs().sum() == 0
    assert not RECORDER.calls
