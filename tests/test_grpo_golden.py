"""One GRPO update by this project's own loop against the released trainer's numbers.

The golden values stem from completions that each had a prompt copy of their own; ours share one
packed row per group (`true`), repeat the prompt (`prompt`), or run all of it again (`released`).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastomni.config import GrpoConfig, OptimizerConfig, RolloutConfig
from fastomni.engine import Engine
from fastomni.grpo import Experience, update
from fastomni.model import OmniModel, PromptBatch
from fastomni.model.checkpoint import released_tensors
from fastomni.rollout import Rollout
from fastomni.scoring import SHARING_MODES, completion_logprobs, released_logprobs
from fastomni_kernels import GroupLayout, group_advantages, kl_penalty

FOLDER = Path(__file__).parent / "data" / "humanomni_tiny"
GOLDEN = load_file(FOLDER / "expected_grpo.safetensors")
LAYOUT = GroupLayout.build([904, 904], GOLDEN["completion_lengths"].tolist())


def packed(name: str) -> Tensor:
    """A golden [N, G, C] tensor's values of real tokens, [M]."""
    return LAYOUT.unpad(GOLDEN[name].flatten(0, 1))


@pytest.fixture(scope="module")
def model() -> OmniModel:
    model = OmniModel.from_pretrained(FOLDER)
    model.set_trainable(("gate", "projector", "audio_projector", "decoder", "embeddings"))
    return model


@pytest.fixture(scope="module")
def prompts() -> PromptBatch:
    expected = load_file(FOLDER / "expected.safetensors")
    inputs = json.loads((FOLDER / "inputs.json").read_text())
    generator = torch.Generator().manual_seed(inputs["seed"] + 2)
    return PromptBatch(
        [tuple(ids) for ids in expected["input_ids"].tolist()],
        [tuple(ids) for ids in expected["bert_input_ids"].tolist()],
        pixels=torch.randn(2, 8, 3, 224, 224, generator=generator),
        mel=torch.randn(2, 128, 3000, generator=generator),
    )


def settings(sharing: str) -> GrpoConfig:
    return GrpoConfig(
        manifest="none.jsonl",
        epochs=1,
        prompts_per_step=2,
        # Holds one group of the two, so that micro-batches are cut.
        micro_batch_tokens=1000,
        rollout=RolloutConfig(num_generations=4, max_new_tokens=20, temperature=1.0),
        optimizer=OptimizerConfig(lr=1e-3),
        beta=0.04,
        sharing=sharing,  # type: ignore[arg-type]
    )


def test_advantages() -> None:
    advantages, _, _ = group_advantages(GOLDEN["rewards"])
    torch.testing.assert_close(advantages, GOLDEN["advantages"], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("sharing", SHARING_MODES)
def test_logprobs_entropies_and_kl(model: OmniModel, prompts: PromptBatch, sharing: str) -> None:
    tokens = packed("completions")
    if sharing == "released":
        completions = tokens.split(list(LAYOUT.sequence_lengths))
        columns = [
            released_logprobs(model, prompts.select([sequence // 4]), completion)
            for sequence, completion in enumerate(completions)
        ]
        logprobs, entropies = (torch.cat(column) for column in zip(*columns, strict=True))
    else:
        embeddings, _ = model.encode(prompts)
        logprobs, entropies = completion_logprobs(
            model, embeddings, tokens, LAYOUT, sharing=sharing
        )
    kl = kl_penalty(logprobs, packed("reference_logprobs"))
    found = {"logprobs": logprobs, "entropies": entropies, "kl": kl}
    golden = {name: packed(name) for name in found}
    torch.testing.assert_close(found, golden, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sharing", SHARING_MODES)
def test_loss_and_gradients(model: OmniModel, prompts: PromptBatch, sharing: str) -> None:
    model.zero_grad()
    config = settings(sharing)
    engine = Engine(model, config.optimizer, total_steps=1)
    embeddings, _ = model.encode(prompts)
    rollout = Rollout(LAYOUT, packed("completions"), packed("logprobs"), [True] * 8)
    experience = Experience(prompts, rollout, GOLDEN["advantages"], packed("reference_logprobs"))
    metrics, logprobs = update(model, engine, embeddings, experience, config)
    torch.testing.assert_close(logprobs, packed("logprobs"), rtol=0, atol=2e-5)
    assert metrics["loss"] == pytest.approx(float(GOLDEN["loss"]), abs=1e-6)
    per_completion = [kl.mean() for kl in packed("kl").split(list(LAYOUT.sequence_lengths))]
    assert metrics["kl"] == pytest.approx(float(torch.stack(per_completion).mean()), abs=1e-5)
    assert metrics["entropy"] == pytest.approx(float(packed("entropies").mean()), abs=1e-5)
    assert metrics["sampling/sampling_logp_difference/mean"] < 1e-5

    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    gradients = released_tensors(model, found)
    names = [name for name in GOLDEN if name.startswith("grad.")]
    assert len(names) == 13
    for name in names:
        golden = GOLDEN[name]
        error = (gradients[name.removeprefix("grad.")] - golden).norm() / golden.norm()
        assert error < 5e-5, f"{name}: relative error {error:.1e}"
    frozen = ("vision_tower.", "audio_tower.", "router.bert_model.")
    assert not any(name.startswith(frozen) for name in found)
