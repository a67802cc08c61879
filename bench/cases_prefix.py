"""Case of prefix_attention: G completions attend to one copy of their prompt, and to themselves.

The decision that is not obvious: bytes and FLOPs are counted on the shared rows for everybody, so a
peer that repeats the prompt for every completion has a low rate; how much more arithmetic that is
stands beside the result. Repeated rows are made, and their gradients folded, outside the clock: a
trainer that repeats prompts has them repeated all through the model.

Shapes: N prompts of up to P tokens, G completions of each of up to C tokens, T packed rows, Hq
query heads, Hkv key-value heads, D head size. The last size of the case is the shortest length in
percent of the longest, of prompts and completions alike; at 100 all are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

import fastomni_kernels
from bench import prefix_peers, two_pass
from bench.cases import FORWARD, TRAINING, Call, Case, Cost, Problem, Provider
from bench.cases_attention import Attention, attention_call
from bench.cases_policy import NO_GPU, compiled, identity
from bench.definitions import exact_prefix_attention, generator
from fastomni_kernels import GroupLayout

DIMENSIONS = ("N", "P", "G", "C", "Hq", "Hkv", "D", "shortest")
# Heads of the 0.5B decoder, and all lengths equal.
_QWEN = (14, 2, 64, 100)
SIZES = {
    "small": (1, 256, 8, 32, *_QWEN),
    "full": (8, 1500, 8, 200, *_QWEN),
    "cpu": (1, 976, 8, 64, *_QWEN),
    "ragged": (4, 512, 8, 64, 14, 2, 64, 40),
    "full-g16": (8, 1500, 16, 200, *_QWEN),
}


def star(
    prompts: int, middle: tuple[int, int, int], *arms: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Vary P, G and C one at a time around a middle (P, G, C)."""
    found: list[tuple[int, ...]] = [middle]
    for place, values in enumerate(arms):
        found += [(*middle[:place], value, *middle[place + 1 :]) for value in values]
    return tuple((prompts, *sizes, *_QWEN) for sizes in dict.fromkeys(found))


SWEEP = star(2, (1024, 8, 128), (512, 1024, 2048, 4096), (4, 8, 16, 32), (64, 128, 256, 512))
GRID = tuple(
    (2, *sizes, *_QWEN)
    for sizes in product((512, 1024, 2048, 4096), (4, 8, 16, 32), (64, 128, 256, 512))
)
# What a CPU can do in minutes.
CPU_SWEEP = star(1, (512, 8, 64), (512, 1024, 2048), (4, 8, 16, 32), (64, 128, 256, 512))


