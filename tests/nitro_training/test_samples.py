from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import make_tiny_sdxl
from nitro_rt.errors import TrainingError
from nitro_training import checkpoint, samples
from nitro_training.model import predict_noise
from nitro_training.prompts import Prompts
from nitro_training.randomness import BatchRandom, generator
from nitro_training.samples import CachedSamples, LiveSamples, Sample, TeacherSourceConfig, build_cache
from nitro_training.sources import Teacher, load_teacher
from nitro_training.teacher import alphas_cumprod

CPU = torch.device("cpu")
PROMPTS = Prompts(["a red apple", "a cat", "a dog on the house", "a star"])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = make_tiny_sdxl(tmp_path_factory.mktemp("tiny"), size_px=32)
    return load_teacher(config(checkpoint=str(folder)), CPU, torch.float32)


@pytest.fixture(scope="module")
def built(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of ten samples in shards of four."""
    folder = tmp_path_factory.mktemp("cache")
    build_cache(folder, config(), PROMPTS, teacher)
    return folder


@pytest.fixture
def cache(built: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(built, tmp_path / "cache"))


def config(**options: Any) -> TeacherSourceConfig:
    settings = {
        "checkpoint": "unused", "sampler": "lcm", "num_steps": 1, "guidance": 1.0, "cache_samples": 10, "shard_size": 4,
        "batch": 2, **options,
    }  # fmt: skip
    return TeacherSourceConfig(**settings)


def batch(num: int, first: int = 0, step: int = 0) -> BatchRandom:
    return BatchRandom(1, step, 0, first=first, num=num)


def one_step_x0(teacher: Teacher, sample: Sample) -> Tensor:
    """The closed form of one LCM step at 999."""
    times, condition = torch.full((len(sample.noise_B4hw),), 999), sample.condition
    abar = alphas_cumprod()[999]
    with torch.no_grad():
        noise = predict_noise(teacher.unet, sample.noise_B4hw, times, condition.embeds_BTC, condition.pooled_BP)
    return (sample.noise_B4hw - (1 - abar).sqrt() * noise) / abar.sqrt()


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- on the fly ----


def test_live_samples_are_the_teachers_for_their_noise_and_prompts(teacher: Teacher) -> None:
    sample = LiveSamples(config(), PROMPTS, teacher, CPU).draw(batch(3))
    random = batch(3)
    chosen = [PROMPTS[index] for index in random.randint(4).tolist()]
    assert torch.equal(sample.noise_B4hw, random.randn(4, 4, 4))
    embeds, pooled = teacher.text.encode(teacher.text.tokenize(chosen))
    torch.testing.assert_close(sample.condition.embeds_BTC, embeds)
    torch.testing.assert_close(sample.condition.pooled_BP, pooled)
    wanted = one_step_x0(teacher, sample)
    scale = wanted.std()  # about 15: this step divides bfloat16's errors by sqrt(abar) = 0.07
    torch.testing.assert_close(sample.x0_B4hw / scale, wanted / scale, rtol=0, atol=0.05)
    assert sample.x0_B4hw.dtype == torch.float32


def test_two_processes_draw_together_what_one_draws(teacher: Teacher) -> None:
    live = LiveSamples(config(num_steps=2), PROMPTS, teacher, CPU)
    whole, parts = live.draw(batch(4)), [live.draw(batch(2, first)) for first in (0, 2)]
    for get in (lambda s: s.noise_B4hw, lambda s: s.x0_B4hw, lambda s: s.condition.embeds_BTC):  # noqa: E731
        torch.testing.assert_close(torch.cat([get(part) for part in parts]), get(whole), rtol=1e-4, atol=1e-3)


def test_another_step_draws_other_samples(teacher: Teacher) -> None:
    live = LiveSamples(config(), PROMPTS, teacher, CPU)
    one, again, other = live.draw(batch(2)), live.draw(batch(2)), live.draw(batch(2, step=1))
    assert torch.equal(one.x0_B4hw, again.x0_B4hw)
    assert not torch.equal(one.x0_B4hw, other.x0_B4hw)


def test_pictures_of_another_size_are_drawn(teacher: Teacher) -> None:
    assert LiveSamples(config(size_px=64), PROMPTS, teacher, CPU).draw(batch(2)).x0_B4hw.shape == (2, 4, 8, 8)


# ---- the cache ----


def test_a_cached_sample_is_the_teachers_for_its_noise_and_prompt(built: Path, teacher: Teacher) -> None:
    cached = CachedSamples(built, config(), PROMPTS, teacher, CPU)
    sample = cached.at([0, 5, 9])
    wanted = one_step_x0(teacher, sample)
    scale = wanted.std()
    torch.testing.assert_close(sample.x0_B4hw / scale, wanted / scale, rtol=0, atol=0.05)
    assert not torch.allclose(sample.x0_B4hw[0] / scale, wanted[1] / scale, rtol=0, atol=0.05)
    assert (sample.x0_B4hw.dtype, sample.noise_B4hw.dtype) == (torch.float32, torch.float32)
    assert abs(float(cached.at(range(10)).noise_B4hw.std()) - 1) < 0.1


def test_a_draw_is_a_choice_of_cached_samples_by_sample(built: Path, teacher: Teacher) -> None:
    cached = CachedSamples(built, config(), PROMPTS, teacher, CPU)
    drawn = cached.draw(batch(6))
    indices = batch(6).randint(10).tolist()
    assert len(set(indices)) > 2
    assert torch.equal(drawn.x0_B4hw, cached.at(indices).x0_B4hw)
    part = cached.draw(batch(2, first=4))
    assert torch.equal(part.x0_B4hw, drawn.x0_B4hw[4:])
    assert torch.equal(part.noise_B4hw, drawn.noise_B4hw[4:])


def test_the_shards_hold_half_precision_latents_and_prompt_numbers_only(built: Path) -> None:
    assert sorted(contents(built)) == ["00000.safetensors", "00001.safetensors", "00002.safetensors", "cache.json"]
    found = [load_file(built / name) for name in shards(built)]
    assert [tuple(shard["x0"].shape) for shard in found] == [(4, 4, 4, 4), (4, 4, 4, 4), (2, 4, 4, 4)]
    assert {shard["x0"].dtype for shard in found} == {torch.float16}
    assert all(shard.keys() == {"x0", "prompt"} for shard in found)


def test_all_prompts_are_used_before_any_is_used_again(built: Path) -> None:
    numbers = torch.cat([load_file(built / name)["prompt"] for name in shards(built)]).tolist()
    assert [sorted(numbers[first : first + 4]) for first in (0, 4)] == [[0, 1, 2, 3]] * 2
    assert len(set(numbers[8:])) == 2
    assert numbers[:4] != numbers[4:8] or numbers[:4] != [0, 1, 2, 3]


def test_noise_between_steps_follows_from_the_sample_not_the_batch(teacher: Teacher, tmp_path: Path) -> None:
    drawn = []
    for size in (1, 4):
        settings = config(num_steps=2, cache_samples=4, batch=size)
        build_cache(tmp_path / str(size), settings, PROMPTS, teacher)
        drawn.append(CachedSamples(tmp_path / str(size), settings, PROMPTS, teacher, CPU).at(range(4)).x0_B4hw)
    scale = drawn[0].std()
    torch.testing.assert_close(drawn[0] / scale, drawn[1] / scale, rtol=0, atol=0.05)


def test_a_killed_build_goes_on_and_ends_as_an_uninterrupted_one(built: Path, teacher: Teacher, tmp_path: Path) -> None:
    def kill(done: int, total: int) -> None:
        if done >= 6:
            raise KeyboardInterrupt

    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        build_cache(folder, config(), PROMPTS, teacher, report=kill)
    assert shards(folder) == ["00000.safetensors"]
    kept = (folder / "00000.safetensors").stat()
    reports: list[tuple[int, int]] = []
    build_cache(folder, config(), PROMPTS, teacher, report=lambda done, total: reports.append((done, total)))
    assert reports == [(4, 10), (6, 10), (8, 10), (10, 10)]
    now = (folder / "00000.safetensors").stat()
    assert (now.st_ino, now.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
    assert contents(folder) == contents(built)


def test_several_processes_build_what_one_builds(built: Path, teacher: Teacher, tmp_path: Path) -> None:
    totals = {}
    for rank in (1, 0):
        build_cache(
            tmp_path / "two", config(), PROMPTS, teacher, rank=rank, num_processes=2,
            report=lambda done, total, rank=rank: totals.update({rank: (done, total)}),
        )  # fmt: skip
        assert len(shards(tmp_path / "two")) == (1 if rank else 3)
    assert totals == {1: (4, 4), 0: (6, 6)}
    assert contents(tmp_path / "two") == contents(built)


def test_a_complete_cache_is_not_drawn_again(cache: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "sample", None)
    build_cache(cache, config(), PROMPTS, teacher)


def test_a_cache_can_be_made_longer_and_used_shorter(cache: Path, teacher: Teacher) -> None:
    before = CachedSamples(cache, config(), PROMPTS, teacher, CPU).at(range(10)).x0_B4hw
    build_cache(cache, config(cache_samples=15), PROMPTS, teacher)
    longer = CachedSamples(cache, config(cache_samples=15), PROMPTS, teacher, CPU)
    assert torch.equal(longer.at(range(10)).x0_B4hw, before)
    assert longer.at([14]).x0_B4hw.isfinite().all()
    shorter = CachedSamples(cache, config(cache_samples=3), PROMPTS, teacher, CPU)
    assert set(shorter.draw(batch(30)).x0_B4hw.flatten(1).sum(1).tolist()) == set(before[:3].flatten(1).sum(1).tolist())


def test_only_few_shards_are_open_at_once(built: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(samples, "_OPEN_SHARDS", 2)
    cached = CachedSamples(built, config(), PROMPTS, teacher, CPU)
    monkeypatch.setattr(samples, "safe_open", lambda path, framework: opened.append(path) or safe_open(path, framework))
    wanted = CachedSamples(built, config(), PROMPTS, teacher, CPU).at([0, 5, 9, 1]).x0_B4hw
    opened.clear()
    assert torch.equal(cached.at([0, 1, 5, 0, 9, 1]).x0_B4hw[[0, 2, 4, 1]], wanted)
    assert [Path(path).name for path in opened] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    cached.at([5])
    assert (len(opened), len(cached._open)) == (4, 2)


# ---- refusals ----


def changed(teacher: Teacher, **digests: str) -> Teacher:
    return dataclasses.replace(teacher, digests={**teacher.digests, **digests})


@pytest.mark.parametrize(
    ("options", "prompts", "digests", "message"),
    [
        ({"guidance": 4.0}, PROMPTS, {}, "teacher.guidance was 1.0, now 4.0"),
        ({"num_steps": 2}, PROMPTS, {}, "teacher.num_steps was 1, now 2"),
        ({"sampler": "ddim-trailing"}, PROMPTS, {}, "teacher.sampler was lcm, now ddim-trailing"),
        ({"size_px": 64}, PROMPTS, {}, "teacher.size_px was 32, now 64"),
        ({"seed": 5}, PROMPTS, {}, "teacher.seed was 61, now 5"),
        ({"shard_size": 8}, PROMPTS, {}, "teacher.shard_size was 4, now 8"),
        ({}, Prompts(["a cat"]), {}, r"prompts \(SHA-256\) was \w{12}\.\.\., now \w{12}\.\.\."),
        ({}, PROMPTS, {"unet": "0" * 64}, r"unet \(SHA-256\) was \w{12}\.\.\., now 000000000000\.\.\."),
        ({}, PROMPTS, {"vae": "0" * 64}, r"vae \(SHA-256\) was \w{12}\.\.\., now 000000000000\.\.\."),
        ({}, PROMPTS, {"text_encoders": "0" * 64}, r"text_encoders \(SHA-256\) was \w{12}\.\.\., now 000000000000\.\.\."),
        ({}, PROMPTS, {"lora": "f" * 64}, r"lora \(SHA-256\) was none, now ffffffffffff\.\.\."),
        ({"guidance": 4.0, "seed": 5}, PROMPTS, {}, "teacher.guidance was 1.0, now 4.0; teacher.seed was 61, now 5"),
    ],
)
def test_a_cache_of_another_origin_is_refused_with_what_differs(
    cache: Path, teacher: Teacher, options: dict[str, Any], prompts: Prompts, digests: dict[str, str], message: str
) -> None:
    before = contents(cache)
    for use in (lambda *given: build_cache(cache, *given), lambda *given: CachedSamples(cache, *given, CPU)):
        with pytest.raises(TrainingError, match=f"made with other options: {message}; use the options") as error:
            use(config(**options), prompts, changed(teacher, **digests))
        assert "\n" not in str(error.value)
    assert contents(cache) == before


def test_batch_and_place_may_change(cache: Path, teacher: Teacher) -> None:
    build_cache(cache, config(batch=5, cache=str(cache)), PROMPTS, teacher)


def test_missing_shards_are_named(cache: Path, teacher: Teacher) -> None:
    (cache / "00001.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"lacks 1 of 3 shards, first 00001\.safetensors; start again"):
        CachedSamples(cache, config(), PROMPTS, teacher, CPU)
    build_cache(cache, config(), PROMPTS, teacher)
    CachedSamples(cache, config(), PROMPTS, teacher, CPU)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def clear(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [cut, clear])
def test_damaged_shards_are_named(cache: Path, teacher: Teacher, spoil: Callable[[Path], None]) -> None:
    spoil(cache / "00001.safetensors")
    with pytest.raises(TrainingError, match=r"00001\.safetensors cannot be read: .*remove it and start again"):
        CachedSamples(cache, config(), PROMPTS, teacher, CPU)
    with pytest.raises(TrainingError, match=r"00001\.safetensors cannot be read"):
        build_cache(cache, config(), PROMPTS, teacher)


def test_a_shard_that_vanishes_during_a_run_is_named(cache: Path, teacher: Teacher) -> None:
    cached = CachedSamples(cache, config(), PROMPTS, teacher, CPU)
    (cache / "00002.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"00002\.safetensors cannot be read"):
        cached.at([9])


def test_a_shard_of_another_cache_is_named(cache: Path, teacher: Teacher) -> None:
    shutil.copy(cache / "00000.safetensors", cache / "00001.safetensors")
    with pytest.raises(TrainingError, match=r"00001\.safetensors belongs to another cache; remove it"):
        build_cache(cache, config(), PROMPTS, teacher)


@pytest.mark.parametrize("content", ["{", "[]", '{"schema_version": 1}'])
def test_a_damaged_manifest_is_named(cache: Path, teacher: Teacher, content: str) -> None:
    (cache / "cache.json").write_text(content)
    with pytest.raises(TrainingError, match=r"cache\.json is damaged .*remove the folder"):
        build_cache(cache, config(), PROMPTS, teacher)


def test_a_cache_of_another_version_is_refused(cache: Path, teacher: Teacher) -> None:
    manifest = json.loads((cache / "cache.json").read_text())
    (cache / "cache.json").write_text(json.dumps({**manifest, "schema_version": 9}))
    with pytest.raises(TrainingError, match=r"cache\.json has version 9, this nitro-rt reads 1"):
        build_cache(cache, config(), PROMPTS, teacher)


def test_no_cache_at_all_is_said(tmp_path: Path, teacher: Teacher) -> None:
    with pytest.raises(TrainingError, match=r"there is no cache at .*cache\.json is missing"):
        CachedSamples(tmp_path, config(), PROMPTS, teacher, CPU)


def test_too_little_space_is_said_before_anything_is_drawn(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10 * 4 * 4 * 4 * 2 - 1))
    monkeypatch.setattr(samples, "sample", None)
    with pytest.raises(TrainingError, match=r"needs 0\.00 GiB more in .*make room, name another folder in teacher\.cache"):
        build_cache(tmp_path, config(), PROMPTS, teacher)


def test_space_that_runs_out_keeps_what_is_there(teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file = checkpoint.save_file

    def full(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
        if "00001" in path:
            Path(path).write_bytes(b"half a fi")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TrainingError, match=r"cannot write .*00001\.safetensors: .*No space left"):
        build_cache(tmp_path, config(), PROMPTS, teacher)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.safetensors", "cache.json"]
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    build_cache(tmp_path, config(), PROMPTS, teacher)
    assert len(shards(tmp_path)) == 3


def test_a_folder_that_cannot_be_written_is_said(teacher: Teacher, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"cannot write .*cache\.json: .*name another folder in teacher\.cache"):
        build_cache(tmp_path / "file", config(), PROMPTS, teacher)


def test_a_teacher_that_gives_no_numbers_is_stopped(teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(unet: Any, embeds: Tensor, pooled: Tensor, noise: Tensor, **_: Any) -> Tensor:
        return torch.where(torch.arange(len(noise)).view(-1, 1, 1, 1) == 1, 1e6, noise)  # too large for float16

    monkeypatch.setattr(samples, "sample", broken)
    with pytest.raises(TrainingError, match=r"the teacher's sample 1 \(prompt '.*'\) is not finite in float16"):
        build_cache(tmp_path, config(), PROMPTS, teacher)
    assert shards(tmp_path) == []


def test_cached_noise_has_names_of_its_own() -> None:
    assert torch.equal(samples.start_noise(61, 3, 4), torch.randn(4, 4, 4, generator=generator(61, "noise", 3)))
    assert not torch.equal(samples.start_noise(61, 3, 4), samples.start_noise(61, 4, 4))
