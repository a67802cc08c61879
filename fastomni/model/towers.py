"""The frozen towers and the router's text encoder, as transformers builds them.

Only the part that the model uses is run: SigLIP stops at the selected layer (the last block, the
post-norm and the pooling head are kept for checkpoints but never computed), and of Whisper the
encoder with its final norm. A tower is always in eval mode; whether gradients flow through it
follows from its parameters' `requires_grad`.

Shapes: B clips, F frames, D tower width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, SiglipVisionConfig, SiglipVisionModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder


class Tower(nn.Module):
    """A module that stays in eval mode and runs without a graph unless it is being trained."""

    def train(self, mode: bool = True) -> Tower:
        """Ignores the mode: frozen towers have no dropout and no running statistics."""
        return super().train(False)

    @property
    def trains(self) -> bool:
        """Whether any parameter asks for a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters())


class VisionTower(Tower):
    """SigLIP features of a hidden layer, without a post-norm."""

    def __init__(self, config: SiglipVisionConfig, select_layer: int) -> None:
        super().__init__()
        self.vision_tower = SiglipVisionModel(config)
        # The tuple of hidden states starts with the embeddings, so -2 is the output of all
        # blocks but the last.
        self.used_layers = (config.num_hidden_layers + 1 + select_layer) % (
            config.num_hidden_layers + 1
        )
        self.patches_per_side = cast(int, config.image_size) // cast(int, config.patch_size)
        self.train(False)

    @property
    def vision_model(self) -> Any:
        """The transformer itself (older transformers wrap it once more)."""
        return getattr(self.vision_tower, "vision_model", self.vision_tower)

    def forward(self, pixels: Tensor) -> Tensor:
        """Patch features.

        Args:
            pixels: [B, F, 3, S, S], normalised.

        Returns:
            [B, F, h, w, D] with h = w = S // patch_size.
        """
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
            hidden = self.vision_model.embeddings(pixels.flatten(0, 1))
            for layer in self.vision_model.encoder.layers[: self.used_layers]:
                hidden = layer(hidden, None)
        side = self.patches_per_side
        return hidden.unflatten(1, (side, side)).unflatten(0, pixels.shape[:2])


class AudioTower(Tower):
    """Whisper encoder states, pooled by three over time."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.audio_tower = nn.ModuleDict({"encoder": WhisperEncoder(config)})
        self.train(False)

    def forward(self, mel: Tensor) -> Tensor:
        """Pooled audio features.

        Args:
            mel: [B, bins, 2 * positions] log-mel spectrogram.

        Returns:
            [B, positions // 3, D].
        """
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
            states = self.audio_tower["encoder"](mel).last_hidden_state
            return F.avg_pool1d(states.transpose(1, 2), 3, 3).transpose(1, 2)


class Router(nn.Module):
    """Branch weights from the question: BERT's first token, a two-layer gate, a softmax."""

    def __init__(self, config: BertConfig, gate_size: int) -> None:
        super().__init__()
        self.bert_model = BertTower(config)
        self.bert_gate = nn.Sequential(
            nn.Linear(config.hidden_size, gate_size), nn.GELU(), nn.Linear(gate_size, 3)
        )

    def forward(self, texts: list[tuple[int, ...]]) -> Tensor:
        """Router probabilities [B, 3]; equal texts are encoded once.

        Args:
            texts: WordPiece ids of each question, with its [CLS] and [SEP].
        """
        device = next(self.bert_gate.parameters()).device
        distinct = list(dict.fromkeys(texts))
        states = torch.cat(
            [self.bert_model(torch.tensor([ids], device=device)) for ids in distinct]
        )
        weights = self.bert_gate(states).softmax(dim=1)
        if len(distinct) == 1:
            return weights.expand(len(texts), 3)
        order = {ids: index for index, ids in enumerate(distinct)}
        return weights[torch.tensor([order[ids] for ids in texts], device=device)]


class BertTower(Tower):
    """BERT's last hidden state of [CLS]; its dropout is off (the released trainer left it on)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config)
        self.train(False)

    def forward(self, ids: Tensor) -> Tensor:
        """[1, L] ids -> [1, D]."""
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
            return self.bert(input_ids=ids).last_hidden_state[:, 0]
