"""Profiles every function of fastomni_kernels against its peers, on this machine.

    python bench/kernels.py [--only linear_grpo_loss ...] [--sizes small full 512x896x151936]
                            [--json FILE] [--plot FILE.png] [--trace FILE.json] [--list]

For each: median time and spread, bytes and FLOPs needed, rates achieved, share of the machine's
ceilings measured in the same run, memory beyond inputs and answer, error against float64. What
errs by more than its bound gets no time. On a CPU our rows are the plain torch paths that users on
a CPU run; Triton kernels are not timed there.
"""

# ruff: noqa: E402 (imports after the path is mended)

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve()
if Path(sys.path[0]).resolve() == HERE.parent:  # else this file answers to `import kernels`
    sys.path[0] = str(HERE.parents[1])

import argparse
import difflib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

# The Hugging Face package of that name is for downloading kernels; peers are measured as installed.
os.environ.setdefault("USE_HUB_KERNELS", "0")

import torch

from bench import (
    cases_attention,
    cases_decode,
    cases_linear_loss,
    cases_logprobs,
    cases_policy,
    cases_prefix,
    cases_sampling,
)
from bench.cases import Case
from bench.ceilings import measure_ceilings
from bench.goals import judge_all
from bench.measure import accelerator, environment
from bench.plots import plot
from bench.profiling import FAILED, REFUSED, Trace, add_rates, profile_case
from bench.tables import show
from fastomni_kernels import dispatch

CASES = (
    *cases_policy.CASES,
    *cases_logprobs.CASES,
    *cases_linear_loss.CASES,
    *cases_prefix.CASES,
    *cases_decode.CASES,
    *cases_sampling.CASES,
    *cases_attention.CASES,
)
SIZE_NAMES = tuple(dict.fromkeys(n for case in CASES for n in (*case.sizes, *case.sweeps)))
MOST_SHOWN = 4  # sizes of a sweep
GPU_SIZES = ("full", "full-g16", "sweep", "grid")
PACKAGES = ("transformers", "triton", "trl", "liger-kernel", "verl", "quack-kernels", "flash-attn")

Job = tuple[Case, str, tuple[int, ...]]


def select(names: Sequence[str] | None) -> list[Case]:
    """Return the cases of the functions (or "function/mode") named, all where none is.

    Raises:
        ValueError: an unknown name; says the nearest known one, or all where none is near.
    """
    known = {case.name: [case] for case in CASES}
    for case in CASES:
        known.setdefault(case.function, []).append(case)
    chosen: dict[str, Case] = {}
    for name in names or known:
        if name not in known:
            raise ValueError(f"--only {name}: unknown; {_nearest(name, list(known))}")
        chosen |= {case.name: case for case in known[name]}
    return [case for case in CASES if case.name in chosen]


def plan(cases: Sequence[Case], sizes: Sequence[str], device: torch.device) -> list[Job]:
    """Return (case, name of the size, size) of all that is to be run.

    Raises:
        ValueError: an unknown size, numbers that do not fit the cases, or full sizes on a CPU.
    """
    jobs: list[Job] = []
    for size in sizes:
        if re.fullmatch(r"\d+(x\d+)*", size):
            numbers = tuple(int(text) for text in size.split("x"))
            unfit = [case for case in cases if len(case.dimensions) != len(numbers)]
            if unfit or min(numbers) < 1:
                wants = "; ".join(f"{c.function} takes {'x'.join(c.dimensions)}" for c in cases)
                raise ValueError(
                    f"--sizes {size} does not fit every case chosen, or holds a 0 ({wants}); "
                    "choose with --only"
                )
            jobs += [(case, size, numbers) for case in cases]
            continue
        if size not in SIZE_NAMES:
            raise ValueError(
                f"--sizes {size}: unknown; {_nearest(size, SIZE_NAMES)}, or give numbers such as "
                "512x896x151936"
            )
        if size in GPU_SIZES and device.type == "cpu":
            raise ValueError(
                f"--sizes {size}: these are a GPU's sizes, which take a CPU hours and tens of GiB; "
                "use small, cpu, or numbers of your own"
            )
        named = [
            (case.in_sweeps if size in case.sweeps else case, size, numbers)
            for case in cases
            for numbers in case.named(size)
        ]
        if not named:
            owners = dict.fromkeys(case.function for case in CASES if case.named(size))
            raise ValueError(f"--sizes {size}: a size of {', '.join(owners)} alone")
        jobs += named
    order = {case.name: index for index, case in enumerate(cases)}
    return sorted(dict.fromkeys(jobs), key=lambda job: order[job[0].name])


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"


