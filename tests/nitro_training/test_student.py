"""The student's step as a whole: who changes, by which gradient, at which rate."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_student import (
    backbone,
    copies,
    engine,
    is_free_of_gradient,
    same,
    student_stage,
    unet,
)  # fmt: skip
from torch import Tensor

from nitro_rt.errors import ConfigError
from nitro_training import checkpoint
from nitro_training.adversary import Verdict
from nitro_training.generator import Place
from nitro_training.pool import HeadOptimizerConfig
from nitro_training.randomness import generator
from nitro_training.student import StudentConfig, StudentStage, cosine, warmup

FAST = {"feature_levels": (2, 5)}
"""A pool of 96 heads, where what it is made of does not matter."""
ONE = {"feature_levels": (5,), "tasks": ("local-conditional",), "refresh_rate": 0.1}
"""And one of 16, where not even the tasks do."""


def parameters(stage: StudentStage) -> list[Tensor]:
    return list(stage.unet.parameters())


class Watch:
    """What a stage does in its steps: verdicts with the gradients they ask for, updates, renewals, the student's gradient."""

    def __init__(self, stage: StudentStage) -> None:
        self.fakes: list[Tensor] = []
        self.wanted: list[list[Tensor]] = []
        """Of every look: the gradient of g_loss in the student's parameters."""
        self.drawn: list[list[int]] = []
        self.updates: list[tuple[list[int], float]] = []
        self.renewed: list[int] = []
        self.applied: list[list[Tensor]] = []
        """Of every optimiser step of the student: the gradient it took."""
        self.rates: list[float] = []
        judge, update, refresh = stage.adversary.judge, stage.adversary.pool.update, stage.adversary.pool.refresh

        def watched_judge(real: Tensor, fake: Tensor, *args: Any) -> Verdict:
            verdict = judge(real, fake, *args)
            self.fakes.append(fake)
            self.drawn.append(verdict.drawn)
            if fake.requires_grad:
                self.wanted.append(list(torch.autograd.grad(verdict.g_loss, parameters(stage), retain_graph=True)))
            return verdict

        def watched_update(drawn: list[int], *, lr_scale: float) -> float:
            self.updates.append((list(drawn), lr_scale))
            return update(drawn, lr_scale=lr_scale)

        def watched_refresh(*args: Any) -> list[int]:
            self.renewed += (renewed := refresh(*args))
            return renewed

        def before_step(optimizer: torch.optim.Optimizer, *args: Any) -> None:
            self.applied.append([p.grad.clone() for p in parameters(stage) if p.grad is not None])
            self.rates.append(optimizer.param_groups[0]["lr"])

        stage.adversary.judge = watched_judge  # type: ignore[method-assign]
        stage.adversary.pool.update = watched_update  # type: ignore[method-assign]
        stage.adversary.pool.refresh = watched_refresh  # type: ignore[method-assign]
        stage.optimizer.register_step_pre_hook(before_step)


def test_only_drawn_or_renewed_heads_change_in_a_step() -> None:
    """Weights and moments, with weight decay, over accumulated micro-batches."""
    stage = student_stage(accumulation=2)
    pool, watch = stage.adversary.pool, Watch(stage)
    stage.step(0)
    before = [copies(pool.head(index)) for index in range(len(pool))]
    moments = {key: value.clone() for key, value in pool.tensors().items()}
    watch.drawn, watch.renewed = [], []
    stage.step(1)
    drawn, renewed = {index for look in watch.drawn for index in look}, set(watch.renewed)
    assert {index for index in range(len(pool)) if not same(before[index], pool.head(index))} == drawn | renewed
    assert 30 <= len(drawn) <= 60 and len(renewed) == 5
    after = pool.tensors()
    for key, value in moments.items():
        index = int(key.split("/")[0])
        if index not in drawn | renewed:
            assert torch.equal(value, after[key])
    assert not {int(key.split("/")[0]) for key in after} & renewed, "renewed heads have no optimiser state"


def test_renewed_heads_have_no_optimiser_state_after_a_step() -> None:
    stage = student_stage({**ONE, "refresh_rate": 1.0})
    stage.step(0)
    assert not stage.adversary.pool.tensors() and not stage.adversary.pool.optimizers


