"""Checkpoints in the released layout, read and written tensor by tensor.

`released_tensors()` is the one mapping between our tensors (fused qkv and gate-up) and the released
names; loading, saving, resuming and the gradient tests all go through it. Only safetensors and JSON
are read. Tensors of the checkpoint win over a tower directory's; a directory fills what is absent.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastomni.model.config import (
    TOWER_FOLDERS,
    CheckpointError,
    OmniConfig,
    tower_folder,
)
from fastomni.model.omni import OmniModel
from fastomni.model.reader import CheckpointReader

# Names that a model may carry although no computation uses them; kept and written back.
UNUSED_PREFIXES = (
    "model.feature_compressor.",
    "model.audio_tower.audio_tower.classifier.",
    "model.audio_tower.audio_tower.projector.",
    "model.audio_tower.audio_tower.layer_weights",
)
# Buffers that older transformers wrote out and that are computed here.
BUFFER_SUFFIXES = (".position_ids", ".rotary_emb.inv_freq")
TEXT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "fastomni.json",
)
TOWER_FILES = {"bert": ("vocab.txt",), "vision": ("preprocessor_config.json",)}
TOWER_FILES["audio"] = TOWER_FILES["vision"]

# Tensor names inside a tower's own directory, as their authors publish them, and their place.
TOWER_PREFIXES = {
    "vision": ("model.vision_tower.vision_tower.vision_model.", ("vision_model.", "")),
    "audio": ("model.audio_tower.audio_tower.encoder.", ("model.encoder.", "encoder.", "")),
    "bert": ("model.bert_model.", ("bert.", "")),
}

# Made by configs/base.yaml; see SOURCE.md in it.
PACKAGED_BASE = Path(__file__).with_name("tiny-base")

# Start of our parameter names -> start of the released ones.
RENAMES = {
    "vision_tower.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "audio_tower.": "model.audio_tower.",
    "router.bert_model.bert.": "model.bert_model.",
    "router.bert_gate.": "model.bert_gate.",
    "projector.": "model.mm_projector.",
    "audio_projector.": "model.audio_projector.",
    "decoder.lm_head": "lm_head.weight",
    "decoder.": "model.",
}


def released_tensors(
    model: OmniModel, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Views of the model's tensors under their released names.

    Args:
        model: gives names and shapes.
        tensors: parameter name -> tensor of the parameter's shape (weights, gradients, optimiser
            moments); default the parameters themselves. Names that are absent are left out.

    Returns:
        released name -> view; writing into a view writes into the tensor.
    """
    if tensors is None:
        tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    views: dict[str, Tensor] = {}
    config = model.config
    width = config.head_dim
    rows = (
        ("q_proj", config.num_attention_heads * width),
        ("k_proj", config.num_key_value_heads * width),
        ("v_proj", config.num_key_value_heads * width),
    )
    for name, tensor in tensors.items():
        released = _released_name(name)
        module, _, kind = released.rpartition(".")
        if module.endswith(".qkv"):
            parts = tensor.split([size for _, size in rows])
            for (projection, _), part in zip(rows, parts, strict=True):
                views[f"{module[:-4]}.self_attn.{projection}.{kind}"] = part
        elif module.endswith(".gate_up"):
            for projection, part in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                views[f"{module[:-8]}.mlp.{projection}.{kind}"] = part
        else:
            views[released] = tensor
    return views


def _released_name(name: str) -> str:
    """The released name of one of our parameters (fused ones are split by the caller)."""
    # Some transformers releases wrap the vision transformer once more.
    name = name.replace("vision_tower.vision_tower.vision_model.", "vision_tower.vision_tower.")
    for ours, theirs in RENAMES.items():
        if name.startswith(ours):
            name = theirs + name[len(ours) :]
            break
    name = name.replace(".o_proj.", ".self_attn.o_proj.")
    return name.replace(".down_proj.", ".mlp.down_proj.")


def load(path_or_hub_id: str | Path) -> OmniModel:
    """Builds a model from a checkpoint directory or hub id; see `OmniModel.from_pretrained`."""
    directory = resolve(path_or_hub_id)
    config = OmniConfig.load(directory)
    with CheckpointReader(directory) as checkpoint:
        gate = checkpoint.shape("model.bert_gate.0.weight")
        if gate is not None:
            config.bert_gate_size = gate[0]
        model = OmniModel(config)
        views = released_tensors(model)
        missing = [name for name in views if name not in checkpoint]
        for name in checkpoint.names():
            if name in views:
                _copy(views[name], checkpoint, name)
                model.stored_dtypes[name] = checkpoint.dtype(name)
            elif name == "lm_head.weight" and config.tie_word_embeddings:
                # A tied head stored a second time: saving writes the embedding there again.
                model.stored_dtypes[name] = checkpoint.dtype(name)
            elif name.startswith(UNUSED_PREFIXES) or name.endswith(BUFFER_SUFFIXES):
                model.unused_tensors[name] = checkpoint.tensor(name)
            else:
                raise CheckpointError(
                    f"{checkpoint.file(name)}: tensor {name} belongs to no part of the model; "
                    "is config.json the one that came with these weights?"
                )
    missing = _fill_from_towers(directory, config, views, missing)
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} tensors are missing, first {missing[0]}; tower and BERT "
            "weights may also come from folders siglip/, whisper/ and bert/ in that directory"
        )
    _note_companions(model, directory)
    return model


