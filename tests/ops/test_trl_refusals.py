"""What the drop-in for TRL's GRPOTrainer refuses, and that the message says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastomni_kernels.integrations import TRL_VERSIONS, FastomniGRPO, check_trl_version
from fastomni_kernels.scoring_head import check_head


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("loss_type", "luspo", "use one of grpo, bnpo, dr_grpo, dapo, cispo, sapo"),
        ("loss_type", "vespo", "use one of grpo"),
        ("importance_sampling_level", "word", "use 'token' or 'sequence'"),
        ("off_policy_mask_threshold", 0.5, "leave it out"),
        ("top_entropy_quantile", 0.2, "leave it at 1.0"),
        ("use_adaptive_entropy", True, "leave it out; entropy_coef gives a fixed bonus"),
    ],
)
def test_a_setting_is_refused_when_the_trainer_is_made(
    setting: str, value: object, remedy: str, trl_tools: SimpleNamespace
) -> None:
    with pytest.raises(ValueError) as caught:
        trl_tools.build(trl_tools.Trainer, trl_tools.tiny(), **{setting: value})
    start = f"FastomniGRPO: {setting}={value!r} is not supported; {remedy}"
    assert str(caught.value).startswith(start)
    assert str(caught.value).endswith("or use GRPOTrainer itself")


def test_settings_are_looked_at_again_for_every_loss(
    trl_batch: dict[str, Tensor], trl_trainers: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = trl_trainers[1]
    for place, name, value, message in (
        (ours.args, "delta", 1.1, r"delta=1\.1 is not above 1 \+ epsilon_high = 1\.2"),
        (ours, "epsilon_low", 1.5, r"LossOptions: clip_low=1\.5; it must lie in \[0, 1\]"),
        # TRL before 1.15 has this attribute and a loss of its own behind it.
        (ours, "use_liger_kernel", True, "leave it out, so that the loss comes from here"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value, raising=False)
            with pytest.raises(ValueError, match=message):
                ours._compute_loss(ours.model, trl_batch)


def test_an_advantage_per_token_is_refused(
    trl_batch: dict[str, Tensor], trl_trainers: tuple[Any, Any]
) -> None:
    trl_batch["advantages"] = trl_batch["advantages"][:, None].expand(-1, 7)
    with pytest.raises(ValueError, match=r"advantages have shape \[5, 7\]; give one for each comp"):
        trl_trainers[1]._compute_loss(trl_trainers[1].model, trl_batch)


class Wrapped(nn.Module):
    """What an adapter or a quantised head looks like."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.weight, self.bias = inner.weight, None


def biased(model: Any) -> None:
    model.lm_head = nn.Linear(32, 22)


def wrapped(model: Any) -> None:
    model.lm_head = Wrapped(model.lm_head)


def with_a_forward_of_its_own(model: Any) -> None:
    model.lm_head.forward = lambda hidden: hidden


def in_eight_bits(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)


def capped(model: Any) -> None:
    model.config.final_logit_softcapping = 30.0


def scaled(model: Any) -> None:
    model.config.logit_scale = 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (biased, "its language-model head has a bias"),
        (wrapped, "is Wrapped, not a plain torch.nn.Linear"),
        (with_a_forward_of_its_own, "is Linear, not a plain torch.nn.Linear"),
        (in_eight_bits, "is torch.int8; leave lm_head out of quantisation"),
        (capped, "final_logit_softcapping=30.0 changes its logits"),
        (scaled, "logit_scale=0.5 changes its logits"),
    ],
)
def test_a_head_that_is_no_plain_product_is_refused(
    change: Callable[[Any], None], message: str, trl_tools: SimpleNamespace
) -> None:
    model = trl_tools.tiny()
    model.config.logit_scale = 1.0  # which is none
    assert check_head(model, False) is model.lm_head
    change(model)
    with pytest.raises(ValueError) as caught:
        trl_tools.build(trl_tools.Trainer, model)
    assert message in str(caught.value)
    assert "or use TRL's own trainer" in str(caught.value) or "; use TRL's own" in str(caught.value)


