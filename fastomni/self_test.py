"""What `fastomni.doctor` tries out: kernels, the decoder's functions and clip decoding, tiny sizes.

Every function runs as a user's call would, on this machine's device and with the backend that is
chosen there, and is held against a definition in float64 on the CPU: `fastomni_kernels.reference`,
or the textbook formula below. An error is the largest difference divided by the definition's
largest value.

Shapes: N prompts, G completions, S sequences, M completion tokens, H hidden, V vocabulary, Hq query
heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

import itertools
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fastomni_kernels as kernels
from fastomni.data.demo_clip import write_clip
from fastomni.data.demo_face import FRAMES_PER_SECOND
from fastomni.data.demo_voice import SAMPLING_RATE
from fastomni.data.media import probe, read_frames, read_waveform
from fastomni.model import elementwise
from fastomni_kernels import GroupLayout, LossOptions, reference

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# What an error is divided by where the definition's values are all smaller.
SMALLEST_SCALE = 1e-3
# A lossy codec at its fastest setting, as a share of full brightness.
PICTURE_BOUND = 0.05
TONE_HZ = 440.0

LAYOUT = GroupLayout.build((5, 3), ((4, 0, 2), (1, 3, 2)))
OPTIONS = LossOptions(beta=0.04)


@dataclass(frozen=True)
class Outcome:
    """One line of the self-test.

    Attributes:
        name: what was tried.
        ok: whether it ran and all errors are within the bound.
        forward: error of the results; None where there is none to measure.
        backward: error of the gradients; None where there are none.
        bound: largest error that is taken for rounding.
        detail: what ran, or the traceback.
    """

    name: str
    ok: bool
    forward: float | None = None
    backward: float | None = None
    bound: float | None = None
    detail: str = ""


Compute = Callable[..., "Tensor | Sequence[Tensor]"]


def run_self_test(device: torch.device) -> list[Outcome]:
    """Tries everything; nothing is raised, what fails is told in its line."""
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    cases = [*_loss_cases(device), *_attention_cases(device, half), *_decoder_cases(device)]
    trials = [(case.name, partial(_compare, case, device)) for case in cases]
    for suffix in (".mp4", ".webm"):
        name = f"decode a clip ({suffix})"
        trials.append((name, partial(_clip, name, suffix)))
    outcomes = []
    for name, trial in trials:
        try:
            outcomes.append(trial())
        except Exception:  # any failure at all is this line's result
            outcomes.append(Outcome(name, ok=False, detail=traceback.format_exc().strip()))
    return outcomes


@dataclass(frozen=True)
class _Case:
    """A function as a user calls it, its definition, and float64 inputs of both."""

    name: str
    compute: Compute
    definition: Compute
    inputs: Sequence[Tensor]
    trains: bool = True
    dtype: torch.dtype = torch.float32


def _loss_cases(device: torch.device) -> list[_Case]:
    tokens, sequences = LAYOUT.num_completion_tokens, LAYOUT.num_sequences
    layout = GroupLayout.build(LAYOUT.prompt_lengths, LAYOUT.completion_lengths, device)
    ids = torch.arange(tokens) * 7 % 37
    hidden, weight = _random(tokens, 8), _random(37, 8, seed=1) / 3
    # Near the log-probs of the policy, so that some ratios are clipped and others are not.
    logprobs = _logprobs(hidden @ weight.T, ids, 1.0)[0]
    advantages = _random(sequences)
    old, base = (logprobs + _random(tokens, seed=seed) / 4 for seed in (2, 3))
    constants = [x.float().to(device) for x in (advantages, old, base)]

    def loss_of(logprobs: Tensor) -> Tensor:
        return _grpo_loss(logprobs, advantages, old, base)

    def from_hidden(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss_of(_logprobs(hidden @ weight.T, ids, 1.0)[0])

    def ours(function: Callable[..., Any], *inputs: Tensor) -> Tensor:
        given = dict(zip(("old_logprobs", "reference_logprobs"), constants[1:], strict=True))
        if len(inputs) == 1:
            return function(*inputs, constants[0], layout, OPTIONS, **given)[0]
        return function(*inputs, ids.to(device), constants[0], layout, OPTIONS, **given)[0]

    return [
        _Case(
            "group_advantages",
            lambda rewards: kernels.group_advantages(rewards).advantages,
            lambda rewards: reference.group_advantages(rewards)[0],
            [_random(3, 4)],
            trains=False,
        ),
        _Case(
            "gather_logprobs",
            lambda logits: kernels.gather_logprobs(logits, ids.to(device), 0.7),
            lambda logits: _logprobs(logits, ids, 0.7),
            [_random(tokens, 37)],
        ),
        _Case(
            "linear_logprobs",
            lambda hidden, weight: kernels.linear_logprobs(hidden, weight, ids.to(device), 0.7),
            lambda hidden, weight: _logprobs(hidden @ weight.T, ids, 0.7),
            [hidden, weight],
        ),
        _Case(
            "kl_penalty",
            lambda logprobs: kernels.kl_penalty(logprobs, constants[2]),
            lambda logprobs: (base - logprobs).exp() - (base - logprobs) - 1,
            [logprobs],
        ),
        _Case("grpo_loss", partial(ours, kernels.grpo_loss), loss_of, [logprobs]),
        _Case(
            "linear_grpo_loss",
            partial(ours, kernels.linear_grpo_loss),
            from_hidden,
            [hidden, weight],
        ),
    ]


def _attention_cases(device: torch.device, half: torch.dtype) -> list[_Case]:
    layout = GroupLayout.build(LAYOUT.prompt_lengths, LAYOUT.completion_lengths, device)
    heads = [_random(LAYOUT.num_rows, count, 16, seed=i) for i, count in enumerate((4, 2, 2))]
    cu = torch.tensor([0, 9, 9, 14, LAYOUT.num_rows], dtype=torch.int32)
    moved = cu.to(device)
    # Queries of 6 sequences, keys and values of 2 prompts and of the sequences' own tokens.
    cached = [_random(6, 4, 16), _random(8, 2, 16, seed=1), _random(8, 2, 16, seed=2)]
    own = [_random(6, 5, 2, 16, seed=3), _random(6, 5, 2, 16, seed=4)]
    newest = [_random(6, 2, 16, seed=5), _random(6, 2, 16, seed=6)]
    angles = _random(6, 1, 8, seed=7).repeat(1, 1, 2)
    seeds = torch.arange(6)

    def decode(function: Callable[..., Tensor], *x: Tensor) -> Tensor:
        offsets, lengths, owners = (
            torch.tensor(counts, dtype=torch.int32, device=x[0].device)
            for counts in ([0, 5, 8], [4, 0, 5, 3, 1, 4], [0, 1, 0, 1, -1, 1])
        )
        # What is appended is written into the caches that are given.
        own_k, own_v, new_k, new_v, angles = (y.clone() for y in x[3:])
        signs = angles.new_tensor([-1.0] * 8 + [1.0] * 8)
        rotation = (angles.cos(), angles.sin() * signs)
        new = {"new_k": new_k, "new_v": new_v, "rotation": rotation}
        out = function(x[0], x[1], x[2], offsets, own_k, own_v, lengths, owners, **new)
        return torch.cat([y.flatten() for y in (out, own_k, own_v)])

    def most_likely(logits: Tensor) -> list[Tensor]:
        return [logits.argmax(-1).double(), (logits / 0.7).log_softmax(-1).amax(-1)]

    def sampled(logits: Tensor) -> list[Tensor]:
        drawn = kernels.sample(logits, seeds.to(device), 0, 0.7, top_k=1)
        return [drawn.tokens.to(drawn.logprobs.dtype), drawn.logprobs]

    return [
        _Case(
            "prefix_attention",
            lambda q, k, v: kernels.prefix_attention(q, k, v, layout),
            lambda q, k, v: reference.prefix_attention(q, k, v, LAYOUT),
            heads,
        ),
        _Case(
            "prefix_decode",
            partial(decode, kernels.prefix_decode),
            partial(decode, reference.prefix_decode),
            [*cached, *own, *newest, angles],
            trains=False,
        ),
        _Case(
            "flash_varlen",
            lambda q, k, v: kernels.flash_varlen(q, k, v, moved, moved, 9, 9, causal=True),
            lambda q, k, v: reference.flash_varlen(q, k, v, cu, cu, causal=True),
            heads,
            dtype=half,
        ),
        _Case("sample", sampled, most_likely, [_random(6, 37)], trains=False),
    ]


def _decoder_cases(device: torch.device) -> list[_Case]:
    angles = _random(7, 8)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    rotation = tuple(
        torch.cat((first, second), -1)[:, None].float().to(device)
        for first, second in ((angles.cos(), angles.cos()), (-angles.sin(), angles.sin()))
    )

    def turned(heads: Tensor) -> Tensor:
        pairs = torch.complex(heads[..., :8], heads[..., 8:]) * turn
        return torch.cat((pairs.real, pairs.imag), -1)

    return [
        _Case(
            "rms_norm",
            lambda hidden, weight: elementwise.rms_norm(hidden, weight, 1e-6),
            lambda x, weight: weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(),
            [_random(7, 24), _random(24, seed=1)],
        ),
        _Case(
            "rotate",
            lambda heads: torch.cat(elementwise.rotate(heads, (rotation[0], rotation[1]), 4), 1),
            turned,
            [_random(7, 6, 16)],
        ),
        _Case(
            "swiglu",
            elementwise.swiglu,
            lambda x: F.silu(x[:, :12]) * x[:, 12:],
            [_random(7, 24)],
        ),
    ]


def _random(*shape: int, seed: int = 0) -> Tensor:
    """Made-up numbers that are the same in every run, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _logprobs(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def _grpo_loss(logprobs: Tensor, advantages: Tensor, old: Tensor, base: Tensor) -> Tensor:
    """The clipped ratio with a k3 penalty, mean of each completion, then of all completions."""
    lengths = [length for group in LAYOUT.completion_lengths for length in group]
    ends = list(itertools.accumulate(lengths))
    losses = [logprobs.sum() * 0]
    for end, length, advantage in zip(ends, lengths, advantages, strict=True):
        rows = slice(end - length, end)
        ratio = (logprobs[rows] - old[rows]).exp()
        objective = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        distance = base[rows] - logprobs[rows]
        penalty = distance.exp() - distance - 1
        losses.append((OPTIONS.beta * penalty - objective).sum() / max(length, 1))
    return torch.stack(losses).sum() / len(lengths)


def _compare(case: _Case, device: torch.device) -> Outcome:
    """Runs both and measures results and, where the function trains something, gradients."""
    # Both start from the same numbers, those that the smaller type can hold.
    given = [x.to(device, case.dtype).requires_grad_(case.trains) for x in case.inputs]
    wide = [x.detach().to("cpu", torch.float64).requires_grad_(case.trains) for x in given]
    found, wanted = _listed(case.compute(*given)), _listed(case.definition(*wide))
    forward, backward = _error(found, wanted), None
    if case.trains:
        directions = [_random(*x.shape, seed=9) for x in wanted]
        moved = [x.to(y) for x, y in zip(directions, found, strict=True)]
        gradients = torch.autograd.grad(found, given, moved)
        backward = _error(gradients, torch.autograd.grad(wanted, wide, directions))
    bound = BOUNDS[case.dtype]
    # A NaN is within no bound.
    ok = forward <= bound and (backward is None or backward <= bound)
    return Outcome(case.name, ok, forward, backward, bound, str(case.dtype))


def _listed(results: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    errors = [
        (a.detach().to("cpu", torch.float64) - b.detach()).abs().max()
        / max(SMALLEST_SCALE, float(b.detach().abs().max()))
        for a, b in zip(found, wanted, strict=True)
    ]
    # Tensor.max, unlike Python's, hands a NaN on.
    return float(torch.stack(errors).max())


def _clip(name: str, suffix: str) -> Outcome:
    """Writes a clip of changing colours and one tone, and reads it back."""
    shades = np.linspace(40, 200, 12)[:, None] + np.array([0, 20, 40])
    pictures = np.broadcast_to(shades[:, None, None], (12, 64, 64, 3)).astype(np.uint8)
    seconds = len(pictures) / FRAMES_PER_SECOND
    times = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    tone = (0.5 * np.sin(2 * np.pi * TONE_HZ * times)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip{suffix}"
        write_clip(path, pictures, tone)
        codecs = probe(path)
        frames, chosen = read_frames(path, 4)
        sound = read_waveform(path, SAMPLING_RATE)
    error = float(np.abs(frames.astype(float) - pictures[chosen]).mean() / 255)
    heard = float(np.fft.rfft(sound).__abs__().argmax() * SAMPLING_RATE / len(sound))
    ok = error <= PICTURE_BOUND and abs(heard - TONE_HZ) < 2 / seconds
    assert codecs.video is not None and codecs.audio is not None
    detail = f"{codecs.video.codec} and {codecs.audio.codec}, a tone of {heard:.0f} Hz"
    return Outcome(name, ok, error, None, PICTURE_BOUND, detail)
