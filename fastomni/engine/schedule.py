"""Learning rates over the steps of a stage."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, total_steps: int, schedule: str, warmup: float) -> float:
    """The share of the peak rate at optimiser step `step` (0-based).

    Args:
        step: steps already done.
        total_steps: steps of the whole stage.
        schedule: "constant", "linear" (to 0 after the last step) or "cosine" (likewise).
        warmup: share of the steps in which the rate rises linearly from 0, rounded up.

    Raises:
        ValueError: an unknown schedule.
    """
    warmup_steps = math.ceil(total_steps * warmup)
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    raise ValueError(f"unknown schedule {schedule!r}; choose constant, linear or cosine")
