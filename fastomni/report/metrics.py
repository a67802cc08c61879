"""Numbers about a step and about an evaluation, named as TRL names them.

A reward that could not be given is NaN and takes no part in any number; a number that is left with
no reward to be made of is no key at all, since NaN is no JSON and draws no curve.

Shapes: N prompts, G completions each, S = N * G.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from fastomni_kernels import GroupAdvantages, GroupLayout


def group_metrics(
    scores: Mapping[str, Tensor],
    weights: Sequence[float] | None,
    compared: GroupAdvantages,
    stopped: Sequence[bool],
    layout: GroupLayout,
) -> dict[str, float]:
    """Metrics of a batch of groups.

    Args:
        scores: reward name -> [N, G]; NaN where a reward could not be given.
        weights: one per reward, or None for 1 each; `reward` is the weighted sum of the rewards
            that were given, for completions that have one.
        compared: of these scores; which groups have no spread, and how many completions no reward.
        stopped: per sequence, whether it ended with a stop token.
        layout: lengths of the completions.

    Returns:
        Name -> number. Deviations (ddof=1) need two rewards, means one: what cannot be had is left
        out. `reward_std` is the mean over the groups that have a deviation.
    """
    lengths = layout.sequence_lengths
    factors = torch.tensor(weights or [1.0] * len(scores))
    table = torch.stack(list(scores.values()), dim=-1)  # [N, G, K]
    given = ~table.isnan()
    reward = (table.where(given, 0) @ factors).where(given.any(2), torch.nan)  # [N, G]
    deviations = torch.stack([_deviation(group) for group in reward])
    metrics = {"reward": reward.nanmean(), "reward_std": deviations.nanmean()}
    for name, values in scores.items():
        metrics[f"rewards/{name}/mean"] = values.nanmean()
        metrics[f"rewards/{name}/std"] = _deviation(values)
    found = {name: float(value) for name, value in metrics.items() if not value.isnan()}
    return found | {
        "frac_reward_zero_std": float(compared.no_spread.float().mean()),
        "rewards/missing": float(compared.missing.sum()),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/tokens": float(sum(lengths)),
        "completions/clipped_ratio": 1 - sum(stopped) / len(stopped),
    }


def _deviation(values: Tensor) -> Tensor:
    """Standard deviation (ddof=1) of what was given; NaN where that is fewer than two."""
    given = values[~values.isnan()]
    return given.std() if len(given) > 1 else given.new_tensor(torch.nan)


def loss_metrics(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """A batch's loss metrics from those of its micro-batches.

    Args:
        parts: per micro-batch name -> scalar, shares of the batch's as the losses of
            `fastomni_kernels` give them: they add up, but for names that end in /min and /max.
    """
    names = list(parts[0])
    scalars = [part[name].detach().float() for part in parts for name in names]
    table = torch.stack(scalars).tolist()  # one transfer for all
    return {
        name: _combined(name, table[column :: len(names)], sum) for column, name in enumerate(names)
    }


def update_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """A step's metrics from those of its updates: means, and the ends of /min and /max."""
    return {
        name: _combined(name, [update[name] for update in updates], fmean) for name in updates[0]
    }


def _combined(
    name: str, values: Sequence[float], otherwise: Callable[[Sequence[float]], float]
) -> float:
    end = name.rpartition("/")[2]
    return {"min": min, "max": max}.get(end, otherwise)(values)


def recall_scores(
    labels: Sequence[str], answers: Sequence[str | None]
) -> tuple[float, float, dict[str, float]]:
    """WAR, UAR and the recall of each class.

    WAR is the share of right answers, UAR the mean of the recalls over the classes that occur
    among the labels (the released evaluation's definitions); an answer outside the label set, or
    none, is wrong.

    Args:
        labels: the truth.
        answers: what the model said, None where it gave no well-formed answer.

    Returns:
        (WAR, UAR, class -> recall), all in 0..1.
    """
    if len(labels) != len(answers) or not labels:
        raise ValueError(f"recall_scores: {len(labels)} labels for {len(answers)} answers")
    recalls = {}
    for name in sorted(set(labels)):
        hits = [answer == name for label, answer in zip(labels, answers, strict=True)
                if label == name]  # fmt: skip
        recalls[name] = sum(hits) / len(hits)
    right = sum(label == answer for label, answer in zip(labels, answers, strict=True))
    return right / len(labels), sum(recalls.values()) / len(recalls), recalls