def ragged(number: int, longest: int, shortest: int) -> list[int]:
    """Return lengths from `longest` down to `shortest` percent of it, in no order.

    Steps of the golden ratio: any stretch of the list is spread evenly over the range.
    """
    spread = longest - max(1, longest * shortest // 100)
    return [longest - round(spread * (index * 0.6180339887 % 1)) for index in range(number)]


def lengths(sizes: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """Lengths of the prompts, and of the completions of each."""
    prompts, longest_prompt, generations, longest, *_, shortest = sizes
    own = iter(ragged(prompts * generations, longest, shortest))
    return (
        ragged(prompts, longest_prompt, shortest),
        [[next(own) for _ in range(generations)] for _ in range(prompts)],
    )


def pairs(sizes: Sequence[int]) -> tuple[int, int]:
    """Count the pairs of a query and a key that it sees, on shared rows and on repeated rows."""
    shared = repeated = 0
    for prompt, completions in zip(*lengths(sizes), strict=True):
        shared += prompt * (prompt + 1) // 2
        shared += sum(own * prompt + own * (own + 1) // 2 for own in completions)
        repeated += sum((prompt + own) * (prompt + own + 1) // 2 for own in completions)
    return shared, repeated


def repeated_work(sizes: Sequence[int]) -> float:
    """How many times the arithmetic repeated rows need."""
    shared, repeated = pairs(sizes)
    return repeated / shared


def prefix_cost(mode: str) -> Callable[[Sequence[int], int], Cost]:
    """As of any attention (`cases_attention.attention_cost`), on the shared rows."""
    factor, q_passes, k_passes = (4, 2, 2) if mode == FORWARD else (14, 6, 6)

    def cost(sizes: Sequence[int], itemsize: int) -> Cost:
        heads, key_heads, size = sizes[4:7]
        prompts, completions = lengths(sizes)
        rows = sum(prompts) + sum(map(sum, completions))
        elements = (q_passes * heads + k_passes * key_heads) * rows * size
        text = (
            f"on shared rows: bytes ({q_passes} Hq + {k_passes} Hkv) T D e, "
            f"FLOPs {factor} Hq D (sum P (P + 1) / 2 + sum C (P + (C + 1) / 2)), e = {itemsize}"
        )
        return Cost(
            float(elements * itemsize), float(factor * heads * size * pairs(sizes)[0]), text
        )

    return cost


def prefix_problem(mode: str) -> Callable[[Sequence[int], torch.device, torch.dtype], Problem]:
    """Normal queries, keys and values of packed groups."""

    def make(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
        heads, key_heads, size, shortest = sizes[4:]
        if heads % key_heads:
            raise ValueError(f"prefix_attention: Hq={heads} is no multiple of Hkv={key_heads}")
        if shortest > 100:
            raise ValueError(f"prefix_attention: shortest={shortest} is a percentage, 1 to 100")
        prompts, completions = lengths(sizes)
        layout = GroupLayout.build(prompts, completions, device)
        draw = generator(device)

        def normal(number: int) -> Tensor:
            values = torch.randn(layout.num_rows, number, size, generator=draw, device=device)
            return values.to(dtype)

        inputs = {"q": normal(heads), "k": normal(key_heads), "v": normal(key_heads)}
        seed = normal(heads)
        wanted = seed if mode == TRAINING else None
        q, k, v = inputs.values()
        exact = exact_prefix_attention(q, k, v, prompts, completions, wanted)
        exact["output_repeated"] = exact["output"][layout.repeat_rows]
        for x in inputs.values():
            x.requires_grad_(mode == TRAINING)
        return Problem({**inputs, "seed": seed}, exact, settings={"layout": layout})

    return make


def ours(problem: Problem, backend: str) -> Attention:
    """fastomni_kernels.prefix_attention."""
    layout = problem.settings["layout"]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastomni_kernels.prefix_attention(q, k, v, layout, backend=backend)

    return function


def shared_peers(mode: str) -> Iterator[Provider]:
    """Peers that work on the shared rows as ours does."""

    def provider(
        name: str,
        make: Callable[[Problem], Attention],
        wrap: Callable[[Attention], Attention] = identity,
        devices: tuple[str, ...] = ("cpu", "cuda"),
        obstacle: str = "needs a CUDA device",
        in_sweeps: bool = True,
    ) -> Provider:
        def prepare(problem: Problem) -> Call:
            return attention_call(problem, wrap(make(problem)), mode)

        return Provider(name, prepare, devices=devices, obstacle=obstacle, in_sweeps=in_sweeps)

    if mode == FORWARD:
        yield provider("FlexAttention", prefix_peers.flex)
        yield provider("two-pass flash (Hydragen)", two_pass.attention)
    else:
        yield provider(
            "FlexAttention", prefix_peers.flex, devices=("cuda",),
            obstacle="FlexAttention has no backward on a CPU",
        )  # fmt: skip
    # All scores exist at once: at the large sizes of a sweep there is no room for them.
    yield provider("torch eager", prefix_peers.eager, in_sweeps=False)
    yield provider("torch.compile", prefix_peers.eager, compiled, in_sweeps=False)


def prefix_case(mode: str) -> Case:
    """prefix_attention in one mode."""

    def our(backend: str) -> Callable[[Problem], Call]:
        return lambda problem: attention_call(problem, ours(problem, backend), mode)

    sweeps = {"sweep": SWEEP, "grid": GRID}
    return Case(
        "prefix_attention",
        mode,
        DIMENSIONS,
        SIZES,
        prefix_cost(mode),
        prefix_problem(mode),
        (
            Provider("fastomni triton", our("triton"), True, ("triton",), ("cuda",), NO_GPU),
            Provider(
                "fastomni reference",
                our("reference"),
                True,
                devices=("cpu",),
                obstacle="the dense pieces are a CPU's; on a GPU it would be torch eager",
            ),
            *map(partial(prefix_peers.on_repeated_rows, mode), prefix_peers.REPEATED),
            *shared_peers(mode),
        ),
        sweeps=sweeps | ({"cpu-sweep": CPU_SWEEP} if mode == TRAINING else {}),
        repeated_work=repeated_work,
    )


CASES = (prefix_case(FORWARD), prefix_case(TRAINING))
