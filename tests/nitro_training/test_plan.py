"""The dry run: counts against real networks, arithmetic against hand computation, the SDXL recipes."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from checkpoints import make_tiny_sdxl
from nitro_rt.errors import ConfigError, TrainingError
from nitro_training import sdxl_config
from nitro_training.adversary import Adversary, Condition
from nitro_training.backbone import UNetFeatures
from nitro_training.costs import (
    Activations,
    Costs,
    Flops,
    Measured,
    Networks,
    Parameters,
    flops_of,
    flops_per_step,
    mean_simulated_steps,
)  # fmt: skip
from nitro_training.distillation import head_pool
from nitro_training.engine import Engine
from nitro_training.generator import draw_place
from nitro_training.losses import GAMES
from nitro_training.memory import GIB, LAYOUTS, Device, Reserve, memory_plan, state_bytes, verdict
from nitro_training.meter import Meter
from nitro_training.model import predict_noise
from nitro_training.plan import plan, render, to_json
from nitro_training.pool import Head, HeadPool
from nitro_training.randomness import BatchRandom
from nitro_training.recipe import StudentRecipe, read_student_recipe
from nitro_training.samples import Sample
from nitro_training.sdxl_config import read_configs
from nitro_training.student import StudentConfig, StudentStage
from nitro_training.teacher import alphas_cumprod

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
NAMES = ("nitrosd-realism", "nitrosd-vibrant")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny here, and threads that wait for each other cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("plan") / "tiny")


@pytest.fixture(scope="module")
def networks(tiny: Path) -> Networks:
    return Networks(tiny_recipe(tiny), read_configs(tiny))


@pytest.fixture(scope="module")
def student(networks: Networks) -> Measured:
    return networks.student()


def tiny_recipe(checkpoint: Path, **student: object) -> StudentRecipe:
    """NitroSD-Realism's recipe on a small model, in float32."""
    recipe = read_student_recipe(RECIPES / "nitrosd-realism.toml")
    options = {"batch": 2, "precision": "fp32", **student}
    return dataclasses.replace(
        recipe,
        teacher=dataclasses.replace(recipe.teacher, checkpoint=str(checkpoint), unet="", size_px=0),
        pool=dataclasses.replace(recipe.pool, width=32, crop_latents=4, num_blocks=1),
        student=dataclasses.replace(recipe.student, **options),  # type: ignore[arg-type]
    )


@contextmanager
def kept(own: nn.Module) -> Iterator[Callable[[], int]]:
    """The bytes that real computation keeps for its backward pass, beside the module's own weights."""
    known = {p.untyped_storage().data_ptr() for p in own.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in held.values())


def real_noise(unet: UNet2DConditionModel, batch: int) -> Tensor:
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    times = torch.full((batch,), 249)
    return predict_noise(
        unet, torch.randn(batch, 4, side, side), times, torch.randn(batch, 77, width), torch.randn(batch, pooled)
    )


def test_the_meter_counts_a_small_network_as_by_hand() -> None:
    network = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4)).to("meta")
    with Meter(network, lowered=None) as meter:
        network(torch.empty(3, 8, device="meta"))
    assert meter.flops == 2 * 3 * (8 * 16 + 16 * 4)
    assert meter.kept_bytes == 4 * 3 * (8 + 16 + 16)  # the input of each layer
    with Meter(network, lowered=torch.bfloat16) as meter:
        network(torch.empty(3, 8, device="meta"))
    assert meter.kept_bytes == 2 * 3 * (8 + 16 + 16) + 2 * 16 * 4  # and the second layer's weights as autocast copied them


def test_autocast_keeps_normalisation_in_float32() -> None:
    network = nn.Sequential(nn.Conv2d(4, 32, 1), nn.GroupNorm(32, 32)).to("meta")
    with Meter(network, lowered=torch.bfloat16):
        assert network[0](torch.empty(1, 4, 2, 2, device="meta")).dtype == torch.bfloat16
        assert network(torch.empty(1, 4, 2, 2, device="meta")).dtype == torch.float32


