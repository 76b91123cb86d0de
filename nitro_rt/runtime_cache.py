"""The kernels that TensorRT-RTX compiled on this GPU, kept in one file beside the bundle so that the next load starts warm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class RuntimeCache:
    """TensorRT-RTX's runtime cache of all engines of one executor.

    The file is worth nothing to another GPU, driver or version: TensorRT-RTX then refuses it, and it is written anew.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._cache: Any = None
        self._loaded = b""

    def attach(self, config: Any) -> None:
        """Let an engine's runtime config use the cache, which is read at the first call."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            try:
                stored = self._file.read_bytes()
            except OSError:
                stored = b""  # the first load of this bundle
            if stored and self._cache.deserialize(stored):
                self._loaded = stored
        config.set_runtime_cache(self._cache)

    def save(self) -> list[str]:
        """Write what was compiled, whole or not at all. Returns: why it could not be kept, for the user; normally nothing."""
        if self._cache is None:
            return []
        content = bytes(memoryview(self._cache.serialize()))
        if content == self._loaded:
            return []
        prepared = self._file.with_name(f"{self._file.name}.{os.getpid()}.new")
        try:
            prepared.write_bytes(content)
            os.replace(prepared, self._file)
        except OSError as exc:
            prepared.unlink(missing_ok=True)
            return [f"the compiled kernels are not kept ({exc.filename}: {exc.strerror}), so the next load compiles them again"]
        return []


def runtime_cache_file(bundle: Path) -> Path:
    """`engines/x.runtime-cache` of the bundle `engines/x`: beside it, since a bundle never changes."""
    folder = bundle.resolve()
    return folder.with_name(f"{folder.name}.runtime-cache")
