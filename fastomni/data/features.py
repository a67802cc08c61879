"""Cache of what frozen towers make of a clip, in memory and optionally on disk.

A key covers everything that the features depend on: the media files' bytes, the resolved
preprocessing, the towers' weights, the dtype and this format's version; so a stale entry is never
found, whatever changed.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastomni.data.manifest import ManifestRow

FORMAT_VERSION = 1


class FeatureCache:
    """Tower features by clip, least recently used ones leaving memory first.

    Args:
        fingerprint: of preprocessing, tower weights and dtype.
        memory_mib: memory for features, in MiB; 0 keeps none.
        directory: where features are also kept as safetensors files, or None.
    """

    def __init__(self, fingerprint: str, memory_mib: int, directory: Path | None = None) -> None:
        self._fingerprint = f"{FORMAT_VERSION}/{fingerprint}"
        self._limit = memory_mib * 2**20
        self._directory = directory
        self._memory: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0
        self._keys: dict[str, str] = {}
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def get(self, row: ManifestRow) -> dict[str, Tensor] | None:
        """A clip's features by name, or None where they are not cached."""
        found = self._memory.get(row.id)
        if found is not None:
            self._memory.move_to_end(row.id)
            return found
        if self._directory is None:
            return None
        try:
            path = self._directory / f"{self._key(row)}.safetensors"
        except OSError:
            return None  # the clip cannot be read; its loader says so, with row and reason
        if not path.is_file():
            return None
        try:
            found = load_file(path)
        except (SafetensorError, OSError):
            path.unlink(missing_ok=True)  # half a file from a full disk: made again
            return None
        self._remember(row.id, found)
        return found

    def put(self, row: ManifestRow, features: Mapping[str, Tensor]) -> None:
        """Keeps a clip's features."""
        kept = {
            # Own memory in the order of a file: a view would hold its whole batch.
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in features.items()
        }
        self._remember(row.id, kept)
        if self._directory is not None:
            path = self._directory / f"{self._key(row)}.safetensors"
            staging = path.with_suffix(f".{os.getpid()}")
            save_file(kept, staging)
            staging.replace(path)

    def _remember(self, name: str, features: dict[str, Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in features.values())
        if size > self._limit:
            return
        self._forget(self._memory.pop(name, {}))
        self._memory[name] = features
        self._bytes += size
        while self._bytes > self._limit:
            self._forget(self._memory.popitem(last=False)[1])

    def _forget(self, features: Mapping[str, Tensor]) -> None:
        self._bytes -= sum(tensor.nbytes for tensor in features.values())

    def _key(self, row: ManifestRow) -> str:
        if row.id not in self._keys:
            digest = hashlib.sha256(self._fingerprint.encode())
            for path in (row.video, row.audio):
                digest.update(
                    b"/none" if path is None else hashlib.sha256(path.read_bytes()).digest()
                )
            self._keys[row.id] = digest.hexdigest()[:40]
        return self._keys[row.id]
