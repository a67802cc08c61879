"""The drop-in for TRL's GRPOTrainer against TRL's own trainer: loss, every gradient, metrics.

Both trainers hold equal models. A test sets the same attributes on both and gives both the same
padded micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastomni_kernels.trl_settings import LOSS_TYPES

LEVELS = ("token", "sequence")


def assert_close(ours: Tensor, theirs: Tensor, name: str, bound: float = 1e-5) -> None:
    """Within `bound` of the largest element."""
    error = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-12)
    assert error <= bound, f"{name}: {error:.1e}"


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    # The loss may cancel to nearly nothing; what it is made of is of the order of 1.
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-5, atol=1e-6)
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    for name, gradient in theirs["gradients"].items():
        assert_close(ours["gradients"][name], gradient, name)
    for mode in ("train", "eval"):
        assert ours["metrics"][mode].keys() == theirs["metrics"][mode].keys()
        for name, values in theirs["metrics"][mode].items():
            expected = pytest.approx(values, rel=1e-5, abs=1e-6, nan_ok=True)
            assert ours["metrics"][mode][name] == expected, name


def without(batch: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: x for name, x in batch.items() if name not in names}


@pytest.fixture
def compare(
    trl_trainers: tuple[Any, Any], trl_step: Callable, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., dict[str, Any]]]:
    """A function (batch, mode=, **settings) that compares one step; returns what TRL gave."""

    def run(batch: dict[str, Tensor], mode: str = "train", **settings: Any) -> dict[str, Any]:
        for trainer in trl_trainers:
            for name, value in settings.items():
                places = [place for place in (trainer, trainer.args) if hasattr(place, name)]
                assert places, name
                for place in places:
                    monkeypatch.setattr(place, name, value)
            trainer.model.train(mode == "train")
        theirs, ours = (trl_step(trainer, batch) for trainer in trl_trainers)
        assert any(gradient.abs().max() > 1e-4 for gradient in theirs["gradients"].values())
        assert_same(ours, theirs)
        return theirs

    yield run
    for trainer in trl_trainers:
        trainer.model.train()


BONUS = dict(entropy_coef=0.1, _entropy_bonus_enabled=True)
PARTS = dict(current_gradient_accumulation_steps=3, steps_per_generation=6, **BONUS)
VARIANTS: dict[str, dict[str, Any]] = {
    "clipped": dict(epsilon_low=0.15, epsilon_high=0.3),
    "dual clip": dict(delta=1.5),
    "kl": dict(beta=0.3, use_bias_correction_kl=False),
    "corrected kl": dict(beta=0.3, use_bias_correction_kl=True),
    "first update": dict(beta=0.3, use_bias_correction_kl=True),
    "entropy bonus": BONUS,
    "accumulation": dict(beta=0.3, **PARTS),
    "evaluation": dict(mode="eval", **PARTS),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_step_is_trls(
    loss_type: str, level: str, variant: str, trl_batch: dict[str, Tensor], compare: Callable
) -> None:
    if variant == "first update":
        del trl_batch["old_per_token_logps"]
    wanted = dict(loss_type=loss_type, importance_sampling_level=level)
    given = compare(trl_batch, **wanted, **VARIANTS[variant])
    if variant == "clipped" and LOSS_TYPES[loss_type][0] == "clip":
        shares = given["metrics"]["train"]
        assert shares["clip_ratio/low_mean"][0] > 0
        assert shares["clip_ratio/high_mean"][0] > 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_a_tool_wrote_does_not_count(
    loss_type: str, level: str, trl_batch: dict[str, Tensor], compare: Callable
) -> None:
    trl_batch["tool_mask"] = torch.ones_like(trl_batch["completion_mask"])
    trl_batch["tool_mask"][0, 2:5] = 0
    trl_batch["tool_mask"][3] = 0
    compare(trl_batch, loss_type=loss_type, importance_sampling_level=level, beta=0.2, **BONUS)


def sampling_ratio(batch: dict[str, Tensor], mode: str, low: float | None, high: float) -> Tensor:
    """TRL's importance_sampling_ratio, which it computes when it generates."""
    difference = batch["old_per_token_logps"] - batch["sampling_per_token_logps"]
    difference = (difference * batch["completion_mask"]).nan_to_num(nan=0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(1, keepdim=True)
    ratio = difference.exp()
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < (low or 0)) | (ratio > high), 0)


