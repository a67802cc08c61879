"""Explanations and answers for clips.

    python -m fastomni.infer CHECKPOINT clip.mp4 [more clips] [--json]

CHECKPOINT is a directory (output_dir/<stage>/model), a hub id, or tiny-base. A clip that cannot be
used is named on the error stream with reason and remedy, the others are answered, and the exit
status is 1. Clips are answered one by one, so that each answer stands as soon as it is there and
depends on no other clip.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastomni.inference_settings import OpenCheckpoint
    from fastomni.rollout import Sampling


@dataclass(frozen=True)
class Answer:
    """What a model says about one clip.

    Attributes:
        clip: the file, as it was given.
        text: all of it.
        explanation: the text inside the think block, or None where there is none.
        answer: the text inside the answer block, or None where there is none.
    """

    clip: str
    text: str
    explanation: str | None
    answer: str | None


def infer(
    checkpoint: OpenCheckpoint, clips: list[str], sampling: Sampling, seed: int = 0
) -> Iterator[Answer | ValueError]:
    """Asks a checkpoint about clips, one after the other.

    Args:
        checkpoint: from `open_checkpoint`.
        clips: media files.
        sampling: one completion each; a temperature of 0 takes the most likely tokens.
        seed: of the draws; with the clip's name it decides them.

    Yields:
        For each clip its answer, or the error that says why it has none.
    """
    import torch

    from fastomni.data.clips import ClipError
    from fastomni.data.manifest import ManifestRow
    from fastomni.rewards import extract_answer
    from fastomni.rollout import generate, sequence_seeds

    paths = [Path(clip).expanduser() for clip in clips]
    rows = [
        ManifestRow(clip, path, None, None, "") for clip, path in zip(clips, paths, strict=True)
    ]
    source = checkpoint.source(rows, workers=0, use_features=False)
    for index, clip in enumerate(clips):
        if not paths[index].is_file():
            yield ValueError(f"{clip}: no such file; check the path")
            continue
        try:
            ((_, prompts),) = source.batches([[index]])
        except ClipError as error:
            yield ValueError(f"{error.path or clip}: {error.reason}")
            continue
        seeds = sequence_seeds(seed, 0, [clip], 1) if sampling.temperature > 0 else None
        with torch.no_grad():
            embeddings, lengths = checkpoint.model.encode(prompts)
        rollout = generate(checkpoint.model, embeddings, lengths, sampling, seeds)
        text = checkpoint.tokenizer.decode(rollout.completions()[0]).strip()
        found = extract_answer(text)
        yield Answer(
            clip, text, extract_explanation(text), None if found is None else found.strip()
        )


def extract_explanation(text: str) -> str | None:
    """The text from the first `<think>` to the last `</think>`; None where it is not closed."""
    start, end = text.find("<think>"), text.rfind("</think>")
    return text[start + len("<think>") : end].strip() if 0 <= start < end else None


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.temperature < 0:
        parser.error("--temperature must be 0 (the most likely tokens) or more")
    if chosen.seed is not None and chosen.temperature == 0:
        parser.error("--seed has no effect without --temperature; nothing is drawn")
    if chosen.max_new_tokens is not None and chosen.max_new_tokens < 1:
        parser.error("--max-new-tokens must be 1 or more")
    os.environ.setdefault("USE_HUB_KERNELS", "0")
    try:
        return _answer_all(chosen)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastomni.infer", description="Explanations and answers for clips."
    )
    parser.add_argument(
        "checkpoint", help="a directory (output_dir/<stage>/model), a hub id, or tiny-base"
    )
    parser.add_argument("clips", nargs="+", metavar="clip", help="media files")
    parser.add_argument("--json", action="store_true", help="one JSON object per clip and line")
    parser.add_argument("--question", help="in place of the one the checkpoint was trained with")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer, in tokens")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="draw tokens (default 0: the likeliest)"
    )
    parser.add_argument("--seed", type=int, help="of the draws (default 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def _answer_all(chosen: argparse.Namespace) -> int:
    from fastomni.inference_settings import open_checkpoint
    from fastomni.rollout import Sampling

    checkpoint = open_checkpoint(chosen.checkpoint, chosen.device)
    settings = checkpoint.settings
    if chosen.question is not None:
        prompt = dataclasses.replace(settings.prompt, question=chosen.question)
        settings = dataclasses.replace(settings, prompt=prompt)
        checkpoint = dataclasses.replace(checkpoint, settings=settings)
    sampling = Sampling(
        max_new_tokens=chosen.max_new_tokens or settings.max_new_tokens,
        temperature=chosen.temperature,
    )
    failed = False
    for result in infer(checkpoint, chosen.clips, sampling, chosen.seed or 0):
        if isinstance(result, ValueError):
            failed = True
            print(f"error: {result}", file=sys.stderr, flush=True)
        elif chosen.json:
            print(json.dumps(dataclasses.asdict(result)), flush=True)
        else:
            print(_lines(result), flush=True)
    return int(failed)


def _lines(result: Answer) -> str:
    if result.answer is None:
        return f"{result.clip}\n  no well-formed answer: {result.text}"
    explanation = result.explanation or "none was given"
    return f"{result.clip}\n  explanation: {explanation}\n  answer: {result.answer}"


if __name__ == "__main__":
    sys.exit(main())
