"""What packed rows in transformers' decoders refuse, and what they say to it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fastomni_kernels import GroupLayout
from fastomni_kernels import transformers_attention as module
from fastomni_kernels.transformers_attention import NAME, attention, check_model, no_mask, register

SIZES = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
)
LAYOUT = GroupLayout.build([5, 3], [[4, 2], [1, 6]])
ROWS = torch.randint(1, 39, (21,), generator=torch.Generator().manual_seed(0))
LONGEST = 9


def build(name: str, **changes: Any) -> Any:
    register()
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=NAME)


def call(model: Any, **changes: Any) -> Tensor:
    given = dict(input_ids=ROWS[None], position_ids=LAYOUT.positions[None], group_layout=LAYOUT)
    return model(**{**given, **changes}).logits


@pytest.fixture(scope="module")
def qwen2() -> Any:
    return build("Qwen2")


PADDED = torch.ones(1, 21, dtype=torch.int64).index_fill(1, torch.tensor([20]), 0)
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "no layout": (
        dict(group_layout=None),
        "fastomni_prefix in Qwen2Attention: no layout arrived, and without one a row would see all "
        "rows before it; call the model with group_layout=GroupLayout.build(...).",
    ),
    "no layout object": (
        dict(group_layout=[5, 3]),
        "fastomni_prefix in Qwen2Attention: group_layout is of type list; it must be a GroupLayout",
    ),
    "another layout": (
        dict(group_layout=GroupLayout.build([21], [[2]])),
        "21 rows, but group_layout describes 23; pass the rows that it was built for",
    ),
    "no positions": (dict(position_ids=None), "pass position_ids=layout.positions[None]"),
    "positions one after another": (
        dict(position_ids=torch.arange(21)[None]),
        "position_ids are not the layout's, in which every completion begins where its prompt ends",
    ),
    "padding": (
        dict(attention_mask=PADDED),
        "fastomni_prefix with Qwen2Config: attention_mask hides tokens; packed rows hold no "
        "padding, so drop padded tokens when packing and leave attention_mask out",
    ),
    "a mask of all rows": (
        dict(attention_mask=torch.ones(1, 1, 21, 21, dtype=torch.bool).tril()),
        "an attention mask arrived; what a row sees is said by group_layout alone, so leave "
        "attention_mask out",
    ),
    "a batch": (
        dict(input_ids=ROWS.expand(2, -1)),
        "a batch of 2; all groups lie in one row of it, [1, T], without padding",
    ),
    "weights": (
        dict(output_attentions=True),
        "output_attentions asks for the weights of the attention, which are never all there at "
        "once; leave it out of the call",
    ),
    "lengths of its own": (
        dict(cu_seq_lens_q=LAYOUT.cu_groups),
        "cu_seq_lens_q asks for sequences cut by these lengths, where group_layout says it all; "
        "leave it out of the call",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_refused_calls(case: str, qwen2: Any) -> None:
    changes, message = CALLS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        call(qwen2, **changes)


def test_a_cache_of_earlier_keys(qwen2: Any) -> None:
    given = dict(position_ids=LAYOUT.positions[None], group_layout=LAYOUT, use_cache=True)
    cache = qwen2(ROWS[None], **given).past_key_values
    message = "42 keys for 21 rows; packed rows are computed all at once, so call the model with "
    with pytest.raises(ValueError, match=message + "use_cache=False and without past_key_values"):
        call(qwen2, past_key_values=cache)


def test_generate_says_how_to_switch(qwen2: Any) -> None:
    with pytest.raises(ValueError, match=r'set_attn_implementation\("sdpa"\)'):
        qwen2.generate(ROWS[None], max_new_tokens=1)
    qwen2.set_attn_implementation("sdpa")
    assert qwen2.generate(ROWS[None], max_new_tokens=1, eos_token_id=None).shape == (1, 22)
    qwen2.set_attn_implementation(NAME)


LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "window": ("Mistral", dict(sliding_window=8), "MistralAttention: a window of 8 tokens, but"),
    "soft cap": (
        "Gemma2",
        {},
        "Gemma2Attention: the model wants soft-capped scores (softcap), which prefix attention "
        "does not have; run it on ordinary rows with another attn_implementation",
    ),
    "sinks": (
        "GptOss",
        dict(num_local_experts=2, num_experts_per_tok=1),
        "GptOssAttention: the model wants attention sinks (s_aux)",
    ),
    "recurrent layers": (
        "Qwen3Next",
        dict(num_experts=0, layer_types=["linear_attention", "full_attention"]),
        "fastomni_prefix with Qwen3NextConfig: the model has layers of the kind linear_attention, "
        "which mix rows without knowing of groups; such a model cannot run packed rows",
    ),
    "head sizes": (
        "DeepseekV3",
        dict(**LATENT, head_dim=4, num_key_value_heads=4, first_k_dense_replace=2),
        "DeepseekV3Attention: queries and keys of head size 12, values of 8",
    ),
    "not causal": ("Qwen2", dict(is_causal=False), "config.is_causal=False"),
    "arguments lost": ("StableLm", {}, "StableLmAttention: no layout arrived"),
    "a mask of its own": ("Doge", {}, "DogeAttention: an attention mask arrived"),
}


@pytest.mark.parametrize("case", MODELS)
def test_refused_models(case: str) -> None:
    name, changes, message = MODELS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        call(build(name, **changes), use_cache=False)


def test_dropout_is_refused_in_training_alone() -> None:
    model = build("Qwen2", attention_dropout=0.1)
    call(model.eval())
    with pytest.raises(ValueError, match=r"dropout of 0\.1; .* make the model with attention_d"):
        call(model.train())


def test_a_window_is_refused_where_it_hides_something() -> None:
    """It counts the row itself: the last row of a prompt of 5 and a completion of 4 sees 9."""
    model = build("Mistral", sliding_window=LONGEST)
    message = "a window of 9 tokens, but a prompt and its completion have up to 10; "
    call(model)
    longer = GroupLayout.build([5, 3], [[5, 1], [1, 6]])
    with pytest.raises(ValueError, match=message):
        call(model, group_layout=longer, position_ids=longer.positions[None])
    model.set_attn_implementation("eager")
    alone = model(torch.cat([ROWS[:9], ROWS[:1]])[None], use_cache=False).logits
    model.config.sliding_window = None
    full = model(torch.cat([ROWS[:9], ROWS[:1]])[None], use_cache=False).logits
    assert torch.equal(alone[:, :LONGEST], full[:, :LONGEST])
    assert not torch.allclose(alone, full)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")],
)
def test_windows_of_layers_that_do_not_hand_them_over(kind: str, setting: str) -> None:
    layer: Any = nn.Module()
    layer.layer_idx = 1
    x = torch.zeros(1, 2, LAYOUT.num_rows, 8)

    def run(window: int) -> Tensor:
        kinds = ["full_attention", kind]
        layer.config = SimpleNamespace(layer_types=kinds, **{setting: window})
        return attention(layer, x, x, x, None, group_layout=LAYOUT)[0]

    assert run(LONGEST).shape == (1, LAYOUT.num_rows, 2, 8)
    with pytest.raises(ValueError, match="a window of 8 tokens"):
        run(LONGEST - 1)
    layer.layer_idx = 0
    run(LONGEST - 1)


def test_a_layer_beside_recurrent_ones() -> None:
    layer: Any = nn.Module()
    layer.config = SimpleNamespace(layers_block_type=["recurrent", "attention"])
    x = torch.zeros(1, 2, LAYOUT.num_rows, 8)
    with pytest.raises(ValueError, match="in Module: the model has layers of the kind recurrent"):
        attention(layer, x, x, x, None, group_layout=LAYOUT)


def test_masks_that_add_a_rule_of_the_models_own() -> None:
    def causal(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return key <= row

    def image(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key <= row) | ((row >= 3) & (key < 6))

    no_mask(q_length=9, mask_function=causal)
    for given in (dict(mask_function=image), dict(mask_function=causal, use_vmap=True)):
        with pytest.raises(ValueError, match="lets tokens see others that come after them"):
            no_mask(q_length=9, **given)


def test_compiled_code_refuses_too() -> None:
    def step(x: Tensor) -> Tensor:
        no_mask(q_length=len(x), mask_function=lambda batch, head, row, key: key <= row + x[0])
        return x + 1

    torch._dynamo.reset()
    settings: dict[str, Any] = dict(backend="eager", fullgraph=True)
    compiled = torch.compile(step, **settings)
    assert compiled(torch.zeros(4)).sum() == 4
    with pytest.raises(RuntimeError, match="lets tokens see others that come after them"):
        compiled(torch.ones(4))
    model = torch.compile(build("Qwen2"), **settings)
    with pytest.raises(ValueError, match="23 rows"):
        call(model, group_layout=GroupLayout.build([21], [[2]]), use_cache=False)
    torch._dynamo.reset()


def test_a_model_of_several_parts_names_one_attention_for_each() -> None:
    vision = dict(
        model_type="siglip_vision_model",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = transformers.LlavaConfig(
        text_config=dict(model_type="qwen2", **SIZES),
        vision_config=vision,
        image_token_index=39,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    ids = ROWS.index_fill(0, torch.arange(4), 39)
    given = dict(input_ids=ids[None], pixel_values=torch.zeros(1, 3, 28, 28))

    def load(attentions: Any) -> Any:
        register()
        return transformers.AutoModelForImageTextToText.from_config(
            config, attn_implementation=attentions
        )

    with pytest.raises(ValueError, match=r'"vision_config": \.\.\.'):
        call(load(NAME), **given)
    model = load({"text_config": NAME, "vision_config": "sdpa"})
    assert call(model, **given).shape == (1, 21, 40)


UNSEEN: dict[str, dict[str, Any]] = {
    "Bloom": dict(n_layer=2, n_head=4),
    "Mamba": dict(state_size=4, conv_kernel=2),
    "Roberta": dict(is_decoder=True, max_position_embeddings=64, type_vocab_size=1),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_check_model_refuses_what_no_attention_function_sees(name: str) -> None:
    model = build(name, **UNSEEN[name])
    call(model.eval(), use_cache=False)  # refuses nothing
    model.train()
    with pytest.raises(ValueError, match="other values for packed rows than for completions alone"):
        check_model(model)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_model_lets_decoders_pass(dtype: torch.dtype) -> None:
    model = build("Llama").to(dtype).eval()
    check_model(model)
    assert not model.training


def test_register_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert register() == register() == NAME
    monkeypatch.setattr(metadata, "version", lambda name: "5.9.2")
    remedy = re.escape('run: pip install "transformers>=5.10"')
    with pytest.raises(ImportError, match=f"needs transformers>=5.10 but found 5.9.2; {remedy}"):
        register()

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(ImportError, match=f"needs transformers>=5.10 but found none; {remedy}"):
        register()


# Handed over by models and without meaning for a causal decoder: what the layers of vision towers
# or encoders know, and what was used before attention is called.
HARMLESS = {
    "cu_seqlens",
    "deterministic",
    "hidden_states",
    "max_length_k",
    "max_length_q",
    "position_embeddings",
}


def options_of_models() -> Iterator[tuple[str, str]]:
    """Names of keyword arguments that models hand to their attention function, and where."""
    folder = Path(transformers.__file__).parent / "models"
    for path in sorted(folder.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        for match in re.finditer(r"attention_interface\(", source):
            depth, stop = 1, match.end()
            while depth:
                depth += {"(": 1, ")": -1}.get(source[stop], 0)
                stop += 1
            tree = ast.parse(source[match.start() : stop], mode="eval")
            assert isinstance(tree.body, ast.Call)
            yield from ((key.arg, path.name) for key in tree.body.keywords if key.arg)


def test_every_option_of_installed_models_is_known() -> None:
    """A new one may change what a row sees: refuse it, or name it harmless."""
    parameters = set(inspect.signature(attention).parameters) - {"others"}
    known = parameters | module._WISHES_OF_MODELS.keys() | module._WISHES_OF_CALLERS.keys()
    options = list(options_of_models())
    assert len(options) > 500
    assert [pair for pair in options if pair[0] not in known | HARMLESS] == []
