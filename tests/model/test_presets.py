"""The presets: the released sizes part by part (on no device at all), and the tiny model's."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, SiglipVisionConfig, WhisperConfig

from fastomni.model.config import OmniConfig, released_tower_fields
from fastomni.model.omni import OmniModel
from fastomni.model.presets import RELEASED_DECODER, build
from fastomni.model.tokenizer import OmniTokenizer


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_released_sizes_part_by_part() -> None:
    towers = released_tower_fields()
    with torch.device("meta"):
        model = OmniModel(
            OmniConfig(
                **RELEASED_DECODER,
                vision=SiglipVisionConfig(**towers["vision"]),
                audio=WhisperConfig(**towers["audio"]),
                bert=BertConfig(**towers["bert"]),
            )
        )
    assert count(model.vision_tower) == 92_884_224
    assert count(model.audio_tower) == 636_968_960
    assert count(model.router.bert_model) == 109_482_240
    assert count(model.router.bert_gate) == 2_766_851
    assert count(model.projector) == 34_762_944
    assert count(model.audio_projector) == 1_951_488
    assert count(model.decoder) == 494_032_768
    assert (model.config.video_tokens, model.config.audio_tokens) == (392, 500)


def test_tiny_is_a_few_million_parameters_and_repeats_with_its_seed() -> None:
    first, again, other = (build("tiny", ["the voice is low."], seed) for seed in (0, 0, 1))
    assert 2_000_000 < count(first) < 4_000_000
    same = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert not torch.equal(first.decoder.head_weight, other.decoder.head_weight)
    vocabulary = OmniTokenizer.of(first).text.get_vocab_size()
    assert 900 <= vocabulary <= 1100
    assert vocabulary == first.config.vocab_size


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown preset 'small'; choose among"):
        build("small")
