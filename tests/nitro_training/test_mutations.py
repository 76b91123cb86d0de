"""The tests of the training's invariants, tested: each fails when the code is broken in the way that it is there to notice.

A mutation replaces a piece of a module's source. All of `nitro_training` is then loaded afresh, so that every module uses
the broken one, and the named test runs in it. A mutation whose text is no longer in the source fails here: adapt it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

_TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Mutation:
    """One way to break the code."""

    what: str
    """In words, for whoever reads the list."""
    module: str
    """Of `nitro_training`."""
    old: str
    """Occurs once in the module's source."""
    new: str
    test: str
    """`<file>::<test>` that has to fail."""


MUTATIONS = (
    # the pool
    Mutation(
        "a head's number is off by a cell",
        "pool",
        "[(first + cell) * config.heads_per_cell",
        "[(first + cell + 1) % 120 * config.heads_per_cell",
        "pool::test_one_head_of_each_cell_of_the_noise_level_is_drawn",
    ),
    Mutation(
        "noise levels share their heads",
        "pool",
        "noise_cell = noise_level_index if config.specialised else 0",
        "noise_cell = 0",
        "pool::test_one_head_of_each_cell_of_the_noise_level_is_drawn",
    ),
    Mutation(
        "always the same head of a cell",
        "pool",
        "torch.randperm(self.config.heads_per_cell, generator=source)",
        "torch.arange(self.config.heads_per_cell)",
        "pool::test_every_head_of_a_cell_is_drawn_equally_often",
    ),
    Mutation(
        "three heads in a cell",
        "pool",
        "for _ in range(config.heads_per_cell))",
        "for _ in range(config.heads_per_cell - 1))",
        "pool::test_the_default_pool_has_480_heads_in_120_cells_of_four",
    ),
    Mutation(
        "the weights of noise levels are ignored",
        "pool",
        "self.config.noise_level_weights or [1.0] * len(self.config.noise_levels)",
        "[1.0] * len(self.config.noise_levels)",
        "pool::test_noise_levels_are_drawn_by_weight",
    ),
    Mutation(
        "every head with an optimiser is stepped: moments and weight decay reach heads that were not drawn",
        "pool",
        "        for index in indices:\n            optimizer",
        "        indices = sorted({*indices, *self.optimizers})\n"
        "        for index in indices:\n"
        "            for parameter in self.head(index).parameters():\n"
        "                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad\n"
        "            optimizer",
        "pool::test_only_drawn_heads_learn",
    ),
    Mutation(
        "weight decay shrinks the whole pool",
        "pool",
        "        return float(norm)\n",
        "        for parameter in self.parameters():\n"
        "            parameter.data.mul_(1 - self.optimizer_config.lr * self.optimizer_config.weight_decay)\n"
        "        return float(norm)\n",
        "student::test_only_drawn_or_renewed_heads_change_in_a_step",
    ),
    Mutation(
        "the last drawn head is not updated",
        "pool",
        "        for index in indices:\n            optimizer",
        "        for index in indices[:-1]:\n            optimizer",
        "pool::test_only_drawn_heads_learn",
    ),
    Mutation(
        "warm-up does not reach the heads",
        "pool",
        "self.optimizer_config.lr * lr_scale",
        "self.optimizer_config.lr",
        "pool::test_a_drawn_head_learns_as_by_plain_adamw",
    ),
    Mutation(
        "the heads' gradient is not clipped",
        "pool",
        "limit = self.optimizer_config.clip or",
        "limit =",
        "pool::test_a_drawn_head_learns_as_by_plain_adamw",
    ),
    Mutation(
        "renewal keeps the optimiser's state",
        "pool",
        "            self.optimizers.pop(index, None)\n",
        "",
        "pool::test_renewed_heads_have_no_optimiser_state_and_no_past",
    ),
    Mutation(
        "renewal keeps the optimiser's state, in a whole step",
        "pool",
        "            self.optimizers.pop(index, None)\n",
        "",
        "student::test_renewed_heads_have_no_optimiser_state_after_a_step",
    ),
    Mutation(
        "renewal forgets the weights",
        "pool",
        "            self.head(index).reset(source)\n",
        "",
        "pool::test_exactly_the_asked_share_is_renewed_and_nothing_else",
    ),
    Mutation(
        "renewal takes one head too many",
        "pool",
        "count = round(self.config.refresh_rate * len(self.heads))",
        "count = round(self.config.refresh_rate * len(self.heads)) + 1",
        "pool::test_exactly_the_asked_share_is_renewed_and_nothing_else",
    ),
    Mutation(
        "renewal takes the first heads",
        "pool",
        "torch.randperm(len(self.heads), generator=source)[:count]",
        "torch.arange(len(self.heads))[:count]",
        "pool::test_whom_the_renewal_takes_is_random",
    ),
    Mutation(
        "weights are renewed from a normal distribution, as the figure draws it",
        "pool",
        "parameter.uniform_(-bound, bound, generator=source)",
        "parameter.normal_(generator=source)",
        "pool::test_renewed_weights_have_the_layers_standard_spread",
    ),
    Mutation(
        "drawn heads stay on the device",
        "pool",
        "            self._rest(index)\n        return float(norm)",
        "        return float(norm)",
        "pool::test_heads_travel_to_the_device_and_home_again",
    ),
    Mutation(
        "a state forgets the moments of the heads",
        "pool",
        "        for index, state in states.items():",
        "        for index, state in ():",
        "student::test_a_state_holds_everything",
    ),
    # the backbone
    Mutation(
        "the backbone is not frozen",
        "backbone",
        "kept.requires_grad_(False)",
        "kept.requires_grad_(True)",
        "backbone::test_gradients_pass_through_the_backbone_and_not_into_it",
    ),
    Mutation(
        "the backbone is not frozen, in a whole step",
        "backbone",
        "kept.requires_grad_(False)",
        "kept.requires_grad_(True)",
        "student::test_the_student_moves_and_teacher_and_backbone_do_not",
    ),
    Mutation(
        "features are cut off from the latents",
        "backbone",
        "hidden = unet.conv_in(latents_B4hw)",
        "hidden = unet.conv_in(latents_B4hw.detach()) + 0 * latents_B4hw.sum()",
        "backbone::test_gradients_pass_through_the_backbone_and_not_into_it",
    ),
    Mutation(
        "a downsampler's feature is missing",
        "backbone",
        "features += skips",
        "features += skips[:2]",
        "backbone::test_every_skip_tensor_and_the_middle_are_what_the_whole_unet_computes",
    ),
    Mutation(
        "the decoder is kept",
        "backbone",
        "unet.up_blocks, unet.conv_norm_out, unet.conv_out = nn.ModuleList(), nn.Identity(), nn.Identity()",
        "pass",
        "backbone::test_no_decoder_is_kept_and_the_caller_keeps_its_own",
    ),
    Mutation(
        "the size conditioning is not seen",
        "backbone",
        "unet.add_time_proj(time_ids_B6.flatten())",
        "unet.add_time_proj(0 * time_ids_B6.flatten())",
        "backbone::test_the_noise_level_the_prompt_and_the_size_are_seen",
    ),
    # a look
    Mutation(
        "real and fake have windows of their own",
        "adversary",
        "crops(fake, corners, crop)",
        "crops(fake, corners.flip(0), crop)",
        "adversary::test_local_tasks_see_the_same_window_of_real_and_fake",
    ),
    Mutation(
        "one window for all samples",
        "adversary",
        "            real, fake = crops(real",
        "            corners = corners[:1].expand(len(real), 2)\n            real, fake = crops(real",
        "adversary::test_windows_are_random_for_every_sample_and_cover_the_latents",
    ),
    Mutation(
        "the last row and column are in no window",
        "adversary",
        "torch.stack([random.randint(side - crop + 1), random.randint(side - crop + 1)], dim=1)",
        "torch.stack([random.randint(side - crop), random.randint(side - crop)], dim=1)",
        "adversary::test_windows_are_random_for_every_sample_and_cover_the_latents",
    ),
    Mutation(
        "the global task sees a window",
        "adversary",
        'if task.startswith("local"):',
        "if True:",
        "adversary::test_the_global_task_sees_the_whole_latents",
    ),
    Mutation(
        "the unconditional task sees the prompt",
        "adversary",
        'if task.endswith("unconditional"):',
        "if False:",
        "adversary::test_only_the_unconditional_task_is_kept_from_the_prompt",
    ),
    Mutation(
        "the conditional tasks see no prompt",
        "adversary",
        'if task.endswith("unconditional"):',
        'if task.endswith("conditional"):',
        "adversary::test_only_the_unconditional_task_is_kept_from_the_prompt",
    ),
    Mutation(
        "the null condition is always zeros",
        "distillation",
        'if recipe.pool.null_condition == "zeros":',
        "if True:",
        "adversary::test_the_null_condition_is_zeros_or_the_empty_prompt",
    ),
    Mutation(
        "a window's offset is left before top",
        "backbone",
        "torch.cat([side, corners_B2, window], dim=1)",
        "torch.cat([side, corners_B2.flip(1), window], dim=1)",
        "adversary::test_the_size_conditioning_of_windows_is_as_asked",
    ),
    Mutation(
        "real and fake share their noise",
        "adversary",
        "noisy_real, noisy_fake = (add_noise(x, random.randn(*x.shape[1:]).to(x.device), times",
        "noise = random.randn(*real.shape[1:])\n        noisy_real, noisy_fake = (add_noise(x, noise, times",
        "adversary::test_real_and_fake_are_noised_to_the_noise_level_independently",
    ),
    Mutation(
        "the backbone is told another time than that of the noise",
        "adversary",
        "fake_features = self.backbone(view.fake_B4hw, times,",
        "fake_features = self.backbone(view.fake_B4hw, times + 1,",
        "adversary::test_all_see_one_noise_level_of_the_set",
    ),
    Mutation(
        "scores are summed instead of averaged",
        "losses",
        "functional.relu(1 - real_HB).mean() + functional.relu(1 + fake_HB).mean()",
        "functional.relu(1 - real_HB).sum() + functional.relu(1 + fake_HB).sum()",
        "losses::test_the_scale_is_free_of_the_number_of_heads_and_samples",
    ),
    Mutation(
        "hinge without its margin",
        "losses",
        "functional.relu(1 - real_HB).mean()",
        "functional.relu(-real_HB).mean()",
        "losses::test_every_game_has_its_known_values",
    ),
    Mutation(
        "the critic's real and fake are swapped, as the paper's transcription has them",
        "losses",
        "return fake_HB.mean() - real_HB.mean()",
        "return real_HB.mean() - fake_HB.mean()",
        "losses::test_heads_pull_real_up_and_fake_down_and_the_student_fake_up",
    ),
    Mutation(
        "the student is driven away from real",
        "losses",
        "return -fake_HB.mean()",
        "return fake_HB.mean()",
        "losses::test_a_toy_game_moves_fakes_to_where_the_real_ones_are",
    ),
    Mutation(
        "real scores are of the fake",
        "adversary",
        "real = self.pool.scores(drawn, real_features)",
        "real = self.pool.scores(drawn, [feature.detach() for feature in fake_features])",
        "adversary::test_gradients_of_the_heads_are_those_of_the_plain_loss",
    ),
    Mutation(
        "the student's loss sees detached features",
        "adversary",
        "fake = self.pool.scores(drawn, fake_features)",
        "fake = self.pool.scores(drawn, [feature.detach() + 0 * feature.sum() for feature in fake_features])",
        "adversary::test_the_gradient_of_the_students_loss_is_that_of_the_plain_loss",
    ),
    Mutation(
        "heads are not frozen for the student's loss",
        "adversary",
        "head.requires_grad_(False)",
        "pass",
        "adversary::test_the_students_loss_leaves_no_gradient_in_heads_or_backbone",
    ),
    Mutation(
        "heads stay frozen after the student's loss",
        "adversary",
        "head.requires_grad_(True)",
        "pass",
        "adversary::test_the_students_loss_leaves_no_gradient_in_heads_or_backbone",
    ),
    Mutation(
        "the heads' loss reaches the student",
        "adversary",
        "[feature.detach() for feature in fake_features]",
        "fake_features",
        "adversary::test_the_heads_loss_leaves_no_gradient_in_the_student_or_backbone",
    ),
    # the student's way
    Mutation(
        "x0 is converted at t instead of t'",
        "generator",
        "abar = abar_T[shifted_B].float()",
        "abar = abar_T[times_B].float()",
        "generator::test_one_step_is_the_closed_form",
    ),
    Mutation(
        "the network is told t instead of t'",
        "generator",
        "noise = predict_noise(unet, x_B4hw, shifted_B,",
        "noise = predict_noise(unet, x_B4hw, times_B,",
        "generator::test_the_grid_is_the_known_table",
    ),
    Mutation(
        "t' is rounded to the nearest",
        "generator",
        "times_B * shift // len(abar_T)",
        "(times_B * shift + len(abar_T) // 2) // len(abar_T)",
        "generator::test_the_grid_is_the_known_table",
    ),
    Mutation(
        "simulation noises at the next shifted time",
        "generator",
        "random.randn(*x.shape[1:]).to(x.device), then, abar_T)",
        "random.randn(*x.shape[1:]).to(x.device), then * shift // 1000, abar_T)",
        "generator::test_simulation_is_the_beginning_of_a_draw",
    ),
    Mutation(
        "drawing noises at the time just left",
        "generator",
        "x = schedule.next_alpha[index] * x",
        "x = schedule.alpha[index] * x",
        "generator::test_draws_are_those_of_diffusers_scheduler",
    ),
    Mutation(
        "simulation stops a step early",
        "generator",
        "zip(times[: place.index], times[1 : place.index + 1], strict=True)",
        "zip(times[: place.index - 1], times[1 : place.index], strict=False)",
        "generator::test_simulation_is_the_beginning_of_a_draw",
    ),
    Mutation(
        "simulation keeps gradients",
        "generator",
        "@torch.no_grad()\ndef simulate(",
        "def simulate(",
        "generator::test_simulation_keeps_no_graph",
    ),
    Mutation(
        "later stages never draw their last step count",
        "generator",
        "torch.randint(2, stage + 1, (), generator=source)",
        "torch.randint(2, max(3, stage), (), generator=source)",
        "generator::test_places_are_drawn_by_their_shares",
    ),
    Mutation(
        "one-step draws are not kept",
        "generator",
        "if stage == 1 or torch.rand((), generator=source) < one_step_share:",
        "if stage == 1:",
        "generator::test_places_are_drawn_by_their_shares",
    ),
    Mutation(
        "x0 is converted in bfloat16",
        "generator",
        "noise.float()) / abar.sqrt()",
        "noise.float()).bfloat16().float() / abar.sqrt()",
        "generator::test_x0_is_converted_in_float32_under_autocast",
    ),
    # a step
    Mutation(
        "gradients of micro-batches are summed",
        "student",
        "self.engine.backward(loss / config.accumulation)",
        "self.engine.backward(loss)",
        "student::test_the_students_gradient_is_the_mean_over_the_micro_batches",
    ),
    Mutation(
        "the heads' gradients of micro-batches are summed",
        "student",
        "(verdict.d_loss / config.accumulation).backward()",
        "verdict.d_loss.backward()",
        "student::test_the_heads_gradient_is_the_mean_over_the_micro_batches",
    ),
    Mutation(
        "every micro-batch has the same samples",
        "student",
        "return BatchRandom(self.seed, step, micro,",
        "return BatchRandom(self.seed, step,",
        "student::test_the_students_gradient_is_the_mean_over_the_micro_batches",
    ),
    Mutation(
        "every process has the same samples",
        "student",
        "first=self.engine.rank * batch",
        "first=0",
        "student::test_two_processes_gradients_are_one_processs_with_the_whole_batch",
    ),
    Mutation(
        "the student's gradient stays for the next step",
        "student",
        "        self.optimizer.zero_grad(set_to_none=True)\n",
        "",
        "student::test_a_step_leaves_no_gradient_behind",
    ),
    Mutation(
        "extra updates of the heads are left out",
        "student",
        "for update in range(config.d_updates - 1):",
        "for update in range(0):",
        "student::test_more_updates_of_the_heads_leave_the_student_one",
    ),
    Mutation(
        "heads are renewed in every micro-batch",
        "student",
        "random = self._random(step, micro)",
        "random = self._random(step, micro)\n        self.adversary.pool.refresh(step, generator(micro))",
        "student::test_heads_are_renewed_once_per_step_whatever_the_accumulation",
    ),
    Mutation(
        "the student trains the teacher's own weights",
        "student",
        "copy.deepcopy(init).requires_grad_(True)",
        "init.requires_grad_(True)",
        "student::test_the_student_moves_and_teacher_and_backbone_do_not",
    ),
    Mutation(
        "the student is not clipped",
        "student",
        'config.clip or float("inf")',
        'float("inf")',
        "student::test_the_students_gradient_is_clipped_to_its_norm",
    ),
    Mutation(
        "no warm-up",
        "student",
        "rate = warmup(step, config.warmup_steps)",
        "rate = 1.0",
        "student::test_both_learning_rates_warm_up_and_the_students_falls",
    ),
    Mutation(
        "the average stands still",
        "student",
        "update_ema(self.ema",
        "update_ema({}, {}, 0.0) if True else update_ema(self.ema",
        "student::test_the_average_follows_the_weights",
    ),
    Mutation(
        "the simulated steps and the one that learns share an autocast",
        "student",
        "        with self._autocast():\n            return predict_x0(",
        "            return predict_x0(",
        "student::test_every_weight_learns_at_every_place_under_autocast",
    ),
    Mutation(
        "a state forgets the pool",
        "student",
        '**self.ema, "pool": pool}',
        "**self.ema}",
        "student::test_a_state_holds_everything",
    ),
    Mutation(
        "later stages train one step alone",
        "student",
        "        place = draw_place(config.stage_at(step),",
        "        place = draw_place(1,",
        "student::test_a_stage_learns_at_the_places_it_is_for",
    ),
    # randomness
    Mutation(
        "samples draw from the shared generator",
        "randomness",
        "return torch.stack([draw(one) for one in self.generators])",
        "return torch.stack([draw(self.shared) for one in self.generators])",
        "randomness::test_two_processes_draw_what_one_draws",
    ),
    Mutation(
        "what is shared differs between processes",
        "randomness",
        'self.shared = generator(*name, "shared")',
        'self.shared = generator(*name, "shared", first)',
        "randomness::test_what_is_shared_is_equal_on_every_process",
    ),
    Mutation(
        "a process numbers its samples from zero",
        "randomness",
        "for index in range(first, first + num)]",
        "for index in range(num)]",
        "randomness::test_two_processes_draw_what_one_draws",
    ),
    # the warm-up
    Mutation(
        "the first time sees the noised result",
        "regression",
        "x = torch.where(is_first, sample.noise_B4hw,",
        "x = torch.where(is_first & False, sample.noise_B4hw,",
        "regression::test_the_first_time_sees_the_noise_itself_and_later_ones_the_noised_result",
    ),
    Mutation(
        "later times see the noise that the teacher began with",
        "regression",
        "add_noise(sample.x0_B4hw, fresh, times, self.abar)",
        "add_noise(sample.x0_B4hw, sample.noise_B4hw, times, self.abar)",
        "regression::test_the_first_time_sees_the_noise_itself_and_later_ones_the_noised_result",
    ),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[one.what for one in MUTATIONS])
