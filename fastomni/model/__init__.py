"""The omni-multimodal model: towers, projectors, router, decoder, and its checkpoints."""

from fastomni.model.config import OmniConfig
from fastomni.model.omni import OmniModel, PromptBatch, TowerFeatures

__all__ = ["OmniConfig", "OmniModel", "PromptBatch", "TowerFeatures"]
