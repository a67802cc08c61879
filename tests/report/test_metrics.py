"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from fastomni.report import group_metrics, loss_metrics, recall_scores
from fastomni_kernels import GroupLayout


def test_group_metrics_of_two_groups() -> None:
    layout = GroupLayout.build([4, 7], [[1, 2, 3], [4, 4, 10]], torch.device("cpu"))
    scores = {
        "accuracy": torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]),
        "format": torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]),
        "reward": torch.tensor([[1.0, 0.0, 2.0], [2.0, 2.0, 2.0]]),
    }
    stopped = [True, True, True, True, True, False]
    metrics = group_metrics(scores, torch.tensor([False, True]), stopped, layout)
    assert metrics == pytest.approx(
        {
            "rewards/accuracy/mean": 4 / 6,
            "rewards/accuracy/std": (4 / 15) ** 0.5,  # four ones and two zeros, ddof=1
            "rewards/format/mean": 4 / 6,
            "rewards/format/std": (4 / 15) ** 0.5,
            "reward": 9 / 6,
            "reward_std": 0.5,  # of 1, 0, 2 it is 1; of equal ones 0
            "frac_reward_zero_std": 0.5,
            "completions/mean_length": 4.0,
            "completions/min_length": 1.0,
            "completions/max_length": 10.0,
            "completions/tokens": 24.0,
            "completions/clipped_ratio": 1 / 6,
        }
    )


def test_loss_metrics_are_shares_that_add_up() -> None:
    entropy, gap = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 0.3, 0.3])
    parts = [
        loss_metrics(torch.tensor(0.25), {"kl": torch.tensor(0.1)}, entropy[:1], gap[:1], 3),
        loss_metrics(torch.tensor(0.50), {"kl": torch.tensor(0.2)}, entropy[1:], gap[1:], 3),
    ]
    whole = {key: parts[0][key] + parts[1][key] for key in parts[0]}
    assert whole == pytest.approx(
        {"loss": 0.75, "kl": 0.3, "entropy": 3.0, "rollout_logprob_gap": 0.2}
    )


def test_recall_scores_count_what_is_outside_as_wrong() -> None:
    labels = ["sad", "sad", "sad", "sad", "happy", "angry"]
    answers = ["sad", "sad", "sad", None, "sad", "furious"]
    war, uar, recalls = recall_scores(labels, answers)
    assert war == pytest.approx(3 / 6)
    assert uar == pytest.approx((3 / 4 + 0 + 0) / 3)
    assert recalls == pytest.approx({"angry": 0.0, "happy": 0.0, "sad": 0.75})
    assert recall_scores(["a"], ["a"]) == (1.0, 1.0, {"a": 1.0})


@pytest.mark.parametrize(("labels", "answers"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_lists_that_do_not_match_are_refused(labels: list[str], answers: list[str | None]) -> None:
    with pytest.raises(ValueError, match="labels for"):
        recall_scores(labels, answers)
