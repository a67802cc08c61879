"""What is installed, the name `kernels`, the extras' messages, and the Makefile's set-up."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import setuptools

from fastomni.extras import MODULES, require

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


def metadata(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def listed(repository: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What setup.py hands to setuptools."""
    given: dict = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    exec(compile((repository / "setup.py").read_text(), "setup.py", "exec"), {})
    return given


def test_listed_packages_are_the_folders_on_disk(repository: Path, listed: dict) -> None:
    folders = {
        ".".join(file.parent.relative_to(start).parts)
        for start, name in ((repository, "fastomni"), (repository / "kernels", "fastomni_kernels"))
        for file in (start / name).rglob("__init__.py")
    }
    assert set(listed["packages"]) == folders
    assert len(listed["packages"]) == len(folders)
    for package in ("fastomni", "fastomni_kernels"):
        assert (repository / listed["package_dir"][package] / "py.typed").is_file()


def test_every_file_of_a_package_that_is_no_module_is_listed(
    repository: Path, listed: dict
) -> None:
    for package in listed["packages"]:
        top, _, rest = package.partition(".")
        folder = repository / listed["package_dir"][top] / rest.replace(".", "/")
        patterns = listed["package_data"].get(package, [])
        shipped = {file for pattern in patterns for file in folder.glob(pattern)}
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in (".py", ".pyc", ".so"):
                assert file in shipped, f"setup.py's package_data leaves out {file}"


def test_the_version_stands_in_one_place(repository: Path) -> None:
    import fastomni

    project = metadata(repository)
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fastomni.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastomni.__version__)


