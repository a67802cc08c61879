"""Trains an omni model by reinforcement learning from verifiable rewards.

    torchrun -m fastomni.train configs/rlvr.yaml [key=value ...]

Runs the configured stages in order: pretrain (new towers learn words), base (a new model learns to
describe), cold start (it learns to explain and answer), RLVR (it learns from labels alone), with an
evaluation before the first and after each of the last two. A stage that is done is skipped; one
that was cut off goes on at its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastomni.config import Config, ConfigError, describe, load_config

if TYPE_CHECKING:
    from fastomni.runs import Run


def run(run: Run) -> None:
    """All stages of a run, each from the model of the one before."""
    from fastomni import evaluate, grpo, pretrain, sft
    from fastomni.report.summary import write_summary

    config = run.config
    run.begin()
    trainers: dict[str, Callable[..., None]] = {
        "pretrain": pretrain.train,
        "base": sft.train,
        "coldstart": sft.train,
        "rlvr": grpo.train,
    }
    measured_before = False
    for name, settings in run.stages():
        answers = name in ("coldstart", "rlvr")
        if config.evaluate is not None and answers and not measured_before:
            # The model this begins with seldom answers at all: whose voice it hears says nothing.
            before = dataclasses.replace(config.evaluate, swap_voice=False)
            evaluate.measure(run, "base", before)
            measured_before = True
        stage = run.stage(name, settings)
        if stage.done:
            print(f"{name}: done before, in {stage.model_directory}", flush=True)
        else:
            model, source, report = run.open(name, settings)
            stage.phase = report.phase
            with report:
                trainers[name](model, source, settings, stage, report, config.seed)
                stage.finish(model)
            for row, reason in source.skipped.items():
                print(f"{name}: row {row!r} was skipped: {reason}", flush=True)
        run.model_directory = stage.model_directory
        if config.evaluate is not None and answers:
            evaluate.measure(run, name, config.evaluate)
    write_summary(run.directory)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\n{describe(Config)}")
        return 0 if arguments else 2
    try:
        config = load_config(arguments[0], arguments[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _run(config)


def _run(config: Config) -> int:
    os.environ.setdefault("USE_HUB_KERNELS", "0")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print(
            "error: this version trains in one process; start it with --nproc-per-node=1",
            file=sys.stderr,
        )
        return 2
    try:
        from fastomni.runs import Run

        run(Run(config))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"interrupted; {_kept(Path(config.output_dir).expanduser())}",
            file=sys.stderr,
        )
        return 130
    return 0


def _kept(directory: Path) -> str:
    """What an interrupted run has left, and what the same command does next."""
    if any(directory.glob("*/checkpoints/step-*")):
        return f"{directory} keeps the last checkpoint, and the same command goes on from it"
    done = [path.parts[-3] for path in directory.glob("*/model/stage.json")]
    if done:
        return (
            f"{directory} keeps what is done ({', '.join(sorted(done))}), and the same command "
            "goes on after it"
        )
    return "no checkpoint was written yet; the same command begins anew"


if __name__ == "__main__":
    sys.exit(main())
