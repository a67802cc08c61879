"""One stage of a run on disk: whether it is done, where it stopped, what it made.

    output_dir/<stage>/checkpoints/step-NNNNNN   while it runs (one at a time, always whole), by
                                                 the number of optimiser steps
    output_dir/<stage>/model                     when it is done, with stage.json

A stage remembers a fingerprint of everything that decides its result (settings, seed, data and the
model it started from), so that a changed configuration is never mistaken for a finished one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from fastomni.engine.checkpoint import latest_checkpoint, steps
from fastomni.engine.engine import Engine
from fastomni.model.checkpoint import write_directory, write_model
from fastomni.model.config import read_json
from fastomni.model.omni import OmniModel

SHOWN_CHANGES = 5


class StageError(ValueError):
    """A stage's folder that does not fit the configuration."""


class Stage:
    """A stage's folder.

    Args:
        directory: output_dir/<stage>.
        fingerprint: JSON of all that decides the result.
        checkpoint_every: steps, as they are logged, between checkpoints.
        updates_per_step: optimiser steps in each of them; no checkpoint falls between these.

    Attributes:
        phase: times a named part of a step; the owner of a report puts its own here.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: dict[str, Any],
        checkpoint_every: int = 50,
        updates_per_step: int = 1,
    ) -> None:
        self.directory = directory
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self._checkpoint_every = checkpoint_every
        self._updates_per_step = updates_per_step
        self.phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext()

    @property
    def model_directory(self) -> Path:
        """Where the finished stage's model is."""
        return self.directory / "model"

    @property
    def done(self) -> bool:
        """Whether the stage was finished with the same fingerprint.

        Raises:
            StageError: it was finished with another one.
        """
        record = self.model_directory / "stage.json"
        if not record.is_file():
            return False
        self._check(read_json(record), record)
        return True

    def check(self) -> None:
        """Refuses a folder that was made with another fingerprint, done or not.

        Raises:
            StageError: naming what differs and what to do.
        """
        checkpoint = latest_checkpoint(self.directory / "checkpoints")
        if not self.done and checkpoint is not None:
            self._check(read_json(checkpoint / "state.json")["extra"], checkpoint)

    def resume(self, engine: Engine) -> None:
        """Takes the engine to the newest checkpoint, where there is one.

        Raises:
            StageError: the checkpoint was made with another fingerprint.
        """
        self.check()
        checkpoint = latest_checkpoint(self.directory / "checkpoints")
        if checkpoint is None:
            return
        engine.resume(checkpoint)
        step = engine.steps_done // self._updates_per_step
        print(f"resuming at step {step} from {checkpoint}", flush=True)

    def checkpoint(self, engine: Engine) -> None:
        """Saves every `checkpoint_every` steps; older checkpoints go. Called after each step."""
        if engine.steps_done % (self._checkpoint_every * self._updates_per_step):
            return
        folder = self.directory / "checkpoints"
        with self.phase("checkpoint"):
            saved = engine.save(folder, fingerprint=self._fingerprint)
            for other in steps(folder):
                if other != saved:
                    shutil.rmtree(other)

    def finish(self, model: OmniModel) -> None:
        """Writes the model, which marks the stage as done, and removes its checkpoints."""

        def write(staging: Path) -> None:
            write_model(model, staging)
            record = json.dumps({"fingerprint": self._fingerprint}, indent=1)
            (staging / "stage.json").write_text(record + "\n", encoding="utf-8")

        write_directory(self.model_directory, write)
        shutil.rmtree(self.directory / "checkpoints", ignore_errors=True)

    def _check(self, record: dict[str, Any], where: Path) -> None:
        changed = _differences(record.get("fingerprint", {}), self._fingerprint)
        if changed:
            raise StageError(
                f"{where} was made with {', '.join(changed[:SHOWN_CHANGES])}; set output_dir to a "
                f"new folder, or remove {self.directory} and the stages after it to train again"
            )


def _differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two fingerprints, one text per value."""
    changed = []
    for key in sorted(found.keys() | wanted.keys()):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            changed.append(f"{prefix}{key}={json.dumps(old)} (now {json.dumps(new)})")
    return changed
