"""The invariants of NitroFusion's step: pool, backbone, conversion, and who may change whom."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from diffusers import UNet2DConditionModel

from nitro_rt.errors import ConfigError
from nitro_training.backbone import UNetFeatures
from nitro_training.loop import step_generator
from nitro_training.model import ModelConfig, build_unet
from nitro_training.pool import HeadPool, PoolConfig, hinge_d_loss
from nitro_training.student import StudentConfig, StudentStage, TeacherPairs, draw_student

MODEL = ModelConfig(text_widths=(16, 16), channels=(16, 32, 32), norm_groups=8, heads=(1, 2, 2))
POOL = PoolConfig(width=32, num_blocks=1, refresh_rate=0.02)
STUDENT = StudentConfig(warmup_steps=0, adversarial_steps=4, batch=2, num_pairs=4)


@pytest.fixture(scope="module")
def teacher() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return build_unet(MODEL, 64).eval()


@pytest.fixture
def stage(teacher: UNet2DConditionModel) -> StudentStage:
    generator = torch.Generator().manual_seed(1)
    features = UNetFeatures(teacher)
    pairs = TeacherPairs(*(torch.randn(4, *shape, generator=generator) for shape in ((4, 8, 8), (4, 8, 8), (77, 32), (16,))))
    return StudentStage(STUDENT, teacher, features, HeadPool(POOL, features.channels()), pairs)


def test_the_backbone_gives_every_skip_tensor_and_the_middle(teacher: UNet2DConditionModel) -> None:
    features = UNetFeatures(teacher)
    found = features(torch.randn(2, 4, 8, 8), torch.tensor([10, 10]), torch.randn(2, 77, 32), torch.randn(2, 16))
    assert [tuple(f.shape[1:]) for f in found] == [
        (16, 8, 8), (16, 8, 8), (16, 8, 8), (16, 4, 4), (32, 4, 4), (32, 4, 4), (32, 2, 2), (32, 2, 2), (32, 2, 2), (32, 2, 2),
    ]  # fmt: skip
    assert features.channels() == tuple(f.shape[1] for f in found)


def test_the_backbone_computes_what_the_whole_unet_computes(teacher: UNet2DConditionModel) -> None:
    """Its last feature equals the mid-block's output inside the whole UNet."""
    inside: list[torch.Tensor] = []
    hook = teacher.mid_block.register_forward_hook(lambda module, args, output: inside.append(output))
    latents, times = torch.randn(1, 4, 8, 8), torch.tensor([250])
    embeds, pooled = torch.randn(1, 77, 32), torch.randn(1, 16)
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    with torch.no_grad():
        teacher(latents, times, embeds, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids})
        found = UNetFeatures(teacher)(latents, times, embeds, pooled)
    hook.remove()
    torch.testing.assert_close(found[-1], inside[0])


def test_the_backbone_keeps_no_decoder_and_no_gradients(teacher: UNet2DConditionModel) -> None:
    features = UNetFeatures(teacher)
    assert len(features.unet.up_blocks) == 0
    assert sum(p.numel() for p in features.parameters()) < 0.7 * sum(p.numel() for p in teacher.parameters())
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    features(latents, torch.tensor([10, 10]), torch.randn(2, 77, 32), torch.randn(2, 16))[-1].sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    assert all(p.grad is None for p in features.parameters())


