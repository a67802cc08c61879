"""What is NaN, and what no number holds, in the policy loss: alike in both implementations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastomni_kernels import GroupLayout, LossOptions, grpo_loss
from fastomni_kernels.dispatch import triton_installed

# Triton's interpreter computes with numpy, which warns of what infinities do.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference"] + ["triton"] * triton_installed()
LENGTHS = [3, 0, 9, 2]
ADVANTAGES = [1.0, 1.0, -1.0, 0.5]
RATIO = "sampling/importance_sampling_ratio"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of tokens and of sequences: NaN must survive those that follow."""
    if triton_installed():
        from fastomni_kernels.triton_kernels import policy_loss as kernels

        monkeypatch.setattr(kernels, "BLOCK", 4)


def drifted(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Log-probs of the policy, the old policy and the rollout, all a little apart."""
    generator = torch.Generator().manual_seed(0)
    apart = 0.04 * torch.randn(3, sum(LENGTHS), generator=generator).to(DEVICE, dtype)
    names = ("logprobs", "old_logprobs", "rollout_logprobs")
    return dict(zip(names, apart - 2, strict=True))


def run(
    backend: str, options: LossOptions, logprobs: Tensor, **given: Tensor
) -> tuple[Tensor, Tensor, dict[str, float]]:
    layout = GroupLayout.build([1], [LENGTHS], DEVICE)
    leaf = logprobs.clone().requires_grad_()
    advantages = torch.tensor(ADVANTAGES, device=DEVICE, dtype=logprobs.dtype)
    loss, metrics = grpo_loss(leaf, advantages, layout, options, **given, backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad, {name: x.item() for name, x in metrics.items()}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("place", [0, 8])
@pytest.mark.parametrize("mismatch", ["none", "token_truncate"])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("policy", ["clip", "cispo", "sapo"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_comes_out(backend: str, policy: str, old: bool, mismatch: str, place: int) -> None:
    options: dict[str, Any] = {"policy": policy, "mismatch": mismatch}
    if policy == "clip":
        options["dual_clip"] = 1.5
    given = drifted()
    given["logprobs"][place] = math.nan
    for name, kept in (("old_logprobs", old), ("rollout_logprobs", mismatch != "none")):
        if not kept:
            del given[name]
    loss, grad, metrics = run(backend, LossOptions(**options), **given)
    assert loss.isnan()
    assert grad.isnan().nonzero().tolist() == [[place]]
    assert (grad != 0).all()
    unknown = {name for name, x in metrics.items() if math.isnan(x)}
    expected = {"policy_loss", "ratio/mean", "ratio/min", "ratio/max"}
    if mismatch != "none" and not old:  # the trainer's log-prob at rollout time is the NaN one
        expected |= {name for name in metrics if name.startswith(("sampling", "rollout"))}
    assert unknown == expected


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("mismatch", ["token_truncate", "token_mask", "sequence_mask"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rollout_without_a_logprob_is_no_difference(
    backend: str, mismatch: str, ratio: str
) -> None:
    options = LossOptions(mismatch=mismatch, ratio=ratio, mismatch_max=1.02)
    missing, same = drifted(torch.float64), drifted(torch.float64)
    places = torch.tensor([0, 5, 13], device=DEVICE)
    missing["rollout_logprobs"][places] = math.nan
    same["rollout_logprobs"][places] = same["old_logprobs"][places]
    found, wanted = run(backend, options, **missing), run(backend, options, **same)
    torch.testing.assert_close(found[:2], wanted[:2], rtol=0, atol=1e-12)
    assert found[2] == pytest.approx(wanted[2], abs=1e-12) and math.isfinite(sum(found[2].values()))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_a_sequence_ratio_reaches_its_tokens_alone(backend: str, ratio: str) -> None:
    given = drifted()
    given["old_logprobs"][4] = math.nan  # the third sequence's second token
    _, grad, metrics = run(backend, LossOptions(ratio=ratio), **given)
    reached = [4] if ratio == "token" else list(range(3, 12))
    assert grad.isnan().nonzero().flatten().tolist() == reached
    assert math.isnan(metrics["ratio/max"]) and math.isnan(metrics[f"{RATIO}/min"])


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize(
    "mismatch", ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
@pytest.mark.parametrize("drift", [200.0, math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_drift_beyond_all_numbers_is_truncated_or_masked(
    backend: str, drift: float, mismatch: str, ratio: str
) -> None:
    """exp(200) is infinite in fp32; masked, or times no gain, it must not be noticed."""
    given = drifted(torch.float64)
    given["rollout_logprobs"][5] = given["old_logprobs"][5] - drift
    options = LossOptions(mismatch=mismatch, ratio=ratio)
    wanted = run("reference", options, **given)
    found = run(backend, options, **{name: x.float() for name, x in given.items()})
    assert found[0].isfinite() and found[1].isfinite().all()
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=0, atol=1e-5)
    # A ratio is capped where the policy's are; the difference is told as it is.
    assert found[2][f"{RATIO}/max"] == pytest.approx(math.exp(60), rel=1e-5)
    assert found[2]["sampling/sampling_logp_difference/max"] == pytest.approx(drift, rel=1e-5)
    assert not any(map(math.isnan, found[2].values()))
    # What is left of the token's sequence.
    masked = {"token_mask": [5], "sequence_mask": list(range(3, 12))}.get(mismatch, [])
    if ratio == "token":
        assert (found[1] == 0).nonzero().flatten().tolist() == masked
