"""How far an answer is from the float64 definition, and whether it may be timed.

The decision that is not obvious: the relative error of a matrix is that of its worst row. A
gradient of the head has rows a million times smaller than others (words that were never sampled),
and an implementation that forgot them would pass any test against the largest number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Answer, Case, Problem

# Rows smaller than this share of the median row are measured against that: a row that is zero in
# exact arithmetic has no size of its own.
SMALLEST_ROW = 0.1
# Numbers that are widened to float64 at once: 256 MiB, beside a gradient of all logits of 4 GB.
CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True)
class Error:
    """Of one answer.

    Attributes:
        largest: largest absolute difference.
        relative: of a matrix, the largest over its rows of |row difference| / |row| (norms); else
            the largest difference over the largest exact value (or the problem's scale).
        bound: what `relative` may be.
    """

    largest: float
    relative: float
    bound: float

    @property
    def acceptable(self) -> bool:
        """Whether the error is within its bound; NaN is not."""
        return self.relative <= self.bound


def compare(answer: Tensor, exact: Tensor, scale: float | None = None) -> tuple[float, float]:
    """Return (largest absolute difference, relative error) of an answer.

    Raises:
        ValueError: another shape than the exact answer's.
    """
    if answer.shape != exact.shape:
        raise ValueError(f"shape {list(answer.shape)}, should be {list(exact.shape)}")
    if answer.dim() < 2 or scale is not None:
        difference = (answer.double() - exact).abs()
        size = exact.abs().max().item() if scale is None else scale
        most = difference.max().item()
        return most, most / size if size else most
    answer, exact = answer.flatten(0, -2), exact.flatten(0, -2)
    largest: list[Tensor] = []
    differences: list[Tensor] = []
    sizes: list[Tensor] = []
    step = max(1, CHUNK_ELEMENTS // exact.shape[-1])
    for start in range(0, len(exact), step):
        rows = slice(start, start + step)
        difference = answer[rows].double() - exact[rows]
        largest.append(difference.abs().max())
        differences.append(difference.norm(dim=-1))
        sizes.append(exact[rows].norm(dim=-1))
    norms = torch.cat(sizes)
    nonzero = norms[norms > 0]
    smallest = SMALLEST_ROW * nonzero.median().item() if len(nonzero) else 1.0
    relative = torch.cat(differences) / norms.clamp(min=smallest)
    # max() of a tensor hands NaN on, Python's does not.
    return torch.stack(largest).max().item(), relative.max().item()


def check(
    case: Case, problem: Problem, answer: Answer, device: torch.device, strict: bool
) -> dict[str, Error]:
    """Compare everything a provider computed with the exact answers.

    Raises:
        ValueError: an answer of the wrong shape, or none that could be compared.
    """
    errors = {}
    for name, value in answer.items():
        if name not in problem.exact:
            raise ValueError(f"{name} has no exact answer to be compared with")
        try:
            largest, relative = compare(value, problem.exact[name], problem.scales.get(name))
        except ValueError as error:
            raise ValueError(f"{name} has {error}") from None
        errors[name] = Error(largest, relative, case.bound(name, device, strict))
    if not errors:
        raise ValueError("it gave no answer")
    return errors


def worst(errors: dict[str, Error]) -> tuple[str, Error]:
    """Return name and error of the answer that is nearest to, or furthest over, its bound."""

    def excess(item: tuple[str, Error]) -> float:
        ratio = item[1].relative / item[1].bound
        return ratio if ratio == ratio else float("inf")

    return max(errors.items(), key=excess)
