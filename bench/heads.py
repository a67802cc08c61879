"""Log-probs (and entropy) from hidden states and head, by every library that has a way to do it.

A head is prepared for a problem and is then a function (hidden, weight) -> (log-probs [M],
entropy [M] or None); the cases of `linear_logprobs` and `linear_grpo_loss` both go through it. The
entropy never carries a gradient here: trainers log it.

Shapes: M completion tokens (S completions of C each), H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

import fastomni_kernels
from bench.cases import Problem

Logprobs = tuple[Tensor, Tensor | None]
Head = Callable[[Tensor, Tensor], Logprobs]

# Width of a tile of TRL's fused head (trl/trainer/utils.py, _CHUNKED_LOGPROB_CHUNK_SIZE).
TRL_TILE = 32768


@dataclass(frozen=True)
class HeadMaker:
    """How a library computes log-probs.

    Attributes:
        name: as printed.
        prepare: problem -> head.
        modules: that must be installed.
        devices: device types it runs on.
    """

    name: str
    prepare: Callable[[Problem], Head]
    modules: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")


def ours(problem: Problem, backend: str) -> Head:
    """fastomni_kernels.linear_logprobs."""
    ids = problem["ids"]

    def head(hidden: Tensor, weight: Tensor) -> Logprobs:
        logprobs, entropy = fastomni_kernels.linear_logprobs(hidden, weight, ids, backend=backend)
        return logprobs, entropy.detach()

    return head


def eager_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy [M] of logits [M, V] as one writes them in torch, fp32 inside."""
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, ids[:, None]).squeeze(-1), entropy


def eager(problem: Problem) -> Head:
    """All logits, then `eager_logprobs`."""
    ids = problem["ids"]

    def head(hidden: Tensor, weight: Tensor) -> Logprobs:
        logits = hidden @ weight.T
        return eager_logprobs(logits, ids)

    return head


def trl_logits(problem: Problem) -> Head:
    """All logits, then TRL's function on them, per completion as its trainer calls it."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    shape = problem.settings["shape"]
    ids = problem["ids"].view(shape)

    def head(hidden: Tensor, weight: Tensor) -> Logprobs:
        logits = (hidden @ weight.T).view(*shape, len(weight))
        logprobs, entropy = selective_log_softmax_and_entropy(
            logits, ids, entropy_requires_grad=False
        )
        return logprobs.flatten(), entropy.flatten()

    return head


def trl_fused(problem: Problem) -> Head:
    """What TRL's `add_fused_lm_head` puts into a model."""
    from trl.kernels import ChunkedLogProbFunction

    ids = problem["ids"]

    def head(hidden: Tensor, weight: Tensor) -> Logprobs:
        logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, ids, 1.0, TRL_TILE, None, 1.0, ("entropy",)
        )
        return logprobs, entropy.detach()

    return head


def liger_chunked(problem: Problem) -> Head:
    """The chunked log-probs inside Liger's fused linear losses; they have no entropy."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    shape = problem.settings["shape"]
    ids = problem["ids"].view(shape)

    def head(hidden: Tensor, weight: Tensor) -> Logprobs:
        rows = hidden.view(*shape, hidden.shape[1])
        logprobs = LigerFusedLinearPPOBase.chunk_forward(rows, weight, ids, temperature=1.0)
        return logprobs.flatten(), None

    return head


def verl_fused(problem: Problem) -> Head:
    """verl's Triton kernels."""
    linear_cross_entropy = import_module(
        "verl.utils.kernel.linear_cross_entropy"
    ).linear_cross_entropy
    ids = problem["ids"]

    def head(hidden: Tensor, weight: Tensor) -> Logprobs:
        logprobs, entropy = linear_cross_entropy(hidden, weight, ids, 1.0, "none")
        return logprobs, entropy.detach()

    return head


def quack_rows(problem: Problem) -> Head:
    """All logits, then QuACK's cross-entropy of rows; it has no entropy."""
    cross_entropy = import_module("quack.cross_entropy").cross_entropy
    ids = problem["ids"]

    def head(hidden: Tensor, weight: Tensor) -> Logprobs:
        loss = cross_entropy(F.linear(hidden, weight), ids, reduction="none", inplace_backward=True)
        return -loss, None

    return head


EAGER = HeadMaker("torch eager", eager)
PEERS = (
    HeadMaker("TRL on logits", trl_logits, ("trl",)),
    HeadMaker("TRL fused head", trl_fused, ("trl",)),
    HeadMaker("verl", verl_fused, ("verl",), ("cuda",)),
    HeadMaker("QuACK on logits", quack_rows, ("quack",), ("cuda",)),
)
LIGER = HeadMaker("Liger chunked", liger_chunked, ("liger_kernel",))
