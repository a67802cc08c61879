"""WAR and UAR on labelled test sets, with greedy answers.

    python -m fastomni.evaluate CHECKPOINT test.jsonl [--limit N] [--json FILE]

CHECKPOINT is a directory (output_dir/<stage>/model) or a hub id. Answers are read from the last
well-formed `<answer>` block. Where the rows say what decides a clip (`kind`), results can be given
by kind, and again with the voice of another clip of another label put in: what that costs is what
the model takes from hearing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastomni.config import EvaluateConfig

if TYPE_CHECKING:
    from fastomni.data.manifest import ManifestRow
    from fastomni.model.omni import OmniModel
    from fastomni.prompts import PromptSource
    from fastomni.runs import Run

SWAP_SEED = 20250310  # of the donors, the same for every model and run


def measure(run: Run, stage: str, settings: EvaluateConfig) -> dict[str, Any]:
    """Evaluates the model a run has come to on all test sets; results are kept and reused.

    Args:
        run: at the model to be measured.
        stage: its folder gets `evaluation/` with results and answers.
        settings: test sets, batch size, limits.

    Returns:
        test set -> results of `evaluate_rows`.
    """
    from fastomni.model.checkpoint import write_directory

    folder = run.directory / stage / "evaluation"
    wanted = {
        "settings": dataclasses.asdict(settings),
        "manifests": [run.manifest_digest(manifest) for manifest in settings.manifests],
        "fingerprint": json.loads(json.dumps(run.model_fingerprint())),
    }
    results_file = folder / "results.json"
    if results_file.is_file():
        found = json.loads(results_file.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in wanted} == wanted:
            for name, part in found["results"].items():
                print(f"{stage} on {name}, measured before: {_line(part)}", flush=True)
            return found["results"]
    started = time.perf_counter()
    model, tokenizer = run.load()
    results: dict[str, Any] = {}
    answers: dict[str, list[dict[str, Any]]] = {}
    for manifest in settings.manifests:
        name = Path(manifest).stem
        source = run.source(model, tokenizer, run.rows(manifest)[: settings.limit])
        results[name], answers[name] = evaluate_rows(model, source, settings, f"{stage} on {name}")
        print(f"{stage} on {name}: {_line(results[name])}", flush=True)

    seconds = time.perf_counter() - started

    def write(staging: Path) -> None:
        for name, lines in answers.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (staging / f"{name}.jsonl").write_text(text, encoding="utf-8")
        content = json.dumps({**wanted, "seconds": seconds, "results": results}, indent=1)
        (staging / "results.json").write_text(content + "\n", encoding="utf-8")

    write_directory(folder, write)
    return results


def evaluate_rows(
    model: OmniModel, source: PromptSource, settings: EvaluateConfig, title: str = "evaluation"
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results and single answers on the rows of one test set; `title` stands by the bar."""
    from fastomni.report import recall_scores
    from fastomni.rewards import extract_answer, format_reward, normalise_label

    own = answer(model, source, settings, None, title)
    rows = [source.rows[index] for index in own]
    texts = list(own.values())
    labels = [normalise_label(row.label) for row in rows]
    said = [_folded(extract_answer(text)) for text in texts]
    war, uar, recalls = recall_scores(labels, said)
    results: dict[str, Any] = {
        "clips": len(rows),
        "war": war,
        "uar": uar,
        "recalls": recalls,
        "format_rate": sum(format_reward(text) for text in texts) / len(texts),
        "invalid": sum(name not in recalls for name in said),
        "skipped": len(source.skipped),
    }
    answers: list[dict[str, Any]] = [
        {"id": row.id, "label": row.label, "kind": row.kind, "answer": name, "text": text}
        for row, name, text in zip(rows, said, texts, strict=True)
    ]
    if settings.swap_voice and any(row.kind for row in rows):
        order = list(own)  # row indices of the clips that could be read
        donors = {order[i]: order[donor] for i, donor in enumerate(voice_donors(rows))}
        swapped = answer(model, source, settings, donors, f"{title}, voices swapped")
        results["by_kind"] = {}
        for line, text in zip(answers, swapped.values(), strict=True):
            line["swapped"] = _folded(extract_answer(text))
        for kind in sorted({row.kind for row in rows if row.kind}):
            chosen = [line for line in answers if line["kind"] == kind]
            results["by_kind"][kind] = {
                "clips": len(chosen),
                "war": _share(chosen, "answer"),
                "war_swapped_voice": _share(chosen, "swapped"),
            }
    return results, answers


