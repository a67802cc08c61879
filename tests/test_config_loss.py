"""A run's loss settings and those of the kernels are the same, though neither imports the other."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, get_type_hints

import pytest

from fastomni.config import ConfigError, GrpoConfig, LossConfig, OptimizerConfig, RolloutConfig
from fastomni.grpo import loss_options
from fastomni_kernels import LossOptions
from fastomni_kernels.advantages import AGGREGATIONS, BASELINES, SCALES

# Given elsewhere in the RLVR stage: its beta, and its rollout's longest completion.
ELSEWHERE = {"beta", "max_completion"}
# Setting -> the choice without which it is refused; clip_low and others belong to the default.
NEEDS = {
    "cispo_max": {"policy": "cispo"},
    "sapo_temperature_positive": {"policy": "sapo"},
    "sapo_temperature_negative": {"policy": "sapo"},
    "mismatch_min": {"mismatch": "token_mask"},
    "mismatch_max": {"mismatch": "token_mask"},
}
NUMBERS = (-1.0, -0.1, 0.0, 0.5, 1.0, 1.2, 1.21, 3.0, 100.0)


def accepted(cls: type, **settings: Any) -> bool:
    try:
        cls(**settings)
    except ValueError:  # ConfigError is one
        return False
    return True


def names_of(hint: str) -> list[str]:
    hints = get_type_hints(LossConfig)
    return [field for field, kind in hints.items() if hint in str(kind)]


def grpo(**settings: Any) -> GrpoConfig:
    return GrpoConfig(
        manifest="none.jsonl",
        epochs=1,
        prompts_per_step=2,
        micro_batch_tokens=1000,
        rollout=RolloutConfig(max_new_tokens=20),
        optimizer=OptimizerConfig(lr=1e-3),
        **settings,
    )


def test_fields_types_and_defaults_agree() -> None:
    ours, theirs = get_type_hints(LossConfig), get_type_hints(LossOptions)
    assert ours == {name: hint for name, hint in theirs.items() if name not in ELSEWHERE}
    default = LossOptions()
    assert dataclasses.asdict(LossConfig()) == {name: getattr(default, name) for name in ours}


@pytest.mark.parametrize("name", names_of("float"))
def test_ranges_agree(name: str) -> None:
    needs = NEEDS.get(name, {})
    optional = "None" in str(get_type_hints(LossConfig)[name])
    values = (*NUMBERS, None) if optional else NUMBERS
    verdicts = [accepted(LossConfig, **{name: value}, **needs) for value in values]
    assert verdicts == [accepted(LossOptions, **{name: value}, **needs) for value in values]
    assert any(verdicts)


@pytest.mark.parametrize(
    ("pair", "needs"),
    [
        (("clip_high", "dual_clip"), {}),
        (("mismatch_min", "mismatch_max"), {"mismatch": "sequence_truncate"}),
    ],
)
def test_ranges_that_depend_on_each_other_agree(
    pair: tuple[str, str], needs: dict[str, str]
) -> None:
    seen = set()
    for values in itertools.product(NUMBERS, (*NUMBERS, None)):
        settings = {**dict(zip(pair, values, strict=True)), **needs}
        verdict = accepted(LossConfig, **settings)
        assert verdict == accepted(LossOptions, **settings), settings
        seen.add(verdict)
    assert seen == {True, False}


SETTINGS: dict[str, float | None] = {
    "clip_low": 0.1,
    "clip_high": 0.28,
    "dual_clip": 3.0,
    "cispo_max": 4.0,
    "sapo_temperature_positive": 1.5,
    "sapo_temperature_negative": 1.5,
    "mismatch_min": 0.5,
    "mismatch_max": None,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_without_use_is_refused_by_both(name: str) -> None:
    for policy, mismatch in itertools.product(("clip", "cispo", "sapo"), ("none", "token_mask")):
        choices = {"policy": policy, "mismatch": mismatch}
        needs = NEEDS.get(name, {"policy": "clip"})
        used = needs.items() <= choices.items()
        assert accepted(LossOptions, **{name: SETTINGS[name]}, **choices) == used, choices
        assert accepted(LossConfig, **{name: SETTINGS[name]}, **choices) == used, choices
        default = getattr(LossOptions, name)
        assert LossOptions(**{name: default}, **choices) == LossOptions(**choices)
        assert LossConfig(**{name: default}, **choices) == LossConfig(**choices)


def test_the_refusal_says_which_choice_has_no_use_for_the_setting() -> None:
    for settings, message in (
        (
            {"policy": "sapo", "clip_low": 0.1},
            "LossOptions: clip_low=0.1; policy='sapo' has no use for it; leave it out",
        ),
        (
            {"policy": "cispo", "clip_high": 5.0},
            "LossOptions: clip_high=5.0; policy='cispo' has no use for it; leave it out, and cap "
            "the ratio itself with cispo_max (TRL: epsilon_high)",
        ),
        (
            {"mismatch_max": 2.0},
            "LossOptions: mismatch_max=2.0; mismatch='none' has no use for it; leave it out",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            LossOptions(**settings)
        assert str(caught.value) == message


@pytest.mark.parametrize("longest", [2.5, 2.0, True, 0])
def test_the_longest_completion_is_a_whole_number(longest: Any) -> None:
    with pytest.raises(ValueError, match=f"^LossOptions: max_completion={longest}; it must be "):
        LossOptions(max_completion=longest)
    assert LossOptions(max_completion=2).max_completion == 2


def test_words_for_advantages_are_those_of_the_kernel() -> None:
    for key, words in (
        ("advantage_scale", SCALES),
        ("advantage_baseline", BASELINES),
        ("reward_aggregation", AGGREGATIONS),
    ):
        assert get_type_hints(GrpoConfig)[key].__args__ == words


@pytest.mark.parametrize("key", ["advantage_scale", "advantage_baseline"])
def test_normalising_each_reward_has_its_own_baseline_and_scale(key: str) -> None:
    grpo(reward_aggregation="normalize_then_sum")
    value = {"advantage_scale": "batch", "advantage_baseline": "leave_one_out"}[key]
    grpo(**{key: value})
    with pytest.raises(ConfigError, match=f"{key}={value} cannot be joined with reward_agg"):
        grpo(reward_aggregation="normalize_then_sum", **{key: value})


def test_options_of_the_kernel_come_from_the_whole_stage() -> None:
    loss = LossConfig(reduction="dr_grpo", clip_high=0.28, mismatch="token_mask", mismatch_min=0.5)
    options = loss_options(grpo(loss=loss, beta=0.3))
    assert options == LossOptions(
        reduction="dr_grpo",
        clip_high=0.28,
        mismatch="token_mask",
        mismatch_min=0.5,
        beta=0.3,
        max_completion=20,
    )
