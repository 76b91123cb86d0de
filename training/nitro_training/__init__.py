"""Training of NitroFusion students: data, autoencoder, teacher, and the one-to-four-step student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nitro_training.run import train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    if name == "train":  # torch and diffusers load only when training starts
        from nitro_training.run import train

        return train
    raise AttributeError(name)