def test_heads_are_renewed_once_per_step_whatever_the_accumulation() -> None:
    for accumulation in (1, 3):
        stage = student_stage({"refresh_rate": 0.25, **FAST}, accumulation=accumulation)
        watch = Watch(stage)
        stage.step(0)
        assert len(watch.renewed) == 24 and int((stage.adversary.pool.births == 1).sum()) == 24


def test_the_student_moves_and_teacher_and_backbone_do_not() -> None:
    stage = student_stage(FAST, recompute=True)
    before = [copies(module) for module in (unet(), backbone(), stage.unet)]
    stage.step(0)
    assert same(before[0], unet()), "what the student was copied from"
    assert same(before[1], backbone()) and is_free_of_gradient(backbone())
    assert all(not torch.equal(old, new) for old, new in zip(before[2], stage.unet.parameters(), strict=True)), "every weight"


def test_a_step_leaves_no_gradient_behind() -> None:
    stage = student_stage(ONE)
    stage.step(0)
    assert is_free_of_gradient(stage.adversary.pool) and is_free_of_gradient(stage.unet)


def test_the_students_gradient_is_the_mean_over_the_micro_batches() -> None:
    stage = student_stage(ONE, accumulation=3, clip=0.0, stage_steps=(0, 0, 0, 1))
    watch = Watch(stage)
    stage.step(0)
    (applied,) = watch.applied
    assert len(watch.wanted) == 3
    for found, *wanted in zip(applied, *watch.wanted, strict=True):
        torch.testing.assert_close(found, torch.stack(wanted).mean(dim=0))
    assert not torch.equal(watch.fakes[0], watch.fakes[1]), "every micro-batch has samples of its own"


def test_the_heads_gradient_is_the_mean_over_the_micro_batches() -> None:
    """With beta 0 the first moment is the gradient: of two looks with the same heads, half of each."""
    few = {"feature_levels": (2,), "heads_per_cell": 1, "noise_levels": (10,), "refresh_rate": 0.0}
    stage = student_stage({**few, "optimizer": HeadOptimizerConfig(betas=(0.0, 0.9), clip=0.0)}, accumulation=2)
    wanted: list[list[Tensor]] = []
    judge, weights = stage.adversary.judge, list(stage.adversary.pool.parameters())

    def watched(*args: Any) -> Verdict:
        verdict = judge(*args)
        wanted.append(list(torch.autograd.grad(verdict.d_loss, weights, retain_graph=True)))
        return verdict

    stage.adversary.judge = watched  # type: ignore[method-assign]
    stage.step(0)
    moments = [state["exp_avg"] for _, one in sorted(stage.adversary.pool.optimizers.items()) for state in one.state.values()]
    assert len(moments) == len(weights) == 18
    for found, first, second in zip(moments, *wanted, strict=True):
        torch.testing.assert_close(found, (first + second) / 2)


def test_two_processes_gradients_are_one_processs_with_the_whole_batch() -> None:
    """The mean of what two processes ask for, each with its half of the samples, is what one with all of them asks for."""
    halves = []
    for rank in range(2):
        part = student_stage(ONE, clip=0.0, stage_steps=(0, 0, 0, 1))
        part.engine = copy.copy(engine())
        part.engine.rank = rank
        watch = Watch(part)
        part.step(0)
        halves.append(watch)
    whole = Watch(stage := student_stage(ONE, clip=0.0, stage_steps=(0, 0, 0, 1), batch=4))
    stage.step(0)
    assert whole.drawn == halves[0].drawn == halves[1].drawn
    for found, first, second in zip(whole.wanted[0], halves[0].wanted[0], halves[1].wanted[0], strict=True):
        torch.testing.assert_close(found, (first + second) / 2, atol=1e-6, rtol=1e-4)


def test_more_updates_of_the_heads_leave_the_student_one() -> None:
    stage = student_stage(FAST, d_updates=3, accumulation=2)
    watch, before = Watch(stage), copies(stage.unet)
    update = stage.adversary.pool.update
    unmoved: list[bool] = []

    def watched(*args: Any, **kwargs: Any) -> float:
        unmoved.append(same(before, stage.unet))
        return update(*args, **kwargs)

    stage.adversary.pool.update = watched  # type: ignore[method-assign]
    stage.step(0)
    assert [len(drawn) for drawn, _ in watch.updates] == [12] * 3, "each of two looks at two levels in three tasks"
    assert len(watch.applied) == 1 and unmoved == [True] * 3
    assert [fake.requires_grad for fake in watch.fakes] == [False] * 4 + [True] * 2
    assert len({float(fake.detach().sum()) for fake in watch.fakes}) == 6, "on samples of their own"
    assert len(watch.renewed) == 1, "one per cent of 96 heads, once"


