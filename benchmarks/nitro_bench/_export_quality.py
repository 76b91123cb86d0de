"""Child process of `export`: how far the graphs of one precision are from the float32 parent, on one runtime.

Prints one line of JSON; the request is the JSON in its argument.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from nitro_bench._export_meter import peak_rss_bytes
from nitro_bench._export_sides import load, reference_of, sqnr_db
from nitro_rt.quality import compare


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Each stage alone on the parent's inputs, then the image of both together; text embeddings are the parent's."""
    reference, indices = Path(request["reference"]), range(request["num_images"])
    denoise = load(request | {"stage": "denoise"})
    x0s, denoise_db = [], []
    for index in indices:
        arrays, expected = reference_of(reference, "denoise", index)
        x0s.append(denoise(arrays))
        denoise_db.append(round(sqnr_db(x0s[-1], expected), 2))
    del denoise  # before the decoder takes memory
    decode = load(request | {"stage": "decode"})
    decode_db, images, references = [], [], []
    for index in indices:
        arrays, expected = reference_of(reference, "decode", index)
        decode_db.append(round(sqnr_db(decode(arrays), expected), 2))
        images.append(decode({"latents": x0s[index]})[0])
        references.append(expected[0])
    distance = compare(np.stack(images), np.stack(references))
    return {
        "denoise_sqnr_db": denoise_db,
        "decode_sqnr_db": decode_db,
        "image_psnr_db": [round(value, 2) for value in distance.psnr_db_N],
        "image_ssim": [round(value, 4) for value in distance.ssim_N],
        "peak_rss_bytes": peak_rss_bytes(),
    }


def main() -> None:
    print(json.dumps(measure(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