def show_list(device: torch.device) -> None:
    """Print cases, sizes and providers, and which of them run here."""
    for case in CASES:
        print(f"{case.name}  [{' x '.join(case.dimensions)}]")
        print(
            "  sizes: " + ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in case.sizes.items())
        )
        for name, sweep in case.sweeps.items():
            shown = " ".join("x".join(map(str, s)) for s in sweep[:MOST_SHOWN])
            more = f" and {len(sweep) - MOST_SHOWN} more" if len(sweep) > MOST_SHOWN else ""
            print(f"  {name}: {shown}{more}")
        for provider in case.providers:
            obstacle = provider.unavailable(device.type)
            print(f"  {provider.name:<30}{obstacle or 'runs here'}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="functions, or function/mode")
    parser.add_argument(
        "--sizes",
        nargs="+",
        metavar="SIZE",
        help=f"{', '.join(SIZE_NAMES)}, or numbers such as 512x896x151936 (--list shows which "
        "number is what); full on a GPU and small on a CPU by default",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times")
    parser.add_argument("--trace", type=Path, metavar="FILE.json",
                        help="write timelines for chrome://tracing or ui.perfetto.dev")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print cases, sizes and providers")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    options = parser.parse_args(arguments)
    for name in ("repeats", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    for name, suffix in (("plot", ".png"), ("trace", ".json"), ("json", ".json")):
        path = getattr(options, name)
        if path is not None and path.suffix != suffix:
            parser.error(f"--{name} {path}: the name must end in {suffix}")
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"--{name} {path}: the folder does not exist")
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    options.sizes = options.sizes or ["full" if options.device == "cuda" else "small"]
    return options


def _progress(text: str) -> None:
    """Show what is being done, on a terminal only, in one line."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text[:100]}", end="", file=sys.stderr, flush=True)


def run(options: argparse.Namespace, jobs: Sequence[Job]) -> dict[str, Any]:
    """Measure ceilings, profile all jobs, and measure ceilings again."""
    device = torch.device(options.device)
    trace = Trace() if options.trace else None
    where = {**environment(PACKAGES), "accelerator": accelerator(device)}
    _progress("ceilings of this machine")
    ceilings = measure_ceilings(device)
    results = [
        profile_case(case, sizes, size_name, device, options.repeats, trace, _progress)
        for case, size_name, sizes in jobs
    ]
    _progress("ceilings of this machine, again")
    ceilings = ceilings.best(measure_ceilings(device))
    _progress("")
    for result in results:
        add_rates(result, ceilings)
    if trace is not None:
        trace.write(options.trace)
    report = {
        "environment": where,
        "settings": {"sizes": options.sizes, "only": options.only, "repeats": options.repeats},
        "ceilings": {"bytes_per_s": ceilings.bytes_per_s, "flops_per_s": ceilings.flops_per_s},
        "cases": results,
        "dispatch": [
            {"function": function, "backend": backend, "reason": reason}
            for (function, backend), reason in dispatch.choices.items()
        ],
    }
    report["goals"] = judge_all(report)
    return report


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 where a row of ours failed or erred, or nothing could be drawn.

    2 where the command cannot be carried out.
    """
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.list:
        show_list(torch.device(options.device))
        return 0
    try:
        jobs = plan(select(options.only), options.sizes, torch.device(options.device))
        report = run(options, jobs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Files first: what reads our output may have closed it, and the figures took minutes.
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    undrawn = False
    try:
        if options.plot:
            plot(report, options.plot)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        undrawn = True
    show(report)
    rows = [row for result in report["cases"] for row in result["rows"] if row["ours"]]
    return int(undrawn or any(row["status"] in (FAILED, REFUSED) for row in rows))


def script() -> int:
    """`main` for a shell: ends quietly where the reader of a pipe (`| head`) has gone."""
    try:
        status = main()
        sys.stdout.flush()  # here and not in the interpreter's last moments, which cannot catch it
    except BrokenPipeError:
        # Python flushes once more at its end: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # what a shell reports of a program that SIGPIPE ended
    return status


if __name__ == "__main__":
    sys.exit(script())
