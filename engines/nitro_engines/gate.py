"""The quality gate: what was built draws, before it is published, and must come near to what its float32 parent drew."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nitro_engines.backends import Backend, load_backend
from nitro_engines.cache import EngineCache
from nitro_engines.files import Report, foreign_errors, runtime_sha256, source_sha256
from nitro_engines.graphs import sized_stage
from nitro_engines.history import running_files
from nitro_engines.keys import Fields, key_of
from nitro_engines.publish import assemble, engines_of
from nitro_engines.quantisation import QUANTISED
from nitro_engines.references import references_of
from nitro_rt.bundle import Bundle, open_bundle
from nitro_rt.cpu import cpu_target
from nitro_rt.device import RUNTIMES, find_driver
from nitro_rt.errors import BackendUnavailable, BuildError, BundleError, EngineMismatch
from nitro_rt.manifest import SCHEMA_VERSION, BundleManifest, Engine, GraphsManifest, Reference, SizeEngines, from_json
from nitro_rt.pipeline import ComputeTypeDiffers, Pipeline
from nitro_rt.providers import GPU_PROVIDERS
from nitro_rt.quality import QualityResult, limits_of
from nitro_rt.references import compare_with_parent, with_steps

Engines = dict[str, Engine]
"""By stage: `text`, `denoise/1`, ..., `decode`."""
Compile = Callable[[Backend], Engines]
"""The engines of the bundle's own graphs on another backend."""


class QualityMissed(BuildError):
    """A bundle draws too unlike its parent."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a bundle is judged by."""

    checkpoint: Callable[[], Path]
    """Gives the folder that the graphs were exported from; called if the parent must draw."""
    num_prompts: int = 4
    """Pictures per step count."""
    allow_quality_loss: bool = False
    """Publish what misses its limits, and say so in the manifest."""

    def references(self, sizes: Sequence[GraphsManifest], cache: EngineCache, report: Report) -> tuple[Reference, ...]:
        """The parent's pictures, drawn now where the cache lacks them. Raises: as `references_of`.

        Args: sizes: the graphs of each size, the bundle's first size first.
        """
        first, *others = sizes
        references = references_of(self.checkpoint, first, self.num_prompts, cache, report)
        for graphs in others:
            drawn = references_of(self.checkpoint, graphs, self.num_prompts, cache, report)
            references += tuple(dataclasses.replace(reference, size_px=graphs.size_px) for reference in drawn)
        return references

    def judged(self, bundle: BundleManifest, compile_on: Compile, cache: EngineCache, report: Report) -> BundleManifest:
        """The manifest with what was measured.

        Args:
            bundle: not yet published; its files and its references are in `cache`.
            compile_on: used where the bundle's own engines cannot run on this machine.
        Raises: QualityMissed with the figures and the way out, if it misses its limits and that was not allowed.
        """
        results = measure(bundle, compile_on, cache, report)
        results = tuple(
            dataclasses.replace(result, loss_allowed=self.allow_quality_loss and not result.passed) for result in results
        )
        for result in results:
            report(sentence(result))
        missed = [result for result in results if not result.passed]
        if missed and not self.allow_quality_loss:
            raise QualityMissed(
                f"{bundle.name} misses its quality limits and is not published: {'; '.join(map(sentence, missed))}. "
                "Build with a higher --precision, or publish it with --allow-quality-loss, which its manifest then says"
            )
        return dataclasses.replace(bundle, quality_gate=results)


def measure(bundle: BundleManifest, compile_on: Compile, cache: EngineCache, report: Report) -> tuple[QualityResult, ...]:
    """How near the bundle comes to its references, per size and step count; measured once and then taken from the cache."""
    key = key_of(
        {
            # Their files, too: TensorRT need not give the same engine for the same key.
            "engines": {
                stage: [engine.key, *(reference.sha256 for reference in running_files(engine))]
                for stage, engine in engines_of(bundle)
            },
            "tokenizers": [dataclasses.asdict(tokenizer) for tokenizer in bundle.tokenizers],
            "references": [dataclasses.asdict(reference) for reference in bundle.references],
            "machine": {**cpu_target(), **_gpu_and_stand_in(bundle)},
            "code": [source_sha256(Path(__file__)), runtime_sha256()],
        }
    )
    with cache.making(key, "this quality gate", report) as work:
        known = _known(cache, key)
        if known is not None:
            return known.results
        results = tuple(_measured(bundle, compile_on, cache, work, report))
        record = GateRecord(schema_version=SCHEMA_VERSION, results=results)
        cache.store_record("gates", key, dataclasses.asdict(record), work)
    return results


@dataclass(frozen=True, kw_only=True)
class GateRecord:
    """What the cache keeps."""

    schema_version: int
    results: tuple[QualityResult, ...]


def sentence(result: QualityResult) -> str:
    """One line for people."""
    verdict = "passed" if result.passed else "missed, allowed" if result.loss_allowed else "missed"
    steps = f"{result.num_steps} step{'s' * (result.num_steps > 1)}{f' at {result.size_px} px' if result.size_px else ''}"
    return (
        f"quality, {steps}: PSNR {result.psnr_db.worst:.1f} dB (limit {result.limits.psnr_db:g}), SSIM {result.ssim.worst:.4f} "
        f"(limit {result.limits.ssim:g}), the worst of {result.num_images} images on {result.judged_on}: {verdict}"
    )


