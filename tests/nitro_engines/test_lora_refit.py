"""LoRAs exchanged in loaded engines: always from the base, by the graph's own names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from checkpoints import make_tiny_sdxl
from hand_made import hand_made_bundle
from layouts import kohya_lora, part_tensors, peft_lora
from nitro_engines.lora_refit import FOLDED, PREFIX, LoraRefit, initializer
from nitro_export import checkpoint_sha256, read_checkpoint
from nitro_export.loading import load_part
from nitro_export.stages import DenoiseNetwork, TextStage
from nitro_rt.bundle import Bundle, open_bundle
from nitro_rt.errors import ConfigError, EngineMismatch


class Engines:
    """Takes weights as engines do."""

    def __init__(self) -> None:
        self.weights: dict[str, dict[str, NDArray[Any]]] = {"text": {}, "denoise": {}}

    def refit(self, weights: Mapping[str, Mapping[str, NDArray[Any]]]) -> None:
        for kind, values in weights.items():
            self.weights[kind].update(values)


def without_time_embedding(path: Path) -> Path:
    """The LoRA without its layer of the time embedding, which engines hold as a table."""
    kept = {name: tensor for name, tensor in load_file(path).items() if "time_embed" not in name}
    save_file(kept, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def bundle(checkpoint: Path, tmp_path: Path) -> Bundle:
    opened = open_bundle(hand_made_bundle(tmp_path / "bundle"))
    source = dataclasses.replace(opened.manifest.source, checkpoint_sha256=checkpoint_sha256(checkpoint))
    return dataclasses.replace(opened, manifest=dataclasses.replace(opened.manifest, source=source))


def test_a_then_b_then_a_is_the_same(checkpoint: Path, bundle: Bundle, tmp_path: Path) -> None:
    first = without_time_embedding(peft_lora(checkpoint, tmp_path / "a.safetensors"))
    second = without_time_embedding(kohya_lora(checkpoint, tmp_path / "b.safetensors"))
    refit, engines = LoraRefit(bundle, checkpoint), Engines()
    a = refit.apply(engines, [f"{first}:0.5"])
    with_a = {kind: dict(values) for kind, values in engines.weights.items()}
    b = refit.apply(engines, [str(second), f"{first}:0.25"])
    again = refit.apply(engines, [f"{first}:0.5"])
    assert a.digest == again.digest != b.digest and a.num_weights > 0
    for kind, values in with_a.items():
        assert all(np.array_equal(engines.weights[kind][name], value) for name, value in values.items())
    base = refit.apply(engines, [])
    assert base.digest == refit.apply(engines, []).digest
    for part in PREFIX:
        for name, tensor in part_tensors(checkpoint, part).items():
            held = engines.weights["denoise" if part == "unet" else "text"].get(initializer(part, name))
            assert held is None or np.array_equal(held, tensor.float().numpy()), name
    assert refit.apply(engines, []).num_weights == 0, "nothing differs from the base any more"


def test_the_names_are_the_graphs(checkpoint: Path) -> None:
    """An exported graph's initializers are called as the parameters of the stage that it is made from."""
    opened = read_checkpoint(checkpoint)
    encoders = [load_part(opened, part) for part in ("text_encoder", "text_encoder_2")]
    text = TextStage(*encoders, batch=1, num_tokens=opened.num_tokens)
    network = DenoiseNetwork(load_part(opened, "unet"))
    of_stage = {name for name, _ in text.named_parameters()}
    of_stage |= {f"network.{name}" for name, _ in network.named_parameters() if not name.startswith("_time_mlp.")}
    names = [(part, name) for part in PREFIX for name in part_tensors(checkpoint, part)]
    assert of_stage == {initializer(part, name) for part, name in names if not name.startswith(FOLDED)}
    assert {prefix: part for part, prefix in PREFIX.items() if part != "unet"} == text.parts


def test_another_checkpoint_is_refused(checkpoint: Path, bundle: Bundle, tmp_path: Path) -> None:
    source = dataclasses.replace(bundle.manifest.source, checkpoint_sha256="0" * 64)
    other = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, source=source))
    with pytest.raises(ConfigError, match="is not what .* was built from: its digest is .* give that checkpoint"):
        LoraRefit(other, checkpoint)
    quantised = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, quantisation={"precision": "int8"}))
    with pytest.raises(EngineMismatch, match="quantised weights, which no LoRA is added to; build with --lora"):
        LoraRefit(quantised, checkpoint)


def test_a_refusal_leaves_what_was(checkpoint: Path, bundle: Bundle, tmp_path: Path) -> None:
    whole = peft_lora(checkpoint, tmp_path / "whole.safetensors")
    lora = without_time_embedding(peft_lora(checkpoint, tmp_path / "a.safetensors"))

    class Refusing(Engines):
        def refit(self, weights: Mapping[str, Mapping[str, NDArray[Any]]]) -> None:
            raise EngineMismatch("denoise/1 takes no new weights")

    refit, engines = LoraRefit(bundle, checkpoint), Engines()
    with pytest.raises(EngineMismatch, match="takes no new weights"):
        refit.apply(Refusing(), [str(lora)])
    with pytest.raises(ConfigError, match="changes time_embedding.*, which the engines hold as a table .* build with --lora"):
        refit.apply(engines, [str(whole)])
    assert refit.apply(engines, []).num_weights == 0
