"""Log-probs and loss of this package in TRL's GRPOTrainer; everything else stays TRL's.

A mixin replaces two of the trainer's methods. The decision that is not obvious: neither patches a
forward. Scoring calls the (wrapped) model as TRL does and borrows its head for that call alone, see
`scoring_head`. Neither trl nor transformers is imported here.

Shapes: B completions of a micro-batch, T tokens of the longest prompt and completion, C tokens of
the longest completion, M tokens that count, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from fastomni_kernels.checks import require
from fastomni_kernels.layout import GroupLayout
from fastomni_kernels.loss_definition import kl_penalty
from fastomni_kernels.policy_loss import grpo_loss, sequence_weights
from fastomni_kernels.scoring_head import CountedTokens, ScoringHead, check_head
from fastomni_kernels.trl_settings import (
    LOSS_TYPES,
    TRL_VERSIONS,
    check_trl_version,
    loss_options,
)

__all__ = ["TRL_VERSIONS", "FastomniGRPO", "check_trl_version"]

# What a rollout may hold for the model beside text.
_MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class FastomniGRPO:
    """Mixin for TRL's GRPOTrainer: `class Trainer(FastomniGRPO, GRPOTrainer): pass`.

    Loss, gradients and metrics are TRL's, for loss_type grpo, bnpo, dr_grpo, dapo, cispo and sapo,
    both values of importance_sampling_level and every option but those refused below. Logits
    [B, T, V] never exist; prompts, padding and, in the loss, what a tool wrote are not scored.

    A micro-batch reads the device back twice: how many tokens of each completion count, which
    packing must know on the host, and its metrics, all at once. Images go to the model as they
    are; the log-probs of a rollout with images are made in one forward, not in parts.

    Raises:
        ImportError: a TRL outside `TRL_VERSIONS`.
        TypeError: base classes in the wrong order.
        ValueError: what is not supported, by name and with a remedy: loss_type luspo and vespo,
            off_policy_mask_threshold, top_entropy_quantile below 1, use_adaptive_entropy,
            use_liger_kernel where it brings its own loss (TRL before 1.15), a delta within the
            clip's range, one advantage per token, and language-model heads with a bias, with an
            adapter, quantised, sharded, or whose logits the model changes.
    """

    # What TRL's trainer has.
    accelerator: Any
    args: Any
    model: Any
    ref_model: Any
    loss_type: str
    importance_sampling_level: str
    temperature: float
    beta: float
    epsilon_low: float
    epsilon_high: float
    entropy_coef: float
    max_completion_length: int
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    use_vllm: bool
    vllm_importance_sampling_correction: bool
    vllm_importance_sampling_mode: Any
    vllm_importance_sampling_clip_min: float | None
    vllm_importance_sampling_clip_max: float | None
    current_gradient_accumulation_steps: int
    _entropy_bonus_enabled: bool
    _metrics: dict[str, dict[str, list[float]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(FastomniGRPO)]
        if any(base.__name__ == "GRPOTrainer" for base in before):
            raise TypeError(
                f"{cls.__name__}: FastomniGRPO stands behind the trainer whose methods it is to "
                "replace; write: class Trainer(FastomniGRPO, GRPOTrainer)"
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_trl_version()
        self._models_that_keep_scores: WeakSet[Any] = WeakSet()
        super().__init__(*args, **kwargs)
        loss_options(self)
        for model in (self.model, self.ref_model):
            if model is not None:
                check_head(model, self.args.cast_lm_head_to_fp32)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs [B, C] of the completions, their entropies [B, C], and the routers' loss.

        Arguments are TRL's, C = logits_to_keep. What the attention mask hides is 0.
        """
        tokens = CountedTokens(attention_mask[:, -logits_to_keep:])
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **others}
        logprobs, entropy, aux_loss = self._score(
            model, inputs, tokens, batch_size, compute_entropy, compute_aux_loss
        )
        return tokens.pad(logprobs), tokens.pad(entropy) if compute_entropy else None, aux_loss

    def _score(
        self,
        model: Any,
        inputs: dict[str, Any],
        tokens: CountedTokens,
        batch_size: int | None,
        with_entropy: bool,
        with_aux_loss: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs [M] and entropies [M] of the tokens that count, and the routers' loss."""
        unwrapped = self.accelerator.unwrap_model(model)
        head = unwrapped.get_output_embeddings()
        in_fp32 = self.args.cast_lm_head_to_fp32
        # The rest is missing, or TRL's own bookkeeping of images.
        given = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        batch, longest = tokens.shape
        # Images are not counted by completions, so they are not cut.
        step = batch_size if batch_size and len(given) == 2 else batch
        settings = {"use_cache": False, **({"output_router_logits": True} if with_aux_loss else {})}
        scores, aux_losses = [], []
        for start in range(0, batch, step):
            stop = min(start + step, batch)
            part = {name: x[start:stop] for name, x in given.items()} if step < batch else given
            ids = part["input_ids"][:, -longest:]
            scorer = ScoringHead(
                head, ids, tokens.rows(start, stop), self.temperature, with_entropy, in_fp32
            )
            with self.accelerator.autocast(), scorer.installed():
                outputs = model(**part, **settings)
            known = unwrapped in self._models_that_keep_scores
            if not known and scorer.scores_are_kept(outputs.logits):
                self._models_that_keep_scores.add(unwrapped)
            scores.append(outputs.logits)
            if with_aux_loss:
                aux_losses.append(outputs.aux_loss)
        logprobs, entropy = torch.cat(scores, 1)
        return logprobs, entropy, torch.stack(aux_losses).mean() if aux_losses else None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Loss of one padded micro-batch as TRL defines it; logs TRL's metrics."""
        mask = inputs["completion_mask"]
        tokens = CountedTokens(mask * inputs["tool_mask"] if "tool_mask" in inputs else mask)
        given = {name: inputs.get(name) for name in _MODEL_INPUTS}
        for name, end in (("input_ids", "ids"), ("attention_mask", "mask")):
            given[name] = torch.cat([inputs[f"prompt_{end}"], inputs[f"completion_{end}"]], 1)
        logprobs, entropy, aux_loss = self._score(
            model, given, tokens, None, True, self.aux_loss_enabled
        )
        # A loss never looks at prompts, so any length of theirs will do.
        layout = GroupLayout.build(
            [1] * len(tokens.lengths), [[length] for length in tokens.lengths], logprobs.device
        )
        loss, kl, ratio = self._packed_loss(inputs, tokens, layout, logprobs)
        policy_loss, loss = self._reduced(loss, inputs, entropy, aux_loss)
        totals = {"entropy": (entropy.sum(), len(entropy))}
        if kl is not None:
            totals["kl"] = (kl.sum(), len(kl))
        if self._entropy_bonus_enabled:
            totals["policy_loss"] = (policy_loss, 1)
        if aux_loss is not None:
            totals["aux_loss"] = (aux_loss, 1)
        clipped = self._clip_shares(tokens, layout, inputs["advantages"], ratio.detach())
        self._log_metrics(totals, clipped)
        return loss

    def _packed_loss(
        self, inputs: dict[str, Any], tokens: CountedTokens, layout: GroupLayout, logprobs: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The micro-batch's loss, its KL [M], and the ratio: [M], or [B] where the sequence's."""
        options = loss_options(self)
        advantages = inputs["advantages"]
        require(
            advantages.ndim == 1,
            f"FastomniGRPO: advantages have shape {list(advantages.shape)}; give one for each "
            "completion, [B], or use GRPOTrainer itself for one per token",
        )
        old = inputs.get("old_per_token_logps")
        old = logprobs.detach() if old is None else tokens.pack(old)
        reference = tokens.pack(inputs["ref_per_token_logps"]) if self.beta else None
        drifts = options.mismatch != "none"
        loss, _ = grpo_loss(
            logprobs,
            advantages,
            layout,
            options,
            old_logprobs=old,
            reference_logprobs=reference if options.beta else None,
            rollout_logprobs=tokens.pack(inputs["sampling_per_token_logps"]) if drifts else None,
        )
        ratio = logprobs - old
        by_sequence = self.importance_sampling_level == "sequence"
        if by_sequence:
            ratio = tokens.pad(ratio).sum(1) / layout.completion_length_tensor.clamp(min=1)
        ratio = ratio.exp()
        if reference is None:
            return loss, None, ratio
        kl = kl_penalty(logprobs, reference)
        if self.args.use_bias_correction_kl:
            kl = kl * (ratio[layout.sequence_of_token] if by_sequence else ratio)
            weights = sequence_weights(layout, options, len(advantages), len(kl), kl)
            loss = loss + self.beta * (weights[layout.sequence_of_token] * kl).sum()
        return loss, kl, ratio

    def _reduced(
        self, loss: Tensor, inputs: dict[str, Any], entropy: Tensor, aux_loss: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The policy loss as TRL logs it, and the loss of which an update's micro-batches add up.

        Args:
            loss: scalar, the micro-batch's own.
            inputs: TRL's.
            entropy: [M].
            aux_loss: scalar of the routers.
        """
        training = self.model.training
        parts = self.current_gradient_accumulation_steps if training else 1
        if LOSS_TYPES[self.loss_type][1] == "dapo":
            # The count lies on the device, and dividing by it there needs no read-back. It is of
            # all that was rolled out together, of which an update may take a part.
            count = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            if training:
                count = count * parts / self.args.steps_per_generation
            loss = loss * (len(entropy) / count)
            policy_loss = loss.detach()
        else:
            policy_loss = loss.detach()
            loss = loss / parts
        if self._entropy_bonus_enabled:
            loss = loss - self.entropy_coef * entropy.sum() / max(len(entropy), 1) / parts
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / parts
        return policy_loss, loss

    def _clip_shares(
        self, tokens: CountedTokens, layout: GroupLayout, advantages: Tensor, ratio: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """How much of each completion was clipped low and high, and of how much: [B] each.

        That is of its tokens, or of one where the ratio is the sequence's.
        """
        by_token = self.importance_sampling_level == "token"
        if by_token:
            advantages = advantages[layout.sequence_of_token]
        highest = self.epsilon_high if self.loss_type == "cispo" else 1 + self.epsilon_high
        clipped = {
            "low": (ratio < 1 - self.epsilon_low) & (advantages < 0),
            "high": (ratio > highest) & (advantages > 0),
        }
        shares = {}
        for side, flags in clipped.items():
            number = flags.to(ratio.dtype)
            if by_token:
                number, of = tokens.pad(number).sum(1), layout.completion_length_tensor
            else:
                of = torch.ones_like(number)
            shares[side] = (number, of.to(ratio.dtype))
        return shares

    def _log_metrics(
        self,
        totals: dict[str, tuple[Tensor, int]],
        clipped: dict[str, tuple[Tensor, Tensor]],
    ) -> None:
        """Append TRL's metrics; one exchange between processes and one read-back for all."""
        columns = {name: total.detach() for name, (total, _) in totals.items()}
        columns |= {f"{n} of": x.new_full((), totals[n][1]) for n, x in columns.items()}
        for side, (number, of) in clipped.items():
            # What has no tokens has no share; these values never win.
            share, nothing = number / of, math.inf if side == "low" else -math.inf
            share = share.nan_to_num(nothing, math.inf, -math.inf)
            columns |= {side: number.sum(), f"{side} of": of.sum()}
            columns[f"{side} extreme"] = share.amin() if side == "low" else share.amax()
        rows = self.accelerator.gather(torch.stack(list(columns.values()))[None]).tolist()
        values = dict(zip(columns, zip(*rows, strict=True), strict=True))
        means = {name: sum(values[name]) / max(sum(values[f"{name} of"]), 1) for name in totals}
        low, high = (
            sum(values[side]) / max(sum(values[f"{side} of"]), 1) for side in ("low", "high")
        )
        if self.loss_type == "cispo":
            means["cispo_clip_ratio"] = high
        elif self.loss_type != "sapo":
            extremes = min(values["low extreme"]), max(values["high extreme"])
            smallest, largest = (x if math.isfinite(x) else math.nan for x in extremes)
            means |= {
                "clip_ratio/low_mean": low,
                "clip_ratio/high_mean": high,
                "clip_ratio/region_mean": low + high,
                "clip_ratio/low_min": smallest,
                "clip_ratio/high_max": largest,
            }
        training = self.model.training
        if self._entropy_bonus_enabled and training and self.accelerator.sync_gradients:
            means["entropy_coef"] = self.entropy_coef
        log = self._metrics["train" if training else "eval"]
        for name, value in means.items():
            log[name].append(value)
