"""Child process of `export`: what the checkpoint itself gives in float32, which every figure is compared with.

Writes an .npz with the inputs and outputs of the denoiser and the decoder; prints one line of JSON. The request is the JSON in
its argument.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from nitro_bench._export_meter import Meter
from nitro_export import read_checkpoint
from nitro_export.parent import Parent
from nitro_rt.quality import require_sound
from nitro_rt.schedule import alphas_cumprod_from_config, step_schedule


def main() -> None:
    request = json.loads(sys.argv[1])
    meter = Meter()
    checkpoint = read_checkpoint(Path(request["checkpoint"]))
    schedule = step_schedule(1, checkpoint.run["shifted_timestep"], alphas_cumprod_from_config(checkpoint.scheduler))
    parent = Parent(checkpoint, size_px=request["size_px"])
    arrays: dict[str, Any] = {"timestep": np.array(schedule.shifted_timesteps[0])}
    arrays |= {"alpha": np.float32(schedule.alpha[0]), "sigma": np.float32(schedule.sigma[0])}
    for index, (prompt, seed) in enumerate(request["samples"]):
        drawing = parent.draw([prompt], [seed], schedule)
        assert drawing.images_BHWC is not None
        require_sound(drawing.images_BHWC.numpy(), f"{checkpoint.folder.name} in float32")
        arrays |= {f"{index}/{name}": tensor.numpy() for name, tensor in drawing.steps[0].items()}
        arrays |= {f"{index}/x0": drawing.x0_BChw.numpy(), f"{index}/images": drawing.images_BHWC.numpy()}
        meter.mark(f"image {index + 1}")
    out = Path(request["out"])
    hidden = out.with_name(f".{out.name}.partial.npz")
    np.savez(hidden, **arrays)
    os.replace(hidden, out)
    print(json.dumps(meter.summary()))


if __name__ == "__main__":
    main()