def answer(
    model: OmniModel,
    source: PromptSource,
    settings: EvaluateConfig,
    donors: Mapping[int, int] | None,
    title: str = "evaluation",
) -> dict[int, str]:
    """Greedy completions by row index; with `donors`, row i hears the clip of row donors[i]."""
    import torch

    from fastomni.report.progress import bar
    from fastomni.rollout import Sampling, generate

    sampling = Sampling(max_new_tokens=settings.max_new_tokens, temperature=0.0)
    readable = [i for i, row in enumerate(source.rows) if row.id not in source.skipped]
    batches = [
        readable[start : start + settings.batch_size]
        for start in range(0, len(readable), settings.batch_size)
    ]
    texts: dict[int, str] = {}
    index_of = {row.id: index for index, row in enumerate(source.rows)}
    voices = source.batches([[donors[i] for i in batch] for batch in batches]) if donors else None
    with bar(title, len(readable)) as advance:
        for batch, (rows, prompts) in zip(batches, source.batches(batches), strict=True):
            if voices is not None:
                _, other = next(voices)
                assert prompts.features is not None and other.features is not None
                prompts.features.audio = other.features.audio
            if rows:
                with torch.no_grad():
                    embeddings, lengths = model.encode(prompts)
                rollout = generate(model, embeddings, lengths, sampling)
                for row, ids in zip(rows, rollout.completions(), strict=True):
                    texts[index_of[row.id]] = source.tokenizer.decode(ids)
            advance(len(batch))
    return texts


def voice_donors(rows: Sequence[ManifestRow]) -> list[int]:
    """For each row another row of another label, drawn once for all with a fixed seed."""
    generator = np.random.default_rng(SWAP_SEED)
    labels = [row.label for row in rows]
    donors = []
    for index, label in enumerate(labels):
        others = [other for other, name in enumerate(labels) if name != label]
        donors.append(int(generator.choice(others)) if others else index)
    return donors


def _folded(text: str | None) -> str | None:
    from fastomni.rewards import normalise_label

    return None if text is None else normalise_label(text)


def _share(lines: Sequence[dict[str, Any]], key: str) -> float:
    from fastomni.rewards import normalise_label

    return sum(line[key] == normalise_label(line["label"]) for line in lines) / len(lines)


def _line(results: dict[str, Any]) -> str:
    kinds = "  ".join(
        f"{kind} {part['war']:.1%} (voice swapped {part['war_swapped_voice']:.1%})"
        for kind, part in results.get("by_kind", {}).items()
    )
    return (
        f"WAR {results['war']:.1%}  UAR {results['uar']:.1%}  "
        f"format {results['format_rate']:.1%}  lowest recall "
        f"{min(results['recalls'].values()):.1%}  {kinds}"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    chosen = _parser().parse_args(arguments)
    os.environ.setdefault("USE_HUB_KERNELS", "0")
    try:
        _measure_checkpoint(chosen)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; no result was kept", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastomni.evaluate",
        description="WAR, UAR, recalls and format rate of a checkpoint's greedy answers.",
    )
    parser.add_argument("checkpoint", help="a directory (output_dir/<stage>/model) or a hub id")
    parser.add_argument("manifest", help="labelled clips; paths in it are relative to its folder")
    parser.add_argument("--limit", type=int, help="so many clips from its start (default: all)")
    parser.add_argument("--batch-size", type=int, default=32, help="clips at once (default 32)")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer (default: its own)")
    parser.add_argument(
        "--swap-voice", action="store_true", help="again with another clip's voice, by kind"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def _measure_checkpoint(chosen: argparse.Namespace) -> None:
    from fastomni.data.manifest import read_manifest
    from fastomni.inference_settings import open_checkpoint
    from fastomni.report.summary import in_percent, show_results

    rows = read_manifest(chosen.manifest)[: chosen.limit]
    checkpoint = open_checkpoint(chosen.checkpoint, chosen.device)
    limit = checkpoint.settings.max_new_tokens
    settings = EvaluateConfig(
        manifests=[chosen.manifest],
        batch_size=chosen.batch_size,
        max_new_tokens=limit if chosen.max_new_tokens is None else chosen.max_new_tokens,
        swap_voice=chosen.swap_voice,
        limit=chosen.limit,
    )
    if chosen.swap_voice and checkpoint.settings.modal != "video_audio":
        raise ValueError(
            f"--swap-voice needs picture and sound, but {checkpoint.directory} is asked with "
            f"modal {checkpoint.settings.modal}; leave it out"
        )
    if chosen.swap_voice and not any(row.kind for row in rows):
        raise ValueError(
            f"--swap-voice gives results by kind, but no row of {chosen.manifest} names one; "
            "add the key kind, or leave it out"
        )
    source = checkpoint.source(rows, workers=2, use_features=True)
    results, _ = evaluate_rows(checkpoint.model, source, settings, Path(chosen.manifest).stem)
    percent = in_percent(results)
    show_results(Path(chosen.manifest).stem, percent)
    if chosen.json is not None:
        content = {"checkpoint": chosen.checkpoint, "manifest": chosen.manifest, **percent}
        chosen.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
