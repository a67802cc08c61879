"""What a stage says while it runs: one line per step, JSON lines, TensorBoard, samples."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fastomni.data.manifest import ManifestRow

# Metrics of the step line, in order: key, label, format.
COLUMNS = (
    ("loss", "loss", ".4f"),
    ("reward", "reward", ".2f"),
    ("rewards/accuracy", "acc", ".2f"),
    ("rewards/format", "fmt", ".2f"),
    ("frac_reward_zero_std", "zero-std", ".0%"),
    ("kl", "kl", ".4f"),
    ("completions/mean_length", "len", ".0f"),
    ("grad_norm", "grad", ".2f"),
)


class StageReport:
    """Metrics of one stage, written to its folder.

    Args:
        directory: the stage's folder; gets `metrics.jsonl`, `completions.jsonl`, `tensorboard/`.
        name: of the stage, as printed.
        log_every: optimiser steps between printed lines (every step is written to the file).
    """

    def __init__(self, directory: Path, name: str, log_every: int = 1) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._name, self._log_every = directory, name, log_every
        self._phases: dict[str, float] = {}
        self._started = time.perf_counter()
        self._total_steps = 0
        self._writer: SummaryWriter | None = None

    def start(self, first_step: int, total_steps: int) -> None:
        """Begins at a step; lines of later steps, from a run that was cut off, are dropped."""
        self._total_steps = total_steps
        for name in ("metrics.jsonl", "completions.jsonl"):
            path = self._directory / name
            if path.is_file():
                lines = path.read_text(encoding="utf-8").splitlines()
                kept = [line for line in lines if _step_of(line) <= first_step]
                path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._writer = SummaryWriter(
            str(self._directory / "tensorboard"), purge_step=first_step + 1
        )
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a part of the step."""
        begin = time.perf_counter()
        yield
        self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - begin

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of optimiser step `step` (1-based) and prints its line."""
        seconds = time.perf_counter() - self._started
        times = {f"seconds/{name}": value for name, value in self._phases.items()}
        times["seconds/data"] = max(0.0, seconds - sum(self._phases.values()))
        record = {"step": step, **metrics, "seconds/step": seconds, **times}
        self._append("metrics.jsonl", record)
        if self._writer is not None:
            for name, value in record.items():
                self._writer.add_scalar(name, value, step)
        if step % self._log_every == 0 or step == self._total_steps:
            print(self._line(step, record), flush=True)
        self._phases.clear()
        self._started = time.perf_counter()

    def completions(
        self,
        step: int,
        rows: Sequence[ManifestRow],
        texts: Sequence[str],
        scores: Mapping[str, Tensor],
    ) -> None:
        """Keeps the completions of the step's first clip with their rewards."""
        rewards = {name: values[0].tolist() for name, values in scores.items()}
        generations = len(rewards["reward"])
        self._append(
            "completions.jsonl",
            {
                "step": step,
                "id": rows[0].id,
                "label": rows[0].label,
                "completions": list(texts[:generations]),
                "rewards": rewards,
            },
        )

    def close(self) -> None:
        """Flushes the event file."""
        if self._writer is not None:
            self._writer.close()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with (self._directory / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _line(self, step: int, record: Mapping[str, float]) -> str:
        shown = [
            f"{label} {format(record[key], form)}" for key, label, form in COLUMNS if key in record
        ]
        seconds = record["seconds/step"]
        parts = [
            f"{key.split('/')[1]} {value / seconds:.0%}"
            for key, value in record.items()
            if key.startswith("seconds/") and key != "seconds/step" and value >= 0.005 * seconds
        ]
        return (
            f"{self._name} {step}/{self._total_steps}  {'  '.join(shown)}  "
            f"mem {peak_memory_gib():.1f}G  {seconds:.2f}s [{' '.join(parts)}]"
        )


def _step_of(line: str) -> float:
    """The step of a JSON line; infinite for one that was cut off in the middle."""
    try:
        return float(json.loads(line)["step"])
    except json.JSONDecodeError:
        return float("inf")


def peak_memory_gib() -> float:
    """Most memory that this process has held, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
