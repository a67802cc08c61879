"""Packed rows in transformers' decoders: `attn_implementation="fastomni_prefix"`.

`register` once, load a decoder with that name and call it with `group_layout=layout`: keyword
arguments of a model's call reach the attention function of its layers. The decision that is not
obvious: what a row sees is said by the layout alone, so no mask is ever made, and whatever would
change it - a mask, a window, a bias, a cache, a call without a layout - is refused: attention over
all rows before a completion would look like training.

transformers is looked up by `register` and imported nowhere.

Shapes: T packed rows, Hq query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor, nn

from fastomni_kernels.checks import require
from fastomni_kernels.layout import GroupLayout
from fastomni_kernels.prefix_attention import prefix_attention

__all__ = ["NAME", "attention", "check_model", "no_mask", "register"]

NAME = "fastomni_prefix"
_SWITCH = 'model.set_attn_implementation("sdpa")'

_OLDEST_TRANSFORMERS = (5, 10)  # older ones call the functions below in another way

# Others (convolutions, recurrences, layers that choose keys) mix rows by rules of their own.
_KNOWN_LAYERS = {"full_attention", "attention", "sliding_attention", "chunked_attention", "moe"}
# Where the configuration says how far a row sees in such a layer.
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}

# Arguments of attention functions that change the result -> what they stand for.
_WISHES_OF_MODELS = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias on the scores",
    "indices": "keys chosen for each row",
    "block_indices": "blocks of keys chosen for each row",
}
_WISHES_OF_CALLERS = {
    "output_attentions": "the weights of the attention, which are never all there at once",
    "cache": "a paged cache, of which packed rows have no need",
    "cu_seq_lens_q": "sequences cut by these lengths, where group_layout says it all",
    "cu_seq_lens_k": "sequences cut by these lengths, where group_layout says it all",
}


def register() -> str:
    """Make `attn_implementation="fastomni_prefix"` known to transformers; may be called again.

    A model loaded with it (or switched by `model.set_attn_implementation`) takes packed rows:

        model(rows[None], position_ids=layout.positions[None], group_layout=layout, use_cache=False)

    Logits are those of rows; `logits_to_keep=layout.predictor_rows` leaves the ones that predict
    completion tokens. Make the loss from them or from hidden states: `labels=` would compare each
    row with the one after it, which at a completion's end belongs to another completion.

    Returns:
        The name.

    Raises:
        ImportError: transformers is missing or older than 5.10.
    """
    wanted = f"transformers>={'.'.join(map(str, _OLDEST_TRANSFORMERS))}"
    try:
        installed = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        installed = "none"
    if tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) < _OLDEST_TRANSFORMERS:
        raise ImportError(
            f'{NAME}: it needs {wanted} but found {installed}; run: pip install "{wanted}"',
            name="transformers",
        )
    transformers = import_module("transformers")
    transformers.AttentionInterface.register(NAME, attention)
    transformers.AttentionMaskInterface.register(NAME, no_mask)
    return NAME


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    group_layout: Any = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' interface; models call it.

    Args:
        module: the layer that calls.
        query: [1, Hq, T, D], any strides.
        key: [1, Hkv, T, D], as is value.
        value: with heads of the same size.
        attention_mask: must be None.
        dropout: must be 0.
        scaling: factor of the scores, D ** -0.5 by default.
        is_causal: must not be False; None: the layer's own.
        sliding_window: keys a row sees, itself included; must hold every prompt and completion.
        position_ids: [1, T], where the model hands them on; compared with the layout's.
        group_layout: the GroupLayout that the model was called with.
        others: what else models hand over.

    Returns:
        [1, T, Hq, D] in the queries' dtype (under autocast in autocast's), and no weights.

    Raises:
        ValueError: what prefix attention cannot express, or rows that do not fit the layout.
    """
    problem = (
        _problem_of_call(module, attention_mask, dropout, is_causal, group_layout)
        or _problem_of_wishes(others)
        or _problem_of_layers(module, sliding_window, group_layout)
        or _problem_of_rows(query, key, value, position_ids, group_layout)
    )
    if problem:
        raise ValueError(f"{NAME} in {type(module).__name__}: {problem}")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # Rotation leaves queries and keys in fp32 there, values are in autocast's dtype.
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return prefix_attention(q, k, v, group_layout, scaling)[None], None


