"""What a kernel benchmark is made of: cases, their sizes and costs, and who computes them.

A case is one function in one mode ("forward", or "forward+backward" with the gradients as part of
the answer). Its problem is made once per size and shared by all providers: ours and the peers. The
decision that is not obvious: a provider is prepared apart from its call, so that what a peer needs
before it can start (padding, masks, a module) is neither timed nor counted as memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

# Outputs and gradients by name; names of gradients begin with "grad_".
Answer = dict[str, Tensor]
Call = Callable[[], Answer]

FORWARD, TRAINING = "forward", "forward+backward"

# Largest relative error (see `bench.errors`) of values and of gradients: of the project's own
# kernels, and of everybody else's. The latter let pass what is common practice: torch's fp32
# log_softmax errs by 1e-4 nats over 151,936 words on a CPU, which a gradient, holding 1 - p,
# magnifies to 2e-2 in its worst row; and in bf16 a logit of 16 is rounded to a sixteenth as soon as
# it is written. What has forgotten a term errs by 1 and is refused by both.
OUR_BOUNDS = {torch.float32: (1e-5, 2e-3), torch.bfloat16: (1e-3, 5e-2)}
BOUNDS = {torch.float32: (1e-4, 0.1), torch.bfloat16: (2e-2, 0.5)}


@dataclass(frozen=True)
class Cost:
    """What an ideal implementation would have to do.

    Attributes:
        bytes: read from and written to memory, each tensor once per pass that needs it.
        flops: a multiplication and an addition are two.
        formula: both, in the letters of the case's dimensions.
    """

    bytes: float
    flops: float
    formula: str


@dataclass
class Problem:
    """Inputs of one case at one size, and the right answer.

    Attributes:
        inputs: by name; leaves that need gradients say so.
        exact: float64 answers by name.
        scales: size that an error of a scalar answer is measured against; elsewhere the answer's
            own size is taken.
        settings: Python numbers that belong to the problem (the temperature, a list of lengths).
    """

    inputs: dict[str, Tensor]
    exact: Answer
    scales: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.inputs[name]


def as_it_is(problem: Problem, answer: Answer) -> Answer:
    """The answer is compared in the form in which it was computed."""
    return answer


@dataclass(frozen=True)
class Provider:
    """One implementation of a case.

    Attributes:
        name: as it is printed.
        prepare: problem -> the call that is timed; may raise what tells why it cannot run.
        ours: whether it is the project's own function.
        strict: whether its errors are held to OUR_BOUNDS.
        modules: that must be installed.
        devices: device types it runs on.
        obstacle: why it does not run elsewhere.
        in_sweeps: whether it is worth its time at every size of a sweep.
        finish: brings an answer into the form that has an exact one, untimed: folds gradients of
            repeated rows, looks up the probability of a token that was drawn.
    """

    name: str
    prepare: Callable[[Problem], Call]
    ours: bool = False
    modules: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    obstacle: str = "needs a CUDA device"
    strict: bool = False
    in_sweeps: bool = True
    finish: Callable[[Problem, Answer], Answer] = as_it_is

    def unavailable(self, device: str) -> str:
        """Return why it cannot run on a device of this type; empty where it can."""
        missing = [name for name in self.modules if not installed(name)]
        if missing:
            return f"{', '.join(missing)} is not installed"
        return "" if device in self.devices else self.obstacle


@dataclass(frozen=True, eq=False)
class Case:
    """One function in one mode.

    Attributes:
        function: its public name.
        mode: FORWARD or TRAINING.
        dimensions: letters of its sizes.
        sizes: the named ones.
        cost: (sizes, bytes per element) -> Cost.
        problem: (sizes, device, dtype) -> Problem.
        providers: the project's first.
        half_on_gpu: whether the inputs are bf16 on a GPU; else they are fp32 everywhere.
        sweeps: named lists of sizes.
        repeated_work: sizes -> how many times the arithmetic is needed where every completion has a
            prompt of its own; None where nothing is shared.
    """

    function: str
    mode: str
    dimensions: tuple[str, ...]
    sizes: Mapping[str, tuple[int, ...]]
    cost: Callable[[Sequence[int], int], Cost]
    problem: Callable[[Sequence[int], torch.device, torch.dtype], Problem]
    providers: tuple[Provider, ...]
    half_on_gpu: bool = True
    sweeps: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    repeated_work: Callable[[Sequence[int]], float] | None = None

    def named(self, size: str) -> tuple[tuple[int, ...], ...]:
        """All sizes that a name stands for; empty where it is no name of this case."""
        one = (tuple(self.sizes[size]),) if size in self.sizes else ()
        return one + self.sweeps.get(size, ())

    @cached_property
    def in_sweeps(self) -> Case:
        """The case with those of its providers that take part in sweeps."""
        return replace(self, providers=tuple(p for p in self.providers if p.in_sweeps))

    @property
    def name(self) -> str:
        """Function and mode, "function/mode"."""
        return f"{self.function}/{self.mode}"

    def dtype(self, device: torch.device) -> torch.dtype:
        """Element type of the inputs on a device."""
        half = self.half_on_gpu and device.type == "cuda"
        return torch.bfloat16 if half else torch.float32

    def bound(self, answer: str, device: torch.device, strict: bool) -> float:
        """Largest relative error that an answer may have to be timed."""
        bounds = OUR_BOUNDS if strict else BOUNDS
        values, gradients = bounds[self.dtype(device)]
        return gradients if answer.startswith("grad_") else values


@cache
def installed(module: str) -> bool:
    """Whether a module can be found (its parents are imported, it is not)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def gradients(
    outputs: Sequence[Tensor], inputs: Mapping[str, Tensor], seeds: Sequence[Tensor] | None = None
) -> Answer:
    """Differentiate `outputs` (weighted by `seeds`) and name the gradients after the inputs."""
    found = torch.autograd.grad(outputs, list(inputs.values()), seeds)
    return {f"grad_{name}": grad for name, grad in zip(inputs, found, strict=True)}