def test_the_meter_keeps_what_a_real_head_keeps() -> None:
    head, feature = Head(64, 32, 2), torch.randn(2, 64, 16, 16)
    with kept(head) as real:
        score = head(feature)
    with Meter(meta := Head(64, 32, 2).to("meta"), lowered=None) as meter:
        meta(torch.empty(2, 64, 16, 16, device="meta"))
    assert meter.kept_bytes == real() and score.shape == (2,)


def test_parameters_are_those_of_the_real_parts(tiny: Path, networks: Networks) -> None:
    found = networks.parameters()
    unet = UNet2DConditionModel.from_pretrained(tiny / "unet")
    parts = {
        "student": unet, "teacher": unet, "backbone": UNetFeatures(unet), "vae": AutoencoderKL.from_pretrained(tiny / "vae")
    }  # fmt: skip
    for name, module in parts.items():
        assert getattr(found, name) == sum(p.numel() for p in module.parameters()), name
    text = (
        CLIPTextModel.from_pretrained(tiny / "text_encoder"),
        CLIPTextModelWithProjection.from_pretrained(tiny / "text_encoder_2"),
    )
    assert found.text_encoders == sum(p.numel() for encoder in text for p in encoder.parameters())


def test_flops_are_those_of_a_real_pass(tiny: Path, student: Measured) -> None:
    """The attention on a GPU computes its matrix again in the backward pass, which the plain one keeps."""
    unet = UNet2DConditionModel.from_pretrained(tiny / "unet")
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            noise = real_noise(unet, 2)
        with FlopCounterMode(display=False) as backward:
            noise.sum().backward()
    attention = forward.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert student.forward == forward.get_total_flops()
    assert student.backward == backward.get_total_flops() + attention // 2


def test_recomputation_keeps_what_real_recomputation_keeps(tiny: Path, student: Measured) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny / "unet")
    unet.enable_gradient_checkpointing()
    with kept(unet) as real:
        noise = real_noise(unet, 2)
    assert noise.requires_grad and student.recomputed == pytest.approx(real(), rel=0.01)
    assert student.recomputed < student.kept and 0 < student.unit < student.kept
    assert 0 < student.unit_flops < student.forward


def test_a_look_counts_backbone_and_heads(tiny: Path, networks: Networks) -> None:
    whole, crop = networks.look("global-conditional"), networks.look("local-conditional")
    features = UNetFeatures(UNet2DConditionModel.from_pretrained(tiny / "unet"))
    config = features.unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as real:
        embeds = torch.randn(2, 77, config.cross_attention_dim)
        features(torch.randn(2, 4, 8, 8), torch.full((2,), 10), embeds, torch.randn(2, pooled), torch.randn(2, 6))
    assert whole.forward == real.get_total_flops()
    assert 0 < crop.forward < whole.forward and 0 < crop.heads < whole.heads
    assert crop.recomputed < crop.kept < whole.kept


def test_simulated_steps_are_those_that_are_drawn() -> None:
    config = StudentConfig(stage_steps=(3, 0, 2, 5), one_step_share=0.4)
    source = torch.Generator().manual_seed(0)
    stages = [config.stage_at(step) for step in range(config.num_steps)]
    drawn = [draw_place(stage, config.one_step_share, source).index for stage in stages for _ in range(2000)]
    assert mean_simulated_steps(config) == pytest.approx(sum(drawn) / len(drawn), abs=0.02)
    assert mean_simulated_steps(StudentConfig(stage_steps=(7,))) == 0


def costs_of(student: int) -> Costs:
    """Round figures, in GiB of one byte per parameter."""
    parameters = Parameters(
        student=student * GIB, backbone=GIB, teacher=student * GIB, text_encoders=GIB // 2, vae=GIB // 2, pool=3 * GIB,
        head_set=GIB, drawn_heads=GIB, open_blocks=GIB, num_heads=480, num_drawn=30,
    )  # fmt: skip
    flops = Flops(**dict.fromkeys((f.name for f in dataclasses.fields(Flops)), 1))
    recomputed = Activations(
        student=GIB, adversary=2 * GIB, student_unit=GIB, backbone_unit=3 * GIB, weight_copies=student * 2 * GIB
    )  # fmt: skip
    kept_all = Activations(student=20 * GIB, adversary=10 * GIB)
    return Costs(
        parameters=parameters, flops=flops, flops_per_step=9, flops_of_cache=0, kept=kept_all, recomputed=recomputed, side=128
    )  # fmt: skip


