"""The reference backend: an in-memory fake that needs nothing but NumPy, so that the whole runtime is tested anywhere.

Its engine file is JSON: `{"kind": "text"}`, `{"kind": "decode"}`, or `{"kind": "denoise", "alpha": [...], "sigma": [...],
"next_alpha": [...], "next_sigma": [...]}` with one number per step. The "network" is a formula, the schedule is the
real one: an image depends on every input as a real image does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nitro_rt.errors import EngineMismatch
from nitro_rt.manifest import Engine
from nitro_rt.session import Array, check_buffers

Float32 = NDArray[np.float32]


class ReferenceSession:
    """A stage computed by a NumPy formula, in float32."""

    compute_dtype = "float32"

    def __init__(self, stage: str, engine: Engine, paths: tuple[Path, ...]) -> None:
        self._stage, self._engine = stage, engine
        self._buffers: dict[str, Array] = {}
        try:
            self._constants: dict[str, Any] = json.loads(paths[0].read_text(encoding="utf-8"))
            self._run: Callable[[], None] = {"text": self._text, "denoise": self._denoise, "decode": self._decode}[
                self._constants["kind"]
            ]
        except (ValueError, KeyError, TypeError) as exc:
            raise EngineMismatch(f"the reference engine of {stage}, {paths[0]}, cannot be read: {exc!r}; build again") from exc

    def bind(self, buffers: Mapping[str, Array]) -> None:
        check_buffers(self._stage, buffers, self._engine)
        self._buffers = dict(buffers)

    def execute(self) -> None:
        self._run()

    def close(self) -> None:
        self._buffers = {}

    def _text(self) -> None:
        ids_BT, ids_2_BT = self._buffers["input_ids"], self._buffers["input_ids_2"]
        embeds_BTC, pooled_BP = self._buffers["prompt_embeds"], self._buffers["pooled_prompt_embeds"]
        embeds_BTC[:] = np.sin(0.1 * ids_BT[..., None] + np.arange(embeds_BTC.shape[-1]))
        pooled_BP[:] = np.cos(0.1 * ids_2_BT.sum(axis=1, keepdims=True) + np.arange(pooled_BP.shape[-1]))

    def _denoise(self) -> None:
        step = int(self._buffers["step_index"][0])
        alpha, sigma, next_alpha, next_sigma = (
            np.float32(self._constants[name][step]) for name in ("alpha", "sigma", "next_alpha", "next_sigma")
        )
        latents: Float32 = self._buffers["latents"]
        condition = self._buffers["prompt_embeds"].mean(axis=(1, 2)) + self._buffers["pooled_prompt_embeds"].mean(axis=1)
        eps = np.float32(0.5) * latents + condition.astype(np.float32)[:, None, None, None]
        x0 = (latents - sigma * eps) / alpha
        self._buffers["next_latents"][:] = next_alpha * x0 + next_sigma * self._buffers["noise"]

    def _decode(self) -> None:
        latents_BCHW, images_BHWC = self._buffers["latents"], self._buffers["images"]
        factor = images_BHWC.shape[1] // latents_BCHW.shape[2]
        small_BHWC = latents_BCHW[:, :3].transpose(0, 2, 3, 1)
        large_BHWC = small_BHWC.repeat(factor, axis=1).repeat(factor, axis=2)
        images_BHWC[:] = np.clip(np.rint(large_BHWC * 64 + 128), 0, 255).astype(np.uint8)
