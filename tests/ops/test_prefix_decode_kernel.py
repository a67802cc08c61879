"""The kernels of a decode step against the definition, and the operators that run them.

In the interpreter a tile is 16 queries by 16 keys, a split 32 keys and a prompt has 4 splits at
most: the sizes below have tails of each, and prompts that need longer splits. The fixture
`decode_step` fills whatever must not be read with NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from fastomni_kernels import prefix_decode, reference
from fastomni_kernels.triton_kernels import prefix_decode as kernels

Step = Callable[..., tuple[list[Tensor], dict[str, Any]]]
# Half types: the result is rounded, the weights before it, and what bf16 stores is truncated in the
# interpreter.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.float16: 3e-3,
    torch.bfloat16: 5e-2,
}
PLACES = 40
HEADS = [(1, 1), (4, 2), (3, 3), (7, 1), (21, 1)]


def run(function: Callable[..., Tensor], tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """The result and both caches afterwards; the arguments stay as they are."""
    copies = [x.clone() for x in tensors]
    return [function(*copies, **options), copies[4], copies[5]]


def compare(tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Result and caches of the kernels, which must be those of the definition."""
    found = run(prefix_decode, tensors, **options, backend="triton")
    wanted = run(reference.prefix_decode, tensors, **options)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.is_contiguous()
        torch.testing.assert_close(
            a, b, rtol=0, atol=TOLERANCES[a.dtype], equal_nan=a is not found[0]
        )
    return found


lengths_strategy = st.sampled_from([0, 1, 2, 31, 32, 33, PLACES - 1, PLACES, PLACES + 3])


@given(
    st.lists(st.sampled_from([1, 15, 33, 64, 140]), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(-1, 3), lengths_strategy), max_size=5),
    st.sampled_from(HEADS),
    st.sampled_from([2, 16, 20]),
    st.sampled_from(list(TOLERANCES)),
    st.booleans(),
    st.booleans(),
)
@example([1], [(0, 0)], (1, 1), 16, torch.float64, False, False)
@settings(max_examples=10, deadline=None)
def test_the_kernels_equal_the_definition(
    decode_step: Step,
    prompts: list[int],
    sequences: list[tuple[int, int]],
    heads: tuple[int, int],
    size: int,
    dtype: torch.dtype,
    append: bool,
    rotate: bool,
) -> None:
    columns = [list(column) for column in zip(*sequences, strict=True)] or [[], []]
    compare(*decode_step(prompts, *columns, PLACES, heads, size, dtype, append, rotate))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("size", [16, 64, 80, 128])
@pytest.mark.usefixtures("poisoned_memory")
def test_sizes_of_heads(decode_step: Step, size: int, dtype: torch.dtype) -> None:
    heads = (4, 2) if size > 16 else (14, 2)
    compare(*decode_step([3, 35], [1, 0], [2, 4], 5, heads, size, dtype))


# Of 4 splits of 32 keys: one key, whole tiles and splits, one more, and splits of 64 and 96 keys.
@pytest.mark.parametrize("prompt", [1, 16, 17, 32, 33, 128, 129, 300])
@pytest.mark.usefixtures("poisoned_memory")
def test_lengths_of_prompts(decode_step: Step, prompt: int) -> None:
    compare(*decode_step([prompt, 5], [0, 0, 1], [1, 9, 3], 9, (2, 1), dtype=torch.float32))


@pytest.mark.usefixtures("poisoned_memory")
def test_slots_in_any_order_some_not_in_use(decode_step: Step) -> None:
    """More sequences of a prompt than a tile of queries holds, found in several looks at slots."""
    prompt_of = [2, -1, 0, 2, 2, 7, 2, 0, 3, 2, 2, -1, 2, 2, 0]  # none of prompt 1
    lengths = [1, 2, 0, 3, 4, 5, 6, 7, 8, 9, 3, 2, 1, 0, 33]
    tensors, options = decode_step(
        [20, 3, 33, 1], prompt_of, lengths, 33, (3, 1), dtype=torch.float32
    )
    found, *_ = compare(tensors, options)
    assert [s for s, out in enumerate(found) if not out.any()] == [1, 5, 11]