def test_memory_is_what_a_hand_computes() -> None:
    """4 B for weights and gradients, 8 B for moments, 2 B for what is frozen; heads with their gradients."""
    recipe, costs = read_student_recipe(RECIPES / "nitrosd-realism.toml"), costs_of(2)
    nothing = Reserve(fixed_bytes=0, share=0.0)
    single = memory_plan(recipe, costs, "single", 1, nothing)
    held = 8 + 16 + 8 + 2 + 2 * (2 + 1) + 2 * 4 * 3  # weights, moments, gradients, backbone, teacher and text, pool
    assert sum(single.held.values()) == held * GIB
    assert single.micro_batch == (1 + max(2 + 3, 1, 4)) * GIB and single.optimizer_step == 8 * GIB
    assert single.total == (held + 8) * GIB
    assert memory_plan(recipe, costs, "DDP", 4, nothing).total == single.total + 8 * GIB  # gradients once more, in buckets
    sharded = memory_plan(recipe, costs, "FSDP", 4, nothing)
    assert sharded.total == (2 + 4 + 8 + 4 + 2 + 6 + 24 + max(6, 2)) * GIB  # gradients are whole while they accumulate
    reserved = memory_plan(recipe, costs, "single", 1, Reserve(fixed_bytes=GIB, share=0.5))
    assert reserved.total == single.total + 5 * GIB
    assert state_bytes(recipe, costs) == (3 * 4 * 2 + 3 * 4 * 3) * GIB


def test_memory_follows_the_recipe() -> None:
    recipe, costs = read_student_recipe(RECIPES / "nitrosd-realism.toml"), costs_of(2)

    def held(**student: object) -> dict[str, float]:
        changed = dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, **student))  # type: ignore[arg-type]
        found = memory_plan(changed, costs, "single", 1)
        return {name: count / GIB for name, count in (found.held | {"peak": found.micro_batch}).items()}

    assert held()["EMA"] == 0 and held(ema_decay=0.999)["EMA"] == 8
    assert held(recompute=False)["peak"] == 30
    assert held(accumulation=2)["drawn heads"] == 2 * 4 * 2
    assert held(precision="fp32")["backbone"] == 4


def test_the_verdict_is_for_the_devices_found() -> None:
    recipe, costs = read_student_recipe(RECIPES / "nitrosd-realism.toml"), costs_of(2)
    plans = [memory_plan(recipe, costs, layout, count, Reserve(fixed_bytes=0, share=0.0)) for layout, count in LAYOUTS]
    single, doubled, quarter = (plans[index].total // GIB for index in (0, 1, 5))
    assert verdict(plans, []).startswith(f"no-go: no CUDA device found; needs {single}.0 GiB on 1 device, ")
    large, small = Device(name="large", memory_bytes=doubled * GIB), Device(name="small", memory_bytes=quarter * GIB)
    assert verdict(plans, [large]) == f"go: needs {single}.0 GiB on 1 device; 1 x large with {doubled}.0 GiB found"
    assert verdict(plans, [large] * 2).startswith(f"go: needs {doubled}.0 GiB on each of 2 devices (DDP)")
    assert verdict(plans, [small]).startswith(f"no-go: needs {single}.0 GiB on 1 device; 1 x small")
    assert verdict(plans, [small] * 4).startswith(f"go: needs {quarter}.0 GiB on each of 4 devices (FSDP)")
    assert verdict(plans, [large, small]).startswith("no-go: ")  # the smallest decides


def test_the_plan_of_a_small_model_is_told_in_words_and_numbers(tiny: Path) -> None:
    found = plan(tiny_recipe(tiny), [Device(name="Test GPU", memory_bytes=24 * GIB)])
    text = render(found)
    assert found.is_go and text.splitlines()[-1].startswith("go: needs ") and str(tiny) in text
    assert "480 heads in the pool, 30 drawn per micro-batch" in text and "on Test GPU" in text
    data = json.loads(to_json(found))
    assert data["costs"]["parameters"]["num_heads"] == 480 and data["memory"][0]["total"] == found.memory[0].total
    assert data["is_go"] is True


def test_extra_updates_of_the_heads_and_cached_samples_change_the_work() -> None:
    recipe = read_student_recipe(RECIPES / "nitrosd-realism.toml")  # five samples, recomputed, four steps of the teacher
    recipe = dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, stage_steps=(9,)))
    student = Measured(forward=10, backward=20, unit_flops=7, kept=0, recomputed=0, unit=0)
    look = Measured(forward=3, backward=5, heads=1, unit_flops=2, kept=0, recomputed=0, unit=0)
    flops = flops_of(recipe, 100, student, [look, look])
    assert flops == Flops(
        teacher=40, text_encoders=100, student_forward=10, student_simulation=0, student_backward=20, backbone_forward=12,
        backbone_backward=10, heads=2, recomputed=11,
    )  # fmt: skip
    assert flops.total == 205 and flops_per_step(recipe, flops) == 20 * 205
    twice = dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, d_updates=2))
    assert flops_per_step(twice, flops) == 20 * (205 + 40 + 100 + 10 + 12 + 2)
    guided = dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, guidance=5.0))
    assert flops_of(guided, 100, student, [look]).teacher == 80
    cached = dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, cache_samples=10))
    assert flops_of(cached, 100, student, [look]).teacher == 0


