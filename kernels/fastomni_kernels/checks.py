"""Refusals shared by the public functions: what was wrong, where, and what to do.

They read shapes, dtypes, devices and host numbers. The one exception is the range of token ids,
which is looked at on the CPU alone (on a GPU it would stop the stream in every call) and inside the
operators, because `torch.compile` traces the public functions with tensors that hold no values.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

TEMPERATURES = (1e-6, 1e6)


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`."""
    if not condition:
        raise ValueError(message)


def check_kind(function: str, name: str, x: object, kind: type) -> None:
    """Refuse anything but an instance of `kind`."""
    if not isinstance(x, kind):
        raise ValueError(
            f"{function}: {name} is of type {type(x).__name__}; it must be a {kind.__name__}"
        )


def check_shape(function: str, name: str, x: Tensor, shape: Sequence[int | str]) -> None:
    """Refuse a tensor whose shape differs from `shape`; letters stand for any size."""
    check_kind(function, name, x, Tensor)
    have = x.shape
    # Compared before a message is made: a rollout asks for each layer of each token.
    if len(have) == len(shape):
        for want, size in zip(shape, have, strict=True):
            if want != size and not isinstance(want, str):
                break
        else:
            return
    wanted = ", ".join(map(str, shape))
    raise ValueError(f"{function}: {name} has shape {list(have)}; it must be [{wanted}]")


def check_float(function: str, **tensors: Tensor) -> None:
    """Refuse tensors that are not floats or lie on different devices."""
    devices = {x.device for x in tensors.values()}
    for name, x in tensors.items():
        require(
            x.is_floating_point(),
            f"{function}: {name} is {x.dtype}; it must be a float tensor",
        )
    require(
        len(devices) == 1,
        f"{function}: {', '.join(tensors)} lie on {sorted(map(str, devices))}; move them together",
    )


def check_ids(function: str, ids: Tensor, like: Tensor) -> None:
    """Refuse ids of another dtype than int64 or on another device than `like`."""
    require(ids.dtype == torch.int64, f"{function}: ids are {ids.dtype}; they must be torch.int64")
    require(
        ids.device == like.device,
        f"{function}: ids lie on {ids.device}, the rest on {like.device}; move them together",
    )


def check_id_range(function: str, ids: Tensor, vocabulary: int) -> None:
    """Refuse ids outside the vocabulary, on the CPU; called by operators, which see values."""
    if ids.device.type == "cpu" and len(ids):
        smallest, largest = (int(x) for x in ids.aminmax())
        require(
            smallest >= 0 and largest < vocabulary,
            f"{function}: ids go from {smallest} to {largest} but the vocabulary has {vocabulary} "
            "entries; drop padding ids before the call",
        )


def check_temperature(function: str, temperature: float) -> None:
    """Refuse a temperature that is not a number from 1e-6 to 1e6.

    Beyond them logits divided by it are all alike, or too far apart for fp32.
    """
    number = isinstance(temperature, Real) and not isinstance(temperature, bool)
    lowest, highest = TEMPERATURES
    require(
        number and lowest <= temperature <= highest,
        f"{function}: temperature={temperature!r}; it must be a positive number from {lowest:g} to "
        f"{highest:g} (greedy decoding is logits.argmax, not a temperature of 0)",
    )


def check_heads(function: str, q: Tensor, key_heads: int) -> None:
    """Refuse query heads [T, Hq, D] that are no multiple of the key heads."""
    require(
        key_heads > 0 and q.shape[1] % key_heads == 0,
        f"{function}: {q.shape[1]} query heads cannot be shared by {key_heads} key heads; the "
        "number of query heads must be a multiple",
    )
