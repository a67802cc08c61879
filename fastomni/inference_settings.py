"""How a checkpoint is asked: the words, frames and modalities it was trained with.

A stage writes this into its model's folder as `fastomni.json`, so that a checkpoint can be used
without the configuration of its run. One that has no such file is asked as R1-Omni's inference
command asks its own.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from fastomni.config import DataConfig, PromptConfig
from fastomni.config_yaml import build, check_at_least
from fastomni.data.manifest import ManifestRow
from fastomni.data.preprocess import Preprocessing
from fastomni.model.checkpoint import resolve
from fastomni.model.config import CheckpointError, tower_folder
from fastomni.model.omni import OmniModel
from fastomni.model.presets import PRESETS
from fastomni.model.prompt import PromptTemplate
from fastomni.model.tokenizer import OmniTokenizer
from fastomni.prompts import PromptSource

FILE = "fastomni.json"


@dataclass(frozen=True, kw_only=True)
class InferenceSettings:
    """The content of `fastomni.json`."""

    prompt: PromptConfig = field(default_factory=PromptConfig)
    """The text around a clip."""
    modal: Literal["video_audio", "video", "audio"] = "video_audio"
    """What the model is shown of a clip."""
    aspect: Literal["pad", "squash"] = "pad"
    """How a frame becomes square."""
    num_frames: int
    """Frames taken from a clip."""
    max_new_tokens: int = 2048
    """Longest answer, in tokens (released inference)."""

    def __post_init__(self) -> None:
        check_at_least(1, "num_frames", self.num_frames)
        check_at_least(1, "max_new_tokens", self.max_new_tokens)

    @classmethod
    def released(cls, num_frames: int) -> InferenceSettings:
        """What R1-Omni's inference command does: other blanks than its trainer, squashed frames."""
        prompt = PromptConfig(separator="  ", video_placeholder=False)
        return cls(prompt=prompt, aspect="squash", num_frames=num_frames)

    @classmethod
    def read(cls, model: OmniModel, directory: Path) -> InferenceSettings | None:
        """The settings that came with a model; None where there are none.

        Args:
            model: loaded from `directory`.
            directory: named in errors.

        Raises:
            CheckpointError: the file is damaged.
            ConfigError: a key or value in it cannot be used.
        """
        content = model.companion_files.get(FILE)
        if content is None:
            return None
        path = directory / FILE
        try:
            data = json.loads(content)
        except ValueError as error:
            raise CheckpointError(f"{path} is not JSON ({error}); repair or remove it") from None
        if not isinstance(data, dict):
            raise CheckpointError(f"{path} holds no object; repair or remove it")
        return build(cls, data, str(path), {})

    def attach(self, model: OmniModel) -> None:
        """Makes every later checkpoint of `model` carry these settings."""
        text = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        model.companion_files[FILE] = text.encode("utf-8")


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint ready to be asked.

    Attributes:
        directory: where its files are.
        model: on its device, in fp32.
        tokenizer: its tokenizers.
        settings: how it is asked.
    """

    directory: Path
    model: OmniModel
    tokenizer: OmniTokenizer
    settings: InferenceSettings

    def source(self, rows: Sequence[ManifestRow], workers: int, use_features: bool) -> PromptSource:
        """Prompts of `rows`; an unreadable clip raises."""
        data = DataConfig(modal=self.settings.modal, workers=workers)
        return prompt_source(
            self.model,
            self.tokenizer,
            rows,
            self.directory,
            self.settings,
            data,
            use_features=use_features,
        )


def open_checkpoint(path_or_hub_id: str, device: str = "auto") -> OpenCheckpoint:
    """Loads a checkpoint to ask it; says so on stderr where it does not tell how it is asked.

    Args:
        path_or_hub_id: a directory in the released layout, or a hub id.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: no such checkpoint, one that cannot be read, or no such device.
    """
    if path_or_hub_id in PRESETS and not Path(path_or_hub_id).is_dir():
        raise ValueError(
            f"{path_or_hub_id} is a preset with random weights, and would answer at random; give "
            "the directory of a trained checkpoint (output_dir/<stage>/model) or a hub id"
        )
    chosen = choose_device(device)
    directory = resolve(path_or_hub_id)
    model = OmniModel.from_pretrained(directory).to(chosen).float().eval()
    settings = InferenceSettings.read(model, directory)
    if settings is None:
        settings = InferenceSettings.released(model.config.num_frames)
        print(
            f"note: {directory} has no {FILE}; it is asked as R1-Omni's inference command asks",
            file=sys.stderr,
            flush=True,
        )
    model.config.num_frames = settings.num_frames
    return OpenCheckpoint(directory, model, OmniTokenizer.of(model), settings)


def choose_device(name: str) -> torch.device:
    """The device behind "auto", "cpu" or "cuda".

    Raises:
        ValueError: a GPU is asked for, and torch sees none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device=cuda, but this torch sees no GPU; use device=cpu, or install a torch "
            "build for the GPU and its driver"
        )
    return torch.device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")


def prompt_source(
    model: OmniModel,
    tokenizer: OmniTokenizer,
    rows: Sequence[ManifestRow],
    directory: Path,
    settings: InferenceSettings,
    data: DataConfig,
    own_questions: bool = False,
    use_features: bool = True,
) -> PromptSource:
    """Prompts of `rows` for `model`, worded as the settings say.

    Args:
        model: gives towers and device.
        tokenizer: its tokenizers.
        rows: the manifest.
        directory: the checkpoint's folder; its tower folders say how clips become tensors.
        settings: words and frames.
        data: workers, error policy, cache sizes; its modal is that of the settings.
        own_questions: ask each row's own question as it stands, without the instruction.
        use_features: run the frozen towers once per clip.
    """
    prompt = settings.prompt
    template = PromptTemplate(
        system=prompt.system,
        instruction="" if own_questions else prompt.think_instruction,
        separator=prompt.separator,
        video_placeholder=prompt.video_placeholder,
        modal=settings.modal,
    )
    folders = {
        name: tower_folder(directory, name, model.config.released) for name in ("vision", "audio")
    }
    for name, folder in folders.items():
        if folder is None:
            raise CheckpointError(
                f"{directory} has no folder with the {name} tower's config.json and "
                "preprocessor_config.json (siglip/, whisper/); copy it there"
            )
    preprocessing = Preprocessing.from_tower_dirs(
        folders["vision"] or "", folders["audio"] or "", settings.num_frames, settings.aspect
    )
    return PromptSource(
        model,
        tokenizer,
        rows,
        template,
        prompt.question,
        preprocessing,
        data,
        own_questions,
        use_features,
    )
