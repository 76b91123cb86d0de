"""NitroFusion's schedule for pipelines that take a scheduler of diffusers, with the benchmark's noise.

Two things differ from diffusers' LCM: the network is told t' = floor(t * shift / T) while fresh noise is mixed in at the
original next time (source: reference scheduler of github.com/ChenDarYen/NitroFusion), and that noise comes from the benchmark's
file. A generator would not do: from the same seed torch draws other numbers in float16 and bfloat16.
"""

from __future__ import annotations

from typing import Any

ORIGINAL_INFERENCE_STEPS = 4
"""The grid has four times; one to four of them are visited."""


def shifted_lcm(config: Any, shift: int) -> Any:
    """A scheduler of diffusers with the checkpoint's own betas.

    Set its `noise` before each image: a torch tensor [steps, B, 4, h, w] in the pipeline's dtype and on its device, of which
    step k mixes in `noise[k + 1]`.

    Args:
        config: of the checkpoint's own scheduler.
        shift: `shifted_timestep` of the checkpoint's run.json.
    """
    from diffusers import LCMScheduler
    from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput

    class ShiftedLCM(LCMScheduler):
        noise: Any
        timesteps: Any

        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.original = self.timesteps
            self.timesteps = self.timesteps * shift // self.config.num_train_timesteps

        def step(self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True) -> Any:
            if self.step_index is None:
                self._init_step_index(timestep)
            following = self.step_index + 1
            told, self.timesteps = self.timesteps, self.original
            try:
                latents, denoised = super().step(model_output, timestep, sample, generator=generator, return_dict=False)
            finally:
                self.timesteps = told
            if following < self.num_inference_steps:
                alpha_bar = self.alphas_cumprod[self.original[following]]
                latents = alpha_bar.sqrt() * denoised + (1 - alpha_bar).sqrt() * self.noise[following]
            return LCMSchedulerOutput(prev_sample=latents, denoised=denoised) if return_dict else (latents, denoised)

    # As a constructor argument: set on the config afterwards it is lost, and 4 steps become 999, 759, ...
    return ShiftedLCM.from_config(config, original_inference_steps=ORIGINAL_INFERENCE_STEPS)
