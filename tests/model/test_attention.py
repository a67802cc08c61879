"""`model.attention` reaches training and rollout, and every mode computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastomni.config import ModelConfig
from fastomni.model import attention, decoder
from fastomni.model.presets import build
from fastomni.rollout import Sampling, generate, sequence_seeds
from fastomni_kernels import GroupLayout, dispatch, reference

LAYOUT = GroupLayout.build([5, 3], [[4, 2], [1, 6, 0]])


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "choices", {})


def test_the_setting_knows_these_modes() -> None:
    assert ModelConfig().attention == "auto"
    for mode in attention.MODES:
        assert ModelConfig(attention=mode).attention == mode  # type: ignore[arg-type]


def hidden_states(mode: str) -> list[Tensor]:
    """Hidden states of packed groups, the gradient of their embeddings, and a rollout."""
    model = build("tiny", ["one two"], seed=3)
    model.decoder.attention = mode
    generator = torch.Generator().manual_seed(0)
    size = model.config.hidden_size
    rows = torch.randn(LAYOUT.num_rows, size, generator=generator).requires_grad_()
    hidden = model(rows, LAYOUT)
    (gradient,) = torch.autograd.grad(hidden.square().sum(), rows)
    prompts = torch.randn(8, size, generator=generator)
    seeds = sequence_seeds(0, 1, ["a", "b"], 2)
    rollout = generate(model, prompts, (5, 3), Sampling(2, 6), seeds)
    return [hidden, gradient, rollout.tokens, rollout.logprobs]


@pytest.mark.parametrize("mode", ["prefix", "reference"])
def test_every_mode_computes_the_same(mode: str) -> None:
    for actual, expected in zip(hidden_states(mode), hidden_states("auto"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_reference_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("prefix_attention", "prefix_decode"):
        definition = getattr(reference, name)

        def watched(*x: Any, name: str = name, definition: Any = definition, **y: Any) -> Tensor:
            called.append(name)
            return definition(*x, **y)

        monkeypatch.setattr(reference, name, watched)
    hidden_states("auto")
    assert not called
    hidden_states("reference")
    assert set(called) == {"prefix_attention", "prefix_decode"}
    for name in called:
        why = dispatch.choices[name, "definition"]
        assert why == "asked for by model.attention=reference"


def test_prefix_asks_for_the_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    for name in ("prefix_attention", "prefix_decode"):
        monkeypatch.setattr(
            attention, name, lambda *x, backend, name=name, **y: asked.append((name, backend))
        )
    meta = torch.zeros(LAYOUT.num_rows, 2, 16, device="meta")
    for device, mode in (("cuda", "prefix"), ("cpu", "prefix"), ("cuda", "auto")):
        assert attention._backend(mode, torch.device(device)) == (
            "triton" if (device, mode) == ("cuda", "prefix") else "auto"
        )
    attention.packed_attention("prefix", meta, meta, meta, LAYOUT)
    attention.decode_attention("prefix", meta)
    assert asked == [("prefix_attention", "auto"), ("prefix_decode", "auto")]


def test_the_decoder_starts_with_auto() -> None:
    assert decoder.Decoder(build("tiny", ["one two"], seed=3).config).attention == "auto"
