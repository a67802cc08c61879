"""Which implementation is chosen and why, and what all operators have in common."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastomni_kernels import (
    GroupLayout,
    dispatch,
    flash_varlen,
    gather_logprobs,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logprobs,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)


def test_the_device_chooses_where_nobody_wishes() -> None:
    assert dispatch.explain("f", "auto", CPU) == ("reference", "the tensors are on cpu")
    assert dispatch.explain("f", "auto", CUDA) == ("triton", "the tensors are on cuda:0")
    assert dispatch.explain("f", "auto", CUDA, has_kernel=False) == (
        "reference",
        "it has no Triton kernel",
    )


def test_the_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTOMNI_KERNELS", "reference")
    asked = "asked for by FASTOMNI_KERNELS=reference"
    assert dispatch.explain("f", "auto", CUDA) == ("reference", asked)
    assert dispatch.explain("f", "triton", CUDA)[0] == "triton"
    monkeypatch.setenv("FASTOMNI_KERNELS", "triton")
    assert dispatch.explain("f", "reference", CUDA)[0] == "reference"
    # Forced for the whole process, it goes where a kernel is; asked for by name, it must be there.
    assert dispatch.explain("f", "auto", CPU, has_kernel=False)[0] == "reference"
    with pytest.raises(ValueError, match="f: has no Triton kernel; use backend='reference'"):
        dispatch.explain("f", "triton", CPU, has_kernel=False)


def test_unknown_words_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="f: backend 'gpu' is unknown; use one of auto, triton"):
        dispatch.explain("f", "gpu", CPU)
    monkeypatch.setenv("FASTOMNI_KERNELS", "cutlass")
    with pytest.raises(ValueError, match="f: FASTOMNI_KERNELS=cutlass is unknown; use one of auto"):
        dispatch.explain("f", "auto", CPU)


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTOMNI_KERNELS", "")
    assert dispatch.explain("f", "auto", CPU) == ("reference", "the tensors are on cpu")
    assert dispatch.explain("f", "auto", CUDA) == ("triton", "the tensors are on cuda:0")


@pytest.mark.parametrize("mode", ["recompute", "workspace"])
def test_the_fused_loss_speaks_in_its_own_name(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = GroupLayout.build([2], [[3, 2]])
    inputs = (torch.ones(5, 8), torch.ones(30, 8), torch.arange(5), torch.ones(2), layout)
    with pytest.raises(ValueError, match=r"^linear_grpo_loss: backend 'gpu' is unknown"):
        linear_grpo_loss(*inputs, mode=mode, backend="gpu")
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"^linear_grpo_loss: backend 'triton' was asked for"):
        linear_grpo_loss(*inputs, mode=mode, backend="triton")
    if mode == "workspace":
        monkeypatch.setattr(dispatch, "choices", {})
        linear_grpo_loss(*inputs, mode=mode)
        chosen = [("linear_grpo_loss", "reference"), ("grpo_loss", "reference")]
        assert list(dispatch.choices) == chosen


def test_what_stands_in_the_way_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"the tensors are on cpu, .* set TRITON_INTERPRET=1"):
        dispatch.explain("f", "triton", CPU)
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    missing = "triton is not installed; run: pip install triton"
    assert dispatch.explain("f", "auto", CUDA) == ("reference", missing)
    with pytest.raises(ValueError, match=f"backend 'triton' was asked for .*, but {missing}"):
        dispatch.explain("f", "triton", CUDA)


def test_a_choice_is_remembered_and_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "choices", {})
    with caplog.at_level(logging.INFO, logger="fastomni_kernels"):
        for _ in range(2):
            group_advantages(torch.tensor([[0.0, 1.0]]))
    assert dispatch.choices == {("group_advantages", "reference"): "the tensors are on cpu"}
    assert caplog.messages == ["group_advantages runs as reference: the tensors are on cpu"]


def test_on_a_cpu_triton_is_not_even_imported(python_environment: dict[str, str]) -> None:
    code = (
        "import sys, torch, fastomni_kernels as k\n"
        "h, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)\n"
        "k.linear_logprobs(h, w, torch.tensor([0, 1, 2]))[0].sum().backward()\n"
        "k.group_advantages(torch.tensor([[0.0, 1.0]]))\n"
        "print([m for m in sys.modules if m.partition('.')[0] in ('triton', 'transformers')])\n"
    )
    environment = {k: v for k, v in python_environment.items() if k != "FASTOMNI_KERNELS"}
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert child.stdout == "[]\n"


def losses() -> dict[str, torch.Tensor]:
    """One differentiable number of every function, on the same inputs."""
    generator = torch.Generator().manual_seed(0)
    layout = GroupLayout.build([2], [[3, 2]])
    hidden = torch.randn(5, 8, generator=generator).requires_grad_()
    weight = 3 * torch.randn(30, 8, generator=generator)
    ids, advantages = torch.arange(5), torch.tensor([1.0, -1.0])
    logits = (hidden[:, None] * weight).sum(2)  # not a product that autocast would touch
    heads, ends = hidden.view(5, 2, 4), torch.tensor([0, 5], dtype=torch.int32)
    return {
        "flash_varlen": flash_varlen(heads, heads, heads, ends, ends, 5, 5).square().sum(),
        "gather_logprobs": gather_logprobs(logits, ids)[0].sum(),
        "linear_logprobs": linear_logprobs(hidden, weight, ids)[0].sum(),
        "grpo_loss": grpo_loss(gather_logprobs(logits, ids)[0], advantages, layout)[0],
        "workspace": linear_grpo_loss(hidden, weight, ids, advantages, layout).loss,
        "recompute": linear_grpo_loss(
            hidden, weight, ids, advantages, layout, mode="recompute"
        ).loss,
    }


def test_autocast_does_not_reach_inside() -> None:
    expected = losses()
    with torch.autocast("cpu", torch.bfloat16):
        actual = losses()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


NAMES = ("gather_logprobs", "linear_logprobs", "grpo_loss", "workspace", "recompute")


@pytest.mark.parametrize("name", NAMES)
def test_there_is_no_second_derivative(name: str) -> None:
    with pytest.raises(RuntimeError, match="its gradient has no gradient; leave create_graph off"):
        loss = losses()[name]
        hidden = next(leaf for leaf in leaves(loss.grad_fn) if leaf.requires_grad)
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        torch.autograd.grad(grad.sum(), hidden)


def leaves(node: object) -> list[torch.Tensor]:
    """Tensors at the ends of the graph behind a node."""
    found = [node.variable] if hasattr(node, "variable") else []
    for following, _ in getattr(node, "next_functions", ()):
        found += leaves(following) if following is not None else []
    return found


def test_a_graph_under_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["fastomni_kernels.prefix_attention"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    q = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(ValueError, match="leave this call out of the graph"):
        module._chosen(q, q, "auto")


def test_compiled_graphs_leave_it_out_of_cuda_graphs() -> None:
    reading = ("prefix_attention", "prefix_attention_backward", "flash_varlen")
    for name in (*reading, "flash_varlen_backward"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.fastomni, name).default.tags
