"""WAR and UAR on labelled test sets, with greedy answers.

    python -m fastomni.evaluate configs/rlvr.yaml [key=value ...]

evaluates the last stage of a run that is done. Answers are read from the last well-formed
`<answer>` block. Where the rows say what decides a clip (`kind`), results are also given by kind,
and again with the voice of another clip of another label put in: what that costs is what the model
takes from hearing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastomni.config import ConfigError, EvaluateConfig, load_config

if TYPE_CHECKING:
    from fastomni.data.manifest import ManifestRow
    from fastomni.model.omni import OmniModel
    from fastomni.prompts import PromptSource
    from fastomni.runs import Run

SWAP_SEED = 20250310  # of the donors, the same for every model and run


def measure(run: Run, stage: str, settings: EvaluateConfig) -> dict[str, Any]:
    """Evaluates a finished stage on all test sets; results are kept and reused.

    Args:
        run: its model must be that of the stage.
        stage: folder that gets `evaluation.json` and the answers.
        settings: test sets, batch size, limits.

    Returns:
        test set -> results of `evaluate_rows`.
    """
    from fastomni.model.checkpoint import write_directory

    folder = run.directory / stage / "evaluation"
    record = json.loads((run.model_directory / "stage.json").read_text(encoding="utf-8"))
    wanted = {
        "settings": dataclasses.asdict(settings),
        "manifests": [run.manifest_digest(manifest) for manifest in settings.manifests],
        "fingerprint": record["fingerprint"],
    }
    results_file = folder / "results.json"
    if results_file.is_file():
        found = json.loads(results_file.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in wanted} == wanted:
            for name, part in found["results"].items():
                print(f"{stage} on {name}, measured before: {_line(part)}", flush=True)
            return found["results"]
    model, tokenizer = run.load()
    results: dict[str, Any] = {}
    answers: dict[str, list[dict[str, Any]]] = {}
    for manifest in settings.manifests:
        name = Path(manifest).stem
        source = run.source(model, tokenizer, run.rows(manifest)[: settings.limit])
        results[name], answers[name] = evaluate_rows(model, source, settings)
        print(f"{stage} on {name}: {_line(results[name])}", flush=True)

    def write(staging: Path) -> None:
        for name, lines in answers.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (staging / f"{name}.jsonl").write_text(text, encoding="utf-8")
        content = json.dumps({**wanted, "results": results}, indent=1)
        (staging / "results.json").write_text(content + "\n", encoding="utf-8")

    write_directory(folder, write)
    return results


def evaluate_rows(
    model: OmniModel, source: PromptSource, settings: EvaluateConfig
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results and single answers on the rows of one test set."""
    from fastomni.report import recall_scores
    from fastomni.rewards import extract_answer, format_reward, normalise_label

    own = answer(model, source, settings, None)
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
        swapped = answer(model, source, settings, donors)
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
) -> dict[int, str]:
    """Greedy completions by row index; with `donors`, row i hears the clip of row donors[i]."""
    import torch

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
    for rows, prompts in source.batches(batches):
        if voices is not None:
            _, other = next(voices)
            assert prompts.features is not None and other.features is not None
            prompts.features.audio = other.features.audio
        if not rows:
            continue
        with torch.no_grad():
            embeddings, lengths = model.encode(prompts)
        rollout = generate(model, embeddings, lengths, sampling)
        for row, ids in zip(rows, rollout.completions(), strict=True):
            texts[index_of[row.id]] = source.tokenizer.decode(ids)
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
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        config = load_config(arguments[0], arguments[1:])
        if config.evaluate is None:
            raise ConfigError(f"{arguments[0]}: evaluate is null; name its manifests")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ.setdefault("USE_HUB_KERNELS", "0")
    try:
        from fastomni.runs import Run

        if not any(Path(config.output_dir).expanduser().glob("*/model/stage.json")):
            raise ValueError(
                f"{config.output_dir}: no stage is done; train first: "
                f"torchrun -m fastomni.train {arguments[0]}"
            )
        run = Run(config)
        name = run.last_finished()
        results = measure(run, name, config.evaluate)
        for manifest, part in results.items():
            recalls = "  ".join(f"{label} {share:.1%}" for label, share in part["recalls"].items())
            print(f"{name} on {manifest}: recall  {recalls}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; no result was kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
