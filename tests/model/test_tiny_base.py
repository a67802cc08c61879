"""The shipped base: small, in the released layout, what its note says, and without emotions."""

import hashlib
import re
from pathlib import Path

import torch

from fastomni.data.demo_text import EMOTIONS, VOICE_FACTS, caption
from fastomni.model.checkpoint import PACKAGED_BASE, CheckpointReader
from fastomni.model.omni import OmniModel
from fastomni.model.tokenizer import OmniTokenizer

FOLDER = Path(PACKAGED_BASE)


def test_it_is_small_and_its_hash_is_the_noted_one() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 8 * 2**20
    digest = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    noted = re.findall(r"\b[0-9a-f]{64}\b", (FOLDER / "SOURCE.md").read_text(encoding="utf-8"))
    assert noted == [digest]


def test_it_loads_by_name_in_the_released_layout() -> None:
    model = OmniModel.from_pretrained("tiny-base")
    with CheckpointReader(FOLDER) as checkpoint:
        assert {checkpoint.dtype(name) for name in checkpoint.names()} == {torch.bfloat16}
        assert "model.layers.0.self_attn.q_proj.weight" in checkpoint
        assert "model.vision_tower.vision_tower.vision_model.head.probe" in checkpoint
    assert sum(parameter.numel() for parameter in model.parameters()) > 2_000_000


def test_its_tokenizer_knows_the_captions_and_the_chat() -> None:
    tokenizer = OmniTokenizer.of(OmniModel.from_pretrained("tiny-base"))
    assert 900 <= tokenizer.text.get_vocab_size() <= 1100
    facts = {"face": "covered", **{name: levels[0] for name, levels in VOICE_FACTS.items()}}
    text = caption(facts)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # Words of the captions are single tokens: a description is about as long as it has words.
    assert len(tokenizer.encode(text)) <= 1.5 * len(text.split()) + 4
    assert all(len(tokenizer.encode(f"<answer>{label}</answer>")) <= 12 for label in EMOTIONS)
