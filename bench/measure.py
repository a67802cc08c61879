"""Seconds and memory peak of a piece of work, and where and with what it was measured."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]


class Clock:
    """Seconds of each phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a part of the step."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin


def environment(packages: Sequence[str] = ("transformers",)) -> dict[str, Any]:
    """Date, commit, processor, threads and versions (of torch and `packages`; None: absent)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    commit = _git("rev-parse", "--verify", "--quiet", "HEAD")
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit or None,
        "uncommitted_changes": not commit or bool(_git("status", "--porcelain")),
        "device": _processor(),
        "cores_allowed": allowed,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in packages},
    }


def accelerator(device: torch.device) -> dict[str, Any] | None:
    """Name, capability, memory and driver-side versions of a CUDA device; None for a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def reset_peak() -> None:
    """Gives freed memory back and starts the peak anew, where the system can (Linux, glibc)."""
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM


def peak_mib() -> float:
    """Peak resident memory of this process in MiB since `reset_peak` (macOS: since its start)."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def resident_mib() -> float | None:
    """Resident memory of this process in MiB now (Linux; None elsewhere)."""
    if sys.platform != "linux":
        return None
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmRSS:")[1].split()[0]) / 2**10


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # an unpacked archive on a machine without git
        return ""
    return done.stdout.strip()


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
