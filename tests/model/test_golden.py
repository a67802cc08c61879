"""Every stage of the model against what the released HumanOmni code computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastomni.model import OmniModel, PromptBatch, TowerFeatures
from fastomni.rollout import Sampling, generate
from fastomni_kernels import GroupLayout

Golden = dict[str, Tensor]


@pytest.fixture(scope="module")
def model(released_checkpoint: Path) -> OmniModel:
    return OmniModel.from_pretrained(released_checkpoint)


@pytest.fixture(scope="module")
def features(model: OmniModel, clips: tuple[Tensor, Tensor]) -> TowerFeatures:
    return model.encode_towers(*clips)


@pytest.fixture(scope="module")
def prompts(expected: Golden, features: TowerFeatures) -> PromptBatch:
    return PromptBatch(
        [tuple(ids) for ids in expected["input_ids"].tolist()],
        [tuple(ids) for ids in expected["bert_input_ids"].tolist()],
        features=features,
    )


def close(actual: Tensor, golden: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, golden, rtol=0, atol=atol)


def test_vision_features(features: TowerFeatures, expected: Golden) -> None:
    assert features.vision is not None
    assert not features.vision.requires_grad
    patches = features.vision.flatten(2, 3)
    close(patches[:, 0], expected["vision_features_first_frame"], 1e-5)
    close(patches.mean(2), expected["vision_features_mean"], 1e-5)


@torch.no_grad()
def test_router_probabilities(model: OmniModel, prompts: PromptBatch, expected: Golden) -> None:
    close(model.router(list(prompts.router_ids)), expected["router_probabilities"], 1e-6)


@torch.no_grad()
def test_video_and_audio_tokens(
    model: OmniModel, features: TowerFeatures, expected: Golden
) -> None:
    assert features.vision is not None and features.audio is not None
    video = model.projector(features.vision, expected["router_probabilities"])
    close(video, expected["video_tokens"], 1e-5)
    close(model.audio_projector(features.audio), expected["audio_tokens"], 1e-5)


@torch.no_grad()
def test_logits(model: OmniModel, prompts: PromptBatch, expected: Golden) -> None:
    embeddings, lengths = model.encode(prompts)
    # 12 text tokens, 8 frames of 7 x 7 tokens and 500 of sound.
    assert lengths == model.prompt_lengths(prompts) == (904, 904)
    hidden = model(embeddings, GroupLayout.build(list(lengths), [[], []]))
    logits = (hidden @ model.decoder.head_weight.T).unflatten(0, (2, 904))
    close(logits[:, -64:], expected["logits_last_64"], 3e-5)
    close(logits[:, ::16], expected["logits_every_16th"], 3e-5)


@torch.no_grad()
def test_a_clip_may_come_as_frames_or_as_features(
    model: OmniModel, prompts: PromptBatch, clips: tuple[Tensor, Tensor]
) -> None:
    fresh = PromptBatch(prompts.input_ids, prompts.router_ids, pixels=clips[0], mel=clips[1])
    assert model.prompt_lengths(fresh) == (904, 904)
    close(model.encode(fresh)[0], model.encode(prompts)[0], 1e-6)
    second = fresh.select([1])
    close(model.encode(second)[0], model.encode(prompts)[0][904:], 1e-5)


def test_greedy_tokens_through_the_cache(
    model: OmniModel,
    prompts: PromptBatch,
    expected: Golden,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The golden tokens were made without a stop.
    monkeypatch.setattr(OmniModel, "stop_ids", ())
    embeddings, lengths = model.encode(prompts)
    rollout = generate(model, embeddings, lengths, Sampling(1, 24, temperature=0.0))
    assert rollout.tokens.view(2, 24).tolist() == expected["greedy_tokens"].tolist()
    assert rollout.stopped == [False, False]


def test_the_stop_token_comes_from_the_checkpoint(model: OmniModel) -> None:
    assert model.stop_ids == (2,)
