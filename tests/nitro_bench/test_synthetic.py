from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from nitro_bench import synthetic
from nitro_bench._clip_vocabulary import write_clip_tokenizer
from nitro_bench._draw import shifted_scheduler
from nitro_bench.lean import psnr_db
from nitro_bench.synthetic import make_sdxl
from nitro_export import checkpoint_sha256, read_checkpoint
from nitro_rt.errors import ConfigError

# SDXL base 1.0's own counts, from its model files.
FULL = {"text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "unet": 2_567_463_684, "vae": 83_653_863}
RED, BLUE = "a red apple on the table", "blue cat"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In shards of 1 MB, and tensors in parts of 1000 numbers, so that both ways are gone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "SHARD_BYTES", 10**6)
        patch.setattr(synthetic, "PART_NUMBERS", 1000)
        return make_sdxl(tmp_path_factory.mktemp("synthetic") / "tiny", size="tiny", report=lambda line: None)


@pytest.fixture(scope="module")
def draw(tiny: Path):
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny, dtype=torch.float32, add_watermarker=False)
    pipe.scheduler = shifted_scheduler(pipe.scheduler.config, synthetic.SHIFT)
    pipe.set_progress_bar_config(disable=True)

    def image(prompt: str, seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        size = {"height": 64, "width": 64}
        drawn = pipe(prompt, num_inference_steps=1, guidance_scale=0.0, generator=generator, output_type="np", **size)
        assert np.isfinite(drawn.images).all()
        return np.round(drawn.images[0] * 255).astype(np.uint8)

    return image


def test_full_size_is_sdxls() -> None:
    parts = synthetic._parts(synthetic._configs("full"), torch.float16)
    assert {part.name: part.num_bytes // 2 for part in parts} == FULL
    for part in parts[:2]:
        assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in part.specs


def test_half_size_has_the_depths_of_full() -> None:
    full, half = (synthetic._parts(synthetic._configs(size), torch.float16) for size in ("full", "half"))
    for whole, cut in zip(full, half, strict=True):
        assert list(whole.specs) == list(cut.specs)


def test_images_are_natural_and_the_prompt_and_the_seed_matter(draw) -> None:
    image, other_prompt, other_seed = draw(RED, 7), draw(BLUE, 7), draw(RED, 8)
    assert image.std() > 20
    assert ((image == 0) | (image == 255)).mean() < 0.1
    assert np.array_equal(image, draw(RED, 7))
    assert 15 < psnr_db(other_prompt, image) < 35  # 28.1 measured
    assert psnr_db(other_seed, image) < 20  # 12.1 measured


def test_it_is_a_checkpoint_that_can_be_exported(tiny: Path) -> None:
    checkpoint = read_checkpoint(tiny)
    assert (checkpoint.native_size_px, checkpoint.run["shifted_timestep"], checkpoint.run["licence"]) == (64, 250, "CC0-1.0")
    assert len(list((tiny / "unet").glob("*.safetensors"))) > 1


def test_equal_seeds_write_equal_bytes_and_other_seeds_do_not(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(synthetic, "SHARD_BYTES", 10**6)
    again = make_sdxl(tmp_path / "again", size="tiny", report=lambda line: None)
    other = make_sdxl(tmp_path / "other", size="tiny", seed=1, report=lambda line: None)
    files = sorted(path.relative_to(tiny) for path in tiny.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((tiny / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert checkpoint_sha256(other) != checkpoint_sha256(tiny)


def test_number_types(tmp_path: Path) -> None:
    halves = [synthetic._parts(synthetic._configs("tiny"), dtype) for dtype in (torch.float16, torch.float32)]
    sizes = [sum(part.num_bytes for part in parts) for parts in halves]
    assert sizes[1] == 2 * sizes[0]


def test_what_is_there_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(ConfigError, match="there already"):
        make_sdxl(tmp_path / "here", size="tiny")
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("wrong", [{"size": "huge"}, {"dtype": "int8"}])
def test_wrong_arguments_name_what_there_is(tmp_path: Path, wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="available: f"):
        make_sdxl(tmp_path / "out", **wrong)


def test_a_failed_run_leaves_nothing_and_a_killed_ones_remains_are_removed(tmp_path: Path, monkeypatch) -> None:
    remains = tmp_path / ".out.partial"
    (remains / "unet").mkdir(parents=True)
    (remains / "unet" / "cut.safetensors").write_bytes(b"cut")
    monkeypatch.setattr(synthetic, "_write_part", _fail_at_the_unet(synthetic._write_part))
    with pytest.raises(KeyboardInterrupt):
        make_sdxl(tmp_path / "out", size="tiny", report=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def _fail_at_the_unet(write):
    def fail(folder: Path, part: synthetic.Part, seed: int) -> None:
        assert not (folder.parent / "unet").exists()
        if part.name == "unet":
            raise KeyboardInterrupt
        write(folder, part, seed)

    return fail


def test_vocabulary_of_clips_size(tmp_path: Path) -> None:
    write_clip_tokenizer(tmp_path / "tokenizer", vocab_size=49408, num_tokens=77, pad="!")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == 49408
    ids = tokenizer("a red apple, 2 PIES é", padding="max_length").input_ids
    assert (len(ids), ids[0], max(ids), ids[-1]) == (77, 49406, 49407, tokenizer.convert_tokens_to_ids("!"))
    assert tokenizer.decode(ids, skip_special_tokens=True).strip("! ") == "a red apple , 2 pies é"


def test_a_vocabulary_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="from 514 to"):
        write_clip_tokenizer(tmp_path / "small", vocab_size=300, num_tokens=77)
