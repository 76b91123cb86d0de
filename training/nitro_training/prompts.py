"""The prompts that teacher and student draw: text files, one prompt a line."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nitro_rt.errors import ConfigError, ModelNotFound


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Where the prompts lie."""

    files: tuple[str, ...]
    """UTF-8 text files, read in order, relative to the working folder. Every non-empty line is a prompt: no comments, since
    a prompt may begin with `#`."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("prompts.files needs one or more text files, one prompt a line; the list is empty")


class Prompts(Sequence[str]):
    """All prompts of a run, in order; repeats stay, since they weigh."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self.sha256 = hashlib.sha256("\n".join(self.texts).encode()).hexdigest()
        """Of the prompts themselves, in order: the same however they are spread over files."""

    @classmethod
    def load(cls, config: PromptsConfig) -> Prompts:
        """Raises: ModelNotFound if a file is missing, ConfigError if one is not UTF-8 or holds no prompt."""
        texts: list[str] = []
        for name in config.files:
            found = _read(Path(name))
            if not found:
                raise ConfigError(f"prompts.files: {name} holds no prompt; it needs one a line")
            texts += found
        return cls(texts)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # slices are not needed
        return self.texts[index]


def _read(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise ModelNotFound(f"prompts.files: cannot read {path} ({exc.strerror}), looked for it from {Path.cwd()}") from exc
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        raise ConfigError(f"prompts.files: {path} is not UTF-8 (line {line}); convert it, for example with iconv") from exc
    # split at newlines only: str.splitlines would also cut a prompt at form feeds and Unicode separators
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line]
