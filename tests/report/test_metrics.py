"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from fastomni.report import group_metrics, loss_metrics, recall_scores, update_metrics
from fastomni_kernels import GroupAdvantages, GroupLayout, group_advantages

NAN = float("nan")


def compared(
    scores: dict[str, torch.Tensor], weights: list[float] | None = None
) -> GroupAdvantages:
    return group_advantages(torch.stack(list(scores.values()), dim=-1), weights=weights)


def test_group_metrics_of_two_groups() -> None:
    layout = GroupLayout.build([4, 7], [[1, 2, 3], [4, 4, 10]], torch.device("cpu"))
    scores = {
        "accuracy": torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]),
        "format": torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]),
    }
    stopped = [True, True, True, True, True, False]
    metrics = group_metrics(scores, [1.0, 2.0], compared(scores, [1.0, 2.0]), stopped, layout)
    assert metrics == pytest.approx(
        {
            "rewards/accuracy/mean": 4 / 6,
            "rewards/accuracy/std": (4 / 15) ** 0.5,  # four ones and two zeros, ddof=1
            "rewards/format/mean": 4 / 6,
            "rewards/format/std": (4 / 15) ** 0.5,
            "reward": 12 / 6,  # 1, 0, 2 and three times 3
            "reward_std": 0.5,  # of 1, 0, 2 it is 1; of equal ones 0
            "frac_reward_zero_std": 0.5,
            "rewards/missing": 0.0,
            "completions/mean_length": 4.0,
            "completions/min_length": 1.0,
            "completions/max_length": 10.0,
            "completions/tokens": 24.0,
            "completions/clipped_ratio": 1 / 6,
        }
    )


def test_rewards_weigh_1_each_by_default() -> None:
    layout = GroupLayout.build([4], [[1, 2]])
    scores = {"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([[0.5, 0.5]])}
    metrics = group_metrics(scores, None, compared(scores), [True, True], layout)
    assert metrics["reward"] == 1.0


def test_rewards_that_could_not_be_given_take_no_part() -> None:
    layout = GroupLayout.build([4, 7, 2], [[1, 2, 3], [4, 4, 10], [1, 1, 1]])
    scores = {
        "a": torch.tensor([[1.0, NAN, 0.0], [NAN, NAN, 3.0], [NAN, NAN, NAN]]),
        "b": torch.tensor([[0.0, 2.0, NAN], [NAN, NAN, NAN], [NAN, NAN, NAN]]),
    }
    metrics = group_metrics(scores, None, compared(scores), [True] * 9, layout)
    found = {name: value for name, value in metrics.items() if "reward" in name}
    assert found == pytest.approx(
        {
            "reward": 6 / 4,  # 1, 2, 0 and 3
            "reward_std": 1.0,  # of the first group's; the others have none
            "rewards/a/mean": 4 / 3,
            "rewards/a/std": (7 / 3) ** 0.5,
            "rewards/b/mean": 1.0,
            "rewards/b/std": 2**0.5,
            "frac_reward_zero_std": 2 / 3,
            "rewards/missing": 5.0,
        }
    )


def test_a_number_of_no_reward_is_left_out() -> None:
    layout = GroupLayout.build([4], [[1, 2]])
    scores = {"a": torch.tensor([[NAN, NAN]]), "b": torch.tensor([[NAN, 1.0]])}
    metrics = group_metrics(scores, None, compared(scores), [True, True], layout)
    found = {name: value for name, value in metrics.items() if name.startswith("reward")}
    assert found == {"reward": 1.0, "rewards/b/mean": 1.0, "rewards/missing": 1.0}


def test_loss_metrics_of_micro_batches_add_up_but_for_extremes() -> None:
    names = ("loss", "kl", "ratio/min", "ratio/max", "sampling/x/mean")
    parts = [
        {name: torch.tensor(value) for name, value in zip(names, values, strict=True)}
        for values in [(0.25, 0.1, 0.9, 1.5, 1.0), (0.5, 0.2, 0.7, 1.1, 2.0)]
    ]
    wanted = dict(zip(names, (0.75, 0.3, 0.7, 1.5, 3.0), strict=True))
    assert loss_metrics(parts) == pytest.approx(wanted)


def test_metrics_of_updates_are_means_but_for_extremes() -> None:
    updates = [
        {"loss": 1.0, "ratio/min": 1.0, "ratio/max": 1.0, "grad_norm": 3.0},
        {"loss": 2.0, "ratio/min": 0.5, "ratio/max": 1.2, "grad_norm": 5.0},
    ]
    wanted = {"loss": 1.5, "ratio/min": 0.5, "ratio/max": 1.2, "grad_norm": 4.0}
    assert update_metrics(updates) == wanted
    assert update_metrics(updates[:1]) == updates[0]


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
