"""A language-model head that scores given tokens, put into somebody else's model for one forward.

The decision that is not obvious: the model's own forward is called, through whatever wraps it, so
that the hooks of DDP, FSDP, PEFT and autocast run; only what its head does is replaced, and only
for that call. What the model returns as logits are then the scores, [2, M]. A model that changes
its logits on the way out (soft-capping, a scale) changes the scores too, which is how one that no
list of names knows is found out.

Shapes: B completions, C tokens of the longest, T tokens of a row, M tokens that count, H hidden,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastomni_kernels.checks import require
from fastomni_kernels.logprobs import linear_logprobs

# Fields of transformers' configurations by which models change their logits; 1 where they do not.
_LOGIT_CHANGES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
    "lm_head_multiplier",
)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class CountedTokens:
    """Which tokens of padded completions count, and the way from padded to packed and back.

    Attributes:
        shape: (B, C).
        lengths: B numbers of tokens that count.
        index: [M] int64, positions in the flattened [B, C].
    """

    def __init__(self, mask: Tensor) -> None:
        """Read the lengths back: packing needs them on the host, so this stops a GPU's stream.

        Args:
            mask: [B, C], not 0 where a token counts; holes are fine.
        """
        counts = mask.bool()
        self.shape = counts.shape
        self.lengths: list[int] = counts.sum(1).tolist()
        self.index = torch.nonzero_static(counts.flatten(), size=sum(self.lengths)).squeeze(1)

    def pack(self, padded: Tensor) -> Tensor:
        """Take what counts, [M], out of [B, C]."""
        return padded.flatten().index_select(0, self.index)

    def pad(self, packed: Tensor) -> Tensor:
        """Spread [M] over [B, C]; what does not count is 0. Differentiable."""
        batch, longest = self.shape
        padded = packed.new_zeros(batch * longest).index_copy(0, self.index, packed)
        return padded.view(batch, longest)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return `index` of the completions start <= b < stop, counted from `start`."""
        before = sum(self.lengths[:start])
        count = sum(self.lengths[start:stop])
        return self.index[before : before + count] - start * self.shape[1]


class ScoringHead:
    """Stands in for a model's head: `with scorer.installed(): scores = model(...).logits`.

    The scores are log-probs and entropies of the tokens, [2, M], fp32 or wider, nats. Under
    autocast the product runs in autocast's dtype, as the head's own would.
    """

    def __init__(
        self,
        head: nn.Linear,
        completion_ids: Tensor,
        index: Tensor,
        temperature: float,
        with_entropy: bool,
        in_fp32: bool,
    ) -> None:
        """Remember what to score.

        Args:
            head: the model's, which passed `check_head`.
            completion_ids: [B, C] int64, the last C tokens of each row.
            index: [M] int64, tokens to score, as positions in the flattened [B, C].
            temperature: > 0; divides the logits.
            with_entropy: False makes the entropies 0.
            in_fp32: whether the product is made in fp32, outside autocast.
        """
        self._head = head
        self._shape = completion_ids.shape
        self._ids = completion_ids.flatten().index_select(0, index)
        self._index = index
        self._temperature = temperature
        self._with_entropy = with_entropy
        self._in_fp32 = in_fp32
        self._scores: Tensor | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Make this the head's forward; the module and its hooks stay."""
        head: Any = self._head
        own = head.__dict__.get("forward")
        head.forward = self._forward
        try:
            yield
        finally:
            del head.forward
            if own is not None:
                head.forward = own

    def _forward(self, hidden: Tensor) -> Tensor:
        weight = self._head.weight
        _check_weight(weight)
        batch, longest = self._shape
        require(
            hidden.ndim == 3 and len(hidden) == batch and hidden.shape[1] > longest,
            f"ScoringHead: the model gave its head hidden states of shape {list(hidden.shape)}, "
            f"where [B={batch}, T>{longest}, H] is needed; with several GPUs start one process for "
            "each (torchrun or accelerate launch)",
        )
        beyond = hidden.shape[1] - longest
        # The flattened position of a token in [B, T], less one: the position before predicts it.
        where = self._index + (self._index // max(longest, 1) + 1) * beyond - 1
        hidden = hidden.flatten(0, 1).index_select(0, where.to(hidden.device))
        hidden, ids = hidden.to(weight.device), self._ids.to(weight.device)
        device = weight.device.type
        if self._in_fp32:
            hidden, weight = hidden.float(), weight.float()
        elif torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        scores = linear_logprobs(hidden, weight, ids, self._temperature, self._with_entropy)
        self._scores = torch.stack(scores)
        return self._scores

    def scores_are_kept(self, returned: Tensor) -> bool:
        """Check that the model returned the scores as they were made; it reads the device back.

        Returns:
            Whether there were any scores to tell by.

        Raises:
            ValueError: the model changed them or did not call its head.
        """
        made = self._scores
        require(
            made is not None,
            "ScoringHead: the model did not call its output embeddings' forward; its log-probs "
            "need TRL's own trainer",
        )
        assert made is not None
        same = returned.shape == made.shape and torch.allclose(
            returned.detach().to(made), made.detach(), rtol=0, atol=0, equal_nan=True
        )
        require(
            same,
            "ScoringHead: the model changes its logits after the head (a soft-cap, a scale, a "
            "slice), so log-probs made by the head would be others than the model's; use TRL's "
            "own trainer",
        )
        return made.numel() > 0


def check_head(model: Any, in_fp32: bool) -> nn.Linear:
    """Return the language-model head, or refuse one whose logits are not hidden @ weight.T.

    Args:
        model: a transformers model, without wrappers other than PEFT's.
        in_fp32: whether TRL gave the head a forward of its own (cast_lm_head_to_fp32).

    Raises:
        ValueError: no head, a head of another kind, with a bias, quantised or sharded, or a
            configuration that changes logits.
    """
    name = type(model).__name__
    head = model.get_output_embeddings()
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    require(
        plain and (in_fp32 or "forward" not in head.__dict__),
        f"{name}: its language-model head is {type(head).__name__}, not a plain torch.nn.Linear "
        "(an adapter on it, quantisation, device_map); leave lm_head out of PEFT's target_modules "
        "and modules_to_save, and of quantisation, or use TRL's own trainer",
    )
    require(
        head.bias is None,
        f"{name}: its language-model head has a bias, which the kernels do not add; use TRL's own "
        "trainer",
    )
    _check_dtype(head.weight)
    config = model.config.get_text_config()
    for field in _LOGIT_CHANGES:
        value = getattr(config, field, None)
        require(
            value is None or (value == 1 and field != "final_logit_softcapping"),
            f"{name}: {field}={value} changes its logits after the head, which the kernels do not "
            "do; use TRL's own trainer",
        )
    return head


def _check_dtype(weight: Tensor) -> None:
    require(
        weight.dtype in _DTYPES,
        f"the weight of the language-model head is {weight.dtype}; leave lm_head out of "
        "quantisation, or use TRL's own trainer",
    )


def _check_weight(weight: Tensor) -> None:
    """Refuse what is no whole, plain matrix; wrappers may shard it between forwards."""
    _check_dtype(weight)
    sharded = ", sharded by ZeRO-3" if hasattr(weight, "ds_id") else ""
    require(
        type(weight) in (Tensor, nn.Parameter) and not sharded,
        f"the weight of the language-model head is a {type(weight).__name__}{sharded}, not a whole "
        "matrix; use ZeRO-1 or ZeRO-2, leave lm_head out of quantisation, or use TRL's own trainer",
    )
