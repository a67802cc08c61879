"""Optimiser step, schedules, checkpoints and resuming."""

from fastomni.engine.engine import Engine, NonFiniteGradient
from fastomni.engine.stage import Stage

__all__ = ["Engine", "NonFiniteGradient", "Stage"]
