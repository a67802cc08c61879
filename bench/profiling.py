"""Profiles one case at one size: availability, errors, memory, then time of what passed.

The order is the point. A provider first has to give the right answer; only then is its memory
measured, and only those that got so far are timed, interleaved. So no wrong answer has a time that
could be quoted.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.cases import TRAINING, Call, Case, Problem, Provider
from bench.ceilings import Ceilings, type_name
from bench.errors import check, worst
from bench.memory import measure_memory
from bench.timing import Timing, time_calls

TIMED, REFUSED, UNAVAILABLE, FAILED = "timed", "refused", "unavailable", "failed"

Row = dict[str, Any]


@dataclass
class Trace:
    """Timelines of one call of every timed provider, collected over all cases.

    Attributes:
        events: in Chrome's trace format.
    """

    events: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, call: Call, device: torch.device) -> None:
        """Profile one call under a label."""
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiler:
            with record_function(name):
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            self.events += json.loads(path.read_text(encoding="utf-8"))["traceEvents"]

    def write(self, path: Path) -> None:
        """Write what chrome://tracing and ui.perfetto.dev open."""
        trace = {"displayTimeUnit": "ms", "traceEvents": self.events}
        path.write_text(json.dumps(trace), encoding="utf-8")


def _mode(case: Case) -> AbstractContextManager[Any]:
    return torch.enable_grad() if case.mode == TRAINING else torch.no_grad()


def examine(
    case: Case, provider: Provider, problem: Problem, device: torch.device
) -> tuple[Row, Call | None]:
    """Prepare and run a provider once, and check and weigh its answer.

    Returns:
        What is known of it so far, and its call where it may be timed.
    """
    row: Row = {"provider": provider.name, "ours": provider.ours, "status": TIMED, "reason": ""}
    obstacle = provider.unavailable(device.type)
    if obstacle:
        return {**row, "status": UNAVAILABLE, "reason": obstacle}, None
    try:
        call = provider.prepare(problem)
        answer = provider.finish(problem, call())
        errors = check(case, problem, answer, device, provider.strict)
        del answer
        row["errors"] = {name: asdict(error) for name, error in errors.items()}
        name, error = worst(errors)
        if not error.acceptable:
            row["status"] = REFUSED
            row["reason"] = f"error of {name} {error.relative:.1e} over bound {error.bound:.0e}"
            return row, None
        memory = measure_memory(call, device)
    except Exception as error:  # whatever a peer throws must not end the run
        status = UNAVAILABLE if _is_missing(error) else FAILED
        return {**row, "status": status, "reason": describe(error)}, None
    row["answer_bytes"], row["extra_bytes"] = memory.answer, memory.extra
    row["resident_extra_bytes"] = memory.resident_extra
    return row, call


def _is_missing(error: Exception) -> bool:
    """Whether something that is not installed is at fault (inductor wraps its own reason)."""
    return isinstance(error, ImportError) or "InvalidCxxCompiler" in str(error)


def describe(error: Exception) -> str:
    """Type and first line of an error, short enough for a table."""
    text = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    return text if len(text) <= 160 else text[:157] + "..."


def profile_case(
    case: Case,
    sizes: Sequence[int],
    size_name: str,
    device: torch.device,
    repeats: int,
    trace: Trace | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Profile all providers of a case at one size.

    Args:
        case: what.
        sizes: one number per dimension of the case.
        size_name: how the command called them.
        device: where.
        repeats: timed rounds.
        trace: gets one call of each timed provider.
        progress: told what is being done.

    Returns:
        Case, sizes, costs and one row per provider, ready for JSON.
    """
    dtype = case.dtype(device)
    shape = " ".join(f"{d}={n}" for d, n in zip(case.dimensions, sizes, strict=True))
    progress(f"{case.name} {shape}: inputs and float64 answer")
    problem = case.problem(sizes, device, dtype)
    rows: list[Row] = []
    calls: dict[str, Call] = {}
    with _mode(case):
        for provider in case.providers:
            progress(f"{case.name} {shape}: checking {provider.name}")
            row, call = examine(case, provider, problem, device)
            rows.append(row)
            if call is not None:
                calls[provider.name] = call
        problem.exact.clear()
        progress(f"{case.name} {shape}: timing {len(calls)} providers")
        timings = time_calls(calls, repeats, device)
        for row in rows:
            if row["status"] != TIMED:
                continue
            name = row["provider"]
            error = timings[name].error
            if error is not None:  # memory may run out only where others' answers are alive too
                row |= {"status": FAILED, "reason": f"while timed: {describe(error)}"}
                continue
            row |= _summary(timings[name])
            if trace is not None:
                trace.add(f"{case.name} {shape} {name}", calls[name], device)
    return {**_heading(case, sizes, size_name, dtype), "rows": rows}


def _heading(
    case: Case, sizes: Sequence[int], size_name: str, dtype: torch.dtype
) -> dict[str, Any]:
    """What a result is of, and what it needs."""
    found: dict[str, Any] = {
        "name": case.name,
        "function": case.function,
        "mode": case.mode,
        "size_name": size_name,
        "sizes": dict(zip(case.dimensions, sizes, strict=True)),
        "dtype": type_name(dtype),
        "needed": asdict(case.cost(sizes, dtype.itemsize)),
    }
    if case.repeated_work is not None:
        found["repeated_work"] = case.repeated_work(sizes)
    return found


def _summary(timing: Timing) -> dict[str, Any]:
    return {
        "median_s": statistics.median(timing.seconds),
        "min_s": min(timing.seconds),
        "max_s": max(timing.seconds),
        "seconds": list(timing.seconds),
        "calls_per_round": timing.calls_per_round,
    }


def add_rates(result: dict[str, Any], ceilings: Ceilings) -> None:
    """Add to a profiled case what follows from its times, its costs and the ceilings.

    Args:
        result: of `profile_case`; gets `floor_s` and `bound_by`, and each timed row `bytes_per_s`,
            `flops_per_s` and `share_of_ceiling`.
        ceilings: of this machine, measured in the same run.
    """
    needed = result["needed"]
    seconds = {
        "memory": needed["bytes"] / ceilings.bytes_per_s,
        "compute": needed["flops"] / ceilings.flops_per_s[result["dtype"]],
    }
    result["bound_by"] = max(seconds, key=lambda name: seconds[name])
    result["floor_s"] = max(seconds.values())
    for row in result["rows"]:
        if row["status"] == TIMED:
            row["bytes_per_s"] = needed["bytes"] / row["median_s"]
            row["flops_per_s"] = needed["flops"] / row["median_s"]
            row["share_of_ceiling"] = result["floor_s"] / row["median_s"]
