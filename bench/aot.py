"""Compiles every kernel that ships, for GPUs that need not be there, and prints what each needs.

    python bench/aot.py [--targets sm_90 ...] [--markdown bench/results/aot.md] [--json FILE]

Exit status 1 where a kernel does not compile, spills on sm_90, asks for more shared memory than
the target has, misses the tensor cores or is listed by no file: each problem is named.
"""

# ruff: noqa: E402 (imports after the path is mended)

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve()
if Path(sys.path[0]).resolve() == HERE.parent:  # else these files answer to `import aot`
    sys.path[0] = str(HERE.parents[1])

import argparse
import dataclasses
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import triton

from bench.measure import REPOSITORY, environment
from fastomni_kernels.aot import (
    KIB,
    TARGETS,
    Resources,
    compile_variant,
    problems,
    unlisted,
    variants,
)

COLUMNS = ("variant", "warps", "stages", "registers", "spills", "stack B", "shared KiB",
           "tensor cores", "async copies", "binary KiB", "seconds")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Check:
    """Outcome for one variant on one target; `resources` is None where it does not compile."""

    target: str
    variant: str
    num_warps: int
    num_stages: int
    resources: Resources | None = None
    problems: list[str] = field(default_factory=list)


def check(targets: Sequence[str], workers: int, names: Sequence[str] = ()) -> Iterator[Check]:
    """Compiles every variant of every target in several processes; yields outcomes in order.

    Args:
        targets: of `TARGETS`.
        workers: processes.
        names: only variants whose names hold one of these; all where none is given.

    Raises:
        ValueError: a file's list is wrong (`fastomni_kernels.aot.variants`), or the compiler took
            its process down.
    """
    jobs = [
        (target, index)
        for target in targets
        for index, variant in enumerate(variants(target))
        if not names or any(name in variant.name for name in names)
    ]
    if not jobs:
        raise ValueError(f"no variant's name holds {' or '.join(names)}")
    # A child that is forked from a process with threads may hang: children start afresh.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        outcomes = [pool.submit(check_one, *job) for job in jobs]
        for (target, index), outcome in zip(jobs, outcomes, strict=True):
            try:
                yield outcome.result()
            except BrokenProcessPool:
                name = variants(target)[index].name
                raise ValueError(
                    f"{target} {name}: the compiler crashed on it, or on a variant compiled beside "
                    "it; --workers 1 tells which"
                ) from None


def check_one(target: str, index: int) -> Check:
    """Compiles one variant and judges it; what the compiler raises becomes a problem."""
    variant = variants(target)[index]
    needs = None
    try:
        needs = compile_variant(variant, target)
        found = problems(needs, variant, target)
    except Exception as error:
        found = [f"does not compile: {type(error).__name__}: {error}"]
    return Check(
        target=target,
        variant=variant.name,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        resources=needs,
        problems=found,
    )


def row(outcome: Check) -> list[str]:
    """One line of the table; dashes where the kernel did not compile."""
    name, needs = outcome.variant, outcome.resources
    words = [name, str(outcome.num_warps), str(outcome.num_stages)]
    return words + (["-"] * (len(COLUMNS) - 3) if needs is None else figures(needs))


def figures(needs: Resources) -> list[str]:
    """The columns that are read from the binary."""
    return [
        str(needs.registers),
        str(needs.spills),
        str(needs.stack_bytes),
        f"{needs.shared_bytes / KIB:.1f}",
        " ".join(f"{count} {name}" for name, count in needs.tensor_cores.items()) or "0",
        str(needs.async_copies),
        f"{needs.binary_bytes / KIB:.0f}",
        f"{needs.seconds:.1f}",
    ]


def show(target: str, outcomes: Sequence[Check]) -> None:
    """Prints one target's table."""
    rows = [list(COLUMNS), *(row(outcome) for outcome in outcomes)]
    widths = [max(len(line[column]) for line in rows) for column in range(len(COLUMNS))]
    print(f"\n{target}: at most {TARGETS[target].shared_limit / KIB:.0f} KiB of shared memory")
    for line in rows:
        numbers = (word.rjust(width) for word, width in zip(line[1:], widths[1:], strict=True))
        print("  ".join([line[0].ljust(widths[0]), *numbers]))


def markdown(report: dict[str, Any], outcomes: dict[str, list[Check]]) -> Iterator[str]:
    """The lines of the page: where it comes from, what is wrong, one table per target."""
    where = report["environment"]
    commit = where["commit"] or "unknown"
    changes = " with uncommitted changes" if where["uncommitted_changes"] else ""
    yield "# What the kernels need, read from their binaries"
    yield ""
    yield f"{where['date']}, commit {commit}{changes}, triton {where['triton']};"
    yield f"compiled ahead of time on {where['device']}, {report['workers']} at once; no GPU is"
    yield "needed. Made by"
    yield ""
    yield f"    {report['command']}"
    yield ""
    yield "Registers are per thread. Spills: instructions that move registers to and from local"
    yield "memory; none may be in a kernel for sm_90. On gfx942: spilled registers; with no stack,"
    yield "scalar ones went to lanes of vector registers. Tensor cores, async copies: instructions"
    yield "in the binary; a float32 dot is exact and has none on NVIDIA. Seconds: of compilation."
    yield ""
    if report["problems"]:
        yield "## Problems"
        yield ""
        yield from (f"- {line.splitlines()[0]}" for line in report["problems"])
        yield ""
    for target, checked in outcomes.items():
        yield f"## {target} (at most {TARGETS[target].shared_limit / KIB:.0f} KiB of shared memory)"
        yield ""
        yield "| " + " | ".join(COLUMNS) + " |"
        yield "| --- |" + " ---: |" * (len(COLUMNS) - 1)
        yield from ("| " + " | ".join(row(outcome)) + " |" for outcome in checked)
        yield ""


def command_line(options: argparse.Namespace) -> str:
    """The command that makes the same page again, from the top of a checkout."""
    words = ["python", "bench/aot.py"]
    if list(options.targets) != list(TARGETS):
        words += ["--targets", *options.targets]
    if options.names:
        words += ["--names", *options.names]
    if options.markdown:
        path = options.markdown.resolve()
        inside = path.is_relative_to(REPOSITORY)
        words += ["--markdown", str(path.relative_to(REPOSITORY) if inside else path)]
    return " ".join(words)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--names", nargs="+", default=[], help="only variants whose names hold one of these"
    )
    parser.add_argument("--workers", type=int, default=2, help="kernels compiled at once")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error("--workers must be 1 or more")
    options.targets = list(dict.fromkeys(options.targets))
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    outcomes: dict[str, list[Check]] = {}
    try:
        # Before any time is spent: whether the files list what they should.
        found = [
            f"{target} {name}: no variant compiles it"
            for target in options.targets
            for name in unlisted(target)
        ]
        for target in options.targets:
            outcomes[target] = list(check([target], options.workers, options.names))
            show(target, outcomes[target])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    checks = [outcome for checked in outcomes.values() for outcome in checked]
    found += [f"{each.target} {each.variant}: {text}" for each in checks for text in each.problems]
    report = {
        "environment": environment(["triton"]),
        "command": command_line(options),
        "workers": options.workers,
        "problems": found,
        "results": [dataclasses.asdict(outcome) for outcome in checks],
    }
    if options.markdown:
        text = "\n".join(markdown(report, outcomes))
        options.markdown.write_text(text.rstrip() + "\n", encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\n{len(checks)} variants, triton {triton.__version__}, {len(found)} problems")
    for problem in found:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