def test_logits_changed_in_a_way_without_a_name_are_found_out(
    trl_batch: dict[str, Tensor], trl_trainers: tuple[Any, Any], trl_tools: SimpleNamespace
) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    class Scaled(Qwen2ForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * 0.5
            return outputs

    class Aside(Qwen2ForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            hidden = self.model(*args, **kwargs)[0]
            return SimpleNamespace(logits=hidden @ self.lm_head.weight.T)

    for kind, message in ((Scaled, "changes its logits after the head"), (Aside, "did not call")):
        model = kind(Qwen2Config(**trl_tools.sizes))
        with pytest.raises(ValueError, match=message):
            trl_trainers[1]._compute_loss(model, trl_batch)


def test_a_weight_that_is_not_whole_during_the_forward_is_refused(
    trl_batch: dict[str, Tensor],
    trl_trainers: tuple[Any, Any],
    trl_tools: SimpleNamespace,
    process_group: None,
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    ours = trl_trainers[1]
    model = trl_tools.tiny()
    shards = distribute_tensor(model.lm_head.weight.data, init_device_mesh("cpu", (1,)))
    model.lm_head.weight = nn.Parameter(shards)
    with pytest.raises(ValueError, match=r"is a DTensor, not a whole matrix; use ZeRO-1 or ZeRO-2"):
        ours._compute_loss(model, trl_batch)
    model = trl_tools.tiny()
    model.lm_head.weight.ds_id = 7  # how DeepSpeed marks what ZeRO-3 has taken apart
    with pytest.raises(ValueError, match="is a Parameter, sharded by ZeRO-3, not a whole matrix"):
        ours._compute_loss(model, trl_batch)


def test_hidden_states_of_a_part_of_the_batch_are_refused(
    trl_batch: dict[str, Tensor], trl_trainers: tuple[Any, Any], trl_tools: SimpleNamespace
) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    class Part(Qwen2ForCausalLM):
        """What nn.DataParallel makes of a model."""

        def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
            return super().forward(input_ids[:2], attention_mask[:2], **kwargs)

    model = Part(Qwen2Config(**trl_tools.sizes))
    with pytest.raises(ValueError, match=r"of shape \[2, 11, 32\], where \[B=5, T>7, H\]"):
        trl_trainers[1]._compute_loss(model, trl_batch)


@pytest.mark.parametrize("installed", ["0.24.0", "1.9.2", "1.17.0.dev0", "2.0.0"])
def test_another_release_of_trl_is_refused(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: installed)
    wanted = f"trl{','.join(TRL_VERSIONS)}"
    with pytest.raises(ImportError) as caught:
        type("Trainer", (FastomniGRPO,), {})()
    assert f"trl {installed} is installed, but this was tested with {wanted}" in str(caught.value)
    assert str(caught.value).endswith(f'; run: pip install "{wanted}"')


@pytest.mark.parametrize("installed", ["1.10.0", "1.14.2", "1.16.0"])
def test_a_release_that_was_tested_is_taken(
    installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: installed)
    check_trl_version()


def test_a_missing_trl_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ImportError, match=r'trl is not installed; run: pip install "trl>=1\.10,'):
        check_trl_version()


def test_the_extra_asks_for_the_releases_that_are_taken(repository: Path) -> None:
    text = (repository / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\ntrl = ["trl{",".join(TRL_VERSIONS)}"]' in text


def test_the_readme_names_the_releases_that_are_taken(repository: Path) -> None:
    text = (repository / "kernels" / "README.md").read_text(encoding="utf-8")
    section = text.split("## In TRL\n")[1].split("\n## ")[0]
    ((first, last),) = re.findall(r"each release\s+from 1\.(\d+) to 1\.(\d+)", section)
    assert TRL_VERSIONS == (f">=1.{first}", f"<1.{int(last) + 1}")
    (command,) = re.findall(r"-m pytest (tests/.*)", section)
    assert all((repository / file).is_file() for file in command.split())


def test_the_mixin_must_stand_before_the_trainer() -> None:
    GRPOTrainer = type("GRPOTrainer", (), {})
    with pytest.raises(TypeError, match=r"write: class Trainer\(FastomniGRPO, GRPOTrainer\)"):
        type("Backwards", (GRPOTrainer, FastomniGRPO), {})
    type("Trainer", (FastomniGRPO, GRPOTrainer), {})
