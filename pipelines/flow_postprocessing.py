"""Generated images moved onto the data by a rectified flow to their nearest real neighbours (arXiv 2503.10638)."""

import inspect
import math
import os
from collections.abc import Callable
from contextlib import contextmanager
from numbers import Real
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ImagePipelineOutput,
    UNet2DModel,
)
from diffusers.image_processor import PipelineImageInput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .call_arguments import checked_arguments
from .pixel_space import (
    FiniteWatch,
    as_output,
    check_call,
    checked_decoding,
    checked_generator,
    checked_labels,
    image_tensor,
    is_integer,
    label_tensor,
    to_images,
)

SOLVERS = ("scheduler", "dopri5")
SPACES = ("pixel", "latent")
MOST_EVALUATIONS = 5000  # of dopri5; flows that were trained take 50 to 500
TIME_SCALE = 1000  # flow time 1 in the units of a diffusion network's timestep embedding


def velocity(
    model: Callable, sample: torch.Tensor, t: torch.Tensor | float, class_labels: torch.Tensor | None = None
) -> torch.Tensor:
    """v(x_t, c, t) of a network that is called like a `UNet2DModel`, at the timestep 1000 t.

    Args:
        model: called like a `UNet2DModel`.
        sample: (batch, ...).
        t: flow time, 0 at the generated sample and 1 at the real one, one or (batch,).
        class_labels: (batch,) or None.

    Returns:
        (batch, ...).
    """
    timestep = torch.as_tensor(t, dtype=torch.float32, device=sample.device).expand(len(sample)) * TIME_SCALE
    labels = {} if class_labels is None else {"class_labels": class_labels}
    return model(sample, timestep, **labels).sample


