"""A contact sheet of the demo set: one frame per clip with what it shows written below.

The frame is taken from the file, not drawn anew, at the end of the clip, where every expression
stands at its height.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
from PIL import Image, ImageDraw, ImageFont

_COLUMNS = 8
_CELL_PX = 168
_TEXT_PX = 48
_MARGIN_PX = 8
_SHEET_MANIFESTS = ("dfew_test.jsonl", "mafw_test.jsonl", "ravdess_test.jsonl")


def _rows(manifest: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


def sheet_rows(directory: Path, per_set: int = _COLUMNS) -> list[dict[str, Any]]:
    """Choose rows for a sheet: from each test set every emotion once, then covered faces.

    Args:
        directory: a demo set.
        per_set: clips from each test set.

    Returns:
        Manifest rows, `per_set` from each test set.
    """
    chosen: list[dict[str, Any]] = []
    for name in _SHEET_MANIFESTS:
        rows = _rows(directory / name)
        first: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["kind"] != "voice":
                first.setdefault(row["label"], row)
        covered = [row for row in rows if row["kind"] == "voice"]
        chosen += [*first.values(), *covered][:per_set]
    return chosen


def _last_frame(path: Path) -> Image.Image:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    if not frames:
        raise ValueError(f"{path}: no picture in this clip; make the demo set again")
    return Image.fromarray(frames[-1].to_ndarray(format="rgb24"))


def _caption_lines(row: Mapping[str, Any]) -> tuple[str, str, str]:
    facts = row["facts"]
    face = " ".join(facts[name] for name in ("mouth", "lips", "brows", "eyes") if name in facts)
    voice = " ".join(facts[name] for name in ("pitch", "pace", "loudness", "tremor"))
    return f"{row['label']} ({row['kind']})", face or "covered", voice


def contact_sheet(directory: Path, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a picture of some clips, eight in a line.

    Args:
        directory: the demo set the rows' paths are relative to.
        path: the PNG to write.
        rows: manifest rows of clips.

    Raises:
        ValueError: no rows, or a clip without a picture.
    """
    if not rows:
        raise ValueError(f"{path}: a contact sheet needs at least one row")
    lines = -(-len(rows) // _COLUMNS)
    step_x, step_y = _CELL_PX + _MARGIN_PX, _CELL_PX + _TEXT_PX + _MARGIN_PX
    columns = min(_COLUMNS, len(rows))
    size = (columns * step_x + _MARGIN_PX, lines * step_y + _MARGIN_PX)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    bold, small = ImageFont.load_default(13), ImageFont.load_default(10)
    for index, row in enumerate(rows):
        left = _MARGIN_PX + index % _COLUMNS * step_x
        top = _MARGIN_PX + index // _COLUMNS * step_y
        picture = _last_frame(Path(directory) / row["video"])
        ratio = _CELL_PX / max(picture.size)
        shown = (round(picture.width * ratio), round(picture.height * ratio))
        picture = picture.resize(shown, Image.Resampling.BICUBIC)
        sheet.paste(picture, (left + (_CELL_PX - shown[0]) // 2, top + _CELL_PX - shown[1]))
        title, face, voice = _caption_lines(row)
        pen.text((left, top + _CELL_PX + 2), title, fill="black", font=bold)
        pen.text((left, top + _CELL_PX + 19), face, fill="#444444", font=small)
        pen.text((left, top + _CELL_PX + 33), voice, fill="#444444", font=small)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
