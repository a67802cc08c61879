"""The doctor: what it names, its self-test's verdicts, and that it survives a broken machine."""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import fastomni_kernels
from fastomni import doctor, inference_settings, requirements, self_test
from fastomni.extras import MODULES
from fastomni.model import elementwise
from fastomni_kernels import varlen_backends

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

CPU = torch.device("cpu")
EDGE = "\u2502"  # between a table's columns
FUNCTIONS = {name for name in fastomni_kernels.__all__ if name.islower()}


def test_everything_is_printed_in_tables_and_the_status_is_0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    for title in ("Machine", "Packages", "What runs here", "Self-test"):
        assert f"\n{title}" in f"\n{printed}"
    assert "FAIL" not in printed and "Traceback" not in printed
    assert max(map(len, printed.splitlines())) <= doctor.NARROWEST
    rows = [re.split(rf"\s*{EDGE}\s*", line)[1:-1] for line in printed.splitlines() if EDGE in line]
    assert ["torch", torch.__version__, ">=2.11"] in [row[:3] for row in rows]
    assert ["flash-attn [flash]", ">=2.7"] in [[row[0], row[2]] for row in rows if len(row) > 2]


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True and report["error"] == ""
    assert report["machine"]["torch"].startswith(torch.__version__)
    assert {x["name"] for x in report["packages"]} >= {"torch", "triton", "liger-kernel"}
    (row,) = (x for x in report["self_test"] if x["name"] == "linear_grpo_loss")
    assert row["ok"] is True
    assert 0 < row["forward"] < row["bound"] and 0 < row["backward"] < row["bound"]


def test_every_public_function_is_explained_and_tried() -> None:
    explained = {choice.what for choice in doctor.choices(CPU)}
    tried = {outcome.name for outcome in self_test.run_self_test(CPU)}
    for names in (explained, tried):
        assert names >= FUNCTIONS | set(elementwise.OPERATIONS)
    assert {"clips", "engine"} <= explained
    assert {"decode a clip (.mp4)", "decode a clip (.webm)"} <= tried


