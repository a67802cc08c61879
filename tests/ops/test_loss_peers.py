"""The policy loss against the trainers and kernels that others use, values and gradients.

What runs is their own code: TRL's `GRPOTrainer._compute_loss` on an object that has no model, the
lines of its rollout that make the mismatch's ratio, Liger's chunked loss and its Triton kernel.
They take padded rows and a mask; ours are the same numbers without the padding.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastomni_kernels import GroupLayout, LossOptions, grpo_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [5, 1, 7, 0, 4, 2]
WIDTH = 8
MAX_COMPLETION = 16
CLIP_LOW, CLIP_HIGH, CISPO_MAX = 0.2, 0.28, 1.25
SAPO_NEGATIVE = 1.125  # exact in fp32, in which TRL keeps it

# TRL's and Liger's loss_type -> ours.
LOSS_TYPES: dict[str, dict[str, Any]] = {
    "grpo": {"reduction": "grpo"},
    "bnpo": {"reduction": "bnpo"},
    "dr_grpo": {"reduction": "dr_grpo", "max_completion": MAX_COMPLETION},
    "dapo": {"reduction": "dapo"},
    "cispo": {"policy": "cispo", "reduction": "dapo", "cispo_max": CISPO_MAX},
    "sapo": {"policy": "sapo", "reduction": "grpo", "sapo_temperature_negative": SAPO_NEGATIVE},
}
MISMATCHES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


class Batch:
    """Random padded rows; every completion's padding is full of numbers that must not matter."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

        shape = (len(LENGTHS), WIDTH)
        lengths = torch.tensor(LENGTHS, device=DEVICE)
        self.mask = (torch.arange(WIDTH, device=DEVICE) < lengths[:, None]).to(torch.int64)
        self.layout = GroupLayout.build([2, 3], [LENGTHS[:3], LENGTHS[3:]], DEVICE)
        self.logprobs = 0.4 * normal(*shape) - 2
        self.old = self.logprobs + 0.3 * normal(*shape)
        self.reference = self.logprobs + 0.3 * normal(*shape)
        self.rollout = self.old + 0.2 * normal(*shape)
        self.rollout[0, 1] = self.rollout[2, 0] = math.nan
        self.entropy = normal(*shape).abs()
        self.advantages = normal(len(LENGTHS))
        self.advantages[-1] = 0

        self.others = {
            "reference_logprobs": self.reference,
            "old_logprobs": self.old,
            "rollout_logprobs": self.rollout,
        }

    def packed(self, padded: Tensor) -> Tensor:
        return self.layout.unpad(padded)


