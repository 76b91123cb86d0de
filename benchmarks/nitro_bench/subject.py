"""What is timed: one step count at one size of one bundle, the requests that draw it, and whether its pictures are right."""

from __future__ import annotations

import base64
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nitro_bench.bench_report import Quality, Subject
from nitro_bench.peer import DrawRequest, Loaded, LoadRequest, Peer, PeerProcess
from nitro_rt.bundle import Bundle
from nitro_rt.errors import BundleError
from nitro_rt.executor import DEVICE_BACKENDS
from nitro_rt.noise import draw_noise
from nitro_rt.providers import GPU_PROVIDERS, provider_of
from nitro_rt.quality import Images, compare, require_sound
from nitro_rt.references import limits_at, pictures, references_at

PROMPT, SEED = "a red apple", 7
"""For bundles without references; the first reference's otherwise."""
THUMBNAIL_PX = 256

OURS = Peer(
    name="nitro-rt",
    title="nitro-rt",
    adapter=Path(__file__).resolve().parent / "peers" / "nitro_rt_bundle.py",
    python=Path(sys.executable),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One subject, opened. `bundle` holds its size only."""

    bundle: Bundle
    num_steps: int
    batch: int
    work: Path
    """A folder for noise and pictures, and for what peers convert."""

    @property
    def size_px(self) -> int:
        return self.bundle.manifest.sizes_px[0]

    @property
    def id(self) -> str:
        steps = "1 step" if self.num_steps == 1 else f"{self.num_steps} steps"
        return f"{self.bundle.folder.name}, {steps}, {self.size_px} px"

    @property
    def on_gpu(self) -> bool:
        return self.bundle.backend in DEVICE_BACKENDS or provider_of(self.bundle) in GPU_PROVIDERS

    @property
    def prompt(self) -> str:
        return next((reference.prompt for reference in references_at(self.bundle, self.num_steps)), PROMPT)

    @property
    def seed(self) -> int:
        return next((reference.seed for reference in references_at(self.bundle, self.num_steps)), SEED)

    def load_request(self, model: Path, peer: Peer) -> LoadRequest:
        """For `peer`, of the bundle or of its checkpoint."""
        folder = self.work / peer.name
        folder.mkdir(parents=True, exist_ok=True)
        return LoadRequest(
            model=str(model.resolve()),
            size_px=self.size_px,
            batch=self.batch,
            steps=(self.num_steps,),
            shift=self.bundle.manifest.schedule.shift,
            work=str(folder),
            options=dict(peer.options),
        )

    def draw_request(self) -> DrawRequest:
        """The picture that is timed, on every side."""
        return self._request((self.prompt,) * self.batch, self.seed)

    def _request(self, prompts: tuple[str, ...], seed: int) -> DrawRequest:
        path = self.work / f"noise-{self.num_steps}-{self.size_px}-{len(prompts)}-{seed}.npy"
        if not path.is_file():
            latent_CHW = self.bundle.latent_CHW
            np.save(path, draw_noise(seed, self.num_steps, len(prompts), len(prompts), latent_CHW))
        return DrawRequest(prompts=prompts, seed=seed, steps=self.num_steps, size_px=self.size_px, noise=str(path))

    def draw_references(self, process: PeerProcess) -> Images:
        """[N, H, W, 3] uint8: the bundle's references, as `process` draws them."""
        drawn = []
        for reference in references_at(self.bundle, self.num_steps):
            path = self.work / "picture.npy"
            process.draw(self._request((reference.prompt,), reference.seed), save=path)
            drawn.append(np.load(path)[0])
        return np.stack(drawn)


def subject_of(case: Case, loaded: Loaded) -> Subject:
    manifest = case.bundle.manifest
    denoise = f"denoise/{case.num_steps}"
    return Subject(
        id=case.id,
        bundle=case.bundle.folder.name,
        digest=case.bundle.digest,
        model=manifest.source.name,
        checkpoint_sha256=manifest.source.checkpoint_sha256,
        backend=case.bundle.backend,
        precisions={
            stage.partition("/")[0]: engine.precision
            for stage, engine in case.bundle.engines()
            if stage in ("text", denoise, "decode")
        },
        compute_dtypes={stage.partition("/")[0]: dtype for stage, dtype in loaded.compute_dtypes.items()},
        steps=case.num_steps,
        size_px=case.size_px,
        batch=case.batch,
        num_bytes=sum(file.num_bytes for file in case.bundle.files()),
        toolchain=manifest.toolchain,
    )


def verified(case: Case, process: PeerProcess, loaded: Loaded, drawn_BHWC: Images) -> Quality:
    """Compare the pictures of a process with the references that the bundle carries.

    Args:
        drawn_BHWC: the picture that will be timed.
    Raises: BundleError if they are not near enough; nothing may then be timed.
    """
    picture: dict[str, Any] = {"picture_prompt": case.prompt, "picture_seed": case.seed, "picture_png": data_uri(drawn_BHWC[0])}
    references = references_at(case.bundle, case.num_steps)
    if not references:
        return Quality(
            num_images=0,
            worst_psnr_db=None,
            mean_psnr_db=None,
            worst_ssim=None,
            limit_psnr_db=None,
            limit_ssim=None,
            note="the bundle carries no pictures of its parent, so its pictures were not judged",
            **picture,
        )
    expected_NHW3 = pictures(case.bundle, references)
    require_sound(expected_NHW3, case.id)
    found = compare(case.draw_references(process), expected_NHW3)
    limits = limits_at(case.bundle, case.num_steps, loaded.compute_dtypes)
    if not found.passes(limits):
        raise BundleError(
            f"{case.id} misses its quality limits: {found.sentence(limits)}; nothing was timed: nitro-rt verify "
            f"{case.bundle.folder} says more, and a new build on this machine may mend it"
        )
    return Quality(
        num_images=len(references),
        worst_psnr_db=found.worst_psnr_db,
        mean_psnr_db=found.psnr_db().mean,
        worst_ssim=found.worst_ssim,
        limit_psnr_db=limits.psnr_db,
        limit_ssim=limits.ssim,
        note="",
        **picture,
    )


def data_uri(picture_HW3: Images) -> str:
    """A PNG that a page can hold, at most `THUMBNAIL_PX` wide."""
    image = Image.fromarray(picture_HW3)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