def test_both_learning_rates_warm_up_and_the_students_falls() -> None:
    stage = student_stage(ONE, warmup_steps=2, final_lr_share=0.5, lr=1e-3, stage_steps=(4,))
    watch = Watch(stage)
    for step in range(4):
        stage.step(step)
    assert [scale for _, scale in watch.updates] == [0.5, 1.0, 1.0, 1.0]
    expected = [1e-3 * warmup(step, 2) * cosine(step / 4, 0.5) for step in range(4)]
    assert watch.rates == pytest.approx(expected)
    assert (cosine(0, 0.1), cosine(0.5, 0.1), cosine(1, 0.1)) == pytest.approx((1, 0.55, 0.1))
    assert warmup(0, 0) == 1.0 and warmup(0, 500) == 1 / 500 and warmup(499, 500) == warmup(10**6, 500) == 1.0


def test_the_students_gradient_is_clipped_to_its_norm() -> None:
    applied, norms = {}, {}
    for clip in (0.0, 1e-3):
        stage = student_stage(ONE, clip=clip)
        watch = Watch(stage)
        norms[clip] = stage.step(0)["g_grad_norm"]
        applied[clip] = torch.stack([gradient.norm() for gradient in watch.applied[0]]).norm()
    assert norms[0.0] == norms[1e-3] > 1e-3, "what is logged is the norm before"
    assert float(applied[0.0]) == pytest.approx(norms[0.0], rel=1e-4)
    assert float(applied[1e-3]) == pytest.approx(1e-3, rel=1e-2)


def test_the_average_follows_the_weights() -> None:
    """Early on faster than `ema_decay`, which would remember the start for too long."""
    stage = student_stage(ONE, ema_decay=0.5)
    average = copies(stage.ema["unet_ema"])
    for step, decay in ((0, 0.1), (1, 2 / 11), (30, 0.5)):
        stage.step(min(step, 3)) if step < 3 else stage._update_student(step, 1.0)
        for old, found, new in zip(average, stage.ema["unet_ema"].parameters(), stage.unet.parameters(), strict=True):
            torch.testing.assert_close(found, decay * old + (1 - decay) * new.detach())
        average = copies(stage.ema["unet_ema"])
    assert stage.published() is stage.ema["unet_ema"] and not any(p.requires_grad for p in stage.published().parameters())
    assert "unet_ema" in stage.state().modules
    without = student_stage(ONE)
    assert without.published() is without.unet and "unet_ema" not in without.state().modules


def test_weights_gradients_and_x0_stay_in_float32_under_autocast() -> None:
    stage = student_stage(FAST, precision="bf16", stage_steps=(0, 0, 0, 1))
    seen: list[torch.dtype] = []
    hook = stage.unet.mid_block.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    watch = Watch(stage)
    stage.step(0)
    hook.remove()
    assert set(seen) == {torch.bfloat16}, "the network does run in bfloat16"
    assert {fake.dtype for fake in watch.fakes} == {torch.float32}
    assert {gradient.dtype for gradient in watch.applied[0]} == {torch.float32}
    tensors = stage.state().tensors().values()
    assert {tensor.dtype for tensor in tensors} <= {torch.float32, torch.int64}


def test_every_weight_learns_at_every_place_under_autocast() -> None:
    """And the step that learns shares no autocast with the simulated steps before it. Autocast keeps the bfloat16 copies of
    weights until it ends; older versions of torch kept those made without gradients, and the weights then learnt nothing."""
    stage = student_stage(FAST, precision="bf16")
    entered, forwards = [0], []
    autocast = stage._autocast

    @contextlib.contextmanager
    def counted() -> Iterator[None]:
        entered[0] += 1
        with autocast():
            yield

    stage._autocast = counted  # type: ignore[method-assign,assignment]
    stage.unet.register_forward_pre_hook(lambda module, args: forwards.append((entered[0], torch.is_grad_enabled())))
    for place in (Place(1, 0), Place(4, 3)):
        random = stage._random(0, "0")
        sample = stage.samples.draw(random)
        stage._draw(sample.noise_B4hw, place, sample.condition, random).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.unet.parameters() if p.ndim > 1)
        stage.unet.zero_grad(set_to_none=True)
    assert [learns for _, learns in forwards] == [True, False, False, False, True]
    assert not {context for context, learns in forwards if learns} & {context for context, learns in forwards if not learns}


