"""What a terminal shows, read from the text that is drawn on one of a known size."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from fastomni.report import StageReport, progress, stage
from fastomni.report.progress import StageDisplay, bar


class Screen:
    """Stands in for a terminal of 100 columns; keeps what is written to it."""

    def __init__(self, terminal: bool = True) -> None:
        self.file = io.StringIO()
        self._terminal = terminal

    def __call__(self) -> Console:
        return Console(file=self.file, force_terminal=self._terminal, width=100, color_system=None)

    def text(self) -> str:
        """All that was drawn, without the sequences that move the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.file.getvalue())


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    shown = Screen()
    for module in (progress, stage):
        monkeypatch.setattr(module, "Console", shown)
    return shown


def test_a_stage_shows_its_bar_its_numbers_and_its_time(screen: Screen) -> None:
    display = StageDisplay("rlvr", 3, 20, screen())
    metrics = [
        ("reward", "1.25"),
        ("kl", "0.0100"),
        ("len", "31"),
        ("zero-std", "18%"),
        ("acc", "1"),
    ]
    display.update(5, metrics, {"rollout": 0.6, "update": 0.4})
    display.close()
    last = screen.text()[screen.text().rindex("rlvr") :]
    assert re.match(r"rlvr \S+ +5/20 0:00:0\d left ", last)
    words = last.split()
    for name, value in metrics:
        assert words[words.index(name) + 1] == value
    assert "time rollout 60%  update 40%" in last
    assert screen.file.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is there again


def test_on_a_terminal_every_step_is_drawn_and_lines_go_to_the_log(
    screen: Screen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with StageReport(tmp_path, "rlvr", log_every=2) as report:
        report.start(0, 3)
        for step in (1, 2, 3):
            report.step(step, {"loss": 0.5, "reward": step / 4, "completions/tokens": 8.0})
    shown = screen.text()
    for reward in ("0.25", "0.50", "0.75"):
        assert re.search(rf"reward +{reward}", shown)
    assert "rlvr 2/3  loss" not in shown + capsys.readouterr().out
    log = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("  ")[0] for line in log] == ["rlvr 2/3", "rlvr 3/3"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_an_error_gives_the_terminal_back(screen: Screen, tmp_path: Path) -> None:
    report = StageReport(tmp_path, "base")
    with pytest.raises(KeyboardInterrupt), report:
        report.start(0, 9)
        report.step(1, {"loss": 0.5})
        raise KeyboardInterrupt
    assert screen.file.getvalue().rstrip().endswith("\x1b[?25h")
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1


def test_a_bar_is_drawn_on_a_terminal_and_goes_when_it_is_done(screen: Screen) -> None:
    with bar("rlvr on dfew_test", 4) as advance:
        advance(1)
        advance(3)
    assert "rlvr on dfew_test" in screen.text() and "4/4" in screen.text()
    assert screen.file.getvalue().endswith("\x1b[1A\x1b[2K")  # its line is wiped


def test_nothing_is_drawn_into_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Screen(terminal=False)
    for module in (progress, stage):
        monkeypatch.setattr(module, "Console", shown)
    with bar("rlvr on dfew_test", 4) as advance:
        advance(4)
    with StageReport(tmp_path, "base") as report:
        report.start(0, 1)
        report.step(1, {"loss": 0.5})
    assert shown.file.getvalue() == ""
    assert capsys.readouterr().out.startswith("base 1/1  loss 0.5000")