@pytest.mark.parametrize("low", [None, 0.7])
@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_rollout_engines_mismatch_is_corrected_as_in_trl(
    loss_type: str, mode: str, low: float | None, trl_batch: dict[str, Tensor], compare: Callable
) -> None:
    ratio = sampling_ratio(trl_batch, mode, low, 1.4)
    assert (ratio != sampling_ratio(trl_batch, mode, None, 1e9)).any()
    compare(
        {**trl_batch, "importance_sampling_ratio": ratio},
        loss_type=loss_type,
        beta=0.2,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=1.4,
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_micro_batch_without_tokens_stays_in_the_graph(
    loss_type: str,
    trl_batch: dict[str, Tensor],
    trl_trainers: tuple[Any, Any],
    trl_step: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = trl_trainers[1]
    for name, value in dict(loss_type=loss_type, beta=0.2, _entropy_bonus_enabled=True).items():
        monkeypatch.setattr(ours, name, value)
    trl_batch["tool_mask"] = torch.zeros_like(trl_batch["completion_mask"])
    found = trl_step(ours, trl_batch)
    assert found["loss"] == 0
    for name, parameter in ours.model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert found["metrics"]["train"]["entropy"] == [0]


@pytest.mark.parametrize("level", LEVELS)
def test_metrics_are_those_of_all_processes(
    level: str,
    trl_batch: dict[str, Tensor],
    trl_trainers: tuple[Any, Any],
    trl_step: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs, ours = trl_trainers
    for trainer in trl_trainers:
        for name, value in dict(
            loss_type="grpo", importance_sampling_level=level, beta=0.2
        ).items():
            monkeypatch.setattr(trainer, name, value)
    whole = without(trl_batch, "num_items_in_batch")
    parts = [{name: x[rows] for name, x in whole.items()} for rows in (slice(2), slice(2, 5))]
    rows: list[Tensor] = []
    with monkeypatch.context() as patch:
        # The second of two processes sees what both send.
        patch.setattr(ours.accelerator, "gather", lambda row: rows.append(row) or torch.cat(rows))
        found = [trl_step(ours, part)["metrics"]["train"] for part in parts][1]
    expected = trl_step(theirs, whole)["metrics"]["train"]
    assert expected["clip_ratio/low_min"] != expected["clip_ratio/high_max"]
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}


@pytest.mark.parametrize("batch_size", [None, 2])
def test_padded_logprobs_and_entropies_are_trls(
    batch_size: int | None,
    trl_batch: dict[str, Tensor],
    trl_trainers: tuple[Any, Any],
    trl_logprobs: Callable,
) -> None:
    options = dict(batch_size=batch_size, compute_entropy=True)
    theirs, ours = (trl_logprobs(trainer, trl_batch, **options) for trainer in trl_trainers)
    mask = trl_batch["completion_mask"]
    assert ours[2] is None
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        assert mine.shape == mask.shape
        assert not mine[mask == 0].any()
        assert_close(mine, other * mask, "values")  # TRL before 1.15 scores padding too
    assert trl_logprobs(trl_trainers[1], trl_batch, batch_size=2)[1] is None


def test_logits_are_never_made_and_the_head_comes_back(
    trl_batch: dict[str, Tensor], trl_trainers: tuple[Any, Any], trl_step: Callable
) -> None:
    ours = trl_trainers[1]
    head = ours.model.get_output_embeddings()
    made: list[tuple[int, ...]] = []
    hook = head.register_forward_hook(lambda module, args, output: made.append(output.shape))
    trl_step(ours, trl_batch)
    hook.remove()
    assert made == [(2, int(trl_batch["completion_mask"].sum()))]
    ids = trl_batch["prompt_ids"]
    assert ours.model(input_ids=ids).logits.shape == (*ids.shape, head.out_features)
    with pytest.raises(IndexError):  # in the middle of the forward
        trl_step(ours, {**trl_batch, "completion_ids": trl_batch["completion_ids"] + 1000})
    assert "forward" not in vars(head)


def test_a_head_cast_to_fp32_keeps_the_forward_that_trl_gave_it(
    trl_batch: dict[str, Tensor], trl_tools: SimpleNamespace, trl_step: Callable
) -> None:
    theirs, ours = trl_tools.pair(trl_tools.tiny().bfloat16(), cast_lm_head_to_fp32=True)
    forward = ours.model.lm_head.forward
    steps = (
        trl_step(trainer, without(trl_batch, "old_per_token_logps")) for trainer in (theirs, ours)
    )
    expected, found = steps
    assert_close(found["loss"], expected["loss"], "loss", 1e-4)
    assert ours.model.lm_head.forward is forward


def test_autocast_reaches_the_head(
    trl_batch: dict[str, Tensor],
    trl_tools: SimpleNamespace,
    trl_step: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fastomni_kernels import scoring_head

    dtypes = []

    def recorded(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        dtypes.append((hidden.dtype, weight.dtype))
        return linear_logprobs(hidden, weight, *rest)

    linear_logprobs = scoring_head.linear_logprobs
    monkeypatch.setattr(scoring_head, "linear_logprobs", recorded)
    theirs, ours = trl_tools.pair(trl_tools.tiny(), bf16=True)
    given = without(trl_batch, "old_per_token_logps")
    expected, found = (trl_step(trainer, given)["gradients"] for trainer in (theirs, ours))
    assert dtypes == [(torch.bfloat16, torch.bfloat16)]
    name = "lm_head.weight"
    assert_close(found[name], expected[name], name, 2e-2)


def test_through_ddp_no_parameter_counts_as_unused(
    trl_batch: dict[str, Tensor],
    trl_trainers: tuple[Any, Any],
    trl_step: Callable,
    process_group: None,
) -> None:
    theirs, ours = trl_trainers
    wrapped = nn.parallel.DistributedDataParallel(ours.model, find_unused_parameters=True)
    assert_same(trl_step(ours, trl_batch, wrapped), trl_step(theirs, trl_batch))


def test_the_routers_loss_is_trls(
    trl_batch: dict[str, Tensor], trl_tools: SimpleNamespace, trl_step: Callable
) -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    experts = dict(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        decoder_sparse_step=1,
        router_aux_loss_coef=0.3,
    )
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**trl_tools.sizes, **experts))
    # Older releases take the coefficient from their own configuration.
    theirs, ours = trl_tools.pair(model, router_aux_loss_coef=0.3)
    given = without(trl_batch, "old_per_token_logps")
    expected = trl_step(theirs, given)
    assert expected["metrics"]["train"]["aux_loss"][0] > 0
    assert_same(trl_step(ours, given), expected)


def test_images_go_to_the_model(trl_tools: SimpleNamespace, trl_trainers: tuple[Any, Any]) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from trl.trainer import utils

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = Qwen2VLConfig(
        text_config={**trl_tools.sizes, "rope_parameters": rope},
        vision_config=dict(depth=1, embed_dim=16, num_heads=2, hidden_size=32, mlp_ratio=2),
        image_token_id=2,
        video_token_id=3,
        vision_start_token_id=4,
        vision_end_token_id=5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    if hasattr(utils, "add_fused_lm_head"):  # since 1.15
        utils.add_fused_lm_head(model, 0.8, outputs=("log_probs", "entropy"))
    ids = torch.randint(6, trl_tools.sizes["vocab_size"], (2, 10))
    ids[:, 1:5] = torch.tensor([4, 2, 2, 5])  # two image tokens each
    images = torch.randn(2 * 8, 3 * 2 * 14 * 14)

    def logprobs(trainer: Any, pixels: Tensor) -> Tensor:
        return trainer._get_per_token_logps_and_entropies(
            model,
            ids,
            torch.ones_like(ids),
            4,
            batch_size=1,
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, 2, 4], [1, 2, 4]]),
            mm_token_type_ids=(ids == 2).long(),
            num_images=[1, 1],
        )[0]

    with torch.no_grad():
        theirs, ours = (logprobs(trainer, images) for trainer in trl_trainers)
        assert_close(ours, theirs, "log-probs")
        assert not torch.allclose(logprobs(trl_trainers[1], -images), theirs)