def _known(cache: EngineCache, key: str) -> GateRecord | None:
    record = cache.find_record("gates", key)
    try:
        return None if record is None else from_json(GateRecord, json.dumps(record), where=key)
    except BundleError:
        return None  # damaged: measured again


def _measured(
    bundle: BundleManifest, compile_on: Compile, cache: EngineCache, work: Path, report: Report
) -> Iterator[QualityResult]:
    with _runnable(bundle, compile_on, cache, work, report) as runnable:
        for size_px in bundle.sizes_px:
            with foreign_errors("judging the bundle", work), warnings.catch_warnings():
                warnings.simplefilter("ignore", ComputeTypeDiffers)
                with Pipeline.of(runnable.at_size(size_px)) as pipe:
                    results = [_judged_at(pipe, num_steps) for num_steps in runnable.built_steps]
            # The first size is written as 0 in a manifest: most bundles have no other.
            yield from (
                dataclasses.replace(result, size_px=0 if size_px == bundle.sizes_px[0] else size_px) for result in results
            )


def _judged_at(pipe: Pipeline, num_steps: int) -> QualityResult:
    comparison, manifest = compare_with_parent(pipe, num_steps), pipe.bundle.manifest
    dtypes = {stage: pipe.compute_dtypes[stage] for stage in ("text", f"denoise/{num_steps}", "decode")}
    engines = (manifest.text, manifest.denoise[num_steps], manifest.decode)
    limits = limits_of((engine.precision for engine in engines), dtypes.values())
    return QualityResult(
        num_steps=num_steps,
        num_images=len(comparison.psnr_db_N),
        psnr_db=comparison.psnr_db(),
        ssim=comparison.ssim(),
        limits=limits,
        passed=comparison.passes(limits),
        loss_allowed=False,
        judged_on=pipe.bundle.backend,
        compute_dtypes=dtypes,
    )


@contextmanager
def _runnable(bundle: BundleManifest, compile_on: Compile, cache: EngineCache, work: Path, report: Report) -> Iterator[Bundle]:
    """The bundle in a folder of its own, or the same graphs on a backend that runs here."""
    own = _assembled(work / "bundle", bundle, cache)
    if not _is_for_gpu(bundle) or _loads(own):
        yield own
        return
    name, asked = _stand_in(bundle), bundle.decode.options.get("provider", bundle.decode.backend)
    report(f"{asked} engines do not run on this machine; their graphs are judged on {name}")
    engines = compile_on(load_backend(name))
    if name == "onnxruntime":
        # Fused, its integer kernels would be judged (without VNNI their sums saturate), not the numbers of the graph.
        fused = any(engine.precision in QUANTISED for engine in engines.values())
        engines = {stage: _as_written(engine) if fused else engine for stage, engine in engines.items()}
    yield _assembled(work / "stand-in", _with_engines(bundle, engines), cache)


def _is_for_gpu(bundle: BundleManifest) -> bool:
    return bundle.decode.backend in RUNTIMES or bundle.decode.options.get("provider") in GPU_PROVIDERS


def _gpu_and_stand_in(bundle: BundleManifest) -> Fields:
    """For the key: what a GPU's engines are judged on beside the CPU. Which of the two draws is known once they are loaded."""
    if not _is_for_gpu(bundle):
        return {}
    driver = find_driver()
    try:
        stand_in = load_backend(_stand_in(bundle)).toolchain()
    except BackendUnavailable:  # said where it is needed
        stand_in = {}
    return {"gpus": [str(gpu) for gpu in driver.gpus], "driver": driver.version, "stand_in": stand_in}


def _stand_in(bundle: BundleManifest) -> str:
    """ONNX Runtime computes quantised graphs as they are written, in floats; OpenVINO also knows bfloat16."""
    return "openvino" if any(engine.precision == "bf16" for _, engine in engines_of(bundle)) else "onnxruntime"


def _as_written(engine: Engine) -> Engine:
    return dataclasses.replace(engine, options={**engine.options, "graph_optimization_level": "basic"})


def _loads(bundle: Bundle) -> bool:
    try:
        Pipeline.of(with_steps(bundle.at_size(bundle.manifest.sizes_px[0]), bundle.built_steps[0])).close()
    except (BackendUnavailable, EngineMismatch):
        return False
    return True


def _assembled(folder: Path, bundle: BundleManifest, cache: EngineCache) -> Bundle:
    with foreign_errors("assembling the bundle to judge it", folder):
        assemble(folder, bundle, cache.path)
    return open_bundle(folder)


def _with_engines(bundle: BundleManifest, engines: Engines) -> BundleManifest:
    """The same bundle of other engines; all of its names of stages are in `engines`."""

    def sized(size_px: int) -> SizeEngines:
        first_px = bundle.sizes_px[0]
        denoise = {count: engines[sized_stage(f"denoise/{count}", size_px, first_px)] for count in bundle.denoise}
        return SizeEngines(denoise=denoise, decode=engines[sized_stage("decode", size_px, first_px)])

    first = sized(bundle.sizes_px[0])
    more = {size_px: sized(size_px) for size_px in bundle.more_sizes}
    return dataclasses.replace(bundle, text=engines["text"], denoise=first.denoise, decode=first.decode, more_sizes=more)
