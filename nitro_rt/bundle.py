"""An engine bundle on disk: `bundle.json` and the files it names.

Opening reads and checks the manifest; `check_files` compares every size and digest; `verify` also refuses what the
manifest does not name. Nothing here needs a backend, so a bundle for another machine opens everywhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nitro_rt.errors import BundleError, EngineMismatch, ModelNotFound
from nitro_rt.manifest import (
    BUNDLE_FILE,
    BundleManifest,
    Engine,
    FileRef,
    SizeEngines,
    TensorSpec,
    check_file,
    from_json,
    resolve,
    seal_of,
)
from nitro_rt.schedule import StepSchedule, alphas_cumprod_from_config, step_schedule

LATENT_CHANNELS = 4
DTYPES = ("float32", "float16", "int64", "uint8")
"""What a tensor of a bundle may be made of."""
STAGE_INPUTS = {
    "text": ("input_ids", "input_ids_2"),
    "denoise": ("latents", "prompt_embeds", "pooled_prompt_embeds", "step_index", "noise"),
    "decode": ("latents",),
}
STAGE_OUTPUTS = {
    "text": ("prompt_embeds", "pooled_prompt_embeds"),
    "denoise": ("next_latents",),
    "decode": ("images",),
}


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened bundle. Use `open_bundle`."""

    folder: Path
    manifest: BundleManifest
    digest: str
    """sha256 of `bundle.json`, which holds every file's digest: it names the whole bundle."""

    @property
    def backend(self) -> str:
        return self.manifest.decode.backend

    @property
    def built_steps(self) -> tuple[int, ...]:
        return tuple(sorted(self.manifest.denoise))

    @property
    def latent_CHW(self) -> tuple[int, int, int]:
        """Of the first size."""
        return self.latent_CHW_at(self.manifest.sizes_px[0])

    def latent_CHW_at(self, size_px: int) -> tuple[int, int, int]:
        _, channels, height, width = self.engines_at(size_px).decode.inputs[0].shape
        return channels, height, width

    def engines_at(self, size_px: int) -> SizeEngines:
        """The denoisers and the decoder of one size. Raises: EngineMismatch naming the nearest size if it was not built."""
        manifest = self.manifest
        if size_px == manifest.sizes_px[0]:
            return SizeEngines(denoise=manifest.denoise, decode=manifest.decode)
        if size_px not in manifest.more_sizes:
            nearest = min(manifest.sizes_px, key=lambda built: abs(built - size_px))
            built = ", ".join(map(str, manifest.sizes_px))
            raise EngineMismatch(
                f"{self.folder} was not built for {size_px} pixels; built: {built}; the nearest built size is {nearest}; "
                f"use it, or build with --size {size_px}"
            )
        return manifest.more_sizes[size_px]

    def at_size(self, size_px: int) -> Bundle:
        """The bundle as if it held this size only: what is compared, drawn and measured is of one size.

        Raises: EngineMismatch if it was not built.
        """
        manifest, first = self.manifest, self.manifest.sizes_px[0]
        if manifest.sizes_px == (size_px,):
            return self
        engines = self.engines_at(size_px)
        only = dataclasses.replace(
            manifest,
            sizes_px=(size_px,),
            denoise=engines.denoise,
            decode=engines.decode,
            more_sizes={},
            references=tuple(r for r in manifest.references if (r.size_px or first) == size_px),
            quality_gate=tuple(r for r in manifest.quality_gate if (r.size_px or first) == size_px),
        )
        return dataclasses.replace(self, manifest=only)

    def path(self, reference: FileRef) -> Path:
        return resolve(self.folder, reference)

    def engines(self) -> Iterator[tuple[str, Engine]]:
        """Every engine with its stage: `text`, `denoise/1`, ..., `decode`; `denoise/1@1024`, ... of further sizes."""
        yield "text", self.manifest.text
        for size_px in self.manifest.sizes_px:
            yield from self.sized_engines(size_px)

    def sized_engines(self, size_px: int) -> Iterator[tuple[str, Engine]]:
        """The engines of one size, with their stages."""
        engines = self.engines_at(size_px)
        for num_steps, engine in sorted(engines.denoise.items()):
            yield self.stage("denoise", size_px, num_steps), engine
        yield self.stage("decode", size_px), engines.decode

    def stage(self, kind: str, size_px: int, num_steps: int | None = None) -> str:
        """The name of a sized stage: `decode`, `denoise/1`; `denoise/1@1024` where that is not the first size."""
        steps = "" if num_steps is None else f"/{num_steps}"
        return kind + steps + ("" if size_px == self.manifest.sizes_px[0] else f"@{size_px}")

    def files(self) -> tuple[FileRef, ...]:
        """Every file that the manifest names, once each, in order of path."""
        references = [reference for _, engine in self.engines() for reference in engine.files]
        references += [tokenizer.file for tokenizer in self.manifest.tokenizers]
        references += [reference.file for reference in self.manifest.references]
        return tuple(sorted(set(references), key=lambda reference: reference.path))

    def check_files(self) -> None:
        """Compare every file's size and digest. Raises: BundleError for the first that is missing, cut or changed."""
        for reference in self.files():
            try:
                check_file(self.folder, reference)
            except OSError as exc:
                raise BundleError(f"{self.folder / reference.path} cannot be read: {exc.strerror}") from exc

    def extra_files(self) -> tuple[str, ...]:
        """Paths in the folder that the manifest does not name."""
        named = {BUNDLE_FILE, *(reference.path for reference in self.files())}
        found = (
            (Path(folder) / name).relative_to(self.folder).as_posix()
            for folder, folders, files in os.walk(self.folder)
            for name in (*files, *(name for name in folders if (Path(folder) / name).is_symlink()))
        )
        return tuple(sorted(set(found) - named))

    def verify(self) -> None:
        """The whole check: sizes, digests, nothing extra, and the engine key, the schedule's constants and the manifest's
        own digest recomputed.

        Raises: BundleError for the first thing that is wrong.
        """
        self.check_files()
        extra = self.extra_files()
        if extra:
            raise BundleError(f"{self.folder} holds {extra[0]!r}, which its manifest does not name ({len(extra)} such files)")
        self._check_engine_key()
        self._check_schedule()
        self._check_seal()  # last: what was edited is better named than a digest

    def _check_seal(self) -> None:
        found, expected = self.manifest.manifest_sha256, seal_of(self.manifest)
        if found != expected:
            raise BundleError(
                f"{self.folder}: {BUNDLE_FILE} was edited: its digest is {found[:12] or 'missing'}, its fields give "
                f"{expected[:12]}; build again"
            )

    def _check_engine_key(self) -> None:
        manifest = self.manifest
        expected = _digest_of_fields(manifest.engine_key_fields)
        if manifest.engine_key != expected:
            raise BundleError(
                f"{self.folder}: the engine key is {manifest.engine_key}, its fields give {expected}; "
                "edited or built wrongly, build again"
            )

    def _check_schedule(self) -> None:
        spec = self.manifest.schedule
        alphas_cumprod_T = alphas_cumprod_from_config({})
        for num_steps, found in spec.steps.items():
            expected = step_schedule(num_steps, spec.shift, alphas_cumprod_T)
            field = _first_difference(found, expected)
            if field:
                raise BundleError(
                    f"{self.folder}: the schedule of {num_steps} steps at shift {spec.shift} has {field} "
                    f"{getattr(found, field)}, the table says {getattr(expected, field)}; edited or built wrongly, build again"
                )


