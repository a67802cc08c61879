"""Numbers about a step and about an evaluation, named as TRL names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fastomni_kernels import GroupLayout


def group_metrics(
    scores: Mapping[str, Tensor], no_spread: Tensor, stopped: Sequence[bool], layout: GroupLayout
) -> dict[str, float]:
    """Metrics of a batch of groups.

    Args:
        scores: reward name -> [N, G]; "reward" is their weighted sum.
        no_spread: [N] bool, groups whose rewards are all equal.
        stopped: per sequence, whether it ended with a stop token.
        layout: lengths of the completions.
    """
    lengths = layout.sequence_lengths
    metrics = {"reward": float(scores["reward"].mean())}
    for name, values in scores.items():
        if name != "reward":
            metrics[f"rewards/{name}/mean"] = float(values.mean())
            metrics[f"rewards/{name}/std"] = float(values.std())
    return metrics | {
        "reward_std": float(scores["reward"].std(dim=1).mean()),
        "frac_reward_zero_std": float(no_spread.float().mean()),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/tokens": float(sum(lengths)),
        "completions/clipped_ratio": 1 - sum(stopped) / len(stopped),
    }


def loss_metrics(
    loss: Tensor, metrics: Mapping[str, Tensor], entropy: Tensor, gap: Tensor, num_tokens: int
) -> dict[str, float]:
    """A micro-batch's share of the step's loss metrics: summed over micro-batches they are whole.

    Args:
        loss: the micro-batch's share of the loss.
        metrics: shares of other metrics, as `grpo_loss` gives them.
        entropy: [M] of the micro-batch's tokens.
        gap: [M], |rollout log-prob - training log-prob|.
        num_tokens: completion tokens of the whole batch.
    """
    return {
        "loss": float(loss.detach()),
        **{name: float(value) for name, value in metrics.items()},
        "entropy": float(entropy.detach().sum()) / num_tokens,
        "rollout_logprob_gap": float(gap.sum()) / num_tokens,
    }


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
