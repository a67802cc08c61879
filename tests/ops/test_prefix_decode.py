"""One decode step: the definition against plain attention, and plain torch against the definition.

The fixture `decode_step` fills whatever must not be read with NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastomni_kernels import GroupLayout, prefix_decode, reference
from fastomni_kernels.shared_decode import _plan

Step = Callable[..., tuple[list[Tensor], dict[str, Any]]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.float16: 3e-3,
    torch.bfloat16: 3e-2,
}

# Prompts and, for each sequence, the prompt (some of none) and its length (some beyond 5 places).
prompts_strategy = st.lists(st.sampled_from([1, 2, 7, 30]), min_size=1, max_size=4)
sequences_strategy = st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 7)), max_size=8)
heads_strategy = st.sampled_from([(1, 1), (4, 2), (3, 3), (7, 1)])


def run(function: Callable[..., Tensor], tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """The result and both caches afterwards; the arguments stay as they are."""
    copies = [x.clone() for x in tensors]
    return [function(*copies, **options), copies[4], copies[5]]


def assert_equal(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, equal_nan=True)


def turned(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Heads times the unit complex numbers that a rotation stands for."""
    half = heads.shape[-1] // 2
    turn = torch.complex(rotation[0][..., :half], rotation[1][..., half:])
    product = torch.complex(heads[..., :half], heads[..., half:]) * turn
    return torch.cat((product.real, product.imag), -1)


def plain_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    offsets: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    lengths: Tensor,
    prompt_of: Tensor,
    new_k: Tensor | None = None,
    new_v: Tensor | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """torch's attention of each sequence over its own copy of all that it sees."""
    rows = []
    for s, (i, length) in enumerate(zip(prompt_of.tolist(), lengths.tolist(), strict=True)):
        if not 0 <= i < len(offsets) - 1:
            rows.append(torch.zeros_like(q[s]))
            continue
        stored = length - (new_k is not None and length <= suffix_k.shape[1])
        own = slice(0, max(0, stored))
        keys = [prefix_k[offsets[i] : offsets[i + 1]], suffix_k[s, own]]
        values = [prefix_v[offsets[i] : offsets[i + 1]], suffix_v[s, own]]
        query = q[s : s + 1]
        turn = None if rotation is None else (rotation[0][s : s + 1], rotation[1][s : s + 1])
        if new_k is not None and new_v is not None and 1 <= length <= suffix_k.shape[1]:
            key = new_k[s : s + 1]
            keys.append(key if turn is None else turned(key, turn))
            values.append(new_v[s : s + 1])
        query = query if turn is None else turned(query, turn)
        heads = (x.transpose(0, 1)[None] for x in (query, torch.cat(keys), torch.cat(values)))
        rows.append(F.scaled_dot_product_attention(*heads, enable_gqa=True)[0, :, 0])
    return torch.stack(rows) if rows else torch.zeros_like(q)