def test_constraints_lie_within_the_requirements(repository: Path) -> None:
    from packaging.requirements import Requirement

    project = metadata(repository)["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = {item.name: item for text in lists for item in map(Requirement, text)}
    lines = (repository / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert "torch" in {item.name for item in pinned}
    for item in pinned:
        (pin,) = item.specifier
        assert pin.operator == "=="
        assert wanted[item.name].specifier.contains(pin.version)


def test_the_folder_kernels_is_no_package(repository: Path) -> None:
    assert not (repository / "kernels" / "__init__.py").exists()


def test_the_name_kernels_is_left_to_hugging_face(repository: Path) -> None:
    code = (
        "from importlib.util import find_spec\n"
        "spec = find_spec('kernels')\n"
        "print('' if spec is None or spec.origin is None else spec.origin)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    origin = child.stdout.strip()
    assert not origin or repository not in Path(origin).parents


def test_missing_kernels_are_explained_at_import(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util as util

    real = util.find_spec

    def find(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "fastomni_kernels" else real(name, package)

    monkeypatch.setattr(util, "find_spec", find)
    source = (repository / "fastomni" / "__init__.py").read_text()
    with pytest.raises(ModuleNotFoundError) as caught:
        exec(compile(source, "__init__.py", "exec"), {"__name__": "fastomni"})
    assert str(caught.value) == (
        "fastomni_kernels, which is installed together with fastomni, cannot be found; "
        "run in the folder that holds setup.py: pip install -e . --no-build-isolation"
    )


def test_extras_are_those_of_the_metadata(repository: Path) -> None:
    extras = metadata(repository)["project"]["optional-dependencies"]
    assert set(MODULES) == set(extras) - {"dev"}


@pytest.mark.parametrize("extra", sorted(MODULES))
def test_a_missing_extra_names_the_command(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = MODULES[extra]
    top = name.partition(".")[0]
    for loaded in [module for module in sys.modules if f"{module}.".startswith(f"{top}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    # A finder that says what Python says where nothing of that name is installed.
    monkeypatch.setattr(sys, "meta_path", [Absent(top), *sys.meta_path])
    with pytest.raises(ImportError) as caught:
        require(extra)
    assert str(caught.value) == (
        f"{name} is not installed; run in the folder that holds setup.py: "
        f'pip install -e ".[{extra}]" --no-build-isolation'
    )


class Absent:
    """Finder to which one top-level package is not installed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {self.name!r}", name=self.name)


def test_an_extra_that_is_there_but_broken_gives_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trl_broken.py").write_text("import no_such_dependency\n")
    (tmp_path / "trl_old.py").write_text("from math import no_such_function\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError) as caught:
        require("trl", "trl_broken")
    reason = "No module named 'no_such_dependency'"
    assert str(caught.value) == f"trl_broken is installed but cannot be loaded: {reason}"
    with pytest.raises(ImportError, match="trl_old is installed but cannot be loaded: cannot imp"):
        require("trl", "trl_old")
    assert require("trl", "json").__name__ == "json"


FAKE_PYTHON = """\
#!/bin/sh
# Stands for python: makes a venv whose python is this file, and counts what pip is asked for.
case "$*" in
*version_info*) [ -z "$OLD_PYTHON" ] ;;
*venv*) [ -z "$NO_VENV" ] || exit 1
    mkdir -p .venv/bin && cp "$0" .venv/bin/python
    printf '#!/bin/sh\\necho "torchrun $*"\\n' > .venv/bin/torchrun
    chmod +x .venv/bin/torchrun ;;
*pip*) echo "pip $*" | sed 's/.*install/install/' >> pip.log
    case "$*" in *"$BROKEN_DOWNLOAD"*) [ -z "$BROKEN_DOWNLOAD" ] ;; esac ;;
esac
"""


@pytest.fixture
def bare_machine(repository: Path, tmp_path: Path) -> Path:
    """A checkout's Makefile on a machine where `python3` is FAKE_PYTHON."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(repository / name, tmp_path)
    python = tmp_path / "python-of-the-system"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return tmp_path


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        ["make", "PYTHON=./python-of-the-system", *arguments],
        cwd=folder,
        env={**inherited, **variables},
        capture_output=True,
        text=True,
    )


INSTALLS = [
    "install setuptools>=77 wheel",
    "install -c constraints.txt torch",
    "install -c constraints.txt --no-build-isolation -e .",
]


def test_make_train_installs_torch_first_then_trains(bare_machine: Path) -> None:
    child = make(bare_machine, "train", "ARGS=seed=3 rlvr.beta=0")
    assert child.returncode == 0, child.stderr
    launch = "torchrun --standalone --nproc-per-node=1 -m fastomni.train configs/rlvr.yaml"
    assert child.stdout.splitlines()[-1] == f"{launch} seed=3 rlvr.beta=0"
    assert (bare_machine / "pip.log").read_text().splitlines() == INSTALLS


def test_a_second_make_installs_nothing_until_the_requirements_change(bare_machine: Path) -> None:
    make(bare_machine, "train")
    (bare_machine / "pip.log").unlink()
    assert make(bare_machine, "train").stdout.count("\n") == 1
    assert not (bare_machine / "pip.log").exists()
    later = (bare_machine / ".venv" / ".ready").stat().st_mtime + 10
    os.utime(bare_machine / "constraints.txt", (later, later))
    make(bare_machine, "train")
    assert (bare_machine / "pip.log").read_text().splitlines() == INSTALLS


@pytest.mark.parametrize("broken", ["setuptools", "torch", "-e ."])
def test_make_goes_on_after_a_failed_download(bare_machine: Path, broken: str) -> None:
    child = make(bare_machine, "train", BROKEN_DOWNLOAD=broken)
    assert child.returncode != 0
    assert "Run the same command again" in child.stderr
    assert "torchrun" not in child.stdout
    again = make(bare_machine, "train")
    assert again.returncode == 0
    assert "torchrun" in again.stdout


def test_the_set_up_for_tests_brings_the_extras_that_have_some(bare_machine: Path) -> None:
    child = make(bare_machine, ".venv/.ready-dev")
    assert child.returncode == 0, child.stderr
    last = "install -c constraints.txt --no-build-isolation -e .[dev,liger,trl]"
    assert (bare_machine / "pip.log").read_text().splitlines() == [*INSTALLS, last]


def test_make_says_what_a_machine_lacks(bare_machine: Path) -> None:
    child = make(bare_machine, "train", NO_VENV="1")
    assert child.returncode != 0
    assert "sudo apt install python3-venv" in child.stderr
    child = make(bare_machine, "train", OLD_PYTHON="1")
    assert child.returncode != 0
    assert "fastomni needs Python 3.10 or newer" in child.stderr
    assert make(bare_machine, "train").returncode == 0


def test_continuous_integration_runs_make_test(repository: Path) -> None:
    script = repository / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
