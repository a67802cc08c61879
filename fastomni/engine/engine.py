"""The four calls behind which training happens: backward, step, save, resume.

There is no wrapper module: methods of the model may be called any number of times before `step`.
One process in fp32; the gradients' norm is checked before every update, so a step that is not
finite changes no weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastomni.config import OptimizerConfig
from fastomni.engine.checkpoint import read_checkpoint, write_checkpoint
from fastomni.engine.schedule import learning_rate_factor
from fastomni.model.omni import OmniModel


class NonFiniteGradient(ValueError):
    """A loss or gradient that is NaN or infinite; no weight was changed."""


class Engine:
    """AdamW over the model's trainable parameters, with clipping by norm and a schedule.

    Attributes:
        model: trains in place.
        steps_done: optimiser steps since the stage began, across resumes.
    """

    def __init__(self, model: OmniModel, settings: OptimizerConfig, total_steps: int) -> None:
        self.model = model
        self.settings = settings
        self.total_steps = total_steps
        self.steps_done = 0
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=settings.lr,
            betas=(settings.betas[0], settings.betas[1]),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    @property
    def learning_rate(self) -> float:
        """The rate that the next step will use."""
        settings = self.settings
        return settings.lr * learning_rate_factor(
            self.steps_done, self.total_steps, settings.schedule, settings.warmup
        )

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss` (a scalar) to those already there."""
        loss.backward()

    def step(self) -> float:
        """Clips, updates the weights and clears the gradients; returns the norm before clipping.

        Raises:
            NonFiniteGradient: the norm is NaN or infinite; nothing was updated.
        """
        parameters = [p for p in self._parameters.values() if p.grad is not None]
        limit = self.settings.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(
            parameters, float("inf") if limit is None else limit
        ).item()
        if norm != norm or norm == float("inf"):
            self._optimizer.zero_grad()
            raise NonFiniteGradient(
                f"optimiser step {self.steps_done + 1}: the gradient norm is {norm}; no weight was "
                "changed. Lower optimizer.lr, or look at this step's clips and rewards"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.steps_done += 1
        return norm

    def save(self, directory: Path, **extra: Any) -> Path:
        """Writes `directory/step-NNNNNN`, whole or not at all.

        Args:
            directory: the stage's checkpoint folder.
            extra: JSON values that `resume` gives back.
        """
        moments = {
            f"{kind}:{name}": state[kind]
            for name, parameter in self._parameters.items()
            if (state := self._optimizer.state.get(parameter))
            for kind in ("exp_avg", "exp_avg_sq")
        }
        masters = {f"master:{name}": p.detach() for name, p in self._parameters.items()}
        state = {"steps_done": self.steps_done, "extra": extra}
        return write_checkpoint(directory, self.model, {**moments, **masters}, state)

    def resume(self, checkpoint: Path) -> dict[str, Any]:
        """Continues from a checkpoint of `save`, bit for bit; returns what was saved as `extra`."""
        tensors, state = read_checkpoint(checkpoint, self.model)
        self.steps_done = state["steps_done"]
        for name, parameter in self._parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"master:{name}"])
            if f"exp_avg:{name}" in tensors:
                self._optimizer.state[parameter] = {
                    # The fused update reads the count where the weights are.
                    "step": torch.tensor(float(self.steps_done), device=parameter.device),
                    "exp_avg": tensors[f"exp_avg:{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq:{name}"],
                }
        return state["extra"]