def test_on_a_gpu_kernels_run_and_the_environment_can_forbid_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("FASTOMNI_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(varlen_backends, "imported", lambda version: (None, "is not installed"))
    monkeypatch.setattr(elementwise, "_liger", lambda function: (object(), ""))
    cuda = torch.device("cuda")
    found = {choice.what: (choice.runs_as, choice.why) for choice in doctor.choices(cuda)}
    for name in doctor.WITH_KERNEL:
        assert found[name] == ("triton", "the tensors are on cuda")
    assert found["kl_penalty"] == ("reference", "it has no Triton kernel")
    assert found["flash_varlen"][0] == "torch"
    assert found["rms_norm"] == ("liger", "the tensors are on a GPU")
    monkeypatch.setenv("FASTOMNI_KERNELS", "reference")
    for choice in doctor.choices(cuda):
        if choice.what in {*doctor.WITH_KERNEL, "flash_varlen", *elementwise.OPERATIONS}:
            assert choice.runs_as in ("reference", "torch")
            assert choice.why == "asked for by FASTOMNI_KERNELS=reference"


def test_functions_have_kernels_where_the_doctor_says_so() -> None:
    folder = Path(fastomni_kernels.__file__).parent
    sources = "\n".join(path.read_text() for path in folder.glob("*.py"))
    for name in doctor.WITH_KERNEL:
        used = "gather_logprobs" if name == "linear_grpo_loss" else name
        own = (folder / f"{name}.py").read_text() if (folder / f"{name}.py").exists() else ""
        by_name = f'_NAME = "{name}"' in own and "dispatch.choose(_NAME, backend" in own
        assert by_name or f'dispatch.choose("{used}", backend' in sources, name
    for name in doctor.PLAIN:
        assert f'dispatch.choose("{name}"' not in sources, name


# The self-test's verdicts.


def outcome(name: str) -> self_test.Outcome:
    (found,) = (x for x in self_test.run_self_test(CPU) if x.name == name)
    return found


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_value_fails(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastomni_kernels.gather_logprobs

    def wrong(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropy = right(*arguments)
        return logprobs * factor, entropy

    monkeypatch.setattr(fastomni_kernels, "gather_logprobs", wrong)
    found = outcome("gather_logprobs")
    assert not found.ok and found.forward is not None and not found.forward <= found.bound
    assert outcome("linear_logprobs").ok


@pytest.mark.parametrize("name", ["prefix_attention", "grpo_loss", "linear_grpo_loss"])
def test_a_wrong_gradient_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 1.001

    right = getattr(fastomni_kernels, name)
    monkeypatch.setattr(
        fastomni_kernels, name, lambda x, *rest, **named: right(Wrong.apply(x), *rest, **named)
    )
    found = outcome(name)
    assert not found.ok
    assert found.forward is not None and found.backward is not None and found.bound is not None
    assert found.forward <= found.bound < found.backward


def test_what_raises_is_told_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(fastomni_kernels, "group_advantages", broken)
    monkeypatch.setattr(self_test, "write_clip", broken)
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"group_advantages(\s+{EDGE}){{4}} FAIL", printed)
    assert "group_advantages: RuntimeError: no kernel image is available" in printed
    assert "Failed: group_advantages, decode a clip (.mp4), decode a clip (.webm)." in printed
    assert doctor.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["self_test"][0]["detail"].startswith("Traceback")


def test_another_picture_than_the_one_written_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    read = self_test.read_frames
    monkeypatch.setattr(
        self_test, "read_frames", lambda *x: (read(*x)[0][:, :, :, ::-1], read(*x)[1])
    )
    found = outcome("decode a clip (.mp4)")
    assert not found.ok and found.forward is not None and found.forward > self_test.PICTURE_BOUND


def test_an_unknown_backend_in_the_environment_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTOMNI_KERNELS", "fast")
    assert doctor.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (row,) = (x for x in report["choices"] if x["what"] == "grpo_loss")
    assert row["runs_as"] == "refused" and "FASTOMNI_KERNELS=fast is unknown" in row["why"]
    assert report["machine"]["FASTOMNI_KERNELS"] == "fast"


def test_a_machine_that_cannot_be_examined_still_gets_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> None:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(inference_settings, "choose_device", broken)
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert "ImportError: libcudart.so.13" in printed and "transformers" in printed
    assert "Failed: the machine's examination." in printed


# Packages.


def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def not_installed(name: str) -> list[str]:
    raise metadata.PackageNotFoundError(name)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_a_checkout_and_an_installation_name_the_same_requirements(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements.metadata, "requires", not_installed)
    from_checkout = requirements.packages()
    written = project(repository)
    # Metadata's own way of writing: no space before the version, double quotes, extras as markers.
    lines = [text.replace("'", '"') for text in written["dependencies"]]
    for extra, texts in written["optional-dependencies"].items():
        for text in texts:
            name, _, marker = text.replace("'", '"').partition("; ")
            parts = [f"({marker})"] if marker else []
            lines.append(f"{name}; " + " and ".join([*parts, f'extra == "{extra}"']))
    monkeypatch.setattr(requirements.metadata, "requires", lambda name: lines)
    assert requirements.packages() == from_checkout
    assert len(from_checkout) == len(lines)


def test_every_requirement_has_a_purpose_and_no_purpose_is_left_over(repository: Path) -> None:
    written = project(repository)
    names = {re.split(r"[<>=; ]", text)[0] for text in written["dependencies"]}
    assert names == set(requirements.PURPOSES)
    assert set(written["optional-dependencies"]) == set(requirements.EXTRA_PURPOSES)
    assert all(package.used_for for package in requirements.packages())


@pytest.mark.parametrize("extra", sorted(MODULES))
def test_an_extra_is_called_unused_exactly_where_no_code_names_it(
    extra: str, repository: Path
) -> None:
    files = [*(repository / "fastomni").rglob("*.py"), *(repository / "kernels").rglob("*.py")]
    own = {"extras.py", "requirements.py"}
    module = re.compile(rf"\b(import|from) {MODULES[extra]}\b|[\"']{MODULES[extra]}[.\"']")
    used = any(module.search(file.read_text()) for file in files if file.name not in own)
    assert used == (requirements.EXTRA_PURPOSES[extra] != "not used yet")


def test_missing_old_and_alternative_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.9.1+cu130", "numpy": "2.0", "flash-attn-4": "4.0.0b36", "trl": "1.16"}

    def version(name: str) -> str:
        return versions[name] if name in versions else str(not_installed(name))

    monkeypatch.setattr(requirements.metadata, "version", version)
    lines = [
        "torch>=2.11",
        "numpy>=1.26",
        "av>=17",
        'triton>=3.6; platform_system == "Plan9"',
        'flash-attn>=2.7; extra == "flash"',
        'liger-kernel (>=0.6) ; extra == "liger"',
        "trl[vllm]>=0.24; extra == 'trl'",
    ]
    monkeypatch.setattr(requirements.metadata, "requires", lambda name: lines)
    found = {x.name: (x.extra, x.required, x.installed, x.problem) for x in requirements.packages()}
    assert found == {
        "torch": ("", ">=2.11", "2.9.1+cu130", "too old"),
        "numpy": ("", ">=1.26", "2.0", ""),
        "av": ("", ">=17", None, "missing"),
        "triton": ("", ">=3.6", None, ""),  # asked for on another system only
        "flash-attn": ("flash", ">=2.7", "flash-attn-4 4.0.0b36", ""),
        "liger-kernel": ("liger", ">=0.6", None, ""),
        "trl": ("trl", ">=0.24", "1.16", ""),
    }
