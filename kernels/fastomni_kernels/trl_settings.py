"""What of TRL's GRPOTrainer is supported: its releases, and its settings in `LossOptions`' words.

Settings are read for every loss, because callbacks may change them in the middle of a training.
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

from fastomni_kernels.checks import require
from fastomni_kernels.options import LossOptions

# Minor releases whose GRPOTrainer defines loss, metrics and these two methods alike.
TRL_VERSIONS = (">=1.10", "<1.17")

# TRL's loss_type -> our policy and reduction.
LOSS_TYPES = {
    "grpo": ("clip", "grpo"),
    "bnpo": ("clip", "bnpo"),
    "dr_grpo": ("clip", "dr_grpo"),
    "dapo": ("clip", "dapo"),
    "cispo": ("cispo", "dapo"),
    "sapo": ("sapo", "grpo"),
}


def check_trl_version() -> None:
    """Refuse a TRL that this module was not tested with.

    Raises:
        ImportError: TRL is missing or outside `TRL_VERSIONS`; the message has the command.
    """
    wanted = f"trl{','.join(TRL_VERSIONS)}"
    command = f'run: pip install "{wanted}"'
    try:
        installed = metadata.version("trl")
    except metadata.PackageNotFoundError:
        raise ImportError(f"FastomniGRPO: trl is not installed; {command}", name="trl") from None
    lowest, beyond = (_numbers(bound) for bound in TRL_VERSIONS)
    if not lowest <= _numbers(installed) < beyond:
        raise ImportError(
            f"FastomniGRPO: trl {installed} is installed, but this was tested with {wanted}, and "
            f"other releases may define what it replaces differently; {command}",
            name="trl",
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def loss_options(trainer: Any) -> LossOptions:
    """Return the trainer's settings in our words, but for a KL corrected by the ratio.

    Args:
        trainer: a GRPOTrainer; what it keeps itself is read there and not in its `args`.

    Raises:
        ValueError: a setting that has no counterpart here, by name and with what to do.
    """
    _refuse(trainer)
    policy, reduction = LOSS_TYPES[trainer.loss_type]
    given: dict[str, Any] = {
        "policy": policy,
        "reduction": reduction,
        "ratio": trainer.importance_sampling_level,
        # A KL that is multiplied by the ratio is no part of LossOptions: the trainer adds it.
        "beta": 0.0 if trainer.args.use_bias_correction_kl else trainer.beta,
        "max_completion": trainer.max_completion_length,
    }
    if policy == "clip":
        given |= {"clip_low": trainer.epsilon_low, "clip_high": trainer.epsilon_high}
        given["dual_clip"] = trainer.args.delta
    elif policy == "cispo":
        given["cispo_max"] = trainer.epsilon_high
    else:
        given["sapo_temperature_positive"] = trainer.args.sapo_temperature_pos
        given["sapo_temperature_negative"] = trainer.args.sapo_temperature_neg
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        given["mismatch"] = trainer.vllm_importance_sampling_mode
        given["mismatch_min"] = trainer.vllm_importance_sampling_clip_min
        given["mismatch_max"] = trainer.vllm_importance_sampling_clip_max
    try:
        return LossOptions(**given)
    except ValueError as error:
        raise ValueError(
            f"FastomniGRPO: GRPOConfig's values make no loss here: {error} (its docstring has "
            "GRPOConfig's name of each setting)"
        ) from None


def _refuse(trainer: Any) -> None:
    args = trainer.args
    clips = LOSS_TYPES.get(trainer.loss_type, ("", ""))[0] == "clip"
    for name, value, fine, remedy in (
        ("loss_type", trainer.loss_type, LOSS_TYPES, f"use one of {', '.join(LOSS_TYPES)}"),
        (
            "importance_sampling_level",
            trainer.importance_sampling_level,
            ("token", "sequence"),
            "use 'token' or 'sequence'",
        ),
        ("off_policy_mask_threshold", args.off_policy_mask_threshold, (None,), "leave it out"),
        ("top_entropy_quantile", args.top_entropy_quantile, (1,), "leave it at 1.0"),
        (
            "use_adaptive_entropy",
            args.use_adaptive_entropy,
            (False,),
            "leave it out; entropy_coef gives a fixed bonus",
        ),
        # From 1.15 on TRL has no loss of Liger's, and no such attribute.
        (
            "use_liger_kernel",
            getattr(trainer, "use_liger_kernel", False),
            (False,),
            "leave it out, so that the loss comes from here",
        ),
    ):
        require(
            value in fine,
            f"FastomniGRPO: {name}={value!r} is not supported; {remedy}, or use GRPOTrainer itself",
        )
    highest = 1 + trainer.epsilon_high
    require(
        not clips or args.delta is None or args.delta > highest,
        f"FastomniGRPO: delta={args.delta} is not above 1 + epsilon_high = {highest:g}, where "
        "it would replace the upper clip; raise it, or leave it out",
    )
