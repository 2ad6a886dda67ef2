"""Class-conditional images with EDM2 networks, the Heun sampler and guidance in an interval of noise levels.

EDM2: Karras et al., CVPR 2024, arXiv 2312.02696.
Guidance interval: Kynkäänniemi et al., NeurIPS 2024, arXiv 2404.07724.
Autoguidance: Karras et al., NeurIPS 2024, arXiv 2406.02507.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .call_arguments import checked_arguments, is_of_kind, short
from .interval import Interval, StepStart
from .pixel_space import (
    FiniteWatch,
    as_output,
    check_call,
    check_count,
    checked_decoding,
    checked_generator,
    checked_labels,
    initial_noise,
    label_tensor,
    number_of_images,
)

# Of ImageNet-512, a number for each channel of the VAE.
EDM2_LATENT_SCALE = [0.11990407, 0.10822511, 0.13477089, 0.15243903]
EDM2_LATENT_BIAS = [-0.69664264, -0.3517316, -0.016172506, 0.32774392]


class EDM2Pipeline(DiffusionPipeline):
    r"""Samples of an EDM2 network, guided by a second network at noise levels in (sigma_lo, sigma_hi].

    .. math:: D = D_{guide}(x; \sigma) + w (D(x; \sigma, c) - D_{guide}(x; \sigma)), \quad
        w = w_0 \text{ if } \sigma_{lo} < \sigma_i \le \sigma_{hi}, \text{ else } 1

    w is decided once a step, from the level sigma_i at which the step starts, for both evaluations of the step. At
    w = 1 only the conditional network runs: that is the saving. The state is float64.

    unet: `EDM2UNet2DModel`, or a network with its `img_resolution`, `img_channels` and `label_dim` in the config and
        called like it, `unet(x, sigma, class_labels=...).sample`, which returns the denoised sample.
    scheduler: `EDMHeunScheduler`.
    vae: decodes latents; None for a network of pixels in [-1, 1], or to sample latents alone.
    guidance_unet: a network of the same shape of samples: unconditional (label_dim 0) for classifier-free guidance, or
        conditional, smaller or less trained, for autoguidance.
    latent_scale, latent_bias: what training latents were made with, one number a channel: encoded * scale + bias. The
        defaults are those of EDM2 on ImageNet-512: `stabilityai/sd-vae-ft-mse`, fed with pixels in [0, 1].

    Raises ValueError for scales that are not finite or 0.
    """

    model_cpu_offload_seq = "unet->guidance_unet->vae"
    _optional_components = ["vae", "guidance_unet"]  # noqa: RUF012  diffusers' names and forms
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        guidance_unet: ModelMixin | None = None,
        latent_scale: list[float] = EDM2_LATENT_SCALE,
        latent_bias: list[float] = EDM2_LATENT_BIAS,
    ):
        super().__init__()
        for name, values in (("latent_scale", latent_scale), ("latent_bias", latent_bias)):
            if not is_of_kind(values, list[float]) or not all(map(math.isfinite, values)):
                raise ValueError(f"{name} must be a list of finite numbers, got {short(values)}")
        if 0 in latent_scale:
            raise ValueError(f"latent_scale must not be 0, by which latents are divided, got {short(latent_scale)}")
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, guidance_unet=guidance_unet)
        self.register_to_config(latent_scale=list(latent_scale), latent_bias=list(latent_bias))

    @property
    def guidance_scale(self) -> float:
        """Guidance weight of the current or last call; 1 is off."""
        return self._guidance_scale

    @property
    def guided_steps(self) -> list[int]:
        """Indices of the steps, from 0 for the noisiest, in which the current or last call guides."""
        return list(self._guided_steps)

    @property
    def num_evaluations(self) -> dict[str, int]:
        """How often the current or last call ran each network, {"unet": 63, "guidance_unet": 12}."""
        return dict(self._num_evaluations)

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current or last call, of two evaluations each but the last."""
        return self._num_timesteps

    @checked_arguments(but="guidance_scale")
    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | list[list[float]] | torch.Tensor | None = None,
        batch_size: int | None = None,
        num_inference_steps: int = 32,
        sigmas: list[float] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guided_steps: tuple[int, int] | None = None,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        decode_batch_size: int | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callable[["EDM2Pipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""Generate images.

        Args:
            class_labels: class indices, one for all images or one an image; or rows of labels, (batch, label_dim) or
                (1, label_dim). None samples without a label (EDM2's conditional networks are not trained for that).
            batch_size: number of images; by default as many as `class_labels` or `latents`, or 1.
            num_inference_steps: n steps of the scheduler's own schedule; 2n - 1 evaluations.
            sigmas: the schedule itself, strictly decreasing noise levels, in place of its length.
            guidance_scale: w_0; 1 is off, and `guidance_unet` then never runs.
            guidance_interval: (sigma_lo, sigma_hi), noise levels: guide in steps that start in (sigma_lo, sigma_hi].
                Published bounds are rounded, so that a step may lie just beside one: see `guided_steps` afterwards.
            guided_steps: (first, last), the same as indices of steps, both included. Neither: guide in every step.
            latents: initial noise of unit variance, (batch, img_channels, height, width).
            generator: one for all images, or a list of one an image, whose result then does not depend on the batch.
            output_type: "pil", "np" (batch, height, width, channels) in [0, 1], "pt" (batch, channels, height, width)
                in [0, 1], or "latent": the sample itself, float32.
            decode_batch_size: how many latents the VAE decodes at once; by default all of them. 512 x 512 pixels take
                far more memory in the VAE than in the network.
            return_dict: whether to return an `ImagePipelineOutput` or a tuple of the images.
            callback_on_step_end: called as callback(pipeline, step, sigma, tensors) after each step, with the level
                at which the step started; what the returned dict holds under "latents" replaces the sample.
            callback_on_step_end_tensor_inputs: which tensors the callback sees; "latents" is x, not scaled.

        Raises ValueError for arguments out of range or at odds with the networks; the message says what to do.
        NotFiniteError, a ValueError, where NaN or infinity comes up, with the step and the sample.
        Warns if the interval has no step, or every step.
        """
        self._guidance_scale = guidance_scale
        self._check_inputs(batch_size, guidance_scale, output_type, callback_on_step_end_tensor_inputs)
        check_count("decode_batch_size", decode_batch_size)
        device = self._execution_device
        labels = self._label_tensor(class_labels)
        batch_size = number_of_images(batch_size, labels, latents)
        generator = checked_generator(generator, batch_size)
        labels = None if labels is None else label_tensor(labels, batch_size, device)
        if sigmas is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        edges = self.scheduler.sigmas.tolist()
        self._num_timesteps = len(edges) - 1
        self._guided_steps = self._steps_to_guide(edges, guidance_interval, guided_steps)
        self._num_evaluations = {"unet": 0, "guidance_unet": 0}

        x = self._initial_sample(batch_size, latents, generator, device)
        watch = FiniteWatch(self._num_timesteps)
        with self._constant_weights(), self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, sigma_next in enumerate(edges[1:]):
                guide = i in self._guided_steps
                x, sigma_hat = self.scheduler.churn(x, generator=generator)
                x = self.scheduler.step(self._denoise(x, sigma_hat, labels, guide), sigma_hat, x).prev_sample
                if sigma_next > 0:
                    x = self.scheduler.step(self._denoise(x, sigma_next, labels, guide), sigma_next, x).prev_sample
                watch.see("the image", x, i)
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, x)
                    x = callback_on_step_end(self, i, self.scheduler.sigmas[i], tensors).pop("latents", x)
                progress_bar.update()

        watch.finish()
        x = x.to(torch.float32)
        images = x if output_type == "latent" else as_output(self.decode(x, decode_batch_size), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @contextmanager
    def _constant_weights(self) -> Iterator[None]:
        """Where EDM2 networks normalise their weights once for the whole call. Others are left as they are."""
        with ExitStack() as stack:
            for network in (self.unet, self.guidance_unet):
                if hasattr(network, "constant_weights"):
                    stack.enter_context(network.constant_weights())
            yield

    def _denoise(self, x: torch.Tensor, sigma: float, labels: torch.Tensor | None, guide: bool) -> torch.Tensor:
        """D, in the dtype of x."""
        level = torch.full((1,), sigma, dtype=torch.float32, device=x.device)
        denoised = self.unet(x, level, class_labels=labels).sample.to(x.dtype)
        self._num_evaluations["unet"] += 1
        if not guide:
            return denoised
        guide_labels = labels if self.guidance_unet.config.label_dim else None
        reference = self.guidance_unet(x, level, class_labels=guide_labels).sample.to(x.dtype)
        self._num_evaluations["guidance_unet"] += 1
        return reference.lerp(denoised, self._guidance_scale)

    def _steps_to_guide(self, edges: list[float], guidance_interval, guided_steps) -> range:
        """The steps in which to guide, as consecutive indices; `edges` are the n + 1 noise levels."""
        count = len(edges) - 1
        if guidance_interval is None and guided_steps is None:
            return range(count if self._guidance_scale != 1 else 0)
        interval = Interval(guided_steps=guided_steps, guidance_interval=guidance_interval)
        name = type(self.scheduler).__name__
        inside = [i for i, sigma in enumerate(edges[:-1]) if StepStart(i, count, sigma, name) in interval]
        guided = range(inside[0], inside[-1] + 1) if inside else range(0)
        if self._guidance_scale == 1:
            return range(0)
        if not guided:
            listed = ", ".join(f"{sigma:.4g}" for sigma in edges[:-1])
            warnings.warn(
                f"guidance_interval={guidance_interval} has none of the noise levels {listed}: no step is guided."
            )
        if len(guided) == count:
            warnings.warn(f"The guidance interval has all of the {count} steps: this is guidance without interval.")
        return guided

    def _initial_sample(self, batch_size: int, latents, generator, device: torch.device) -> torch.Tensor:
        """Unit noise times the first noise level, in the dtype of the scheduler's state."""
        channels, size = self.unet.config.img_channels, self.unet.config.img_resolution
        noise = initial_noise(latents, batch_size, channels, size, generator, device, torch.float32)
        return noise.to(device, self.scheduler.state_dtype(device)) * self.scheduler.init_noise_sigma

    @checked_arguments
    @torch.no_grad()
    def decode(self, latents: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
        """Images (batch, channels, height, width) float32 in [0, 1] of samples as `output_type="latent"` gives them.

        Latents are taken back to the VAE's own scale, (latents - latent_bias) / latent_scale, and the VAE's output is
        in [0, 1] already. Without a VAE the sample is an image in [-1, 1]. batch_size: how many go through the VAE at
        once; None for all.

        Raises ValueError for latents without a VAE, numbers of channels that do not fit, a batch size below 1, and
        images that are not finite.
        """
        check_count("batch_size", batch_size)
        if latents.ndim != 4 or latents.shape[1] != self.unet.config.img_channels:
            channels = self.unet.config.img_channels
            raise ValueError(f"latents must be (batch, {channels}, height, width), got {tuple(latents.shape)}")
        self._check_decodable()
        if self.vae is None:
            return (latents.to(torch.float32) / 2 + 0.5).clamp(0, 1)
        scale, bias = (
            torch.tensor(values, dtype=torch.float32, device=latents.device).reshape(1, -1, 1, 1)
            for values in (self.config.latent_scale, self.config.latent_bias)
        )
        raw = ((latents.to(torch.float32) - bias) / scale).to(self.vae.dtype)
        parts = [self.vae.decode(part).sample.to(torch.float32) for part in raw.split(batch_size or len(raw))]
        return checked_decoding(torch.cat(parts)).clamp(0, 1)

    def _check_decodable(self) -> None:
        channels = self.unet.config.img_channels
        if self.vae is None and channels not in (1, 3):
            raise ValueError(
                f"The network makes latents of {channels} channels and the pipeline has no vae: pass"
                " output_type='latent', or build it with vae=AutoencoderKL.from_pretrained(...)."
            )
        scale, bias = self.config.latent_scale, self.config.latent_bias
        if self.vae is not None and not len(scale) == len(bias) == channels:
            raise ValueError(
                f"latent_scale={scale} and latent_bias={bias} must have one number for each of the {channels}"
                " channels: build the pipeline with the ones of training."
            )

    def _check_inputs(self, batch_size, guidance_scale, output_type, callback_tensors) -> None:
        if not hasattr(self.scheduler, "churn"):
            raise ValueError(
                f"scheduler is a {type(self.scheduler).__name__}, but the sampler is Algorithm 2 of EDM; use an"
                " EDMHeunScheduler."
            )
        check_call(self, output_type, callback_tensors)
        check_count("batch_size", batch_size)
        if output_type != "latent":
            self._check_decodable()
        if not (is_of_kind(guidance_scale, float) and math.isfinite(guidance_scale)):
            raise ValueError(f"guidance_scale must be a finite number, got {short(guidance_scale)}; 1 is off")
        if guidance_scale != 1:
            self._check_guidance_unet(guidance_scale)

    def _check_guidance_unet(self, guidance_scale) -> None:
        if self.guidance_unet is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs a second network: build the pipeline with guidance_unet=, an"
                " unconditional one (classifier-free guidance) or a weaker conditional one (autoguidance)."
            )
        own, other = self.unet.config, self.guidance_unet.config
        if other.img_channels != own.img_channels or other.label_dim not in (0, own.label_dim):
            raise ValueError(
                f"guidance_unet has {other.img_channels} channels and {other.label_dim} classes, unet"
                f" {own.img_channels} and {own.label_dim}: the channels must be equal, the classes equal or 0."
            )

    def _label_tensor(self, class_labels) -> torch.Tensor | None:
        """Labels as indices (1 or batch,) or rows (1 or batch, label_dim); None for none."""
        classes = self.unet.config.label_dim
        if class_labels is None:
            return None
        rows = torch.as_tensor(class_labels)
        if not classes or rows.ndim != 2 or rows.shape[1] == 1 < classes:
            return torch.tensor(checked_labels(class_labels, classes or None))
        if rows.shape[1] != classes:
            raise ValueError(f"class_labels as rows must have {classes} numbers each, got {rows.shape[1]}")
        return rows.to(torch.float32)  # as the network takes them; a Mac's device would refuse float64
