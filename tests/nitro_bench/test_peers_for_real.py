"""Each peer of the CPU in its own environment, on nitro-emoji, against diffusers with the same schedule and noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import nitro_rt
from nitro_bench.peer import DrawRequest, LoadRequest, PeerFailed, PeerProcess
from nitro_bench.peers.catalogue import HOW_TO_MAKE, PEERS
from nitro_rt.noise import draw_noise
from nitro_rt.quality import limits_of, psnr_db
from oracle import oracle_images

EMOJI = Path(nitro_rt.__file__).parent / "models" / "nitro-emoji"
SHIFT, SIZE, SEED, PROMPT = 500, 128, 7, "a red apple"
STEPS = (1, 2, 4)
ON_CPU = [name for name, peer in PEERS.items() if peer.how_to_make == HOW_TO_MAKE]
ANOTHER_PICTURE_DB = 30.0
TRUNCATION_DB = 49.0
"""OpenVINO GenAI truncates to uint8 where diffusers rounds: half of all values are one lower, 51 dB."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_CPU)
def test_a_peer_draws_what_diffusers_draws(name: str, tmp_path: Path) -> None:
    peer = PEERS[name]
    if not peer.python.is_file():
        pytest.skip(f"the environment of {name} is not made: {peer.how_to_make}")
    load = LoadRequest(
        model=str(EMOJI),
        size_px=SIZE,
        batch=1,
        steps=STEPS,
        shift=SHIFT,
        work=str(tmp_path),
        options={"threads": "1", **peer.options},
    )
    with PeerProcess(peer) as process:
        try:
            loaded = process.load(load)
        except PeerFailed as exc:
            if exc.reason.startswith("cannot run here"):
                pytest.skip(exc.reason)
            raise
        found_db = {steps: _draw(process, steps, tmp_path) for steps in STEPS}
    is_genai = peer.adapter.name.startswith("openvino_genai")
    needed_db = min(limits_of((), (loaded.compute_dtype,)).psnr_db, TRUNCATION_DB if is_genai else np.inf)
    assert bool(loaded.differs) == is_genai
    comparable = (1,) if is_genai else STEPS
    assert all(found_db[steps] >= needed_db for steps in comparable), found_db
    # A peer that cannot be told the schedule draws other pictures of the same thing: 23 dB.
    assert all(found_db[steps] < ANOTHER_PICTURE_DB for steps in STEPS if steps not in comparable), found_db


def _draw(process: PeerProcess, steps: int, folder: Path) -> float:
    """PSNR against the oracle."""
    noise, picture = folder / "noise.npy", folder / "picture.npy"
    np.save(noise, draw_noise(SEED, steps, 1, 1, (4, SIZE // 8, SIZE // 8)))
    request = DrawRequest(prompts=(PROMPT,), seed=SEED, steps=steps, size_px=SIZE, noise=str(noise))
    process.draw(request, save=picture)
    return psnr_db(np.load(picture)[0], oracle_images(EMOJI, [PROMPT], seed=SEED, steps=steps, shift=SHIFT)[0])
