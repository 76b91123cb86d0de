"""Training of NitroFusion students: data, autoencoder, teacher, and the one-to-four-step student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nitro_training.run import describe, train

__all__ = ["describe", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # torch and diffusers load only when training starts
        from nitro_training import run

        return getattr(run, name)
    raise AttributeError(name)
