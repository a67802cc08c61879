"""What a stage says while it runs: a live display or lines, JSON lines, TensorBoard, samples.

The parts of a step that are timed are those named by `phase`; what is left of it is called data,
the wait for clips. A checkpoint is written after a step's metrics, so its time is the next step's.
"""

from __future__ import annotations

import json
import math
import re
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fastomni.data.manifest import ManifestRow
from fastomni.report.progress import StageDisplay

# Metrics of the display and of the lines, in order: key, label, format.
COLUMNS = (
    ("loss", "loss", ".4f"),
    ("reward", "reward", ".2f"),
    ("rewards/accuracy/mean", "acc", ".2f"),
    ("rewards/format/mean", "fmt", ".2f"),
    ("frac_reward_zero_std", "zero-std", ".0%"),
    ("kl", "kl", ".4f"),
    ("clip_ratio/region_mean", "clip", ".1%"),
    ("entropy", "ent", ".2f"),
    ("completions/mean_length", "len", ".0f"),
    ("tokens_per_second", "tok/s", ".0f"),
    ("grad_norm", "grad", ".2f"),
    ("data/skipped", "skipped", ".0f"),
)


class StageReport:
    """Metrics of one stage, written to its folder; a context manager that closes itself.

    Args:
        directory: the stage's folder; gets `metrics.jsonl`, `completions.jsonl`, `log.txt` and
            `tensorboard/`.
        name: of the stage, as printed.
        log_every: steps between lines of the log (every step is in `metrics.jsonl`).

    Attributes:
        count_skipped: clips left out so far; None where an unreadable one ends the run.
    """

    def __init__(self, directory: Path, name: str, log_every: int = 1) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._name, self._log_every = directory, name, log_every
        self.count_skipped: Callable[[], int] | None = None
        self._phases: dict[str, float] = {}
        self._started = time.perf_counter()
        self._total_steps = 0
        self._hidden: Collection[str] = ()
        self._writer: SummaryWriter | None = None
        self._display: StageDisplay | None = None

    def __enter__(self) -> StageReport:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, first_step: int, total_steps: int, hidden: Collection[str] = ()) -> None:
        """Begins at a step; lines of later steps, from a run that was cut off, are dropped.

        Args:
            first_step: steps done before.
            total_steps: steps of the stage.
            hidden: metrics among `COLUMNS` that say nothing in this run; written, but not shown.
        """
        self._total_steps, self._hidden = total_steps, hidden
        for name, step_of in (
            ("metrics.jsonl", _step_of),
            ("completions.jsonl", _step_of),
            ("log.txt", _step_of_log),
        ):
            path = self._directory / name
            if path.is_file():
                lines = path.read_text(encoding="utf-8").splitlines()
                kept = [line for line in lines if step_of(line) <= first_step]
                path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._writer = SummaryWriter(
            str(self._directory / "tensorboard"), purge_step=first_step + 1
        )
        console = Console()
        if console.is_terminal and self._display is None:
            self._display = StageDisplay(self._name, first_step, total_steps, console)
        self._phases.clear()
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a part of the step."""
        begin = time.perf_counter()
        yield
        self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - begin

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of step `step` (1-based) and shows them."""
        seconds = time.perf_counter() - self._started
        times = {f"seconds/{name}": value for name, value in self._phases.items()}
        times["seconds/data"] = max(0.0, seconds - sum(self._phases.values()))
        memory = {"peak_memory_gib": peak_memory_gib()}
        speed = {}
        if "completions/tokens" in metrics:
            speed["tokens_per_second"] = metrics["completions/tokens"] / seconds
        skipped = {} if self.count_skipped is None else {"data/skipped": self.count_skipped()}
        record = {
            "step": step,
            **metrics,
            **speed,
            **skipped,
            **memory,
            "seconds/step": seconds,
            **times,
        }
        self._append("metrics.jsonl", json.dumps(record))
        if self._writer is not None:
            for name, value in record.items():
                self._writer.add_scalar(name, value, step)
        shown = [
            (label, format(record[key], form))
            for key, label, form in COLUMNS
            if key in record and key not in self._hidden
        ]
        shown.append(("mem", f"{peak_memory_gib():.1f}G"))
        shares = {
            key.split("/")[1]: value / seconds
            for key, value in times.items()
            if value >= 0.005 * seconds
        }
        if step % self._log_every == 0 or step == self._total_steps:
            line = self._line(step, shown, seconds, shares)
            self._append("log.txt", line)
            if self._display is None:
                print(line, flush=True)
        if self._display is not None:
            self._display.update(step, [*shown, ("step", f"{seconds:.2f}s")], shares)
        self._phases.clear()
        self._started = time.perf_counter()

    def kernels(self, choices: Mapping[tuple[str, str], str]) -> None:
        """Says in one line which implementations have run so far, and why.

        Args:
            choices: (function, backend) -> reason, as `fastomni_kernels.dispatch.choices`.
        """
        functions: dict[tuple[str, str], list[str]] = {}
        for (function, backend), reason in choices.items():
            functions.setdefault((backend, reason), []).append(function)
        parts = [
            f"{backend}: {', '.join(names)} ({reason})"
            for (backend, reason), names in functions.items()
        ]
        line = f"{self._name} kernels  {'; '.join(parts)}"
        self._append("log.txt", line)
        print(line, flush=True)

    def completions(
        self,
        step: int,
        rows: Sequence[ManifestRow],
        texts: Sequence[str],
        scores: Mapping[str, Tensor],
    ) -> None:
        """Keeps the completions of the step's first clip with their rewards; null for NaN."""
        rewards = {
            name: [None if math.isnan(value) else value for value in values[0].tolist()]
            for name, values in scores.items()
        }
        generations = len(next(iter(rewards.values())))
        record = {
            "step": step,
            "id": rows[0].id,
            "label": rows[0].label,
            "completions": list(texts[:generations]),
            "rewards": rewards,
        }
        self._append("completions.jsonl", json.dumps(record))

    def close(self) -> None:
        """Flushes the event file and gives the terminal back."""
        if self._display is not None:
            self._display.close()
            self._display = None
        if self._writer is not None:
            self._writer.close()

    def _append(self, name: str, line: str) -> None:
        with (self._directory / name).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _line(
        self,
        step: int,
        shown: Sequence[tuple[str, str]],
        seconds: float,
        shares: Mapping[str, float],
    ) -> str:
        metrics = "  ".join(f"{label} {value}" for label, value in shown)
        parts = " ".join(f"{name} {share:.0%}" for name, share in shares.items())
        return f"{self._name} {step}/{self._total_steps}  {metrics}  {seconds:.2f}s [{parts}]"


def _step_of(line: str) -> float:
    """The step of a JSON line; infinite for one that was cut off in the middle."""
    try:
        return float(json.loads(line)["step"])
    except json.JSONDecodeError:
        return float("inf")


def _step_of_log(line: str) -> float:
    """The step of a line of the log, `name step/total ...`; infinite for one that was cut off."""
    found = re.match(r"\S+ (\d+)/\d+  .*\]$", line)
    return float(found[1]) if found else float("inf")


def peak_memory_gib() -> float:
    """Most memory that this process has held, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
