"""Memory that a call needs beyond its inputs and its answer.

On a GPU this is the allocator's own peak. On a CPU it is made of the allocations and releases that
torch's allocator reports to the profiler, in their order: exact to the byte, the same in every run,
and the same quantity as on a GPU. The decision that is not obvious: growth of the process's
resident memory is measured too and stands beside it as a witness (it sees what is allocated past
torch), but it is not the figure: pages that the C library kept from earlier calls are missing in
it, and pages that it keeps after a release are in it.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Else Kineto writes two lines to the terminal for each profile.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch.profiler import ProfilerActivity, profile

from bench.cases import Answer, Call
from bench.measure import peak_mib, reset_peak, resident_mib


@dataclass(frozen=True)
class Memory:
    """Of one call, in bytes.

    Attributes:
        answer: outputs and gradients, which exist at the end.
        extra: peak during the call, less what existed before it, less the answer.
        resident_extra: the same from the growth of resident memory (Linux, CPU; else None).
    """

    answer: int
    extra: int
    resident_extra: int | None


def answer_bytes(answer: Answer) -> int:
    """Bytes of an answer; tensors that are the same memory count once."""
    unique = {(x.data_ptr(), x.numel(), x.dtype): x for x in answer.values()}
    return sum(x.numel() * x.element_size() for x in unique.values())


def measure_memory(call: Call, device: torch.device) -> Memory:
    """Run a call once, after it has run before, and return what it took."""
    gc.collect()  # garbage of earlier calls must not be released while this one is measured
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        size = answer_bytes(call())
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        return Memory(size, max(0, peak - size), None)
    # Two calls, because the profiler takes tens of MiB for itself.
    reset_peak()
    resident = resident_mib()
    size = answer_bytes(call())
    grown = None if resident is None else round((peak_mib() - resident) * 2**20) - size
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return Memory(size, max(0, _peak(profiler) - size), None if grown is None else max(0, grown))


def _peak(profiler: profile) -> int:
    """Largest sum of the bytes allocated and not yet released while the profile was taken."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    live = peak = 0
    for event in sorted(changes, key=lambda event: float(event["ts"])):
        if event["args"]["Device Type"] == 0:  # the CPU
            live += int(event["args"]["Bytes"])
            peak = max(peak, live)
    return peak
