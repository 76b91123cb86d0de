"""From a diffusers SDXL checkpoint to ONNX graphs: text, denoise (per step count) and decode, each checked against torch.

Importing this loads no torch; `export_checkpoint` does, when it is called.
"""

from nitro_export.checkpoint import Checkpoint, checkpoint_sha256, read_checkpoint
from nitro_export.export import PRECISIONS, export_checkpoint
from nitro_export.toolchain import toolchain

__all__ = ["PRECISIONS", "Checkpoint", "checkpoint_sha256", "export_checkpoint", "read_checkpoint", "toolchain"]