def open_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """Open a bundle folder and check its manifest, not yet its files.

    Raises: ModelNotFound if there is no bundle; BundleError if its manifest is damaged, edited or of another version.
    """
    path = Path(folder)
    manifest_path = path / BUNDLE_FILE
    if not path.exists():
        raise ModelNotFound(f"no bundle at {path}; build one: nitro-rt build --out {path}")
    if not manifest_path.is_file():
        raise ModelNotFound(f"{path} is not a bundle: it has no {BUNDLE_FILE}; build one: nitro-rt build --out DIR")
    try:
        content = manifest_path.read_bytes()
        text = content.decode()
    except OSError as exc:
        raise BundleError(f"{manifest_path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise BundleError(f"{manifest_path} is not UTF-8 text; it was cut or edited, build again") from exc
    manifest = from_json(BundleManifest, text, where=str(manifest_path))
    bundle = Bundle(folder=path, manifest=manifest, digest=hashlib.sha256(content).hexdigest())
    _check_manifest(bundle)
    return bundle


def _check_manifest(bundle: Bundle) -> None:
    """Refuse a manifest whose parts do not fit each other, before any engine is loaded."""
    manifest = bundle.manifest
    more = list(manifest.more_sizes)
    _require(
        bundle,
        len(set(manifest.sizes_px)) == len(manifest.sizes_px) >= 1 and sorted(manifest.sizes_px[1:]) == sorted(more),
        f"names the sizes {list(manifest.sizes_px)} and has engines for the first and {more}",
    )
    for reference in bundle.files():
        bundle.path(reference)
    _require(bundle, bool(manifest.denoise), "names no denoiser")
    _require(
        bundle,
        set(manifest.denoise) == set(manifest.schedule.steps),
        f"has denoisers for {sorted(manifest.denoise)} steps and schedules for {sorted(manifest.schedule.steps)}",
    )
    _require(bundle, len(manifest.tokenizers) == 2, f"names {len(manifest.tokenizers)} tokenizers, SDXL has 2")
    for size_px, engines in manifest.more_sizes.items():
        fits = set(engines.denoise) == set(manifest.denoise)
        _require(bundle, fits, f"has other step counts at {size_px} pixels than at {manifest.sizes_px[0]}")
    for size_px in manifest.sizes_px:
        _check_rows(bundle, size_px)
    for stage, engine in bundle.engines():
        kind = stage.partition("/")[0].partition("@")[0]
        _require(bundle, bool(engine.files), f"names no file for {stage}")
        _require(bundle, engine.backend == bundle.backend, f"mixes the backends {engine.backend!r} and {bundle.backend!r}")
        inputs, outputs = names(engine.inputs), names(engine.outputs)
        _require(bundle, inputs == STAGE_INPUTS[kind], f"has {stage} with inputs {inputs}, expected {STAGE_INPUTS[kind]}")
        _require(bundle, outputs == STAGE_OUTPUTS[kind], f"has {stage} with outputs {outputs}, expected {STAGE_OUTPUTS[kind]}")
        size_px = int(stage.partition("@")[2] or manifest.sizes_px[0])
        _check_shapes(bundle, stage, engine, size_px)


def _check_rows(bundle: Bundle, size_px: int) -> None:
    """Step counts that share a denoiser have its rows one after another, from the first: a wrong row draws a wrong step."""
    ends: dict[tuple[FileRef, ...], int] = {}
    for num_steps, engine in sorted(bundle.engines_at(size_px).denoise.items()):
        expected = ends.get(engine.files, 0)
        stage = bundle.stage("denoise", size_px, num_steps)
        found = f"has {stage} begin at row {engine.first_row} of its step tables, not {expected}"
        _require(bundle, engine.first_row == expected, found)
        ends[engine.files] = expected + num_steps


def _check_shapes(bundle: Bundle, stage: str, engine: Engine, size: int) -> None:
    """Every tensor has the batch and size that the manifest promises, and the type of the contract."""
    manifest = bundle.manifest
    decode_input = bundle.engines_at(size).decode.inputs[0].shape
    _require(bundle, len(decode_input) == 4 and decode_input[1] == LATENT_CHANNELS, f"has latents of shape {decode_input}")
    length = manifest.tokenizers[0].max_length
    _require(bundle, manifest.tokenizers[1].max_length == length, "has tokenizers of different lengths")
    latents = ("float32", decode_input)
    expected = {
        "input_ids": ("int64", (manifest.batch, length)),
        "input_ids_2": ("int64", (manifest.batch, length)),
        "latents": latents,
        "next_latents": latents,
        "noise": latents,
        "step_index": ("int64", (1,)),
        "images": ("uint8", (manifest.batch, size, size, 3)),
    } | {spec.name: (spec.dtype, spec.shape) for spec in manifest.text.outputs}
    for spec in (*engine.inputs, *engine.outputs):
        # Known before they are compared: where the text encoder's outputs are edited, all that they are compared with is too.
        _require(
            bundle,
            spec.dtype in DTYPES and all(dimension > 0 for dimension in spec.shape),
            f"has {stage}'s {spec.name} as {spec.dtype} {list(spec.shape)}, not of {', '.join(DTYPES)} and of positive sizes",
        )
        dtype, shape = expected[spec.name]
        fits = spec.dtype == dtype and spec.shape == shape and bool(shape) and (shape[0] == manifest.batch or shape == (1,))
        _require(
            bundle, fits, f"has {stage}'s {spec.name} as {spec.dtype} {list(spec.shape)}, the rest needs {dtype} {list(shape)}"
        )


def names(specs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
    return tuple(spec.name for spec in specs)


def _digest_of_fields(fields: dict[str, Any]) -> str:
    """sha256 of the canonical JSON, in hex: sorted keys, no spaces, UTF-8, as the engine builder spells it."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _first_difference(found: StepSchedule, expected: StepSchedule) -> str | None:
    """The first field in which two schedules differ: whole numbers exactly, coefficients to 1e-6."""
    for field in ("timesteps", "shifted_timesteps"):
        if getattr(found, field) != getattr(expected, field):
            return field
    for field in ("alpha", "sigma", "next_alpha", "next_sigma"):
        left, right = getattr(found, field), getattr(expected, field)
        if len(left) != len(right) or not np.allclose(left, right, rtol=0, atol=1e-6):
            return field
    return None


def _require(bundle: Bundle, fits: bool, found: str) -> None:
    if not fits:
        raise BundleError(f"{bundle.folder / BUNDLE_FILE} {found}; it was edited or built wrongly, build again")