@given(prompts_strategy, sequences_strategy, heads_strategy, st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_definition_is_attention_over_copies(
    decode_step: Step,
    prompts: list[int],
    sequences: list[tuple[int, int]],
    heads: tuple[int, int],
    append: bool,
    rotate: bool,
) -> None:
    columns = [list(column) for column in zip(*sequences, strict=True)] or [[], []]
    tensors, options = decode_step(prompts, *columns, 5, heads, append=append, rotate=rotate)
    found = reference.prefix_decode(*(x.clone() for x in tensors), **options)
    wanted = plain_attention(*tensors, **options)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@given(
    prompts_strategy,
    sequences_strategy,
    heads_strategy,
    st.sampled_from(list(TOLERANCES)),
    st.booleans(),
    st.booleans(),
)
@example([7, 7, 7, 7], [(i // 2, 3) for i in range(8)], (4, 2), torch.float64, True, True)
@example([7, 7, 2], [(i // 2, 3) for i in range(6)], (4, 2), torch.float64, True, True)
@example([7, 2], [(i // 3, i) for i in range(6)], (4, 2), torch.float64, False, False)
@settings(max_examples=60, deadline=None)
def test_plain_torch_equals_the_definition(
    decode_step: Step,
    prompts: list[int],
    sequences: list[tuple[int, int]],
    heads: tuple[int, int],
    dtype: torch.dtype,
    append: bool,
    rotate: bool,
) -> None:
    columns = [list(column) for column in zip(*sequences, strict=True)] or [[], []]
    tensors, options = decode_step(
        prompts, *columns, 5, heads, dtype=dtype, append=append, rotate=rotate
    )
    found = run(prefix_decode, tensors, backend="reference", **options)
    assert found[0].is_contiguous()
    assert_equal(found, run(reference.prefix_decode, tensors, **options), TOLERANCES[dtype])


@pytest.mark.parametrize("backend", ["definition", "reference", "triton"])
def test_each_active_sequence_changes_one_place(decode_step: Step, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    lengths, prompt_of = [1, 5, 3, 2, 6, 0], [1, 0, -1, 2, 0, 1]
    tensors, options = decode_step([4, 2], prompt_of, lengths, 5)
    function: Callable[..., Tensor] = prefix_decode
    if backend == "definition":
        function = reference.prefix_decode
    else:
        options["backend"] = backend
    _, *caches = run(function, tensors, **options)
    keys = turned(options["new_k"], options["rotation"])
    for cache, before, new in zip(caches, tensors[4:6], (keys, options["new_v"]), strict=True):
        wanted = before.clone()
        for s, place in ((0, 0), (1, 4)):  # the others are not in use, have no token or no place
            wanted[s, place] = new[s]
        torch.testing.assert_close(cache, wanted, rtol=0, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("prompt_lengths", [(5, 5, 5), (5, 5, 3), (1, 4, 2)])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (3, 1)])
@pytest.mark.parametrize("suffix", [1, 4])
def test_decode_is_the_last_row_of_attention(
    prompt_lengths: tuple[int, ...], heads: tuple[int, int], suffix: int
) -> None:
    layout = GroupLayout.build(prompt_lengths, [[suffix] * 2] * len(prompt_lengths), DEVICE)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(layout.num_rows, n, 8, generator=generator).to(DEVICE, torch.float64)
        for n in (heads[0], heads[1], heads[1])
    )
    last = torch.tensor(layout.sequence_rows) + suffix - 1
    expected = reference.prefix_attention(q, k, v, layout)[last]
    # Places after the valid ones hold what an earlier rollout left there.
    own_k, own_v = (
        torch.cat([layout.pad_completions(x[layout.completion_rows], 0.0)] * 2, 1) for x in (k, v)
    )
    offsets = torch.tensor([0, *prompt_lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
    prompt_of = torch.arange(len(prompt_lengths), dtype=torch.int32, device=DEVICE)
    prompt_of = prompt_of.repeat_interleave(2)
    prefix = (k[layout.prompt_rows], v[layout.prompt_rows], offsets)
    lengths = torch.full_like(prompt_of, suffix)
    actual = prefix_decode(q[last], *prefix, own_k, own_v, lengths, prompt_of)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_sequence_that_sees_nothing_gets_zeros(decode_step: Step, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    tensors, _ = decode_step([0, 2], [0, 1, 0], [0, 0, 2], 3, append=False, rotate=False)
    found = prefix_decode(*tensors, backend=backend)
    assert not found[0].any() and found[1:].all()
    assert_equal([found], [reference.prefix_decode(*tensors)], 1e-12)


def test_views_and_an_explicit_scale(decode_step: Step) -> None:
    """Views of a fused projection, and keys whose heads do not lie together."""
    tensors, options = decode_step([7, 2], [1, 0, 0, 1], [1, 2, 2, 4], 4)
    wanted = run(reference.prefix_decode, tensors, **options, scale=0.3)
    fused = torch.cat((tensors[0], options["new_k"], options["new_v"]), 1)
    q, options["new_k"], options["new_v"] = fused.split([4, 2, 2], 1)
    apart = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors[1:3]]
    views = [q, *apart, *tensors[3:]]
    assert not any(x.is_contiguous() for x in views[:3])
    assert_equal(run(prefix_decode, views, **options, scale=0.3), wanted, 1e-12)
    elsewhere = q.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # neither heads nor elements
    assert_equal(run(prefix_decode, [elsewhere, *views[1:]], **options, scale=0.3), wanted, 1e-12)


def test_large_scores_do_not_overflow(decode_step: Step) -> None:
    tensors, options = decode_step([7, 2], [1, 0, 0], [1, 2, 2], 4, dtype=torch.float32)
    tensors[0] *= 1000
    found, *_ = run(prefix_decode, tensors, **options)
    options = {
        name: tuple(y.double() for y in x) if name == "rotation" else x.double()
        for name, x in options.items()
    }
    wide = [x.double() if x.is_floating_point() else x for x in tensors]
    wanted, *_ = run(reference.prefix_decode, wide, **options)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-2)


def test_products_stay_few() -> None:
    """What makes it fast, and no result shows: prompts that are alike make one run."""
    usual = _plan((0, 9, 18, 27, 30), (0, 0, 1, 1, 2, 2, 3, 3))
    assert usual.usual
    assert [(run.tokens, run.prompts, run.sequences) for run in usual.runs] == [
        (9, 3, 2),
        (3, 1, 2),
    ]
    shuffled = _plan((0, 9, 18), (1, 7, 0, 1, -1, 0))
    assert shuffled.order == (2, 5, 0, 3) and not shuffled.usual
    assert [(run.prompts, run.sequences) for run in shuffled.runs] == [(2, 2)]
    assert _plan((0, 9, 18, 20), (2, 0)).runs == ((0, 9, 1, 0, 1), (18, 2, 1, 1, 1))
    assert not _plan((0, 3), (-1, 1)).runs


def test_wrong_arguments_are_refused_by_name(decode_step: Step) -> None:
    tensors, options = decode_step([3, 2], [0, 1], [1, 2], 4, dtype=torch.float32)
    refuse: Any = lambda match: pytest.raises(ValueError, match=match)  # noqa: E731

    def call(index: int, x: Tensor, **changes: Any) -> None:
        prefix_decode(*tensors[:index], x, *tensors[index + 1 :], **{**options, **changes})

    q, prefix_k, _, offsets, suffix_k, _, lengths, prompt_of = tensors
    with refuse(r"prefix_k has shape \[8, 2, 4\]; it must be \[U, Hkv, 16\]"):
        call(1, prefix_k[..., :4])
    with refuse(r"suffix_v has shape \[2, 3, 2, 16\]; it must be \[2, 4, 2, 16\]"):
        call(5, suffix_k[:, :3])
    with refuse("3 query heads cannot be shared by 2 key heads"):
        call(0, q[:, :3])
    with refuse(r"suffix_lengths is torch\.int64 on .*; it must be torch\.int32"):
        call(6, lengths.long())
    with refuse(r"prompt_of has shape \[1\]; it must be \[2\]"):
        call(7, prompt_of[:1])
    with refuse("prefix_offsets is empty"):
        call(3, offsets[:0])
    with refuse(r"q is torch\.float32 on .*, suffix_k is torch\.float16 on .*; they must agree"):
        call(4, suffix_k.half())
    with refuse(r"q is torch\.int32; it must be a float tensor"):
        call(0, q.int())
    with refuse("new_v is given alone; new_k and new_v go together"):
        call(0, q, new_k=None)
    with refuse(r"new_k has shape \[1, 2, 16\]; it must be \[2, 2, 16\]"):
        call(0, q, new_k=options["new_k"][:1])
    with refuse(r"sines has shape \[2, 16\]; it must be \[2, 1, 16\]"):
        call(0, q, rotation=(options["rotation"][0], options["rotation"][1][:, 0]))
    with refuse("rotation must be a pair"):
        call(0, q, rotation=options["rotation"][:1])
    with refuse("suffix_k has strides .* its last two dimensions must be contiguous"):
        call(4, suffix_k.transpose(1, 2).contiguous().transpose(1, 2))
    odd, _ = decode_step([3], [0], [1], 4, size=15, append=False, rotate=False)
    with refuse("a head of D=15 cannot be rotated"):
        prefix_decode(*odd, rotation=(odd[0][:, :1], odd[0][:, :1]))
    if DEVICE == "cpu":
        for wrong, match in (
            ([0, 3, 9], "to 9 but prefix_k has 8 rows"),
            ([0, 5, 3], "not rising"),
        ):
            with refuse(match):
                call(3, offsets.new_tensor(wrong))


def test_gradients_are_refused(decode_step: Step) -> None:
    tensors, options = decode_step([3, 2], [0, 1], [1, 2], 4)
    tensors[0].requires_grad_()
    with pytest.raises(ValueError, match=r"q requires a gradient and there is none; call it under"):
        prefix_decode(*tensors, **options)
    with torch.no_grad():
        assert not prefix_decode(*tensors, **options).requires_grad
