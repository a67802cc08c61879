"""Settings of the RLVR stage's loss: ratio, clipping, reduction, KL, rollout-mismatch correction.

Names, defaults and ranges are those of `fastomni_kernels.LossOptions`, which computes them and
cites the papers; they are written again here because reading a configuration must not load torch,
and a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastomni.config_yaml import check, check_at_least, check_positive


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What the loss of one token is, and how tokens are added up."""

    policy: Literal["clip", "cispo", "sapo"] = "clip"
    """clip: the clipped ratio of PPO and GRPO; cispo: the capped, detached ratio times log-prob;
    sapo: a sigmoid gate in place of the clip."""
    ratio: Literal["token", "sequence"] = "token"
    """Probability ratio of each token, or its geometric mean over the completion (GSPO)."""
    reduction: Literal["grpo", "bnpo", "dapo", "dr_grpo"] = "grpo"
    """grpo: mean over each completion, then over completions (released); dapo: mean over all
    tokens; dr_grpo: sum over all tokens, divided by completions * rollout.max_new_tokens; bnpo:
    mean over a micro-batch's tokens, the only one that depends on micro_batch_tokens."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low where the advantage is negative; it leaves 1 only
    where updates_per_rollout is 2 or more."""
    clip_high: float = 0.2
    """And above 1 + clip_high where it is positive (DAPO: 0.28)."""
    dual_clip: float | None = None
    """Where the advantage is negative the ratio is also clipped above this; null: it is not."""
    cispo_max: float = 5.0
    """Cap of the ratio itself where policy is cispo, which has no use for clip_high."""
    sapo_temperature_positive: float = 1.0
    """Steepness of sapo's gate where the advantage is positive."""
    sapo_temperature_negative: float = 1.05
    """And where it is not."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL that beta weighs (released: k3)."""
    mismatch: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "none"
    """Weighs the policy term by trainer's over rollout's probability, of each token or of the whole
    completion; truncate clamps that weight to mismatch_min .. mismatch_max, mask drops what lies
    outside. The rollout's probabilities are those before top_k and top_p."""
    mismatch_min: float | None = None
    """Lower end of that range, in [0, 1]; null: none."""
    mismatch_max: float | None = 3.0
    """Upper end of that range; null: none."""
    entropy_coef: float = 0.0
    """Weight of the mean entropy over all tokens, which is subtracted from the loss."""

    def __post_init__(self) -> None:
        check(0 <= self.clip_low <= 1, "clip_low", self.clip_low, "must lie in [0, 1]")
        check_at_least(0, "clip_high", self.clip_high)
        if self.dual_clip is not None:
            lowest = 1 + self.clip_high
            problem = f"must exceed 1 + clip_high, here {lowest}: what is below is clipped already"
            check(self.dual_clip > lowest, "dual_clip", self.dual_clip, problem)
        for key in ("cispo_max", "sapo_temperature_positive", "sapo_temperature_negative"):
            check_positive(key, getattr(self, key))
        check_positive("mismatch_max", self.mismatch_max)
        if self.mismatch_min is not None:
            highest = 1.0 if self.mismatch_max is None else min(1.0, self.mismatch_max)
            inside = 0 <= self.mismatch_min <= highest
            problem = "must lie in [0, 1] and not above mismatch_max"
            check(inside, "mismatch_min", self.mismatch_min, problem)
        self._check_uses()

    def _check_uses(self) -> None:
        """Refuses settings that would be ignored; a default cannot be told from one left out."""
        for key, policy in _POLICY_OF.items():
            remedy = f"leave it out, or set policy to {policy}"
            if key == "clip_high" and self.policy == "cispo":
                remedy = "leave it out, and cap the ratio itself with cispo_max"
            problem = f"has no effect where policy is {self.policy}; {remedy}"
            used = self.policy == policy or self._is_default(key)
            check(used, key, getattr(self, key), problem)
        for key in ("mismatch_min", "mismatch_max"):
            remedy = "leave it out, or set mismatch to a mode"
            problem = f"has no effect where mismatch is none; {remedy}"
            used = self.mismatch != "none" or self._is_default(key)
            check(used, key, getattr(self, key), problem)

    def _is_default(self, key: str) -> bool:
        return bool(getattr(self, key) == getattr(type(self), key))


# Setting -> the only policy that reads it.
_POLICY_OF = {
    "clip_low": "clip",
    "clip_high": "clip",
    "dual_clip": "clip",
    "cispo_max": "cispo",
    "sapo_temperature_positive": "sapo",
    "sapo_temperature_negative": "sapo",
}