@pytest.mark.parametrize("places", [0, 1, 32, 50])
def test_numbers_of_places(decode_step: Step, places: int) -> None:
    """Also more tokens than places, which store nothing and read all there are."""
    lengths = [0, 1, places, places + 1, places + 40, max(0, places - 1)]
    compare(*decode_step([3], [0] * 6, lengths, places, (2, 1), dtype=torch.float32))


@pytest.mark.parametrize(("append", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_a_sequence_does_not_depend_on_its_neighbours(
    decode_step: Step, dtype: torch.dtype, append: bool
) -> None:
    """The same bits alone, in another slot, beside other prompts and in a longer cache."""
    prompt_of, lengths = [1, 0, 1, -1, 1, 1, 0, 1], [9, 3, 33, 5, 1, 40, 11, 4]
    tensors, options = decode_step(
        [140, 60], prompt_of, lengths, PLACES, (4, 1), dtype=dtype, append=append
    )
    together = run(prefix_decode, tensors, **options, backend="triton")
    q, prefix_k, prefix_v, _, suffix_k, suffix_v, counts, owners = tensors
    for s in (2, 5, 6):
        first, stop = ((0, 140), (140, 200))[prompt_of[s]]
        longer = [x.new_full((2, 70, *x.shape[2:]), torch.nan) for x in (suffix_k, suffix_v)]
        for x, cache in zip(longer, (suffix_k, suffix_v), strict=True):
            x[1, :PLACES] = cache[s]
        slots = torch.tensor([0, s])
        alone = [q[slots], prefix_k[first:stop], prefix_v[first:stop]]
        alone += [counts.new_tensor([0, stop - first]), *longer, counts[slots]]
        alone += [owners.new_tensor([-1, 0])]
        changed = {
            name: tuple(y[slots] for y in x) if name == "rotation" else x[slots]
            for name, x in options.items()
        }
        found = run(prefix_decode, alone, **changed, backend="triton")
        for a, b in zip(found, together, strict=True):
            a = a[1, :PLACES] if a.dim() == 4 else a[1]
            assert torch.equal(a.nan_to_num(), b[s].nan_to_num())


def test_appending_is_storing_before(decode_step: Step) -> None:
    tensors, options = decode_step([20, 3], [0, 1, 0], [5, 33, 1], 40, dtype=torch.float32)
    out, *caches = run(prefix_decode, tensors, **options, backend="triton")
    stored = [*tensors[:4], *caches, *tensors[6:]]
    again = prefix_decode(*stored, rotation=options["rotation"], backend="triton")
    torch.testing.assert_close(out, again, rtol=0, atol=1e-6)


def test_caches_with_gaps_between_places_are_written_where_they_are(decode_step: Step) -> None:
    tensors, options = decode_step([20, 3], [0, 1, 0], [5, 33, 1], 40, dtype=torch.float32)
    wanted = run(reference.prefix_decode, tensors, **options)
    wide = [x.new_full((3, 50, 3, 2, 16), 7.0) for x in tensors[4:6]]
    views = [x[:, 5:45, 1] for x in wide]
    for view, cache in zip(views, tensors[4:6], strict=True):
        view.copy_(cache)
    out = prefix_decode(*tensors[:4], *views, *tensors[6:], **options, backend="triton")
    for a, b in zip((out, *views), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-6, equal_nan=True)
    assert all((x[:, :5] == 7).all() and (x[:, :, ::2] == 7).all() for x in wide)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("append", [False, True])
def test_operators_pass_opcheck(decode_step: Step, append: bool, backend: str) -> None:
    tensors, options = decode_step(
        [6], [0, -1], [2, 1], 3, (2, 1), append=append, rotate=append, spare=0
    )
    for cache in tensors[4:6]:
        cache.nan_to_num_()  # opcheck compares with ==
    new = [options[name] for name in ("new_k", "new_v")] if append else []
    angles = options.get("rotation", (None, None))
    name = "prefix_decode_append" if append else "prefix_decode"
    operator = getattr(torch.ops.fastomni, name).default
    opcheck(operator, (*tensors, *new, *angles, 0.3, backend))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("append", [False, True])
def test_the_function_compiles_without_a_break(
    decode_step: Step, append: bool, backend: str
) -> None:
    tensors, options = decode_step([6, 2], [1, 0, -1], [2, 1, 1], 3, append=append)
    options["backend"] = backend
    compiled = torch.compile(prefix_decode, fullgraph=True, backend="aot_eager")
    found, wanted = (run(function, tensors, **options) for function in (compiled, prefix_decode))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_autograd_is_told_of_the_change(decode_step: Step, backend: str) -> None:
    tensors, options = decode_step([6, 2], [1, 0], [2, 1], 3)
    before = [x._version for x in tensors]
    prefix_decode(*tensors, **options, backend=backend)
    assert [x._version > v for x, v in zip(tensors, before, strict=True)] == [
        x is tensors[4] or x is tensors[5] for x in tensors
    ]


class Recorded(TorchDispatchMode):
    """Operators of torch that make tensors or read one back, and the shapes of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) or func is torch.ops.aten._local_scalar_dense.default:
            self.calls.append((str(func), list(getattr(made, "shape", []))))
        return made


def test_a_cuda_graph_can_hold_the_launches(
    decode_step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read back, and what is launched and allocated follows from shapes alone."""
    grids = []
    for kernel in ("prefix_decode_kernel", "prefix_decode_merge_kernel"):

        class Launcher:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *_, **__: grids.append(grid)

        monkeypatch.setattr(kernels, kernel, Launcher())
    seen = []
    for prompts, prompt_of, lengths in (
        ([20, 1], [0, 1, 0], [1, 5, 40]),
        ([3, 18], [1, -1, 1], [7, 0, 90]),
    ):
        tensors, options = decode_step(prompts, prompt_of, lengths, PLACES)
        with Recorded() as recorded:
            kernels.forward(
                *tensors, options["new_k"], options["new_v"], *options["rotation"], 0.25
            )
        seen.append((recorded.calls, grids[-2:]))
    assert seen[0] == seen[1]
    assert {name for name, _ in seen[0][0]} == {"aten.empty.memory_format"}


def test_what_the_kernels_do_not_take(decode_step: Step) -> None:
    tensors, _ = decode_step([2], [0], [1], 2, (1, 1), size=130, append=False, rotate=False)
    with pytest.raises(ValueError, match="heads of up to 128, not 130; use 'reference'"):
        prefix_decode(*tensors, backend="triton")
    tensors, _ = decode_step([2], [0], [1], 2, (65, 1), append=False, rotate=False)
    with pytest.raises(ValueError, match="64 query heads per key head, not 65; use 'reference'"):
        prefix_decode(*tensors, backend="triton")
    wanted = reference.prefix_decode(*tensors)
    torch.testing.assert_close(prefix_decode(*tensors), wanted, rtol=0, atol=1e-12)
    tensors, _ = decode_step([40], [0, 0], [1, 2], 2, (64, 1), append=False, rotate=False)
    compare(tensors, {})


@pytest.mark.parametrize("append", [False, True])
def test_what_is_not_a_number_stays_visible(append: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, keys, own = torch.randn(2, 4, 16), torch.randn(3, 2, 16), torch.zeros(2, 5, 2, 16)
    q[1] = float("nan")
    offsets, lengths = torch.tensor([0, 3]).int(), torch.tensor([2, 2]).int()
    new = {"new_k": keys[:2], "new_v": keys[1:]} if append else {}
    tensors = (q, keys, keys, offsets, own, own.clone(), lengths, torch.zeros(2).int())
    moved = [x.to(device) for x in tensors]
    found = prefix_decode(*moved, **{k: x.to(device) for k, x in new.items()}, backend="triton")
    assert found[0].isfinite().all() and found[1].isnan().all()
