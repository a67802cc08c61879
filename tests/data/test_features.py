"""The feature cache: what a key covers, how much memory is held, and what a bad file does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastomni.data.features import FeatureCache
from fastomni.data.manifest import ManifestRow

MIB = 2**20


def row_of(
    folder: Path, name: str, video: bytes = b"picture", audio: bytes | None = None
) -> ManifestRow:
    path = folder / f"{name}.mp4"
    path.write_bytes(video)
    sound = None
    if audio is not None:
        sound = folder / f"{name}.wav"
        sound.write_bytes(audio)
    return ManifestRow(name, path, sound, None, "happy")


def features_of(seed: int, numbers: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "vision": torch.randn(numbers // 2, 2, generator=generator).T,  # not contiguous
        "audio": torch.randn(numbers, generator=generator),
    }


def equal(left: dict[str, Tensor] | None, right: dict[str, Tensor]) -> bool:
    return left is not None and all(torch.equal(left[name], right[name]) for name in right)


def test_features_come_back_and_are_no_views_of_what_was_put(tmp_path: Path) -> None:
    cache, row, features = FeatureCache("f", 1), row_of(tmp_path, "a"), features_of(0)
    assert cache.get(row) is None
    wanted = {name: tensor.clone() for name, tensor in features.items()}
    cache.put(row, features)
    features["audio"].zero_()
    assert equal(cache.get(row), wanted)


def test_another_process_finds_them_on_disk(tmp_path: Path) -> None:
    row, features = row_of(tmp_path, "a"), features_of(0)
    FeatureCache("f", 0, tmp_path / "cache").put(row, features)
    for memory in (0, 1):
        assert equal(FeatureCache("f", memory, tmp_path / "cache").get(row), features)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_a_key_covers_bytes_and_fingerprint_but_no_name(tmp_path: Path) -> None:
    folder, features = tmp_path / "cache", features_of(0)
    FeatureCache("f", 0, folder).put(row_of(tmp_path, "a", b"v", b"s"), features)
    for fingerprint, row, found in [
        ("f", row_of(tmp_path, "renamed", b"v", b"s"), True),
        ("g", row_of(tmp_path, "a", b"v", b"s"), False),
        ("f", row_of(tmp_path, "b", b"V", b"s"), False),
        ("f", row_of(tmp_path, "c", b"v", b"S"), False),
        ("f", row_of(tmp_path, "d", b"s", b"v"), False),
        ("f", row_of(tmp_path, "e", b"v"), False),
    ]:
        assert (FeatureCache(fingerprint, 0, folder).get(row) is not None) == found, row.id


def test_memory_stays_below_its_limit_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = FeatureCache("f", 1)
    rows = [row_of(tmp_path, name) for name in "abcd"]
    third = MIB // 4 // 3  # numbers of 4 bytes: three entries fill one MiB
    for index, row in enumerate(rows[:3]):
        cache.put(row, {"audio": torch.full((third,), float(index))})
    assert cache.get(rows[0]) is not None
    cache.put(rows[3], {"audio": torch.full((third,), 3.0)})
    assert [cache.get(row) is not None for row in rows] == [True, False, True, True]
    cache.put(rows[1], {"audio": torch.zeros(MIB // 4 + 1)})  # larger than the whole cache
    assert [cache.get(row) is not None for row in rows] == [True, False, True, True]


def test_putting_the_same_clip_again_takes_no_more_room(tmp_path: Path) -> None:
    cache, half = FeatureCache("f", 1), MIB // 4 // 2
    rows = [row_of(tmp_path, name) for name in "ab"]
    for _ in range(5):
        cache.put(rows[0], {"audio": torch.zeros(half)})
    cache.put(rows[1], {"audio": torch.ones(half)})
    assert [cache.get(row) is not None for row in rows] == [True, True]


def test_no_memory_and_no_folder_keep_nothing(tmp_path: Path) -> None:
    cache, row = FeatureCache("f", 0), row_of(tmp_path, "a")
    cache.put(row, features_of(0))
    assert cache.get(row) is None


def test_half_a_file_is_made_again(tmp_path: Path) -> None:
    row, features = row_of(tmp_path, "a"), features_of(0)
    FeatureCache("f", 0, tmp_path / "cache").put(row, features)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:-4])
    cache = FeatureCache("f", 0, tmp_path / "cache")
    assert cache.get(row) is None
    assert not path.exists()
    cache.put(row, features)
    assert equal(cache.get(row), features)


@pytest.mark.parametrize("folder", [True, False])
def test_a_clip_that_is_gone_is_not_found_and_left_to_its_loader(
    folder: bool, tmp_path: Path
) -> None:
    row = row_of(tmp_path, "a")
    assert row.video is not None
    row.video.unlink()
    assert FeatureCache("f", 1, tmp_path / "cache" if folder else None).get(row) is None