def test_the_pool_has_a_cell_of_heads_for_each_level() -> None:
    pool = HeadPool(POOL, (16,) * 10)
    assert len(pool) == 4 * 10 * 4
    generator = torch.Generator().manual_seed(0)
    for level in range(4):
        drawn = pool.draw(level, generator)
        cells = [index // POOL.heads_per_cell for index in drawn]
        assert cells == list(range(level * 10, level * 10 + 10)), "one head of each cell of this noise level"


def test_only_drawn_or_renewed_heads_change(stage: StudentStage, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: set[int] = set()
    draw, refresh = HeadPool.draw, HeadPool.refresh

    def spy_draw(pool: HeadPool, *args: object) -> list[int]:
        touched.update(drawn := draw(pool, *args))  # type: ignore[arg-type]
        return drawn

    def spy_refresh(pool: HeadPool, *args: object) -> list[int]:
        touched.update(renewed := refresh(pool, *args))  # type: ignore[arg-type]
        return renewed

    monkeypatch.setattr(HeadPool, "draw", spy_draw)
    monkeypatch.setattr(HeadPool, "refresh", spy_refresh)
    before = copy.deepcopy(stage.pool.state_dict())
    stage.step(0, step_generator(1, 0))
    changed = {int(key.split(".")[1]) for key, value in stage.pool.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == touched and len(touched) >= 10


def test_renewed_heads_have_no_optimiser_state(stage: StudentStage) -> None:
    for step in range(3):
        stage.step(step, step_generator(1, step))
    trained = {id(parameter) for parameter in stage.head_optimizer.state}
    renewed = stage.pool.refresh(stage.head_optimizer, torch.Generator().manual_seed(5))
    assert len(renewed) == round(0.02 * 160)
    for index in renewed:
        assert all(parameter not in stage.head_optimizer.state for parameter in stage.pool.heads[index].parameters())
    assert len(trained) >= len(stage.head_optimizer.state) > 0


def test_a_step_moves_the_student_and_leaves_teacher_and_backbone(stage: StudentStage, teacher: UNet2DConditionModel) -> None:
    before = [copy.deepcopy(m.state_dict()) for m in (stage.unet, teacher, stage.features)]
    losses = stage.step(0, step_generator(1, 0))
    assert set(losses) == {"regression", "d_loss", "g_loss"}
    for module, old, moves in zip((stage.unet, teacher, stage.features), before, (True, False, False), strict=True):
        assert any(not torch.equal(value, old[key]) for key, value in module.state_dict().items()) == moves


def test_the_student_pass_leaves_no_gradient_in_heads(stage: StudentStage) -> None:
    generator = step_generator(1, 0)
    real = stage.pairs.x0_N4hw[:2]
    fake = real.clone().requires_grad_(True)
    _, g_loss = stage._judge(real, fake, stage.pairs.embeds_NTC[:2], stage.pairs.pooled_NP[:2], generator)
    kept = {name: p.grad.clone() for name, p in stage.pool.named_parameters() if p.grad is not None}
    g_loss.backward()
    assert fake.grad is not None and fake.grad.abs().sum() > 0
    assert all(torch.equal(p.grad, kept[name]) for name, p in stage.pool.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("shift", [250, 500])
def test_one_step_equals_the_closed_form(teacher: UNet2DConditionModel, shift: int) -> None:
    """x0 = (x_T - sqrt(1 - abar) eps) / sqrt(abar) at t' = 999 * shift // 1000."""
    noise, embeds, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32), torch.randn(2, 16)
    drawn = draw_student(teacher, embeds, pooled, noise, num_steps=1, shift=shift, generator=torch.Generator())
    time = 999 * shift // 1000
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = torch.cumprod(1 - betas, 0)[time]
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    with torch.no_grad():
        eps = teacher(noise, time, embeds, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
    torch.testing.assert_close(drawn, (noise - (1 - abar).sqrt() * eps) / abar.sqrt(), atol=1e-4, rtol=1e-4)


def test_hinge_is_zero_past_the_margin_and_free_of_the_number_of_heads() -> None:
    assert hinge_d_loss(torch.full((3, 2), 1.5), torch.full((3, 2), -1.5)) == 0
    one, many = torch.zeros(1, 2), torch.zeros(30, 2)
    assert hinge_d_loss(one, one) == hinge_d_loss(many, many) == 2


def test_features_that_do_not_fit_the_pool_are_refused() -> None:
    pool = HeadPool(POOL, (16, 16))
    with pytest.raises(ConfigError, match="gives 1 features, the pool has heads for 2"):
        pool.scores([0, 4], (torch.zeros(1, 16, 8, 8),))


def test_the_warmup_regresses_without_the_pool(stage: StudentStage) -> None:
    warming = StudentStage(dataclasses.replace(STUDENT, warmup_steps=4), stage.unet, stage.features, stage.pool, stage.pairs)
    assert set(warming.step(0, step_generator(1, 0))) == {"regression"}
