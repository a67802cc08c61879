"""The released checkpoint at a tiny size, its golden values, and small random models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, SiglipVisionConfig, WhisperConfig

from fastomni.model import OmniConfig, OmniModel

MakeModel = Callable[..., OmniModel]


@pytest.fixture(scope="session")
def released_checkpoint() -> Path:
    """A checkpoint written by the released code; its README says what the values are."""
    return Path(__file__).resolve().parents[1] / "data" / "humanomni_tiny"


@pytest.fixture(scope="session")
def expected(released_checkpoint: Path) -> dict[str, Tensor]:
    """What the released code computed with that checkpoint."""
    return load_file(released_checkpoint / "expected.safetensors")


@pytest.fixture(scope="session")
def clips(released_checkpoint: Path) -> tuple[Tensor, Tensor]:
    """Frames [2, 8, 3, 224, 224] and spectrograms [2, 128, 3000] of the golden values."""
    inputs = json.loads((released_checkpoint / "inputs.json").read_text())
    generator = torch.Generator().manual_seed(inputs["seed"] + 2)
    frames = torch.randn(inputs["batch"], inputs["frames"], 3, 224, 224, generator=generator)
    return frames, torch.randn(inputs["batch"], 128, 3000, generator=generator)


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """A function that builds a model of a few thousand weights, all of them random."""

    def make(seed: int = 0, **changes: Any) -> OmniModel:
        fields: dict[str, Any] = dict(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=40,
            num_frames=2,
            bert_gate_size=12,
            vision=SiglipVisionConfig(
                hidden_size=8,
                intermediate_size=12,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
            ),
            audio=WhisperConfig(
                d_model=8,
                encoder_layers=1,
                encoder_attention_heads=2,
                encoder_ffn_dim=12,
                num_mel_bins=16,
                max_source_positions=15,
                vocab_size=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            ),
            bert=BertConfig(
                vocab_size=30,
                hidden_size=8,
                intermediate_size=12,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=24,
            ),
        )
        model = OmniModel(OmniConfig(**(fields | changes)))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model

    return make