def test_a_broken_invariant_is_noticed(mutation: Mutation) -> None:
    with _fresh(mutation), pytest.raises(AssertionError):
        _check(mutation.test)()


@pytest.mark.slow
@pytest.mark.parametrize("test", sorted({one.test for one in MUTATIONS}))
def test_nothing_is_noticed_where_nothing_is_broken(test: str) -> None:
    """The same tests in the same surroundings; that they pass in their own files is what every run of the suite shows."""
    with _fresh():
        _check(test)()


@contextmanager
def _fresh(mutation: Mutation | None = None) -> Iterator[None]:
    """`nitro_training` loaded anew, with one module broken; what was loaded before is put back at the end."""
    before = {name: module for name, module in sys.modules.items() if _is_ours(name)}
    for name in before:
        del sys.modules[name]
    try:
        if mutation:
            _load_broken(mutation)
        yield
    finally:
        for name in [name for name in sys.modules if _is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _is_ours(name: str) -> bool:
    return name in ("nitro_training", "tiny_student") or name.startswith("nitro_training.")


def _load_broken(mutation: Mutation) -> None:
    name = f"nitro_training.{mutation.module}"
    spec = importlib.util.find_spec(name)
    assert spec and spec.origin
    source = Path(spec.origin).read_text(encoding="utf-8")
    found = source.count(mutation.old)
    if found != 1:
        pytest.fail(f"{mutation.old!r} occurs {found} times in {spec.origin}: this mutation has to be adapted to new code")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    setattr(sys.modules["nitro_training"], mutation.module, module)
    exec(compile(source.replace(mutation.old, mutation.new), spec.origin, "exec", dont_inherit=True), module.__dict__)


def _check(test: str) -> Callable[[], None]:
    """A test without arguments, from a freshly loaded copy of its file."""
    file, _, function = test.partition("::")
    spec = importlib.util.spec_from_file_location(f"mutated_test_{file}", _TESTS / f"test_{file}.py")
    assert spec and spec.loader
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    check: Callable[[], None] = getattr(module, function)
    return check
