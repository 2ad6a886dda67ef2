"""Minority samples from a pixel-space diffusion model by Boost-and-Skip (Um, Kim, Ye, ICML 2025, arXiv 2502.06516)."""

import inspect
import math
from collections.abc import Callable
from contextlib import contextmanager
from numbers import Real

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .call_arguments import checked_arguments
from .pixel_space import (
    FiniteWatch,
    check_call,
    check_count,
    checked_generator,
    checked_labels,
    initial_noise,
    is_integer,
    label_tensor,
    number_of_images,
    reads_variance,
    to_images,
    with_precise_alphas,
)
from .respacing import checked_timesteps, is_boost_and_skip, kept_steps, set_timesteps

BOOST_AND_SKIP_CLASSES = {
    "DDIMScheduler": "BoostAndSkipDDIMScheduler",
    "EulerDiscreteScheduler": "BoostAndSkipEulerDiscreteScheduler",
    "DPMSolverMultistepScheduler": "BoostAndSkipDPMSolverMultistepScheduler",
}


class BoostAndSkipPipeline(DiffusionPipeline):
    r"""Pixel-space generation, unconditional or class-conditional, that starts from boosted noise after skipped steps.

    .. math:: x_{t_s} = \gamma\,\epsilon,\quad \epsilon \sim N(0, I)

    where t_0 > t_1 > ... is the schedule as set and s is `skip_steps`; from there the stock sampler walks
    t_s, t_{s+1}, ... The noise is not rescaled to the level of t_s. A boost alone is forgotten on the way from
    pure noise; started later, where part of the noise level is signal, it leads to samples of low density.
    `gamma=1, skip_steps=0` is the stock sampler.

    Args:
        unet: `UNet2DModel` or a model called like one; with twice as many output as input channels (learned variance)
            the second half goes to schedulers that read it and is dropped for the others.
        scheduler: a `DDPMScheduler`, whose initial noise and timesteps the pipeline then treats itself, or a
            `BoostAndSkip...Scheduler`.
        null_class: index of the class label that stands for "no label"; needed for guidance. None: the model has none.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012  diffusers' name and form

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, null_class: int | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(null_class=null_class)

    @property
    def guidance_scale(self) -> float:
        """Guidance weight of the current or last call; 1 is off."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current or last call runs the network on labels and on the null class."""
        return self._guidance_scale != 1

    @property
    def num_timesteps(self) -> int:
        """Number of steps that the current or last call walks, the skipped ones not counted."""
        return self._num_timesteps

    @checked_arguments
    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | list[int] | list[list[int]] | torch.Tensor | None = None,
        num_inference_steps: int | str = 250,
        timesteps: list[int] | None = None,
        gamma: float | None = None,
        skip_steps: int | None = None,
        skip_to_sigma: float | None = None,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["BoostAndSkipPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""Generate images.

        Args:
            batch_size: number of images; by default as many as `class_labels`, or 1.
            class_labels: class indices, one for all images or one an image (batch_size,). Left out, a
                class-conditional model with a null class samples without a label.
            num_inference_steps: steps of the schedule before skipping, in the scheduler's spacing; or a respacing of
                guided-diffusion, such as "250", "10,10,5" or "ddim25".
            timesteps: the schedule itself, strictly decreasing training timesteps, in place of its length.
            gamma: factor on the standard deviation of the initial noise, > 0. The paper uses 2.5 to 4. By default
                the scheduler's, or 1.
            skip_steps: how many of the first steps to drop, >= 0. The paper drops 3 of 250. By default the
                scheduler's, or 0; of `timesteps=`, only those asked for here. All three hold for this call:
                afterwards `self.scheduler` is the one it was.
            skip_to_sigma: in place of skip_steps, the noise level (noise over signal) to start from, for any number of
                steps: those before the step whose level is nearest are dropped.
            guidance_scale: w in eps_null + w (eps_label - eps_null); 1 is off.
            eta: 0 for DDIM, 1 for its ancestral form; only for schedulers that take it.
            use_clipped_model_output: for DDIM, whether the noise is derived anew from the clipped x0. By default
                True, as in the authors' loop.
            latents: initial noise of unit variance (batch_size, channels, height, width); gamma multiplies it. Its
                height and width may differ from the model's sample_size.
            generator: one for all images, or a list of one an image, whose result then does not depend on the batch.
            output_type: "pil", "np" (batch, height, width, channels) in [0, 1], "pt" (batch, channels, height,
                width) in [0, 1], or "latent", the last x_t as it is.
            return_dict: whether to return an `ImagePipelineOutput` or a tuple of the images.
            callback_on_step_end: called as callback(pipeline, step, timestep, tensors) after each step; what the
                returned dict holds under "latents" replaces the sample.
            callback_on_step_end_tensor_inputs: which tensors the callback sees; "latents" is the sample x_t.

        Raises:
            ValueError: for arguments out of range, and for a scheduler that can neither be boosted here nor boosts by
                itself; the message says what to do.
            NotFiniteError: a ValueError, where NaN or infinity comes up, with the step and the sample.
        """
        self._guidance_scale = guidance_scale
        self._check_inputs(batch_size, class_labels, guidance_scale, output_type, callback_on_step_end_tensor_inputs)
        labels = checked_labels(class_labels, self.unet.config.get("num_class_embeds"), self.config.null_class)
        batch_size = number_of_images(batch_size, labels, latents)
        generator = checked_generator(generator, batch_size)
        device = self._execution_device
        labels = self._label_tensor(labels, batch_size, device)

        with self._scheduler_for_call(gamma, skip_steps, skip_to_sigma) as (boost, *skip):
            steps = self._set_timesteps(num_inference_steps, timesteps, *skip, device)
            extra = self._step_kwargs(eta, use_clipped_model_output, generator)
            latents = self._initial_sample(batch_size, latents, generator, device) * boost
            self._num_timesteps = len(steps)
            watch = FiniteWatch(len(steps))
            with self.progress_bar(total=len(steps)) as progress_bar:
                for i, t in enumerate(steps):
                    model_output = self._model_output(self.scheduler.scale_model_input(latents, t), t, labels)
                    watch.see("the network's output", model_output, i)
                    latents = self.scheduler.step(model_output, t, latents, **extra).prev_sample
                    watch.see("the image", latents, i)
                    if callback_on_step_end is not None:
                        tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                        latents = callback_on_step_end(self, i, t, tensors).pop("latents", latents)
                    progress_bar.update()

        watch.finish()
        images = to_images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _model_output(self, sample: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The network's prediction, guided if asked; (batch, channels or 2 channels, height, width)."""
        channels = sample.shape[1]
        sample = sample.to(self.unet.dtype)
        if not self.do_classifier_free_guidance:
            output = self.unet(sample, t, class_labels=labels).sample
        else:
            both = torch.cat([torch.full_like(labels, self.config.null_class), labels])
            null, cond = self.unet(torch.cat([sample, sample]), t, class_labels=both).sample.chunk(2)
            guided = null[:, :channels] + self.guidance_scale * (cond[:, :channels] - null[:, :channels])
            output = torch.cat([guided, cond[:, channels:]], dim=1)
        if output.shape[1] == 2 * channels and not reads_variance(self.scheduler):
            output = output[:, :channels]
        return output

    @contextmanager
    def _scheduler_for_call(self, gamma: float | None, skip_steps: int | None, skip_to_sigma: float | None):
        """Put the scheduler of this call in place; yields what is left to do here: noise factor, two kinds of skip."""
        own, scheduler = self.scheduler, self.scheduler
        if is_boost_and_skip(scheduler):
            given = {"gamma": gamma, "skip_steps": skip_steps, "skip_to_sigma": skip_to_sigma}
            given = {name: value for name, value in given.items() if value is not None}
            if len(given.keys() & {"skip_steps", "skip_to_sigma"}) == 1:  # in place of the scheduler's
                given = {"skip_steps": 0, "skip_to_sigma": None, **given}
            if given:
                scheduler = type(scheduler).from_config(scheduler.config, **given)
            config = scheduler.config
            on = (config.gamma, config.skip_steps, config.get("skip_to_sigma")) != (1, 0, None)
            gamma, skip_steps, skip_to_sigma = 1.0, given.get("skip_steps", 0), given.get("skip_to_sigma")
        elif isinstance(scheduler, DDPMScheduler):
            gamma = 1.0 if gamma is None else gamma
            skip_steps = 0 if skip_steps is None else skip_steps
            _check_boost_and_skip(gamma, skip_steps, skip_to_sigma)
            on = (gamma, skip_steps, skip_to_sigma) != (1, 0, None)
        else:
            raise ValueError(_unsupported(scheduler))
        # switched off it is the stock sampler, bit for bit
        self.scheduler = with_precise_alphas(scheduler) if on else scheduler
        try:
            yield gamma, skip_steps, skip_to_sigma
        finally:
            self.scheduler = own

    def _set_timesteps(self, num_inference_steps, timesteps, skip_steps, skip_to_sigma, device) -> torch.Tensor:
        """Set the schedule and return the timesteps to walk, from the first one that is kept."""
        if timesteps is not None:
            timesteps = checked_timesteps(timesteps, self.scheduler.config.num_train_timesteps)
            timesteps, skip_steps = kept_steps(timesteps, skip_steps), 0
        elif is_boost_and_skip(self.scheduler):
            skip_steps, skip_to_sigma = 0, None  # it drops them itself
        set_timesteps(self.scheduler, num_inference_steps, timesteps, device)
        if skip_to_sigma is not None:
            skip_steps = _steps_before(skip_to_sigma, self.scheduler)
            if timesteps is not None:
                timesteps, skip_steps = kept_steps(timesteps, skip_steps), 0
                set_timesteps(self.scheduler, num_inference_steps, timesteps, device)
        return kept_steps(self.scheduler.timesteps, skip_steps)

    def _step_kwargs(self, eta: float, use_clipped_model_output: bool | None, generator) -> dict:
        """The keyword arguments of scheduler.step, of those that this scheduler takes."""
        if not (math.isfinite(eta) and eta >= 0):
            raise ValueError(f"eta must be >= 0, got {eta}; 0 is DDIM, 1 its ancestral form")
        known = inspect.signature(self.scheduler.step).parameters
        for name, value, off in (("eta", eta, 0), ("use_clipped_model_output", use_clipped_model_output, None)):
            if name not in known and value != off:
                raise ValueError(
                    f"{name}={value!r}: {type(self.scheduler).__name__} does not take it; leave it out or use"
                    " BoostAndSkipDDIMScheduler"
                )
        if use_clipped_model_output is None:
            use_clipped_model_output = True
        values = {"eta": eta, "use_clipped_model_output": use_clipped_model_output, "generator": generator}
        return {name: value for name, value in values.items() if name in known}

    def _initial_sample(self, batch_size: int, latents, generator, device: torch.device) -> torch.Tensor:
        """Noise of unit variance times the scheduler's initial sigma, in the network's dtype."""
        config, dtype = self.unet.config, self.unet.dtype
        noise = initial_noise(latents, batch_size, config.in_channels, config.sample_size, generator, device, dtype)
        return noise.to(device, dtype) * self.scheduler.init_noise_sigma

    def _check_inputs(self, batch_size, class_labels, guidance_scale, output_type, callback_tensors) -> None:
        check_count("batch_size", batch_size)
        check_call(self, output_type, callback_tensors)
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be finite, got {guidance_scale}")
        null_class, classes = self.config.null_class, self.unet.config.get("num_class_embeds")
        if null_class is not None and not (
            classes is not None and is_integer(null_class) and 0 <= null_class < classes
        ):
            raise ValueError(
                f"null_class must be one of the model's {classes or 0} classes or None, got {null_class!r}"
            )
        if guidance_scale != 1 and (self.config.null_class is None or class_labels is None):
            raise ValueError(
                f"guidance_scale={guidance_scale} needs class_labels and a model with a null class; pass"
                " class_labels=, build the pipeline with null_class=, or use guidance_scale=1"
            )

    def _label_tensor(self, labels: list[int] | None, batch_size: int, device) -> torch.Tensor | None:
        """Labels (batch_size,) int64; the null class where a conditional model got none; None for no labels at all."""
        if labels is None:
            if self.unet.config.get("num_class_embeds") is None:
                return None
            labels = [self.config.null_class]
        return label_tensor(labels, batch_size, device)


def _check_boost_and_skip(gamma: float, skip_steps: int, skip_to_sigma: float | None) -> None:
    if isinstance(gamma, bool) or not isinstance(gamma, Real) or not (math.isfinite(gamma) and gamma > 0):
        raise ValueError(f"gamma must be a finite number > 0, got {gamma!r}; 1 is the stock initial noise")
    if not is_integer(skip_steps) or skip_steps < 0:
        raise ValueError(f"skip_steps must be an integer >= 0, got {skip_steps!r}; 0 skips nothing")
    if skip_to_sigma is None:
        return
    is_number = isinstance(skip_to_sigma, Real) and not isinstance(skip_to_sigma, bool)
    if not (is_number and math.isfinite(skip_to_sigma) and skip_to_sigma > 0):
        raise ValueError(
            f"skip_to_sigma must be a finite number > 0, noise over signal, got {skip_to_sigma!r}; None skips nothing"
        )
    if skip_steps:
        raise ValueError(f"{skip_steps=} and {skip_to_sigma=} both say where the sampler starts; give one")


def _steps_before(skip_to_sigma: float, scheduler: DDPMScheduler) -> int:
    """How many steps lie before the one whose noise level is nearest to skip_to_sigma, by their ratio.

    Raises ValueError for a level that the training's schedule does not have, or the last step lies above.
    """
    alphas = scheduler.alphas_cumprod.double().cpu()
    levels = ((1 - alphas) / alphas).sqrt()
    highest, levels = levels[-1].item(), levels[scheduler.timesteps.cpu().long()].tolist()
    if not levels[-1] <= skip_to_sigma <= highest:
        raise ValueError(
            f"skip_to_sigma={skip_to_sigma:g} is outside of the noise levels of this schedule, {levels[-1]:.4g} to"
            f" {highest:.4g} (noise over signal); choose one between them"
        )
    return min(range(len(levels)), key=lambda i: abs(math.log(levels[i] / skip_to_sigma)))


def _unsupported(scheduler: SchedulerMixin) -> str:
    name = type(scheduler).__name__
    ours = BOOST_AND_SKIP_CLASSES.get(name)
    if ours:
        return (
            f"BoostAndSkipPipeline cannot boost a stock {name}; use {ours}.from_config(pipe.scheduler.config) or"
            " boost_and_skip(pipe.scheduler, gamma=..., skip_steps=...) from diffusers_ext"
        )
    return (
        f"BoostAndSkipPipeline does not know {name}; use a DDPMScheduler,"
        f" BoostAndSkipDDPMScheduler, {', '.join(BOOST_AND_SKIP_CLASSES.values())}"
    )
