"""The three stages of a bundle as torch modules, with everything that is constant folded in.

Shapes: B batch, T tokens, C text channels, P pooled channels, h and w latents, H and W pixels, N steps, D channels of
the time embedding, E channels of the size embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nitro_export.checkpoint import NUM_TIME_IDS
from nitro_rt.manifest import TensorSpec
from nitro_rt.schedule import StepSchedule


class Stage(nn.Module):
    """What the exporter and the parity check need of a stage."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parts: dict[str, str]
    """Prefix of this module's parameter names -> the checkpoint's part that they come from."""

    def narrow(self, dtype: torch.dtype) -> None:
        """Let the network compute in float16 or bfloat16 from now on.

        With float16 `inputs` and `outputs` change accordingly; with bfloat16, which NumPy has not, they stay float32.
        """
        raise NotImplementedError


class TextStage(Stage):
    """Both text encoders: token ids to what the UNet is conditioned on, as StableDiffusionXLPipeline.encode_prompt."""

    def __init__(self, encoder: Any, encoder_2: Any, *, batch: int, num_tokens: int) -> None:
        super().__init__()
        self.encoder, self.encoder_2 = encoder, encoder_2
        width: int = encoder.config.hidden_size + encoder_2.config.hidden_size
        ids = (batch, num_tokens)
        self.parts = {"encoder.": "text_encoder", "encoder_2.": "text_encoder_2"}
        self.inputs = (_spec("input_ids", "int64", *ids), _spec("input_ids_2", "int64", *ids))
        self.outputs = (
            _spec("prompt_embeds", "float32", *ids, width),
            _spec("pooled_prompt_embeds", "float32", batch, encoder_2.config.projection_dim),
        )

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Two [B, T] int64 to [B, T, C] and [B, P]; SDXL reads the hidden states before the last layer."""
        first = self.encoder(input_ids, output_hidden_states=True)
        second = self.encoder_2(input_ids_2, output_hidden_states=True)
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        as_said = getattr(torch, self.outputs[0].dtype)
        return embeds.to(as_said), second.text_embeds.to(as_said)

    def narrow(self, dtype: torch.dtype) -> None:
        self.to(dtype)
        if dtype == torch.float16:
            self.outputs = _as_float16(self.outputs, *(spec.name for spec in self.outputs))


class DenoiseNetwork(nn.Module):
    """The UNet with its time and size embeddings given instead of computed; made once, shared by all step counts."""

    unet: Any

    def __init__(self, unet: Any) -> None:
        """Takes `unet` over and changes it."""
        super().__init__()
        self._time_proj, self._time_mlp, self._size_proj = unet.time_proj, unet.time_embedding, unet.add_time_proj
        # The UNet's forward asks these two hooks for its embeddings; the rest of it stays diffusers' own.
        unet.get_time_embed = lambda sample, timestep: timestep
        unet.get_aug_embed = lambda emb, encoder_hidden_states, added_cond_kwargs: added_cond_kwargs["embedding"]
        unet.time_embedding = _Given()
        self.unet = unet

    def time_embedding(self, timesteps: tuple[int, ...]) -> Tensor:
        """[N, D] float32: what the UNet adds to every block at each time. Call it before `narrow`."""
        return self._time_mlp(self._time_proj(torch.tensor(timesteps)))

    def size_embedding(self, size_px: int) -> Tensor:
        """[1, E] float32 of (size, size, 0, 0, size, size)."""
        sizes = torch.tensor([size_px, size_px, 0, 0, size_px, size_px], dtype=torch.float32)
        assert len(sizes) == NUM_TIME_IDS
        return self._size_proj(sizes).reshape(1, -1)

    def forward(self, latents: Tensor, prompt_embeds: Tensor, pooled: Tensor, time_BD: Tensor, size_BE: Tensor) -> Tensor:
        embedding = self.unet.add_embedding(torch.cat([pooled, size_BE], dim=-1))
        added = {"embedding": embedding}
        return self.unet(latents, time_BD, prompt_embeds, added_cond_kwargs=added, return_dict=False)[0]


class DenoiseStage(Stage):
    """One step of the shifted LCM schedule (nitro_rt.schedule), chosen by `step_index`."""

    network: DenoiseNetwork
    time_embedding_ND: Tensor
    size_embedding_1E: Tensor
    alpha_N: Tensor
    sigma_N: Tensor
    next_alpha_N: Tensor
    next_sigma_N: Tensor

    def __init__(
        self, network: DenoiseNetwork, schedule: StepSchedule, *, size_px: int, latent_size: int, batch: int, num_tokens: int
    ) -> None:
        super().__init__()
        self.network = network
        self.parts = {"network.unet.": "unet"}
        self.dtype = torch.float32
        # Told and converted at t', mixed at the original next time.
        self.register_buffer("time_embedding_ND", network.time_embedding(schedule.shifted_timesteps))
        self.register_buffer("size_embedding_1E", network.size_embedding(size_px))
        for name in ("alpha", "sigma", "next_alpha", "next_sigma"):
            self.register_buffer(f"{name}_N", torch.tensor(getattr(schedule, name), dtype=torch.float32))
        config = network.unet.config
        pooled = config.projection_class_embeddings_input_dim - NUM_TIME_IDS * config.addition_time_embed_dim
        latents = (batch, config.in_channels, latent_size, latent_size)
        self.inputs = (
            _spec("latents", "float32", *latents),
            _spec("prompt_embeds", "float32", batch, num_tokens, config.cross_attention_dim),
            _spec("pooled_prompt_embeds", "float32", batch, pooled),
            _spec("step_index", "int64", 1),
            _spec("noise", "float32", *latents),
        )
        self.outputs = (_spec("next_latents", "float32", *latents),)

    def forward(
        self, latents: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, step_index: Tensor, noise: Tensor
    ) -> Tensor:
        """Latents [B, 4, h, w] at one time to those at the next, float32; the network computes in `self.dtype`.

        The last step mixes with next_alpha 1 and next_sigma 0, so its result is x0 whatever the noise.
        """
        batch = latents.shape[0]
        # index_select, not [step_index]: it becomes one plain Gather of a table that keeps its name in the graph.
        time_BD = self.time_embedding_ND.index_select(0, step_index).expand(batch, -1)
        size_BE = self.size_embedding_1E.expand(batch, -1)
        given = (latents, prompt_embeds, pooled_prompt_embeds)
        eps = self.network(*(tensor.to(self.dtype) for tensor in given), time_BD, size_BE).to(torch.float32)
        alpha, sigma, next_alpha, next_sigma = (
            table.index_select(0, step_index).view(1, 1, 1, 1)
            for table in (self.alpha_N, self.sigma_N, self.next_alpha_N, self.next_sigma_N)
        )
        x0 = (latents - sigma * eps) / alpha
        return next_alpha * x0 + next_sigma * noise

    def narrow(self, dtype: torch.dtype) -> None:
        # The tables are rounded once, here: SDXL's float32 size embedding must not meet float16 text in one Concat.
        self.network.to(dtype)
        self.dtype = dtype
        self.time_embedding_ND, self.size_embedding_1E = self.time_embedding_ND.to(dtype), self.size_embedding_1E.to(dtype)
        if dtype == torch.float16:
            self.inputs = _as_float16(self.inputs, "prompt_embeds", "pooled_prompt_embeds")


class DecodeStage(Stage):
    """The VAE's decoder, from the UNet's latents to the bytes of the images."""

    vae: Any
    scale: Tensor
    shift: Tensor

    def __init__(self, vae: Any, *, latent_size: int, size_px: int, batch: int) -> None:
        super().__init__()
        self.vae = vae
        self.parts = {"vae.": "vae"}
        self.dtype = torch.float32
        scale, shift = latent_scale_and_shift(vae.config)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.inputs = (_spec("latents", "float32", batch, vae.config.latent_channels, latent_size, latent_size),)
        self.outputs = (_spec("images", "uint8", batch, size_px, size_px, vae.config.out_channels),)

    def levels(self, latents: Tensor) -> Tensor:
        """[B, 4, h, w] to [B, H, W, 3] float32 in 0..255, not rounded: here a NaN is still one."""
        pixels = self.vae.decode((latents * self.scale + self.shift).to(self.dtype), return_dict=False)[0].to(torch.float32)
        return (pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255

    def forward(self, latents: Tensor) -> Tensor:
        """[B, 4, h, w] float32 to [B, H, W, 3] uint8. The cast comes last: TensorRT has uint8 as an output only."""
        return self.levels(latents).round().to(torch.uint8)

    def narrow(self, dtype: torch.dtype) -> None:
        nn.Module.to(self.vae, dtype)  # diffusers' own warns of layers to keep in float32, of which a VAE has none
        self.dtype = dtype


def latent_scale_and_shift(config: Any) -> tuple[Tensor, Tensor]:
    """What turns the UNet's latents into the decoder's, each [1, 4 or 1, 1, 1]: latents * scale + shift.

    As diffusers' SDXL pipeline: latents_mean and latents_std where the config has both; and its shift_factor, which
    that pipeline does not know (SDXL's own VAEs have none).
    """
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    both = mean is not None and std is not None
    scale = torch.tensor(std if both else [1.0], dtype=torch.float64) / config.scaling_factor
    shift = torch.tensor(mean if both else [0.0], dtype=torch.float64) + (getattr(config, "shift_factor", None) or 0.0)
    return scale.to(torch.float32).view(1, -1, 1, 1), shift.to(torch.float32).view(1, -1, 1, 1)


class _Given(nn.Module):
    def forward(self, embedding: Tensor, condition: Tensor | None = None) -> Tensor:
        return embedding


def _spec(name: str, dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def _as_float16(specs: tuple[TensorSpec, ...], *names: str) -> tuple[TensorSpec, ...]:
    return tuple(_spec(spec.name, "float16", *spec.shape) if spec.name in names else spec for spec in specs)
