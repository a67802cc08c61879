"""A run on disk and in memory: its data, its model at each stage, its folders and its summary."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from fastomni.config import Config, GrpoConfig, PretrainConfig, SftConfig
from fastomni.data.demo import ensure_demo
from fastomni.data.demo_text import demo_texts
from fastomni.data.manifest import ManifestRow, read_manifest
from fastomni.data.preprocess import Preprocessing
from fastomni.engine import Stage
from fastomni.model.checkpoint import resolve, write_directory, write_model
from fastomni.model.config import CheckpointError, read_json, tower_folder, write_json
from fastomni.model.omni import OmniModel
from fastomni.model.presets import PRESETS, build
from fastomni.model.prompt import PromptTemplate
from fastomni.model.tokenizer import OmniTokenizer
from fastomni.prompts import PromptSource
from fastomni.report import StageReport
from fastomni.rewards import check_labels
from fastomni.rewards import resolve as resolve_rewards

StageConfig = PretrainConfig | SftConfig | GrpoConfig


class Run:
    """Opens what the stages of one configuration need.

    Attributes:
        config: the settings.
        directory: output_dir.
        data_root: the folder that manifests are relative to.
        model_directory: the checkpoint that the next stage starts from.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.directory = Path(config.output_dir).expanduser()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        # Sums with atomic adds would make two equal runs differ in the last bit.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        if cuda and not torch.cuda.is_available():
            raise ValueError(
                "device=cuda, but this torch sees no GPU; use device=cpu, or install a torch "
                "build for the GPU and its driver"
            )
        self.device = torch.device("cuda" if cuda else "cpu")
        # The preset's own folder is made when it is first loaded.
        self._preset = config.model.path in PRESETS
        self._initial = self.directory / "init" if self._preset else resolve(config.model.path)
        self.model_directory = self._initial
        self.data_root = self._data_root()

    def begin(self) -> None:
        """Refuses what could not be finished before any time is spent on it, then notes the config.

        Raises:
            ValueError: a stage's folder, a manifest or a label that does not fit the configuration.
        """
        for name, settings in self.stages():
            self.stage(name, settings).check()
            self._checked_rows(settings)
        if self.config.evaluate is not None:
            for manifest in self.config.evaluate.manifests:
                self.rows(manifest)
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")

    def stages(self) -> list[tuple[str, StageConfig]]:
        """Names and settings of the configured stages, in order."""
        config = self.config
        named = (
            ("pretrain", config.pretrain),
            ("base", config.base),
            ("coldstart", config.coldstart),
            ("rlvr", config.rlvr),
        )
        return [(name, settings) for name, settings in named if settings is not None]

    def last_finished(self) -> str:
        """Goes to the last stage that is done and returns its name.

        Raises:
            ValueError: none is done.
        """
        finished = ""
        for name, settings in self.stages():
            stage = self.stage(name, settings)
            if not stage.done:
                break
            finished, self.model_directory = name, stage.model_directory
        if not finished:
            raise ValueError(
                f"{self.directory}: no stage is done; train first: "
                "torchrun -m fastomni.train CONFIG"
            )
        return finished

    def stage(self, name: str, settings: StageConfig) -> Stage:
        """The folder of a stage, with the fingerprint of all that decides its result."""
        path = self.config.model.path
        start: dict[str, Any] = {"model": path}
        if self._preset:
            start = {"preset": path, "seed": self.config.seed}
        for earlier, earlier_settings in self.stages():
            if earlier == name:
                break
            content = json.dumps(self._fingerprint(earlier, earlier_settings, start))
            start = {"stage": earlier, "digest": _short_digest(content.encode())}
        fingerprint = self._fingerprint(name, settings, start)
        return Stage(self.directory / name, fingerprint, settings.checkpoint_every)

    def _fingerprint(
        self, name: str, settings: StageConfig, start: dict[str, Any]
    ) -> dict[str, Any]:
        config = self.config
        quiet = ("checkpoint_every", "log_every")
        return {
            "settings": {k: v for k, v in config.to_dict()[name].items() if k not in quiet},
            "prompt": config.to_dict()["prompt"],
            "modal": config.data.modal,
            "aspect": config.model.aspect,
            "num_frames": config.model.num_frames,
            "seed": config.seed,
            "manifest": self.manifest_digest(settings.manifest),
            "start": start,
        }

    def load(self) -> tuple[OmniModel, OmniTokenizer]:
        """The model that the current stage starts from (or that was last finished)."""
        if self._preset and self.model_directory == self._initial:
            self._build_preset()
        model = OmniModel.from_pretrained(self.model_directory).to(self.device).float()
        return model, OmniTokenizer.of(model)

    def rows(self, manifest: str) -> list[ManifestRow]:
        """Rows of a manifest of this run."""
        return read_manifest(self.data_root / manifest)

    def manifest_digest(self, manifest: str) -> str:
        """A digest of a manifest's bytes.

        Raises:
            ValueError: there is no such file.
        """
        path = self.data_root / manifest
        if not path.is_file():
            raise ValueError(
                f"manifest {path} does not exist; manifests are relative to data.root (or to "
                "data.demo_dir, where the demo set is drawn)"
            )
        return _short_digest(path.read_bytes())

    def source(
        self,
        model: OmniModel,
        tokenizer: OmniTokenizer,
        rows: list[ManifestRow],
        own_questions: bool = False,
        use_features: bool = True,
    ) -> PromptSource:
        """Prompts of `rows` for `model`, as the configuration words them."""
        prompt, data = self.config.prompt, self.config.data
        template = PromptTemplate(
            system=prompt.system,
            instruction="" if own_questions else prompt.think_instruction,
            separator=prompt.separator,
            video_placeholder=prompt.video_placeholder,
            modal=data.modal,
        )
        return PromptSource(
            model,
            tokenizer,
            rows,
            template,
            prompt.question,
            self._preprocessing(model),
            data,
            own_questions,
            use_features,
        )

    def open(self, name: str, settings: StageConfig) -> tuple[OmniModel, PromptSource, StageReport]:
        """Model, prompts and report of a stage."""
        rows = self._checked_rows(settings)
        if isinstance(settings, GrpoConfig):
            use_features, own_questions = settings.sharing != "released", False
        else:
            use_features = True
            own_questions = isinstance(settings, SftConfig) and settings.use_row_question
        if {"vision_tower", "audio_tower"} & set(settings.trainable):
            use_features = False
        model, tokenizer = self.load()
        source = self.source(model, tokenizer, rows, own_questions, use_features)
        report = StageReport(self.directory / name, name, settings.log_every)
        return model, source, report

    def _checked_rows(self, settings: StageConfig) -> list[ManifestRow]:
        """The rows of a stage's manifest, refused where it could not learn from one of them."""
        rows = self.rows(settings.manifest)
        manifest = self.data_root / settings.manifest
        if isinstance(settings, GrpoConfig):
            check_labels([r.label for r in rows], resolve_rewards(settings.rewards), manifest)
            return rows
        untaught = [row.id for row in rows if not row.response]
        if untaught:
            raise ValueError(
                f"{manifest}: {len(untaught)} rows have no response to learn, first "
                f"{', '.join(untaught[:5])}; give each a text (key response, or a gpt turn with "
                "tags in the released JSON)"
            )
        return rows

    def _preprocessing(self, model: OmniModel) -> Preprocessing:
        folders = {
            name: tower_folder(self.model_directory, name, model.config.released)
            for name in ("vision", "audio")
        }
        for name, folder in folders.items():
            if folder is None:
                raise CheckpointError(
                    f"{self.model_directory} has no folder with the {name} tower's config.json and "
                    "preprocessor_config.json (siglip/, whisper/); copy it there"
                )
        return Preprocessing.from_tower_dirs(
            folders["vision"] or "",
            folders["audio"] or "",
            self.config.model.num_frames or model.config.num_frames,
            self.config.model.aspect,
        )

    def _data_root(self) -> Path:
        data = self.config.data
        if data.root is not None:
            return Path(data.root).expanduser()
        return ensure_demo(
            Path(data.demo_dir or "data/demo").expanduser(),
            scale=data.demo_scale,
            workers=max(1, data.workers),
        )

    def _build_preset(self) -> None:
        """Builds the preset's folder, unless one of the same preset, seed and texts is there."""
        prompt, preset = self.config.prompt, self.config.model.path
        texts = [prompt.system, prompt.question, prompt.think_instruction]
        template = PromptTemplate(prompt.system, prompt.think_instruction)
        corpus = [*demo_texts(), *texts * 20, *[template.render(prompt.question)] * 20]
        seed = self.config.seed
        digest = _short_digest("\0".join(corpus).encode())
        record = {"preset": preset, "seed": seed, "corpus": digest}
        path = self._initial / "preset.json"
        if path.is_file() and read_json(path) == record:
            return
        model = build(preset, corpus, seed)

        def write(staging: Path) -> None:
            write_model(model, staging)
            write_json(staging / "preset.json", record)

        write_directory(self._initial, write)


def _short_digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