def resolve(path_or_hub_id: str | Path) -> Path:
    """The directory of a checkpoint; a hub id is downloaded (weights as safetensors only).

    "tiny-base" is the demo's base model, which comes with the package.
    """
    if str(path_or_hub_id) == "tiny-base":
        return PACKAGED_BASE
    directory = Path(os.path.expanduser(path_or_hub_id))  # Path's own raises for unknown users
    if directory.is_dir():
        return directory
    name = str(path_or_hub_id)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name} is neither a directory nor a hub id of the form owner/name; "
            "check the path (or use 'tiny-base', the demo's own base)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception as error:  # the hub client's errors have no common base worth naming
        raise CheckpointError(
            f"{name} is no directory here, and the hub did not give it "
            f"({type(error).__name__}: {error}); check the name and the connection"
        ) from error


def save(model: OmniModel, directory: Path) -> None:
    """Writes a checkpoint directory beside and renames it; see `OmniModel.save_pretrained`."""
    write_directory(directory, lambda staging: write_model(model, staging))


def write_model(model: OmniModel, directory: Path) -> None:
    """Writes config, weights and companion files into an existing directory."""
    model.config.save(directory)
    for name, content in model.companion_files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    default = getattr(torch, model.config.torch_dtype, torch.float32)
    tensors = {
        name: view.to(model.stored_dtypes.get(name, default)).contiguous()
        for name, view in released_tensors(model).items()
    }
    if "lm_head.weight" in model.stored_dtypes and "lm_head.weight" not in tensors:
        head = model.decoder.head_weight.detach()
        tensors["lm_head.weight"] = head.to(model.stored_dtypes["lm_head.weight"], copy=True)
    save_file(
        {**tensors, **model.unused_tensors},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )


def write_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Makes a directory appear whole or not at all.

    `write` fills a staging folder beside the target; every file is flushed to disk before a rename
    puts it in place, so what bears the directory's name is whole. Where an old one stood, it is
    renamed away first and comes back if the second rename fails.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.with_name(f".{directory.name}.incomplete-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    replaced = directory.with_name(f".{directory.name}.replaced-{os.getpid()}")
    try:
        write(staging)
        for path in [*staging.rglob("*"), staging]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if directory.exists():
            shutil.rmtree(replaced, ignore_errors=True)  # of a crash under the same process id
            directory.rename(replaced)
        staging.rename(directory)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if replaced.exists() and not directory.exists():
            replaced.rename(directory)
        raise


def _copy(view: Tensor, source: CheckpointReader, name: str, stored: str | None = None) -> None:
    """Copies one tensor into a view, refusing another shape."""
    stored = stored or name
    if source.shape(stored) != tuple(view.shape):
        raise CheckpointError(
            f"{source.file(stored)}: {stored} has shape {source.shape(stored)}, config.json asks "
            f"for {tuple(view.shape)}; use the config that came with these weights"
        )
    view.copy_(source.tensor(stored))


def _fill_from_towers(
    directory: Path, config: OmniConfig, views: dict[str, Tensor], missing: list[str]
) -> list[str]:
    """Fills missing tower tensors from the tower folders; returns what is still missing."""
    for tower, (prefix, candidates) in TOWER_PREFIXES.items():
        wanted = [name for name in missing if name.startswith(prefix)]
        folder = tower_folder(directory, tower, config.released)
        if not wanted or folder is None or not (folder / "model.safetensors").is_file():
            continue
        with CheckpointReader(folder) as weights:
            for name in wanted:
                stored = [c + name[len(prefix) :] for c in candidates]
                found = next((key for key in stored if key in weights), None)
                if found is not None:
                    _copy(views[name], weights, name, found)
                    missing = [other for other in missing if other != name]
    return missing


def _note_companions(model: OmniModel, directory: Path) -> None:
    """Remembers the tokenizer and processor files, so that saving carries them along."""
    for name in TEXT_FILES:
        if (directory / name).is_file():
            model.companion_files[name] = (directory / name).read_bytes()
    for tower, names in TOWER_FILES.items():
        # A folder without a config, of the released sizes then, may hold the file all the same.
        folder = tower_folder(directory, tower, model.config.released)
        for name in names:
            path = (folder or directory / TOWER_FOLDERS[tower]) / name
            if path.is_file():
                model.companion_files[f"{TOWER_FOLDERS[tower]}/{name}"] = path.read_bytes()
