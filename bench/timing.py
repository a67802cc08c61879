"""Seconds of several calls, interleaved in one run: A B C, B C A, C A B, ...

A slow spell of the machine then falls on all of them alike, and none always runs in the wake of the
same other. On a GPU each call starts with a cold L2 cache: a buffer larger than the cache is filled
before it, which also lets the host get ahead, so that the events enclose the device's work and not
Python's. On a CPU a call that is too short for the clock is repeated within one measurement. Python
collects its garbage between rounds and never within one: what a peer's call leaves in reference
cycles is gigabytes at a GPU's sizes.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bench.cases import Call

# Rounds before the first that counts.
WARM_UP = {"cpu": 1, "cuda": 3}
# A measurement on a CPU takes at least this long.
SHORTEST_S = 2e-3
# Twice the largest L2 cache there is (B200: 126 MB), filled so often that a GPU is busy for most of
# a millisecond: Python needs a good part of that to get a call's kernels into the queue.
FLUSH_BYTES, FLUSHES = 256 * 2**20, 8


@dataclass(frozen=True)
class Timing:
    """Of one provider.

    Attributes:
        seconds: of one call, one number per round.
        calls_per_round: how many calls each number is the mean of.
        error: what a call raised, after which it was not called again; None: nothing.
    """

    seconds: tuple[float, ...]
    calls_per_round: int
    error: Exception | None = None


def time_calls(calls: Mapping[str, Call], repeats: int, device: torch.device) -> dict[str, Timing]:
    """Time calls that have each run at least once before.

    Args:
        calls: by name.
        repeats: rounds that count; all calls run once (on a CPU: for SHORTEST_S) in each.
        device: what they run on.
    """
    names = list(calls)
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    counts = dict.fromkeys(names, 1)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    errors: dict[str, Exception] = {}

    def take(name: str) -> float | None:
        """Seconds of one call; None where it raises, now or before (memory may run out late)."""
        if name in errors:
            return None
        try:
            return clock(calls[name], counts[name], device)
        except Exception as error:
            errors[name] = error.with_traceback(None)  # whose frames would keep tensors alive
            return None

    if device.type == "cpu":
        for name in names:
            taken = take(name)
            if taken is not None and taken < SHORTEST_S:
                # Once more: the first after another provider is a slow one.
                taken = min(taken, take(name) or taken)
            counts[name] = math.ceil(SHORTEST_S / max(taken or SHORTEST_S, 1e-7))
    enabled = gc.isenabled()
    gc.disable()
    try:
        for round_ in range(WARM_UP[device.type] + repeats):
            gc.collect()
            for position in range(len(names)):
                name = names[(round_ + position) % len(names)]
                taken = take(name)
                if round_ >= WARM_UP[device.type] and taken is not None:
                    seconds[name].append(taken)
    finally:
        if enabled:
            gc.enable()
    return {name: Timing(tuple(seconds[name]), counts[name], errors.get(name)) for name in names}


def _cpu_seconds(call: Call, count: int, device: torch.device) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def _cuda_seconds(call: Call, count: int, device: torch.device) -> float:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(FLUSHES):
        flush.zero_()
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1e3