def options_of(loss_type: str, **changes: Any) -> LossOptions:
    settings = {**LOSS_TYPES[loss_type], **changes}
    clips = "policy" not in settings
    bounds = {"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH} if clips else {}
    return LossOptions(**{**bounds, **settings})


def ours(
    batch: Batch, options: LossOptions, **given: Tensor | None
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Loss, metrics, and gradients of padded log-probs and entropy."""
    logprobs, entropy = (x.clone().requires_grad_() for x in (batch.logprobs, batch.entropy))
    packed = {name: None if x is None else batch.packed(x) for name, x in given.items()}
    loss, metrics = grpo_loss(
        batch.packed(logprobs),
        batch.advantages,
        batch.layout,
        options,
        entropy=batch.packed(entropy),
        **packed,
    )
    loss.backward()
    assert logprobs.grad is not None
    grad_entropy = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
    return loss.detach(), metrics, logprobs.grad, grad_entropy


def trl_mismatch_ratio(batch: Batch, mode: str, lowest: float | None, highest: float) -> Tensor:
    """Run the lines of TRL's rollout that compare its log-probs with the engine's."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    (block,) = [
        node
        for node in ast.walk(ast.parse(textwrap.dedent(source)))
        if isinstance(node, ast.If)
        and any(
            isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "per_token_logps_diff"
            for line in node.body
        )
    ]
    names: dict[str, Any] = {
        "self": SimpleNamespace(
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=lowest,
            vllm_importance_sampling_clip_max=highest,
        ),
        "old_per_token_logps": batch.old,
        "sampling_per_token_logps": batch.rollout,
        "completion_mask": batch.mask,
        "tool_mask": None,
        "torch": torch,
        "math": math,
    }
    exec(compile(ast.Module(block.body, []), "grpo_trainer", "exec"), names)
    return names["vllm_importance_sampling_ratio"]


def trl(
    batch: Batch,
    loss_type: str,
    level: str = "token",
    beta: float = 0.0,
    delta: float | None = None,
    entropy_coef: float = 0.0,
    old: bool = True,
    mismatch_ratio: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """TRL's loss, its metrics, and gradients of padded log-probs and entropy."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    logprobs, entropy = (x.clone().requires_grad_() for x in (batch.logprobs, batch.entropy))
    metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
    accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=False,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropy, None),
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        _metrics=metrics,
        args=SimpleNamespace(
            delta=delta,
            use_bias_correction_kl=False,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=SAPO_NEGATIVE,
            steps_per_generation=1,
        ),
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=CLIP_LOW,
        epsilon_high=CISPO_MAX if loss_type == "cispo" else CLIP_HIGH,
        max_completion_length=MAX_COMPLETION,
        current_gradient_accumulation_steps=1,
        use_vllm=mismatch_ratio is not None,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
    )
    prompt = torch.ones(len(LENGTHS), 3, dtype=torch.int64, device=DEVICE)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": torch.zeros_like(batch.mask),
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old if old else None,
        "ref_per_token_logps": batch.reference,
        "importance_sampling_ratio": mismatch_ratio,
        "num_items_in_batch": batch.mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    assert logprobs.grad is not None
    grad_entropy = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
    named = {name: torch.tensor(values[0]) for name, values in metrics["train"].items()}
    return loss.detach(), named, logprobs.grad, grad_entropy


def assert_same(
    found: tuple[Tensor, dict[str, Tensor], Tensor, Tensor],
    expected: tuple[Tensor, dict[str, Tensor], Tensor, Tensor],
    tolerance: float = 1e-10,
) -> None:
    for i in (0, 2, 3):
        torch.testing.assert_close(found[i], expected[i], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_trl(loss_type: str, level: str) -> None:
    """Each loss type with what it can be combined with, with and without old log-probs."""
    pytest.importorskip("trl")
    batch = Batch(seed=3)
    dual_clip = 1.5 if loss_type in ("grpo", "bnpo", "dr_grpo", "dapo") else None
    for beta, delta, entropy_coef, old in (
        (0.0, None, 0.0, False),
        (0.0, None, 0.0, True),
        (0.04, None, 0.01, False),
        (0.04, dual_clip, 0.01, True),
    ):
        options = options_of(
            loss_type, ratio=level, beta=beta, dual_clip=delta, entropy_coef=entropy_coef
        )
        found = ours(
            batch,
            options,
            reference_logprobs=batch.reference,
            old_logprobs=batch.old if old else None,
        )
        expected = trl(batch, loss_type, level, beta, delta, entropy_coef, old)
        assert_same(found, expected)
        assert bool(found[3].any()) == bool(entropy_coef)

        metrics, named = found[1], expected[1]
        shared = {"entropy"} | ({"kl"} if beta and loss_type in ("dapo", "cispo") else set())
        if level == "token" and dual_clip:
            shared |= {f"clip_ratio/{which}_mean" for which in ("low", "high", "region")}
        for name in shared:
            assert metrics[name].item() == pytest.approx(named[name].item(), abs=1e-6), name
        if level == "token" and loss_type == "cispo":
            capped = metrics["clip_ratio/high_mean"].item()
            assert capped == pytest.approx(named["cispo_clip_ratio"].item())


@pytest.mark.parametrize("lowest", [None, 0.8])
@pytest.mark.parametrize("mode", MISMATCHES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_trl_mismatch(loss_type: str, mode: str, lowest: float | None) -> None:
    """All of TRL's corrections, on both levels of the policy's ratio."""
    pytest.importorskip("trl")
    batch = Batch(seed=7)
    ratio = trl_mismatch_ratio(batch, mode, lowest, 1.2)
    assert (ratio == 0).any() == mode.endswith("mask")
    for level in ("token", "sequence"):
        corrected = {"mismatch": mode, "mismatch_min": lowest, "mismatch_max": 1.2}
        options = options_of(loss_type, ratio=level, beta=0.04, **corrected)
        found = ours(batch, options, **batch.others)
        expected = trl(batch, loss_type, level, beta=0.04, mismatch_ratio=ratio)
        assert_same(found, expected)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_liger_chunked_loss(loss_type: str) -> None:
    """The function inside Liger's fused linear loss."""
    chunked = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    batch = Batch(seed=11)
    clips = loss_type in ("grpo", "bnpo", "dr_grpo", "dapo")
    mismatch_ratio = (batch.old - batch.rollout).nan_to_num().exp().clamp(max=1.2)
    for level in ("token", "sequence") if clips else ("token",):
        for delta in (None, 1.5) if clips else (None,):
            logprobs = batch.logprobs.clone().requires_grad_()
            loss, _ = chunked.LigerFusedLinearGRPOFunction.ppo_loss_fn(
                logprobs,
                batch.mask,
                batch.advantages,
                batch.mask,
                ref_per_token_logps=batch.reference,
                old_per_token_logps=batch.old,
                epsilon_low=CLIP_LOW,
                epsilon_high=CISPO_MAX if loss_type == "cispo" else CLIP_HIGH,
                beta=0.04,
                loss_type=loss_type,
                max_completion_length=MAX_COMPLETION,
                importance_sampling_level=level,
                vllm_is_ratio=mismatch_ratio,
                delta=delta,
                sapo_temperature_neg=SAPO_NEGATIVE,
            )
            loss.backward()
            assert logprobs.grad is not None
            corrected = {"mismatch": "token_truncate", "mismatch_max": 1.2, "beta": 0.04}
            options = options_of(loss_type, ratio=level, dual_clip=delta, **corrected)
            found = ours(batch, options, **batch.others)
            expected = (loss.detach(), {}, logprobs.grad, torch.zeros_like(batch.entropy))
            assert_same(found, expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_liger_triton_loss(loss_type: str, backend: str) -> None:
    """Liger's kernel starts from logits: so does the chain here."""
    peer = pytest.importorskip("liger_kernel.transformers.grpo_loss")
    batch = Batch(seed=13, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    vocabulary = 19
    start = torch.randn(len(LENGTHS), WIDTH + 1, vocabulary, generator=generator).to(DEVICE)
    ids = torch.randint(vocabulary, (len(LENGTHS), WIDTH), generator=generator).to(DEVICE)
    results = []
    for mine in (False, True):
        logits = start.clone().requires_grad_()
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        old, reference = (logprobs.detach() + x for x in (batch.old + 2, 0.3 * batch.reference))
        if mine:
            loss, _ = grpo_loss(
                batch.packed(logprobs),
                batch.advantages,
                batch.layout,
                options_of(loss_type, beta=0.04),
                reference_logprobs=batch.packed(reference),
                old_logprobs=batch.packed(old),
                backend=backend,
            )
        else:
            loss, _ = peer.triton_grpo_loss(
                logits,
                old,
                reference,
                ids,
                batch.advantages,
                batch.mask,
                temperature=1.0,
                beta=0.04,
                eps_low=CLIP_LOW,
                eps_high=CISPO_MAX if loss_type == "cispo" else CLIP_HIGH,
                inplace=False,
                loss_type=loss_type,
                max_completion_length=MAX_COMPLETION,
                sapo_temperature_neg=SAPO_NEGATIVE,
                reduce=True,
            )
        (grad,) = torch.autograd.grad(loss, logits)
        results.append((loss.detach(), grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