def test_what_does_not_fit_is_refused(tiny: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny)
    with pytest.raises(ConfigError, match=r"crop_latents = 16 is larger than the latents \(8x8\)"):
        plan(dataclasses.replace(recipe, pool=dataclasses.replace(recipe.pool, crop_latents=16)), [])
    (tmp_path / "unet").mkdir()
    with pytest.raises(TrainingError, match=r"unet/config.json.*fetch the checkpoint again"):
        read_configs(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_the_sdxl_recipes_are_those_of_the_paper(name: str) -> None:
    recipe = read_student_recipe(RECIPES / f"{name}.toml")
    realism = name == "nitrosd-realism"
    assert recipe.run.name == name and recipe.run.licence == ("CC-BY-NC-SA-4.0" if realism else "openrail++")
    assert recipe.student.shifted_timestep == (250 if realism else 500)
    assert (recipe.teacher.sampler, recipe.teacher.num_steps) == (("lcm", 4) if realism else ("ddim-trailing", 8))
    assert recipe.teacher.guidance in (0.0, 1.0) and recipe.regression.num_steps == 0
    assert (recipe.student.batch, recipe.student.accumulation, recipe.student.regression_weight) == (5, 20, 0.0)
    assert recipe.pool.noise_levels == (10, 250, 500, 750) and recipe.pool.refresh_rate == 0.01


def test_sdxl_has_the_sizes_that_are_known() -> None:
    """2.567 B parameters, 1.243 B of them encoder and mid-block; 480 heads in sets of 7.9 M."""
    networks = Networks(read_student_recipe(RECIPES / "nitrosd-realism.toml"), read_configs(Path("nowhere")))
    found = networks.parameters()
    assert (found.student, found.backbone) == (2_567_463_684, 1_243_367_040)
    assert (found.text_encoders, found.vae) == (123_060_480 + 694_659_840, 83_653_863)
    assert (found.num_heads, found.num_drawn, networks.side) == (480, 30, 128)
    assert found.head_set == pytest.approx(7.9e6, rel=0.01) and found.pool == 48 * found.head_set
    assert networks.backbone.channels() == (320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280)
    assert networks.backbone.sides(128) == (128, 128, 128, 64, 64, 64, 32, 32, 32, 32)
    with torch.no_grad(), Meter(lowered=networks.lowered):
        shapes = [tuple(feature.shape[1:]) for feature in networks.features("local-conditional")]
    sides = (64, 64, 64, 32, 32, 32, 16, 16, 16, 16)
    assert shapes == [(width, side, side) for width, side in zip(networks.backbone.channels(), sides, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_of_sdxl(name: str) -> None:
    found = plan(read_student_recipe(RECIPES / f"{name}.toml"), [])
    assert "built in" in found.configs and found.verdict.startswith("no-go: no CUDA device found; needs ")
    assert found.costs.flops.student_forward / 5 == pytest.approx(6.76e12, rel=0.01)
    assert 40 * GIB < found.memory[0].total < 80 * GIB  # the paper's one A100; 41 GB are weights, moments and gradients


def test_the_built_in_configs_are_read_where_there_is_no_checkpoint(tiny: Path) -> None:
    assert read_configs(Path("nowhere")).parts == sdxl_config.BUILT_IN
    assert read_configs(tiny).parts["unet"]["block_out_channels"] != [320, 640, 1280]


class FixedSamples:
    """Stands for the teacher: random latents for every draw."""

    def __init__(self, side: int, width: int, pooled: int) -> None:
        self.side, self.width, self.pooled = side, width, pooled

    def draw(self, random: BatchRandom) -> Sample:
        noise, x0 = random.randn(4, self.side, self.side), random.randn(4, self.side, self.side)
        return Sample(noise, x0, Condition(random.randn(77, self.width), random.randn(self.pooled)))


def test_one_real_iteration_with_the_topology_of_sdxl() -> None:
    """SDXL's blocks and transformer depths (1, 2, 10) at a tenth of the width; pool, losses and optimisers of the recipe.

    One optimiser step at the last stage: the student and exactly the drawn and the renewed heads move, the backbone not.
    """
    recipe = read_student_recipe(RECIPES / "nitrosd-realism.toml")
    recipe = dataclasses.replace(
        recipe,
        pool=dataclasses.replace(recipe.pool, width=32, crop_latents=8),
        student=dataclasses.replace(recipe.student, batch=2, accumulation=1, stage_steps=(0, 0, 0, 1), warmup_steps=0),
    )
    torch.manual_seed(0)
    shape = {
        **sdxl_config.BUILT_IN["unet"], "block_out_channels": [32, 64, 128], "attention_head_dim": [1, 2, 4], "sample_size": 16,
        "cross_attention_dim": 32, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 48 + 16,
    }  # fmt: skip
    unet, engine = UNet2DConditionModel.from_config(shape), Engine()
    backbone = UNetFeatures(unet, recompute=recipe.student.recompute).to(engine.device)
    pool = head_pool(recipe, backbone, 16, engine)
    null = Condition(torch.zeros(1, 77, 32).to(engine.device), torch.zeros(1, 16).to(engine.device))
    adversary = Adversary(backbone, pool, GAMES[recipe.student.loss], alphas_cumprod().to(engine.device), null)
    stage = StudentStage(recipe.student, unet, adversary, FixedSamples(16, 32, 16), engine)
    before = [head_weights(pool, index) for index in range(len(pool))]
    frozen = [parameter.clone() for parameter in backbone.parameters()]
    losses = stage.step(0)

    widths, sides = (32, 32, 32, 32, 64, 64, 64, 128, 128, 128), (16, 16, 16, 8, 8, 8, 4, 4, 4, 4)
    assert backbone.channels() == widths and backbone.sides(16) == sides
    assert len(pool) == 480 and losses["stage"] == 4 and losses["renewed_heads"] == 5
    assert all(torch.isfinite(torch.tensor(value)) for value in losses.values())
    assert losses["g_grad_norm"] > 0 and losses["d_grad_norm"] > 0
    moved = {index for index in range(480) if not torch.equal(before[index], head_weights(pool, index))}
    renewed = {index for index in range(480) if pool.births[index] == 1}
    assert moved == set(pool.optimizers) | renewed and len(renewed) == 5
    assert 30 - 5 <= len(pool.optimizers) <= 30 and not renewed & set(pool.optimizers)
    assert all(torch.equal(was, now) for was, now in zip(frozen, backbone.parameters(), strict=True))
    assert any(not torch.equal(was, now) for was, now in zip(unet.parameters(), stage.unet.parameters(), strict=True))


def head_weights(pool: HeadPool, index: int) -> Tensor:
    return torch.cat([parameter.detach().cpu().flatten() for parameter in pool.head(index).parameters()])


def test_every_option_of_a_student_recipe_is_explained() -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    sections = typing.get_type_hints(StudentRecipe)
    for section, kind in sections.items():
        if dataclasses.is_dataclass(kind):
            part = text.partition(f"## [{section}]\n")[2].partition("\n## ")[0]
            missing = [field.name for field in dataclasses.fields(kind) if f"| `{field.name}` |" not in part]
            assert not missing, f"docs/recipes.md lacks {missing} of [{section}]; run python -m nitro_training.options"
