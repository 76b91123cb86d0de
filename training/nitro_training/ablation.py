"""The ablation: the method with one part taken away at a time, as in the paper's Table 2, on equal terms.

    python -m nitro_training.ablation --recipe training/recipes/ablation.toml --out runs/ablation --report docs/ablation.md

All runs start from the same one-step weights, take the same number of optimiser steps, and are scored on images of the same
prompts and noise. With the same seed they also see the same samples at the same t* in the same order. Every finished run is
one small JSON file, published by a rename: called again, the command goes on with the runs that are missing.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nitro_rt.errors import ConfigError, TrainingError
from nitro_training import ablation_report, checkpoint, loop, script
from nitro_training.ablation_plan import NUM_SEEDS, VARIANTS, AblationConfig, key_of
from nitro_training.ablation_result import Result
from nitro_training.ablation_scores import NUM_IMAGES, Yardstick, require_size
from nitro_training.adversary import Adversary
from nitro_training.backbone import UNetFeatures
from nitro_training.distillation import head_pool, null_condition
from nitro_training.engine import Engine
from nitro_training.facts import facts
from nitro_training.losses import GAMES
from nitro_training.metric import DEFAULT_FOLDER, Metric
from nitro_training.model import LATENT_PX
from nitro_training.prompts import Prompts
from nitro_training.recipe import StudentRecipe
from nitro_training.regression import RegressionStage
from nitro_training.samples import CachedSamples, LiveSamples, TeacherSamples, build_cache
from nitro_training.sources import load_backbone_unet, load_teacher, load_unet
from nitro_training.student import StudentStage
from nitro_training.teacher import alphas_cumprod

_EMA = "module/unet_ema/"

Report = Callable[[str], None]


class Ablation:
    """What all runs share, and the runs."""

    def __init__(self, config: AblationConfig, engine: Engine, report: Report) -> None:
        """Load everything, fill the cache of samples, train or load the one-step weights, draw the teacher's images.

        Raises: ConfigError, ModelNotFound or TrainingError where something is missing or does not fit.
        """
        self.config, self.report, self.base = config, report, config.resolved()
        self.engine = engine
        self.prompts = Prompts.load(self.base.prompts)
        judge = Metric.load(config.metric)
        self.teacher = load_teacher(self.base.teacher, self.engine.device, torch.float32)
        self.side = self.teacher.latents_side(self.base.teacher.size_px)
        self.backbone = UNetFeatures(load_backbone_unet(self.base.backbone, self.teacher)).to(self.engine.device)
        require_size(judge, self.side * LATENT_PX)
        self.samples = self._samples()
        self.init = self._init()
        self.common = self._common(judge)
        self.yardstick = Yardstick(
            judge, self.teacher, self.base.teacher, self.base.student.shifted_timestep, config.num_images,
            config.out / "teacher.safetensors", checkpoint.digest_of(self.common), report,
        )  # fmt: skip

    def _samples(self) -> TeacherSamples:
        config, device = self.base.teacher, self.engine.device
        if not config.cache_samples:
            return LiveSamples(config, self.prompts, self.teacher, device)
        folder = Path(config.cache) if config.cache else self.config.out / "samples"
        build_cache(
            folder, config, self.prompts, self.teacher, report=lambda done, total: self.report(f"samples: {done} of {total}")
        )
        return CachedSamples(folder, config, self.prompts, self.teacher, device)

    def _init(self) -> UNet2DConditionModel:
        """The one-step weights that every run starts from."""
        named = self.config.init or self.base.student.init
        if named != "teacher":
            state = Path(named) / "regression.safetensors"
            if state.is_file():
                return regressed(state, self.teacher.unet, self.base.student.shifted_timestep)
            return load_unet(named, self.teacher.unet)
        if not self.base.regression.num_steps:
            return self.teacher.unet
        shift = self.base.student.shifted_timestep
        stage = RegressionStage(self.base.regression, self.teacher.unet, shift, self.samples, self.engine)
        options = {
            "regression": dataclasses.asdict(self.base.regression), "shifted_timestep": shift,
            "teacher": self.teacher.digests, "prompts_sha256": self.prompts.sha256,
        }  # fmt: skip
        loop.run(
            stage, self.config.out, options=options, config=self.base.loop,
            report=lambda done, losses: self._progress("init", done, stage.num_steps, losses),
        )  # fmt: skip
        init = stage.published().eval()
        assert isinstance(init, UNet2DConditionModel)
        return init

    def _common(self, judge: Metric) -> dict[str, Any]:
        """What all results follow from, beside their own recipe."""
        sampling = dataclasses.asdict(self.base.teacher)
        return {
            "samples": {key: sampling[key] for key in sorted(sampling.keys() - {"cache", "shard_size", "batch", "checkpoint"})},
            "teacher": self.teacher.digests,
            "prompts": self.prompts.sha256,
            "init": digest_of_weights(self.init),
            "metric": judge.manifest["sha256"],
            "num_images": self.config.num_images,
        }

    def results(self) -> list[Result]:
        """All results, the missing ones made now: the teacher, the one-step weights, then the variants, seed by seed."""
        found = [
            self._result("teacher", None, {}, lambda: (self.yardstick.teacher_scores(), {})),
            self._result("init", None, {}, lambda: (self.yardstick.scores(self.init), {})),
        ]
        places = [(variant, seed) for seed in range(self.config.seeds) for variant in VARIANTS]
        missing = [place for place in places if not self._path(place[0].name, place[1]).exists()]
        start_s = time.perf_counter()
        for variant, seed in places:
            recipe = variant.recipe(self.base, seed)
            make = partial(self._run, f"{variant.name}, seed {seed}", recipe)
            found.append(self._result(variant.name, seed, key_of(recipe), make))
            if (variant, seed) in missing:
                done = missing.index((variant, seed)) + 1
                left_s = (time.perf_counter() - start_s) / done * (len(missing) - done)
                self.report(f"{done} of {len(missing)} runs done, about {left_s / 60:.0f} minutes left")
        return found

    def _path(self, name: str, seed: int | None) -> Path:
        return self.config.out / "results" / f"{name}{'' if seed is None else f'-{seed}'}.json"

    def _result(
        self, name: str, seed: int | None, own: dict[str, Any], make: Callable[[], tuple[dict[str, float], dict[str, Any]]]
    ) -> Result:
        """The result that is there, or a new one.

        Raises: TrainingError naming the options that differ, if it was made with others.
        """
        path, key = self._path(name, seed), {**self.common, **own}
        if not path.exists():
            scores, about = make()
            Result(name=name, seed=seed, scores=scores, about={**about, **made_with(self.base)}, key=key).write(path)
        result = Result.read(path)
        result.require_key(path, key)
        return result

    def _run(self, name: str, recipe: StudentRecipe) -> tuple[dict[str, float], dict[str, Any]]:
        """Train and score one student. Nothing of half a run is kept: it is minutes."""
        pool = head_pool(recipe, self.backbone, self.side, self.engine)
        null = null_condition(recipe, self.teacher, self.engine.device)
        adversary = Adversary(self.backbone, pool, GAMES[recipe.student.loss], alphas_cumprod().to(self.engine.device), null)
        stage = StudentStage(recipe.student, self.init, adversary, self.samples, self.engine)
        step_s = []
        for step in range(stage.num_steps):
            start_s = time.perf_counter()
            losses = stage.step(step)
            step_s.append(time.perf_counter() - start_s)
            require_finite(name, step, losses)
            self._progress(name, step + 1, stage.num_steps, losses)
        student = stage.published().eval()
        about = {"num_heads": len(pool), "num_steps": stage.num_steps, "step_s": round(statistics.median(step_s), 4)}
        return self.yardstick.scores(student), {**about, "last_losses": losses}

    def _progress(self, name: str, done: int, total: int, losses: Mapping[str, float]) -> None:
        if done % self.base.loop.log_every == 0 or done == total:
            shown = ", ".join(f"{key} {losses[key]:.3f}" for key in ("d_loss", "g_loss", "regression_loss") if key in losses)
            self.report(f"{name}: step {done} of {total}, {shown}")


def require_finite(name: str, step: int, losses: Mapping[str, float]) -> None:
    """Raises: TrainingError naming run, step and term."""
    for key, value in losses.items():
        if not math.isfinite(value):
            raise TrainingError(f"{name}: {key} became {value} at step {step}; finished runs are kept. Lower a learning rate")


def regressed(state: Path, like: UNet2DConditionModel, shift: int) -> UNet2DConditionModel:
    """The averaged one-step weights in a run's `regression.safetensors`.

    Raises: ConfigError if they were trained for another shift, TrainingError if the file is damaged or of another model.
    """
    options = json.loads(checkpoint.read_metadata(state).get("options", "{}"))
    if options.get("shifted_timestep") != shift:
        raise ConfigError(
            f"{state} was trained for shifted_timestep {options.get('shifted_timestep')}, the recipe has {shift}; "
            "take the weights of a run with the same shift"
        )
    unet = copy.deepcopy(like)
    try:
        with safe_open(str(state), framework="pt") as file:
            weights = {key.removeprefix(_EMA): file.get_tensor(key) for key in file.keys() if key.startswith(_EMA)}  # noqa: SIM118
        unet.load_state_dict(weights)
    except (SafetensorError, RuntimeError) as exc:
        raise TrainingError(f"{state} does not hold one-step weights of this model: {str(exc).splitlines()[0]}") from exc
    return unet.eval()


def digest_of_weights(module: nn.Module) -> str:
    """SHA-256 over all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def made_with(recipe: StudentRecipe) -> dict[str, Any]:
    """Versions, date and threads, for the report."""
    return {key: value for key, value in facts(recipe).items() if key in ("versions", "python", "num_threads", "date")}


