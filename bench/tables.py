"""A report of the kernel benchmark as text, in units that a reader can take in."""

from __future__ import annotations

from typing import Any

from bench import sharing

# Factors and units, largest first.
SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
_BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_RATES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))

CPU_NOTE = (
    "On a CPU: our rows are the plain torch paths that run on a CPU, and say nothing of the Triton "
    "kernels, which are not timed here."
)


def in_units(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """Three significant digits in the largest unit that leaves at least 1 before the point."""
    factor, unit = next(((f, u) for f, u in units if value >= f), units[-1])
    scaled = value / factor
    digits = max(0, 2 - len(str(int(scaled))) + 1)
    return f"{scaled:.{digits}f} {unit}".rstrip()


def seconds(value: float) -> str:
    """0.00123 -> 1.23 ms."""
    return in_units(value, SECONDS)


def size(value: float) -> str:
    """1536 -> 1.50 KiB."""
    return in_units(value, _BYTES)


def rate(value: float, what: str) -> str:
    """(2.5e9, "B/s") -> 2.50 GB/s."""
    text = in_units(value, _RATES)
    number, _, prefix = text.partition(" ")
    return f"{number} {prefix}{what}"


def heading(result: dict[str, Any]) -> str:
    """Case, sizes and element type."""
    shape = " ".join(f"{name}={number}" for name, number in result["sizes"].items())
    return f"{result['name']}  {shape}  {result['dtype']}"


def largest_error(row: dict[str, Any]) -> str:
    """The answer that is nearest to its bound, with its largest and relative error."""
    name, error = max(
        row["errors"].items(), key=lambda item: item[1]["relative"] / item[1]["bound"]
    )
    return f"{name} {error['largest']:.0e} / {error['relative']:.0e}"


def show_case(result: dict[str, Any]) -> None:
    """Print one case as a table."""
    needed = result["needed"]
    print(f"\n{heading(result)}")
    print(
        f"  needs {size(needed['bytes'])} and {rate(needed['flops'], 'FLOP')} "
        f"({needed['formula']}); at best {seconds(result['floor_s'])}, bound by "
        f"{result['bound_by']}"
    )
    if comparison := sharing.sentence(result):
        print(f"  ours: {comparison}")
    columns = ("median", "least", "most", "bytes", "FLOPs", "ceiling", "extra memory")
    titles = "".join(f"{title:>13}" for title in columns)
    print(f"  {'':<28}{titles}  largest error, absolute / relative")
    for row in result["rows"]:
        mark = "*" if row["ours"] else " "
        name = f"{mark} {row['provider']:<28}"
        if row["status"] == "refused":
            print(f"{name}  not timed: {row['reason']}")
        elif row["status"] != "timed":
            label = "not available" if row["status"] == "unavailable" else row["status"]
            print(f"{name}  {label}: {row['reason']}")
        else:
            cells = (
                seconds(row["median_s"]),
                seconds(row["min_s"]),
                seconds(row["max_s"]),
                rate(row["bytes_per_s"], "B/s"),
                rate(row["flops_per_s"], "F/s"),
                f"{100 * row['share_of_ceiling']:.1f} %",
                size(row["extra_bytes"]),
            )
            print(name + "".join(f"{cell:>13}" for cell in cells) + f"  {largest_error(row)}")


def show(report: dict[str, Any]) -> None:
    """Print the whole report."""
    where, ceilings = report["environment"], report["ceilings"]
    graphics = where["accelerator"]
    device = graphics["name"] if graphics else f"{where['device']}, {where['threads']} threads"
    versions = ("torch", "triton", "transformers", "trl", "liger-kernel")
    print(f"{device}; " + ", ".join(f"{name} {where[name]}" for name in versions if where[name]))
    rates = ", ".join(f"{n} {rate(x, 'FLOP/s')}" for n, x in ceilings["flops_per_s"].items())
    copy = rate(ceilings["bytes_per_s"], "B/s")
    print(f"ceilings of this machine in this run: copy {copy}; matrix product {rates}")
    if graphics is None:
        print(CPU_NOTE)
    print(
        "* ours; bytes and FLOPs are what the task needs, per second of the median; ceiling is the "
        "least time over the median;\n  extra memory is the peak beyond inputs, outputs and "
        "gradients; providers are timed in turn, warm-up excluded."
    )
    for result in report["cases"]:
        show_case(result)
    print("\ngoals")
    for goal in report["goals"]:
        value = "" if goal["measured"] is None else f" ({goal['measured']:.3g})"
        print(f"  {goal['verdict']:<13}{goal['goal']}{value}")
