"""CLIP tokenising with the `tokenizers` library, equal to transformers' `CLIPTokenizer(padding="max_length")`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nitro_rt.errors import BackendUnavailable, BundleError
from nitro_rt.manifest import TokenizerSpec

if TYPE_CHECKING:
    import tokenizers


class PromptTruncated(UserWarning):
    """A prompt has more tokens than the text encoder reads; the message names the words that were cut."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One prompt as token ids."""

    ids: list[int]
    """`max_length` of them: begin mark, tokens, end mark, padding."""
    cut: str
    """The part of the prompt that did not fit; empty where all of it did."""
    num_tokens: int
    """Tokens of the whole prompt, both marks counted."""


class Tokenizer:
    """One of the bundle's tokenizers."""

    def __init__(self, path: Path, spec: TokenizerSpec) -> None:
        """Raises: BundleError if the file is no tokenizer; BackendUnavailable without the `tokenizers` package."""
        self.spec = spec
        self._tokenizer = _read(path)

    def encode(self, prompt: str) -> Encoded:
        encoding = self._tokenizer.encode(prompt, add_special_tokens=False)
        room = self.spec.max_length - 2
        ids = [self.spec.bos_id, *encoding.ids[:room], self.spec.eos_id]
        ids += [self.spec.pad_id] * (self.spec.max_length - len(ids))
        cut = prompt[encoding.offsets[room][0] :].strip() if len(encoding.ids) > room else ""
        return Encoded(ids=ids, cut=cut, num_tokens=len(encoding.ids) + 2)

    def encode_batch(self, prompts: Sequence[str], batch: int) -> NDArray[np.int64]:
        """[batch, max_length] ids; the rows past the prompts hold the empty prompt."""
        rows = [self.encode(prompt).ids for prompt in prompts]
        rows += [self.encode("").ids] * (batch - len(rows))
        return np.array(rows, dtype=np.int64)


def truncation_message(encodings: Sequence[Encoded]) -> str | None:
    """What to warn about a prompt, given as each tokenizer encodes it; None where all of them take it whole."""
    for encoded in encodings:
        if encoded.cut:
            return (
                f"the prompt has {encoded.num_tokens} tokens, the text encoder reads {len(encoded.ids)}; "
                f"cut off and not drawn: {encoded.cut!r}"
            )
    return None


def _read(path: Path) -> tokenizers.Tokenizer:
    try:
        import tokenizers
    except ImportError as exc:
        raise BackendUnavailable(f"the package tokenizers cannot be imported ({exc}); pip install nitro-rt") from exc
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as exc:  # the library raises bare Exception
        raise BundleError(f"{path} is not a tokenizer file: {exc}; build the bundle again") from exc
    # Marks, truncation and padding are ours: the file's own settings would cut silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