def run(config: AblationConfig, report: Report = print) -> list[Result]:
    """Make what is missing of an ablation.

    Raises: ConfigError, ModelNotFound or TrainingError; finished runs are kept.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    engine = Engine()
    if engine.num_processes > 1:
        raise ConfigError(f"the ablation needs one process, there are {engine.num_processes}")
    # On a CPU the plain attention is the fastest on maps this small; nitro_training.run takes it too.
    attention = sdpa_kernel(SDPBackend.MATH) if engine.device.type == "cpu" else nullcontext()
    try:
        with FileLock(config.out / ".lock", timeout=0), attention:
            return Ablation(config, engine, report).results()
    except Timeout as exc:
        raise TrainingError(f"another process works in {config.out}; wait for it or choose another --out") from exc


def main() -> None:
    """`python -m nitro_training.ablation`: train and score every variant; what is done is not done again."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m nitro_training.ablation", description=main.__doc__)
    parser.add_argument("--recipe", type=Path, required=True, help="a student's recipe; its options are the full method's")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="runs of every variant (%(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="optimiser steps of every run (the recipe's)")
    parser.add_argument("--init", default="", help="one-step weights: a run's folder or a UNet's (the recipe's, or trained)")
    parser.add_argument("--metric", type=Path, default=DEFAULT_FOLDER, help="the judge's folder (the repository's)")
    parser.add_argument("--images", type=int, default=NUM_IMAGES, help="images that every run is scored on (%(default)s)")
    parser.add_argument("--report", type=Path, help="put the tables into this page, between its two marks")
    options = parser.parse_args()
    config = AblationConfig(
        recipe=options.recipe, out=options.out, seeds=options.seeds, steps=options.steps, init=options.init,
        metric=options.metric, num_images=options.images,
    )  # fmt: skip
    if options.report is not None:
        ablation_report.require_marks(options.report)
    results = run(config, lambda line: print(line, flush=True))
    page = ablation_report.markdown(results, {variant.name: variant.title for variant in VARIANTS})
    print(page)
    if options.report is not None:
        ablation_report.put_into(options.report, page)
        print(options.report)


if __name__ == "__main__":
    script.run(main)
