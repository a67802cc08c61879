"""Pretraining of new towers: which words of its caption does a clip show?

The released towers come pretrained; a model built from nothing needs the same. Every word that some
captions hold and others do not is a yes-or-no question to the clip's video and audio tokens, read
through the decoder's own norm and head. So the tokens come to lie where the decoder looks for
words, and no text encoder and no decoder layer has to run: a fraction of the cost of captioning.
(After SuperClass, Huang et al. 2024, arXiv:2411.03313, which pretrains vision models by classifying
caption tokens.)

Shapes: B clips, W words in question, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastomni.config import PretrainConfig
from fastomni.engine import Engine, Stage
from fastomni.model.omni import OmniModel, PromptBatch
from fastomni.prompts import PromptSource
from fastomni.report import StageReport

# Means over tokens are short vectors. With 1,200 captioned clips, batches of 32 and rate 1e-3 this
# scale brought the loss of step 300 from 0.14 to 0.05 (2026-11-21); SigLIP's scale starts at 10.
LOGIT_SCALE = 6.0


def train(
    model: OmniModel,
    source: PromptSource,
    settings: PretrainConfig,
    stage: Stage,
    report: StageReport,
    seed: int,
) -> None:
    """Trains towers and projectors of `model` in place, resuming at the newest checkpoint."""
    model.set_trainable(settings.trainable)
    steps_per_epoch = math.ceil(len(source.rows) / settings.batch_size)
    engine = Engine(model, settings.optimizer, math.ceil(settings.epochs * steps_per_epoch))
    stage.resume(engine)
    report.start(engine.steps_done, engine.total_steps)
    captions = {row.id: set(source.tokenizer.encode(row.response or "")) for row in source.rows}
    words = telling_words(list(captions.values()))
    for step, rows, prompts in source.steps(
        engine.steps_done, engine.total_steps, settings.batch_size, seed
    ):
        with report.phase("update"):
            present = torch.tensor(
                [[float(word in captions[row.id]) for word in words] for row in rows]
            ).to(model.device)
            scores = word_scores(model, prompts, torch.tensor(words, device=model.device))
            loss = F.binary_cross_entropy_with_logits(scores, present)
            engine.backward(loss)
            learning_rate = engine.learning_rate
            grad_norm = engine.step()
        metrics = {
            "loss": float(loss.detach()),
            "word_accuracy": float(((scores > 0) == (present > 0)).float().mean()),
        }
        report.step(step, metrics | {"learning_rate": learning_rate, "grad_norm": grad_norm})
        stage.checkpoint(engine)


def telling_words(captions: Sequence[set[int]]) -> list[int]:
    """Tokens that some captions hold and some do not, in id order.

    Raises:
        ValueError: all captions hold the same tokens, so there is nothing to learn.
    """
    anywhere = set().union(*captions)
    words = sorted(token for token in anywhere if any(token not in held for held in captions))
    if not words:
        raise ValueError("pretrain: all captions say the same; there is nothing to learn")
    return words


def word_scores(model: OmniModel, prompts: PromptBatch, words: Tensor) -> Tensor:
    """Scores [B, W]: how much the clips' video and audio tokens speak for each word.

    Args:
        model: gives towers, projectors, norm and head.
        prompts: B clips.
        words: [W] token ids.
    """
    weight = model.decoder.head_weight[words]  # [W, H]
    means = [
        model.decoder.norm(tokens).mean(dim=1)
        for tokens in model.modal_tokens(prompts)
        if tokens is not None
    ]
    return LOGIT_SCALE * F.linear(torch.stack(means).sum(dim=0), weight)
