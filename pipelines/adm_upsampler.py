"""Class-conditional super-resolution by a diffusion model of guided-diffusion (Dhariwal & Nichol 2021, "ADM")."""

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.image_processor import PipelineImageInput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch.nn import functional as F

from .call_arguments import checked_arguments
from .pixel_space import (
    FiniteWatch,
    check_call,
    checked_generator,
    checked_labels,
    image_tensor,
    initial_noise,
    label_tensor,
    reads_variance,
    to_images,
    with_precise_alphas,
)
from .respacing import set_timesteps


class ADMUpsamplerPipeline(DiffusionPipeline):
    r"""Large images from small ones: ancestral sampling of p(x | low_res, class).

    The network sees the noisy image x_t and, on further channels after it, the low-resolution image in [-1, 1],
    enlarged bilinearly (corners not aligned) to the size of x_t.

    Args:
        unet: `UNet2DModel` or one called like it, with twice as many input channels as an image has, and as many
            output channels as an image or, with a learned variance, twice as many; the variance half is dropped for
            schedulers that do not read it.
        scheduler: `DDPMScheduler` for the original's sampler, or another one that walks integer timesteps.

    Raises:
        ValueError: for a network of other channels.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012  diffusers' name and form

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        if unet is not None:
            _check_channels(unet.config.get("in_channels"), unet.config.get("out_channels"))

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current or last call."""
        return self._num_timesteps

    @checked_arguments(but="image")
    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput | str | Path,
        class_labels: int | list[int] | list[list[int]] | torch.Tensor | None = None,
        num_inference_steps: int | str = 250,
        timesteps: list[int] | None = None,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["ADMUpsamplerPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Enlarge images.

        Args:
            image: the small images, one or a batch: PIL; arrays ([batch,] height, width, channels) or tensors
                ([batch,] channels, height, width), uint8 or floating point in [0, 1]; or the path of an `.npz` of
                guided-diffusion, with uint8 images in arr_0 and class labels in arr_1.
            class_labels: class indices, one for all images or one an image (batch,). By default those of the `.npz`.
            num_inference_steps: steps of the schedule, in the scheduler's spacing; or a respacing of guided-diffusion,
                such as "250", "10,10,5" or "ddim25".
            timesteps: the schedule itself, strictly decreasing training timesteps, in place of its length.
            latents: initial noise of unit variance (batch, channels, height, width). Its height and width, which may
                differ from the model's sample_size, are those of the result.
            generator: one for all images, or a list of one an image, whose result then does not depend on the batch.
            output_type: "pil", "np" (batch, height, width, channels) in [0, 1], "pt" (batch, channels, height, width)
                in [0, 1], or "latent", the last x_t as it is.
            return_dict: whether to return an `ImagePipelineOutput` or a tuple of the images.
            callback_on_step_end: called as callback(pipeline, step, timestep, tensors) after each step; what the
                returned dict holds under "latents" replaces the sample.
            callback_on_step_end_tensor_inputs: which tensors the callback sees; "latents" is the sample x_t.

        Raises:
            ValueError: for images of another form, number of channels or range, and for labels or latents that do not
                fit them.
            NotFiniteError: a ValueError, where NaN or infinity comes up, with the step and the sample.
        """
        check_call(self, output_type, callback_on_step_end_tensor_inputs)
        if isinstance(image, str | Path):
            image, class_labels = _read_npz(image, class_labels)
        low_res = image_tensor("image", image, self.unet.config.in_channels // 2)
        batch_size, device = len(low_res), self._execution_device
        generator = checked_generator(generator, batch_size)
        labels = checked_labels(class_labels, self.unet.config.get("num_class_embeds"))
        labels = None if labels is None else label_tensor(labels, batch_size, device)
        set_timesteps(self.scheduler, num_inference_steps, timesteps, device)
        size, dtype = self.unet.config.sample_size, self.unet.dtype
        latents = initial_noise(latents, batch_size, low_res.shape[1], size, generator, device, dtype)
        latents = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        low_res = F.interpolate(low_res * 2 - 1, latents.shape[2:], mode="bilinear", align_corners=False)
        low_res = low_res.to(device, dtype)
        scheduler = with_precise_alphas(self.scheduler)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        self._num_timesteps = len(scheduler.timesteps)
        watch = FiniteWatch(self._num_timesteps)

        for i, t in enumerate(self.progress_bar(scheduler.timesteps)):
            model_input = scheduler.scale_model_input(latents, t).to(dtype)
            model_output = self.unet(torch.cat([model_input, low_res], dim=1), t, class_labels=labels).sample
            if not reads_variance(scheduler):
                model_output = model_output[:, : latents.shape[1]]
            watch.see("the network's output", model_output, i)
            latents = scheduler.step(model_output, t, latents, **extra).prev_sample
            watch.see("the image", latents, i)
            if callback_on_step_end is not None:
                tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                latents = callback_on_step_end(self, i, t, tensors).pop("latents", latents)

        watch.finish()
        images = to_images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _check_channels(taken: int | None, given: int | None) -> None:
    if taken is None or taken % 2 or given not in (taken // 2, taken):
        raise ValueError(
            f"unet is no upsampler: it takes {taken} channels and gives {given}, where an upsampler takes those of a"
            " noisy and of a small image, and gives those of one image or twice as many"
        )


def _read_npz(path: str | Path, class_labels) -> tuple[np.ndarray, object]:
    """Images and, unless others are given, class labels of an `.npz` as guided-diffusion writes it."""
    if not (Path(path).is_file() and Path(path).suffix == ".npz"):
        raise ValueError(f"image={str(path)!r} must be the path of an .npz file, or images")
    with np.load(path, allow_pickle=False) as arrays:
        if "arr_0" not in arrays:
            raise ValueError(f"image={str(path)!r} must hold the images as arr_0, got {sorted(arrays)}")
        if class_labels is None and "arr_1" in arrays:
            class_labels = torch.from_numpy(arrays["arr_1"].astype(np.int64))
        return arrays["arr_0"], class_labels