def no_mask(
    q_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **_: Any,
) -> None:
    """Mask function of transformers' interface: makes none, and refuses what one would change.

    Args:
        q_length: T.
        mask_function: (batch, head, query row, key row) -> whether the row sees the key.
        attention_mask: [1, T] of the model's call; must hide nothing.
        use_vmap: whether the model added a rule of its own to the mask.
        device: of the model's inputs.
        config: of the model.

    Raises:
        ValueError: a mask that hides tokens or shows later ones, or layers that are no attention.
    """
    where = f"{NAME} with {type(config).__name__}"
    problem = _layer_kinds(config)[1]
    require(not problem, f"{where}: {problem}")
    require(
        attention_mask is None or bool(attention_mask.all()),
        f"{where}: attention_mask hides tokens; packed rows hold no padding, so drop padded tokens "
        f"when packing and leave attention_mask out, or switch: {_SWITCH}",
    )
    rule = (
        f"{where}: the model lets tokens see others that come after them (of an image, of a "
        "prefix, or by config.is_causal=False) or adds a rule of its own to its mask; such a model "
        "cannot run packed rows"
    )
    require(not use_vmap, rule)
    rows = torch.arange(q_length - 1, device=device)
    zero = rows.new_zeros(1)
    looks_ahead = mask_function(zero, zero, rows, rows + 1).any()
    if torch.compiler.is_compiling():
        torch._assert_async(~looks_ahead, rule)
    else:
        require(not looks_ahead, rule)


def check_model(model: Any) -> None:
    """Run a small layout packed, and completion by completion; refuse a model that differs.

    It finds what an attention function cannot see: layers that mix rows without calling it (Bloom,
    Falcon and Mamba ignore attn_implementation), and positions that are not simply position_ids
    (RoBERTa's begin at 2). Call it once for a model that is new to packed rows.

    Args:
        model: a decoder that was loaded with attn_implementation="fastomni_prefix"; it runs in
            eval mode and without gradients, and is put back into the mode it was in.

    Raises:
        ValueError: its first output (logits, or hidden states) differs by more than the square
            root of its dtype's precision, relative to the largest element.
    """
    weight = model.get_input_embeddings().weight
    layout = GroupLayout.build([7, 4], [[5, 3, 5], [2, 6]], weight.device)
    # Special tokens lie at the ends of a vocabulary.
    low, high = len(weight) // 4, 3 * len(weight) // 4
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(low, high, (layout.num_rows,), generator=generator).to(weight.device)

    def run(rows: Tensor, part: GroupLayout, **positions: Tensor) -> Tensor:
        return model(input_ids=rows[None], group_layout=part, use_cache=False, **positions)[0][0]

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = run(ids, layout, position_ids=layout.positions[None])[layout.repeat_rows]
            repeated = layout.repeated()
            parts = [repeated.select_prompts(i, i + 1) for i in range(repeated.num_prompts)]
            rows = ids[layout.repeat_rows].split([part.num_rows for part in parts])
            alone = torch.cat([run(*pair) for pair in zip(rows, parts, strict=True)])
    finally:
        model.train(was_training)
    error = ((packed - alone).abs().max() / alone.abs().max()).item()
    allowed = torch.finfo(alone.dtype).eps ** 0.5
    require(
        error <= allowed,
        f"{NAME}: {type(model).__name__} gives other values for packed rows than for completions "
        f"alone (by {error:.1e} of the largest, allowed {allowed:.1e}): it mixes rows without "
        "calling the attention function, or changes position_ids, and cannot run packed rows",
    )


