"""Settings of the policy loss, with the papers they come from; one object for all loss functions.

Names are the papers'; where TRL's GRPOConfig has the same setting, its name stands beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What the loss of one token is, and how tokens are added up.

    The token loss is `weight * policy term + beta * kl`; `weight` corrects the mismatch between
    the rollout's probabilities and the trainer's and is 1 where `mismatch` is "none".

    Attributes:
        policy: "clip" is PPO's and GRPO's clipped ratio (arXiv:2402.03300, eq. 3), "cispo" the
            detached capped ratio times log-prob (MiniMax-M1, arXiv:2506.13585), "sapo" the
            sigmoid gate (arXiv:2511.20347).
        ratio: "token" takes each token's probability ratio, "sequence" the geometric mean over the
            completion (GSPO, arXiv:2507.18071).
        reduction: "grpo" is the mean over each completion, then over completions; "bnpo" the mean
            over the micro-batch's tokens, weighted with its share of the completions; "dapo" the
            mean over all tokens of the batch (arXiv:2503.14476); "dr_grpo" the sum over all tokens
            divided by completions * max_completion (arXiv:2503.20783).
        beta: weight of the KL penalty; R1-Omni trains with 0.04.
        kl: estimator of the KL, "k1", "k2" or "k3" (Schulman, "Approximating KL divergence").
        clip_low: under "clip" the ratio is clipped below 1 - clip_low where the advantage is
            negative (TRL: epsilon).
        clip_high: and above 1 + clip_high where it is positive (TRL: epsilon_high).
        dual_clip: where the advantage is negative the ratio is also clipped above this
            (arXiv:1912.09729; TRL: delta); None: not.
        cispo_max: cap of the detached ratio under "cispo" (TRL: epsilon_high there).
        sapo_temperature_positive: steepness of the gate under "sapo" where the advantage is
            positive (TRL: sapo_temperature_pos).
        sapo_temperature_negative: where it is not (TRL: sapo_temperature_neg).
        mismatch: correction by exp(trainer's log-prob at rollout time - rollout's log-prob), per
            token or as product over the sequence; "truncate" clamps it to the range
            mismatch_min .. mismatch_max, "mask" drops what lies outside.
        mismatch_min: lower end of that range; None: none.
        mismatch_max: upper end; None: none (TRL: vllm_importance_sampling_clip_max).
        entropy_coef: weight of the entropy bonus, the mean entropy over all tokens of the batch.
        max_completion: longest completion a rollout may give, in tokens; needed by "dr_grpo".

    Raises:
        ValueError: a value out of range, a setting that another one needs, or a value other than
            the default of a setting for which the policy, or mismatch "none", has no use.
    """

    policy: Literal["clip", "cispo", "sapo"] = "clip"
    ratio: Literal["token", "sequence"] = "token"
    reduction: Literal["grpo", "bnpo", "dapo", "dr_grpo"] = "grpo"
    beta: float = 0.0
    kl: Literal["k1", "k2", "k3"] = "k3"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    cispo_max: float = 5.0
    sapo_temperature_positive: float = 1.0
    sapo_temperature_negative: float = 1.05
    mismatch: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "none"
    mismatch_min: float | None = None
    mismatch_max: float | None = 3.0
    entropy_coef: float = 0.0
    max_completion: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in _WORDS.items():
            self._require(getattr(self, name) in allowed, name, f"use one of {', '.join(allowed)}")
        for name, optional in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and optional:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            self._require(number and math.isfinite(value), name, "it must be a finite number")
        whole = self.max_completion is None or isinstance(self.max_completion, int)
        self._require(whole, "max_completion", "it must be an integer")
        self._check_ranges()
        self._check_uses()

    def _check_ranges(self) -> None:
        self._require(self.beta >= 0, "beta", "it must not be negative")
        self._require(0 <= self.clip_low <= 1, "clip_low", "it must lie in [0, 1]")
        self._require(self.clip_high >= 0, "clip_high", "it must not be negative")
        if self.dual_clip is not None:
            lowest = 1 + self.clip_high
            self._require(self.dual_clip > lowest, "dual_clip", f"it must exceed {lowest}")
        for name in ("cispo_max", "sapo_temperature_positive", "sapo_temperature_negative"):
            self._require(getattr(self, name) > 0, name, "it must be positive")
        if self.mismatch_max is not None:
            self._require(self.mismatch_max > 0, "mismatch_max", "it must be positive")
        if self.mismatch_min is not None:
            highest = 1.0 if self.mismatch_max is None else min(1.0, self.mismatch_max)
            inside = 0 <= self.mismatch_min <= highest
            self._require(inside, "mismatch_min", "it must lie in [0, 1], below mismatch_max")
        if self.max_completion is not None:
            self._require(self.max_completion >= 1, "max_completion", "it must be 1 or more")
        elif self.reduction == "dr_grpo":
            problem = "reduction='dr_grpo' divides by it; pass the rollout's longest completion"
            self._require(False, "max_completion", problem)

    def _check_uses(self) -> None:
        """Refuse settings that would be ignored; a default cannot be told from one left out."""
        for name, policy in _POLICY_OF.items():
            problem = f"policy={self.policy!r} has no use for it; leave it out"
            if name == "clip_high" and self.policy == "cispo":
                problem += ", and cap the ratio itself with cispo_max (TRL: epsilon_high)"
            self._require(self.policy == policy or self._is_default(name), name, problem)
        for name in ("mismatch_min", "mismatch_max"):
            problem = "mismatch='none' has no use for it; leave it out"
            self._require(self.mismatch != "none" or self._is_default(name), name, problem)

    def _is_default(self, name: str) -> bool:
        return bool(getattr(self, name) == getattr(type(self), name))

    def _require(self, condition: bool, name: str, problem: str) -> None:
        if not condition:
            raise ValueError(f"LossOptions: {name}={getattr(self, name)!r}; {problem}")


# Setting -> the only policy that reads it.
_POLICY_OF = {
    "clip_low": "clip",
    "clip_high": "clip",
    "dual_clip": "clip",
    "cispo_max": "cispo",
    "sapo_temperature_positive": "sapo",
    "sapo_temperature_negative": "sapo",
}
_HINTS = get_type_hints(LossOptions)
_WORDS = {name: get_args(hint) for name, hint in _HINTS.items() if get_origin(hint) is Literal}
# Name of each number -> whether it may be None.
_NUMBERS = {name: type(None) in get_args(_HINTS[name]) for name in _HINTS if name not in _WORDS}