class FlowPostprocessingPipeline(DiffusionPipeline):
    r"""Repairs generated images, of any pipeline, by a flow that was trained to lead them to real ones.

    .. math:: \frac{dx_t}{dt} = v_\theta(x_t, c, t),\quad x_0 = \hat x,\quad t: 0 \to 1

    where the network learned v = x_1 - x_0 between samples x_0 of a base model and their nearest real neighbours x_1.
    Where the velocity is zero, the image comes back bit for bit.

    Args:
        model: `UNet2DModel` or a network called like one, with as many output as input channels.
        scheduler: `FlowMatchEulerDiscreteScheduler` or `FlowMatchHeunDiscreteScheduler`, the ODE solver. Its sigma is
            1 - t.
        base: the pipeline whose images are repaired, if they are to be drawn here. It is moved, offloaded and saved
            with this one, and loaded in its dtype; a device map does not reach it, `.to()` does. Variants are loaded
            by `from_pretrained` of this class; `DiffusionPipeline.from_pretrained` fails at a pipeline within another.
        vae: for space="latent", the autoencoder of the latents; by default the one of the base.
        space: "pixel", where the network sees images in [-1, 1], or "latent", scaled latents of the autoencoder.

    Raises:
        ValueError: for another space, and for "latent" without an autoencoder.
    """

    model_cpu_offload_seq = "model->vae"
    _optional_components = ["base", "vae"]  # noqa: RUF012  diffusers' name and form
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        model: UNet2DModel,
        scheduler: SchedulerMixin,
        base: DiffusionPipeline | None = None,
        vae: AutoencoderKL | None = None,
        space: str = "pixel",
    ):
        super().__init__()
        if space not in SPACES:
            raise ValueError(f'space must be "pixel" or "latent", got {space!r}')
        if space == "latent" and vae is None and getattr(base, "vae", None) is None:
            raise ValueError('space="latent" needs an autoencoder; pass vae= or a base that has one')
        if base is not None and _of_one_folder(model, base):
            _cast(base, model.dtype)  # which diffusers' `from_pretrained` gives to networks alone
        self.register_modules(model=model, scheduler=scheduler, base=base, vae=vae)
        self.register_to_config(space=space)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs
    ) -> "FlowPostprocessingPipeline":
        """As `DiffusionPipeline.from_pretrained`, the base in the dtype and variant asked for as well.

        Args:
            pretrained_model_name_or_path: a folder or Hub id, as there.
            **kwargs: as there; `base` takes the place of the base in the folder.
        """
        folder = pretrained_model_name_or_path
        if not os.path.isdir(folder):
            folder = cls.download(folder, **kwargs)
        base = os.path.join(folder, "base")
        if "base" not in kwargs and os.path.isdir(base):
            names = ("dtype", "torch_dtype", "variant", "use_safetensors", "low_cpu_mem_usage", "trust_remote_code")
            kwargs["base"] = DiffusionPipeline.from_pretrained(
                base, **{name: kwargs[name] for name in names if name in kwargs}
            )
        pipe = super().from_pretrained(folder, **kwargs)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe

    @classmethod
    def load_config(cls, *args, **kwargs) -> Any:
        """As of diffusers, without the base, which `from_pretrained` has loaded: diffusers searches it in vain.

        Args:
            *args: as of diffusers.
            **kwargs: as of diffusers.
        """
        config = super().load_config(*args, **kwargs)
        if isinstance(config, dict):
            config.pop("base", None)
        return config

    @property
    def num_timesteps(self) -> int:
        """Number of scheduler steps, which is that of network evaluations, of the current or last call."""
        return self._num_timesteps

    @checked_arguments(but="images")
    @torch.no_grad()
    def __call__(
        self,
        images: PipelineImageInput | None = None,
        prompt: str | list[str] | None = None,
        class_labels: int | list[int] | list[list[int]] | torch.Tensor | None = None,
        num_inference_steps: int = 10,
        strength: float = 1.0,
        solver: str = "scheduler",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        latents: torch.Tensor | None = None,
        base_kwargs: dict | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["FlowPostprocessingPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""Repair images.

        In latent space, images go through the autoencoder, so a velocity of zero returns its reconstruction of them;
        latents and the base's own results come back as they were.

        Args:
            images: what to repair, one or a batch: PIL; arrays ([batch,] height, width, channels) or tensors ([batch,]
                channels, height, width), uint8 or floating point in [0, 1]. Left out, the base draws them.
            prompt: for the base, if it takes one.
            class_labels: class indices, one for all images or one an image (batch,). They go to the network if it is
                conditional, and to the base if that takes them.
            num_inference_steps: steps of the scheduler. Euler evaluates the network once a step; Heun twice, but once
                in its last step, which ends at sigma 0. Not used by dopri5.
            strength: the flow time in [0, 1] at which to stop, in the same number of steps; 0 changes nothing.
            solver: "scheduler", or "dopri5", which chooses its steps by the tolerances and needs torchdiffeq. The
                error is judged over the whole batch, so an image then depends on its batch within the tolerance.
            rtol: relative tolerance of dopri5.
            atol: absolute tolerance of dopri5, in the units of the network's input.
            latents: what to repair in the network's own space, in place of images: (batch, channels, height, width),
                in [-1, 1] or scaled latents. A base that is asked for "latent" gives them.
            base_kwargs: further arguments of the base's call, such as guidance_scale or batch_size.
            generator: one for all images, or a list of one an image. It goes to the base; the flow itself draws
                nothing, and an autoencoder encodes to the mean.
            output_type: "pil", "np" (batch, height, width, channels) in [0, 1], "pt" (batch, channels, height, width)
                in [0, 1], or "latent", the last x_t as it is.
            return_dict: whether to return an `ImagePipelineOutput` or a tuple of the images.
            callback_on_step_end: called as callback(pipeline, step, timestep, tensors) after each scheduler step; what
                the returned dict holds under "latents" replaces the sample.
            callback_on_step_end_tensor_inputs: which tensors the callback sees; "latents" is the sample x_t.

        Raises:
            ValueError: for images of another form, size, number of channels or range, for arguments that are missing
                or out of range, for a scheduler that is none of the two, and where dopri5 needs more than
                `MOST_EVALUATIONS`.
            ImportError: for dopri5 without torchdiffeq.
            NotFiniteError: a ValueError, where NaN or infinity comes up, with the step (the evaluation, for dopri5)
                and the sample.
        """
        check_call(self, output_type, callback_on_step_end_tensor_inputs)
        self._check_solver(num_inference_steps, strength, solver, rtol, atol, callback_on_step_end)
        given = [name for name, value in (("images", images), ("latents", latents)) if value is not None]
        if len(given) == 2 or (given and (prompt is not None or base_kwargs is not None)):
            raise ValueError(
                f"{given[0]} leaves nothing to draw; leave out prompt, base_kwargs and the other of images and latents"
            )
        labels = self._labels(class_labels, drawn=not given)
        if not given:
            generator = list(generator) if isinstance(generator, tuple) else generator
            images, latents = self._draw(prompt, class_labels, base_kwargs, generator)
        images, start = self._start(images, latents)
        checked_generator(generator, len(start))
        labels = None if labels is None else label_tensor(labels, len(start), self._execution_device)

        if solver == "dopri5":
            final = self._solve_dopri5(start, labels, strength, rtol, atol)
        else:
            tensors = list(callback_on_step_end_tensor_inputs)
            final = self._walk(start, labels, num_inference_steps, strength, callback_on_step_end, tensors)

        images = self._finish(images, start, final, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _draw(self, prompt, class_labels, base_kwargs: dict | None, generator):
        """(images, None) or, in latent space, (None, latents) of the base."""
        if self.base is None:
            raise ValueError(
                "images must be given: the pipeline has no base to draw them; pass images= or build it with base="
            )
        pixel, call = self.config.space == "pixel", dict(base_kwargs or {})
        own = {"prompt": prompt, "class_labels": class_labels, "generator": generator}
        own = {name: value for name, value in own.items() if value is not None}
        if both := sorted(set(call) & {*own, "output_type", "return_dict", "generator"}):
            raise ValueError(f"base_kwargs must not hold {both}: this call has arguments for them, or sets them")
        known = inspect.signature(self.base.__call__).parameters
        if "class_labels" not in known and self.model.config.get("num_class_embeds") is not None:
            own.pop("class_labels", None)  # for the network alone
        call |= {**own, "output_type": "pt" if pixel else "latent"}
        if unknown := sorted(set(call) - set(known)):
            raise ValueError(
                f"{type(self.base).__name__} does not take {', '.join(unknown)}; leave it out or choose another base"
            )
        images = self.base(**call).images
        return (images, None) if pixel else (None, images)

    def _start(self, images, latents) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The images in [0, 1] where there are any, and x_0 in the network's space, dtype and device."""
        channels, device, dtype = self.model.config.in_channels, self._execution_device, self.model.dtype
        if images is not None and self.config.space == "pixel":
            images = image_tensor("images", images, channels).to(device)
            latents = images * 2 - 1
        elif images is not None:
            latents = self._encode(image_tensor("images", images, self._vae.config.in_channels))
            images = None
        if not isinstance(latents, torch.Tensor) or latents.ndim != 4 or latents.shape[1] != channels:
            shape = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents)
            raise ValueError(f"latents must have shape (batch, {channels}, height, width), got {shape}")
        size = self.model.config.sample_size
        size = (size, size) if is_integer(size) else size
        if size is not None and tuple(latents.shape[2:]) != tuple(size):
            raise ValueError(
                f"images must be {size[0]} x {size[1]} in the network's space, the size that it was trained on, got"
                f" {latents.shape[2]} x {latents.shape[3]}; resize them"
            )
        if not torch.isfinite(latents).all():
            raise ValueError("latents must be finite, got NaN or infinity")
        return images, latents.to(device, dtype)

    def _labels(self, class_labels, drawn: bool) -> list[int] | None:
        """Checked before anything is drawn; None for an unconditional network, whose base may use them alone."""
        classes = self.model.config.get("num_class_embeds")
        return None if classes is None and drawn else checked_labels(class_labels, classes)

    def _walk(self, x, labels, num_inference_steps: int, strength: float, callback, tensor_names: list[str]):
        """Integrate with the scheduler, whose velocity points from sigma 0 to sigma 1, against ours."""
        scheduler = self.scheduler
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
            scheduler.set_timesteps(sigmas=sigmas, device=x.device)
        else:
            scheduler.set_timesteps(num_inference_steps, device=x.device)
        total = scheduler.config.num_train_timesteps
        if strength != 1:
            scheduler.sigmas = 1 - strength * (1 - scheduler.sigmas)
            scheduler.timesteps = scheduler.sigmas[:-1] * total
        scheduler.set_begin_index(0)
        self._num_timesteps = len(scheduler.timesteps)
        watch = FiniteWatch(self._num_timesteps)
        for i, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
            v = velocity(self.model, x, 1 - timestep / total, labels)
            x = scheduler.step(-v, timestep, x, return_dict=False)[0]
            watch.see("the image", x, i)
            if callback is not None:
                x = callback(self, i, timestep, dict.fromkeys(tensor_names, x)).pop("latents", x)
        watch.finish()
        return x

    def _solve_dopri5(self, x, labels, strength: float, rtol: float, atol: float):
        """Integrate in float32 with torchdiffeq's adaptive Dormand-Prince method."""
        try:
            from torchdiffeq import odeint
        except ImportError as error:
            raise ImportError(
                "solver='dopri5' needs torchdiffeq; pip install torchdiffeq, or use the scheduler"
            ) from error
        if strength == 0:
            return x

        evaluations, watch = 0, FiniteWatch(None)

        def field(t, x_t):
            nonlocal evaluations
            v = velocity(self.model, x_t.to(x.dtype), t, labels).float()
            watch.see(f"at t = {float(t):.4g} the velocity", v, evaluations)
            watch.finish()  # the solver waits for the device in every step anyway
            evaluations += 1
            if evaluations > MOST_EVALUATIONS:
                raise ValueError(_too_stiff(float(t), strength, rtol, atol, f"after {MOST_EVALUATIONS} evaluations"))
            return v

        times = torch.tensor([0.0, strength], device=x.device)
        settings = {"rtol": rtol, "atol": atol, "method": "dopri5"}
        if not _has_float64(x.device):  # in which torchdiffeq would keep the time
            settings["options"] = {"dtype": torch.float32}
        try:
            final = odeint(field, x.float(), times, **settings)[-1].to(x.dtype)
        except AssertionError as error:  # torchdiffeq, of a step that is too small for float32
            raise ValueError(_too_stiff(None, strength, rtol, atol, str(error))) from error
        watch.see("the image", final, evaluations)
        watch.finish()
        return final

    def _finish(self, images, start, final, output_type: str):
        """The repaired images; given ones plus their displacement, untouched by rounding to [-1, 1]."""
        if output_type == "latent":
            return final
        if self.config.space == "latent":
            return to_images(self._decode(final), output_type)
        if images is None:
            return to_images(final, output_type)
        return as_output((images + (final.float() - start.float()) / 2).clamp(0, 1), output_type)

    @property
    def _vae(self) -> AutoencoderKL:
        vae = getattr(self.base, "vae", None) if self.vae is None else self.vae
        if vae is None:
            raise ValueError('space="latent" needs an autoencoder; assign pipe.vae, or pipe.base with one')
        return vae

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] to scaled latents: the mean of the posterior."""
        vae, scale, shift = self._vae, *self._latent_units()
        with _precise(vae):
            posterior = vae.encode((images * 2 - 1).to(self._execution_device, vae.dtype)).latent_dist
            return (posterior.mode() - shift) * scale

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents to images around [-1, 1]."""
        vae, scale, shift = self._vae, *self._latent_units()
        with _precise(vae):
            return checked_decoding(vae.decode((latents.to(vae.dtype) / scale + shift), return_dict=False)[0])

    def _latent_units(self) -> tuple[float, float]:
        config = self._vae.config
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            raise ValueError(
                f"{type(self._vae).__name__} scales its latents channel by channel, which is not supported; use an"
                " autoencoder with scaling_factor alone, or postprocess its images in pixel space"
            )
        return config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0

    def _check_solver(self, num_inference_steps, strength, solver, rtol, atol, callback) -> None:
        if solver not in SOLVERS:
            raise ValueError(f'solver must be "scheduler" or "dopri5", got {solver!r}')
        if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 <= strength <= 1:
            raise ValueError(f"strength must be in [0, 1], got {strength!r}; 1 integrates all the way")
        if solver == "dopri5":
            if not (math.isfinite(rtol) and math.isfinite(atol) and rtol >= 0 and atol >= 0 and rtol + atol > 0):
                raise ValueError(f"rtol and atol must be >= 0 and not both 0, got {rtol} and {atol}")
            if callback is not None:
                raise ValueError("callback_on_step_end: dopri5 has no steps to show; use the scheduler")
            return
        if not is_integer(num_inference_steps) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be an integer >= 1, got {num_inference_steps!r}")
        config, known = self.scheduler.config, (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
        if not isinstance(self.scheduler, known):
            raise ValueError(
                f"scheduler must be a FlowMatchEulerDiscreteScheduler or FlowMatchHeunDiscreteScheduler, got"
                f" {type(self.scheduler).__name__}, which solves another equation; assign pipe.scheduler"
            )
        for name in ("stochastic_sampling", "invert_sigmas", "use_dynamic_shifting", "shift_terminal"):
            if config.get(name):
                raise ValueError(
                    f"scheduler has {name}={config[name]}, which does not walk t from 0 to 1; switch it off"
                )

    # diffusers reaches components that are modules, but not those of a nested pipeline

    def to(self, *args, **kwargs) -> "FlowPostprocessingPipeline":
        """As `DiffusionPipeline.to`, the base included.

        Args:
            *args: as there.
            **kwargs: as there.
        """
        super().to(*args, **kwargs)
        if self.base is not None:
            self.base.to(*args, **kwargs)
        return self

    def remove_all_hooks(self) -> None:
        """As `DiffusionPipeline.remove_all_hooks`, the base included."""
        super().remove_all_hooks()
        if self.base is not None:
            self.base.remove_all_hooks()

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """As `DiffusionPipeline.enable_model_cpu_offload`, the base included.

        Args:
            gpu_id: as there.
            device: as there.
        """
        super().enable_model_cpu_offload(gpu_id, device)
        if self.base is not None:
            self.base.enable_model_cpu_offload(gpu_id, device)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """As `DiffusionPipeline.enable_sequential_cpu_offload`, the base included.

        Args:
            gpu_id: as there.
            device: as there.
        """
        super().enable_sequential_cpu_offload(gpu_id, device)
        if self.base is not None:
            self.base.enable_sequential_cpu_offload(gpu_id, device)

    def enable_group_offload(self, onload_device: torch.device, **options) -> None:
        """As `DiffusionPipeline.enable_group_offload`, the base included.

        Args:
            onload_device: as there.
            **options: its other arguments.
        """
        super().enable_group_offload(onload_device, **options)
        if self.base is not None:
            self.base.enable_group_offload(onload_device, **options)


def _of_one_folder(model, base: DiffusionPipeline) -> bool:
    """Whether diffusers read them from one saved pipeline."""
    paths = [str(getattr(part, "config", {}).get("_name_or_path") or "") for part in (model, base)]
    return [os.path.basename(path) for path in paths] == ["model", "base"] and len(
        set(map(os.path.dirname, paths))
    ) == 1


def _cast(base: DiffusionPipeline, dtype: torch.dtype) -> None:
    """Give the networks of a pipeline a dtype."""
    for part in base.components.values():
        if isinstance(part, torch.nn.Module) and getattr(part, "dtype", dtype) != dtype:
            part.to(dtype)


def _has_float64(device: torch.device) -> bool:
    """A device without it, such as a Mac's, refuses to make one."""
    try:
        torch.empty((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def _too_stiff(t: float | None, strength: float, rtol: float, atol: float, why: str) -> str:
    at = "" if t is None else f" at t = {t:.4g}"
    return (
        f"dopri5 does not get to t = {strength} with rtol={rtol} and atol={atol}, {why}{at}: the velocity is too rough"
        " for these tolerances; raise them, or use solver='scheduler'"
    )


@contextmanager
def _precise(vae: AutoencoderKL):
    """Float32 for an autoencoder that overflows in float16, as SDXL's, which says so in its config."""
    if vae.dtype != torch.float16 or not vae.config.get("force_upcast"):
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(torch.float16)