def _problem_of_call(
    module: nn.Module,
    attention_mask: Tensor | None,
    dropout: float,
    is_causal: bool | None,
    layout: object,
) -> str:
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        return (
            "attention without causality, but this is for decoders; a model of several parts gives "
            f'each its own: attn_implementation={{"text_config": "{NAME}", "vision_config": ...}}'
        )
    if layout is None:
        return (
            "no layout arrived, and without one a row would see all rows before it; call the model "
            "with group_layout=GroupLayout.build(...). A model that was and loses it on the way "
            "(StableLM, Nemotron) cannot run packed rows. For ordinary rows, as in generate(), "
            f"switch: {_SWITCH}"
        )
    if not isinstance(layout, GroupLayout):
        return f"group_layout is of type {type(layout).__name__}; it must be a GroupLayout"
    if attention_mask is not None:
        return (
            "an attention mask arrived; what a row sees is said by group_layout alone, so leave "
            "attention_mask out (a model that makes a mask of its own cannot run packed rows)"
        )
    if dropout:
        return (
            f"attention dropout of {dropout}; weights that could be dropped are never all there at "
            "once, so make the model with attention_dropout=0"
        )
    return ""


def _problem_of_wishes(others: dict[str, Any]) -> str:
    for name, meaning in _WISHES_OF_MODELS.items():
        if others.get(name) is not None:
            return (
                f"the model wants {meaning} ({name}), which prefix attention does not have; run it "
                "on ordinary rows with another attn_implementation"
            )
    for name, meaning in _WISHES_OF_CALLERS.items():
        if others.get(name, False) is not False and others[name] is not None:
            return f"{name} asks for {meaning}; leave it out of the call"
    return ""


def _layer_kinds(config: Any) -> tuple[Sequence[str], str]:
    """The kinds of a model's layers, and what is wrong with them."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    other = ", ".join(sorted(set(kinds) - _KNOWN_LAYERS))
    return kinds, other and (
        f"the model has layers of the kind {other}, which mix rows without knowing of groups; such "
        "a model cannot run packed rows"
    )


def _problem_of_layers(module: nn.Module, sliding_window: int | None, layout: GroupLayout) -> str:
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds, problem = _layer_kinds(config)
    window = sliding_window
    if window is None and index is not None and index < len(kinds) and kinds[index] in _WINDOWS:
        window = getattr(config, _WINDOWS[kinds[index]], None)
    if problem or window is None:
        return problem
    pairs = zip(layout.prompt_lengths, layout.completion_lengths, strict=True)
    longest = max(prompt + max(completions, default=0) for prompt, completions in pairs)
    if window >= longest:
        return ""
    return (
        f"a window of {window} tokens, but a prompt and its completion have up to {longest}; "
        "prefix attention has no windows, so shorten them or load the model without its window"
    )


def _problem_of_rows(
    query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor | None, layout: GroupLayout
) -> str:
    batch, _, rows, size = query.shape
    if batch != 1:
        return f"a batch of {batch}; all groups lie in one row of it, [1, T], without padding"
    if key.shape[2] != rows:
        return (
            f"{key.shape[2]} keys for {rows} rows; packed rows are computed all at once, so call "
            "the model with use_cache=False and without past_key_values"
        )
    if value.shape[3] != size:
        return (
            f"queries and keys of head size {size}, values of {value.shape[3]}; the kernels need "
            "one size, so such a model (multi-head latent attention) cannot run packed rows"
        )
    if torch.compiler.is_compiling():
        # The number of rows is compared by the operator when it runs; positions are not.
        return ""
    if rows != layout.num_rows:
        return (
            f"{rows} rows, but group_layout describes {layout.num_rows}; pass the rows that it was "
            "built for"
        )
    # With more axes, as of images, they do not say where a token lies in its text.
    if position_ids is None or position_ids.dim() > 2:
        return ""
    written = 0 if position_ids.is_inference() else position_ids._version
    if _are_positions(position_ids, written, layout):
        return ""
    return (
        "position_ids are not the layout's, in which every completion begins where its prompt "
        "ends; pass position_ids=layout.positions[None]"
    )


@lru_cache(maxsize=1)  # all layers of a forward get one tensor, written to as often
def _are_positions(position_ids: Tensor, written: int, layout: GroupLayout) -> bool:
    return torch.equal(position_ids.reshape(-1), layout.positions.to(position_ids))