def test_a_stage_learns_at_the_places_it_is_for() -> None:
    """The first at one step alone, the last at every later step, in the share that is not kept for one step."""
    stage = student_stage(ONE, one_step_share=0.0, accumulation=6)
    learnt: list[int] = []
    stage.unet.register_forward_pre_hook(
        lambda module, args: learnt.append(int(args[1][0])) if torch.is_grad_enabled() else None
    )
    stage.step(0)
    assert learnt == [499] * 6, "t' of one step"
    learnt.clear()
    stage.step(3)
    assert len(learnt) == 6 and 1 < len(set(learnt)) and set(learnt) <= {374, 249, 124}


def test_a_regression_on_the_teachers_result_may_be_added() -> None:
    gradients = {}
    for weights in ((1.0, 0.0), (0.0, 2.0), (1.0, 2.0)):
        stage = student_stage(ONE, adversarial_weight=weights[0], regression_weight=weights[1], clip=0.0)
        watch = Watch(stage)
        losses = stage.step(0)
        assert ("regression" in losses) == (weights[1] > 0)
        gradients[weights] = watch.applied[0]
    for first, second, both in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(first + second, both, atol=1e-6, rtol=1e-3)


def test_a_state_holds_everything() -> None:
    """A step follows from its number alone: a run that goes on from its state is the uninterrupted run, bit for bit."""
    pool = {**ONE, "heads_per_cell": 2, "specialised": False}
    whole, first, resumed = (student_stage(pool, ema_decay=0.9, stage_steps=(1, 3)) for _ in range(3))
    trace = [whole.step(step) for step in range(4)]
    assert [first.step(step) for step in range(2)] == trace[:2]
    for index in range(len(resumed.adversary.pool)):
        resumed.adversary.pool.head(index).reset(generator("not loaded"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.safetensors"
        checkpoint.save(path, first.state().tensors(), step=2, options={})
        assert checkpoint.load(path, resumed.state(), options={}) == 2
    assert [resumed.step(step) for step in range(2, 4)] == trace[2:]
    expected, found = whole.state().tensors(), resumed.state().tensors()
    assert expected.keys() == found.keys() and all(torch.equal(value, found[key]) for key, value in expected.items())


def test_the_log_says_what_happened() -> None:
    losses = student_stage(FAST).step(0)
    assert {"d_loss", "g_loss", "d_grad_norm", "g_grad_norm", "renewed_heads", "stage"} <= set(losses)
    assert losses["renewed_heads"] == 1 and losses["stage"] == 1


def test_stages_follow_one_another() -> None:
    config = StudentConfig(stage_steps=(3, 0, 2, 1))
    assert config.num_steps == 6 and [config.stage_at(step) for step in range(6)] == [1, 1, 1, 3, 3, 4]
    with pytest.raises(ConfigError, match="step 6 is past the last of 6"):
        config.stage_at(6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shifted_timestep": 0}, "from 1 to 1000"),
        ({"stage_steps": ()}, "one to 4 numbers"),
        ({"stage_steps": (1, 1, 1, 1, 1)}, "one to 4 numbers"),
        ({"stage_steps": (0, 0)}, "one to 4 numbers"),
        ({"loss": "wasserstein"}, "hinge, critic, nonsaturating"),
        ({"batch": 1}, "at least 2"),
        ({"accumulation": 0}, "at least 1"),
        ({"d_updates": 0}, "at least 1"),
        ({"one_step_share": 1.1}, "share from 0 to 1"),
        ({"ema_decay": -0.1}, "share from 0 to 1"),
        ({"adversarial_weight": 0.0}, "nothing would be learnt"),
        ({"precision": "fp16"}, "bf16 or fp32"),
    ],
)
def test_options_that_train_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StudentConfig(**options)
