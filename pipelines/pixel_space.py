"""What pipelines share: generators, class labels, initial noise, images as tensors, and images out of samples."""

import copy
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PIL_MODES = (
    "1",
    "L",
    "P",
    "RGB",
    "LA",
    "La",
    "PA",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
)  # 8 bits, 0 to 255


def is_integer(value: Any) -> bool:
    """Whether it is an integer of Python or NumPy, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_count(name: str, count: Any) -> None:
    """Check a number of things.

    Args:
        name: of the argument, for the message.
        count: its value; None is allowed.

    Raises:
        ValueError: with name in it, unless count is None or an integer >= 1.
    """
    if count is not None and not (is_integer(count) and count >= 1):
        raise ValueError(f"{name} must be an integer >= 1, got {count!r}")


class NotFiniteError(ValueError):
    """A sampler met NaN or infinity.

    Args:
        what: is not finite.
        sample: the row of the batch, from 0.
        step: of the sampler, from 0.
        num_steps: of the sampler; None where nobody knows it.
    """

    def __init__(self, what: str, sample: int, step: int, num_steps: int | None):
        of = "" if num_steps is None else f" of {num_steps}"
        super().__init__(
            f"{what} of sample {sample} is not finite in step {step}{of} (both counted from 0); use another dtype,"
            " bfloat16 or float32, or a smaller gamma or guidance scale, and check the weights"
        )
        self.what, self.sample, self.step, self.num_steps = what, sample, step, num_steps

    def of_sample(self, sample: int) -> "NotFiniteError":
        """The same with the number that the sample has among many batches."""
        return NotFiniteError(self.what, sample, self.step, self.num_steps)


class FiniteWatch:
    """Looks whether the values of a sampler are finite.

    Args:
        num_steps: of the sampler; None where nobody knows it.

    Raises:
        NotFiniteError: where values of a sampler are not finite: at once on a CPU, elsewhere in `finish`, so that the
            host does not wait for them in every step.
    """

    def __init__(self, num_steps: int | None):
        self.num_steps, self.seen = num_steps, []

    def see(self, what: str, values: torch.Tensor, step: int) -> None:
        """Look at values (batch, ...).

        Args:
            what: they are, for the message.
            values: (batch, ...).
            step: of the sampler, from 0.
        """
        self.seen.append((what, step, values.isfinite().flatten(1).all(dim=1)))
        if values.device.type == "cpu":
            self.finish()

    def finish(self) -> None:
        """Read what was seen on a device."""
        seen, self.seen = self.seen, []
        if seen and not torch.stack([finite.all() for *_, finite in seen]).all():
            what, step, finite = next(one for one in seen if not one[2].all())
            raise NotFiniteError(what, int((~finite).nonzero()[0]), step, self.num_steps)


def checked_decoding(images: torch.Tensor) -> torch.Tensor:
    """Images (batch, ...) that a VAE made.

    Raises:
        ValueError: where they are not finite, as those in float16 may be.
    """
    finite = images.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        raise ValueError(
            f"the VAE's image of sample {int((~finite).nonzero()[0])} is not finite; decode in another dtype"
            ' (vae.to(torch.float32)), or take output_type="latent" and decode that'
        )
    return images


def check_call(pipeline: DiffusionPipeline, output_type: str, callback_tensors: list[str]) -> None:
    """Check two arguments of a pipeline's call.

    Args:
        pipeline: whose call it is.
        output_type: "pil", "np", "pt" or "latent".
        callback_tensors: names of the tensors that a callback asks for.

    Raises:
        ValueError: for an unknown output type and for tensors that the pipeline shows to no callback.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f'output_type must be "pil", "np", "pt" or "latent", got {output_type!r}')
    check_callback(pipeline, callback_tensors)


def check_callback(pipeline: DiffusionPipeline, callback_tensors: list[str]) -> None:
    """Check what a callback asks for.

    Args:
        pipeline: whose call it is.
        callback_tensors: names of the tensors that a callback asks for.

    Raises:
        ValueError: for tensors that the pipeline shows to no callback.
    """
    known = pipeline._callback_tensor_inputs
    unknown = set(callback_tensors) - set(known)
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; allowed are {known}")


def checked_generator(generator: Any, batch_size: int) -> torch.Generator | list[torch.Generator] | None:
    """One generator or None as it is, several as a list of one a sample.

    Raises:
        ValueError: for anything else.
    """
    several = list(generator) if isinstance(generator, list | tuple) else [generator]
    if not all(isinstance(one, torch.Generator) for one in several) and generator is not None:
        raise ValueError(
            f"generator must be a torch.Generator, a list of one a sample or None, got {generator!r:.200}"
        )
    if not isinstance(generator, list | tuple):
        return generator
    if len(generator) != batch_size:
        raise ValueError(
            f"generator is a list of {len(generator)}, but batch_size is {batch_size}; give one generator, or one"
            " a sample"
        )
    return list(generator)


def checked_labels(
    class_labels: int | list[int] | torch.Tensor | None, num_classes: int | None, null_class: int | None = None
) -> list[int] | None:
    """The labels as a list of one or of many integers; None where none are given and none are needed.

    Args:
        class_labels: as of a pipeline's call, one or (batch,).
        num_classes: of the model, None for an unconditional one.
        null_class: of the pipeline; None without one.

    Raises:
        ValueError: for labels that are missing, not wanted, out of range or no integers.
    """
    if class_labels is None:
        if num_classes is not None and null_class is None:
            raise ValueError(
                f"class_labels must be given: the model is conditional on {num_classes} classes and the pipeline"
                " knows no null class"
            )
        return None
    if num_classes is None:
        raise ValueError(f"class_labels={class_labels!r}: the model is unconditional; leave class_labels out")
    labels = torch.as_tensor(class_labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]  # lists of one label, which DiTPipeline takes as well
    if labels.ndim > 1 or labels.numel() == 0 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"class_labels must be an integer or a non-empty list of integers, got {class_labels!r}")
    wrong = [label for label in labels.reshape(-1).tolist() if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"class_labels must be in [0, {num_classes}), got {wrong}")
    return labels.tolist() if labels.ndim else [labels.item()]


def label_tensor(labels: list[int] | torch.Tensor, batch_size: int, device: torch.device) -> torch.Tensor:
    """(batch_size, ...) of one label, or row of labels, or of one an image.

    Raises:
        ValueError: for another number.
    """
    if len(labels) not in (1, batch_size):
        raise ValueError(f"class_labels must hold 1 or batch_size={batch_size} labels, got {len(labels)}")
    labels = torch.as_tensor(labels, device=device)
    return labels.expand(batch_size, *labels.shape[1:])


def number_of_images(batch_size: int | None, labels: list | torch.Tensor | None, latents: torch.Tensor | None) -> int:
    """The batch size, or as many as there are labels (n,) or latents (n, ...), or 1."""
    if batch_size is not None:
        return batch_size
    if labels is not None and len(labels) > 1:
        return len(labels)
    return 1 if latents is None else len(latents)


def initial_noise(
    latents: torch.Tensor | None,
    batch_size: int,
    channels: int,
    size: int | tuple[int, int] | None,
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Noise of unit variance (batch_size, channels, height, width): the latents as they are, or drawn.

    Args:
        latents: noise that is given, or None.
        batch_size: number of images.
        channels: of the network.
        size: (height, width), or one number for both; None where the model does not say.
        generator: one, or a list of one an image.
        device: of the network.
        dtype: of the network.

    Raises:
        ValueError: for latents of another shape, and where there is no size.
    """
    if latents is None:
        if size is None:
            raise ValueError("the model's config has no sample_size; pass latents= of the height and width to sample")
        size = (size, size) if is_integer(size) else tuple(size)
        # mps draws are not reproducible, so its noise comes from the CPU as in diffusers' own pipelines
        source = torch.device("cpu") if device.type == "mps" else device
        latents = randn_tensor((batch_size, channels, *size), generator=generator, device=source, dtype=dtype)
    elif latents.ndim != 4 or latents.shape[:2] != (batch_size, channels):
        raise ValueError(
            f"latents must have shape ({batch_size}, {channels}, height, width), got {tuple(latents.shape)}"
        )
    return latents


def reads_variance(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler expects a learned variance after the prediction, in as many channels again."""
    return str(scheduler.config.get("variance_type", "")).startswith("learned")


def with_precise_alphas(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A copy of a `DDPMScheduler` whose alphas_cumprod are float64, as in guided-diffusion; others as they are.

    In float32, 1 - alphas_cumprod of the first timesteps has lost three digits, and with it the ancestral noise.
    """
    if not isinstance(scheduler, DDPMScheduler):
        return scheduler
    scheduler = copy.deepcopy(scheduler)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    return scheduler


def image_tensor(name: str, image: Any, channels: int) -> torch.Tensor:
    """Images as float32 (batch, channels, height, width) in [0, 1] on their device.

    Args:
        name: of the argument, for the message.
        image: PIL, arrays ([batch,] height, width, channels) or tensors ([batch,] channels, height, width), uint8 or
            floating point in [0, 1]; or a list of them, of one size.
        channels: that the images must have.

    Raises:
        ValueError: with name in it, for anything else.
    """
    from PIL import Image

    if isinstance(image, list | tuple) and image and not any(isinstance(one, list | tuple) for one in image):
        parts = [image_tensor(name, one, channels) for one in image]
        if len(sizes := {(part.shape[3], part.shape[2]) for part in parts}) > 1:
            raise ValueError(f"{name} holds pictures of different sizes, {sorted(sizes)}; resize them to one")
        return torch.cat([part.to(parts[0].device) for part in parts])
    if isinstance(image, Image.Image):
        image = _pixels(name, image, channels)
    if isinstance(image, np.ndarray):
        image = image[None] if image.ndim == 3 else image
        if image.dtype not in (np.uint8, np.float16, np.float32, np.float64):
            raise ValueError(f"{name} must be uint8 or floating point in [0, 1], got {image.dtype}")
        image = torch.from_numpy(np.require(image, requirements="CW"))
        image = image.movedim(-1, 1) if image.ndim == 4 else image
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"{name} must be a PIL image, an array, a tensor or a list of them, got {image!r:.200}")
    image = image[None] if image.ndim == 3 else image
    if image.ndim != 4 or image.shape[1] != channels or not image.numel():
        raise ValueError(
            f"{name} must have {channels} channels, (batch, {channels}, height, width) as a tensor or (batch, height,"
            f" width, {channels}) as an array, got a tensor of shape {tuple(image.shape)}"
        )
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not image.is_floating_point():
        raise ValueError(f"{name} must be uint8 or floating point in [0, 1], got {image.dtype}")
    if not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            f"{name} must be uint8 or floating point in [0, 1], got {image.dtype} from {image.min()} to {image.max()}"
        )
    return image.float()


def _pixels(name: str, picture, channels: int) -> np.ndarray:
    """A PIL image as (height, width, 1 or 3): uint8, or floating point of the 16-bit and float modes.

    Raises ValueError for modes without a range and for pictures that are transparent in places.
    """
    if picture.mode in ("La", "RGBa"):  # premultiplied colours, which have one way to another mode
        picture = picture.convert(picture.mode.upper())
    alpha = picture.has_transparency_data
    if picture.mode.startswith("I;16") and not alpha:
        pixels = np.asarray(picture) / 65535
    elif picture.mode == "F":
        pixels = np.asarray(picture)  # in [0, 1], or it is refused
    elif picture.mode not in PIL_MODES or (alpha and picture.mode.startswith("I;16")):
        raise ValueError(f"{name} is a picture of mode {picture.mode!r}; convert it to 8-bit grey or RGB")
    elif alpha and picture.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        raise ValueError(f"{name} is transparent in places; lay it on a background first")
    else:
        pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 1 if channels == 1 else 3, axis=2)


def to_images(sample: torch.Tensor, output_type: str) -> torch.Tensor | np.ndarray | list:
    """A sample (batch, channels, height, width) with values around [-1, 1] as the pipeline's output type."""
    if output_type == "latent":
        return sample
    return as_output((sample / 2 + 0.5).clamp(0, 1), output_type)


def as_output(images: torch.Tensor, output_type: str) -> torch.Tensor | np.ndarray | list:
    """Images (batch, channels, height, width) in [0, 1] as "pt", "np" or "pil"."""
    if output_type == "pt":
        return images
    images = images.float().cpu().permute(0, 2, 3, 1).numpy()
    return DiffusionPipeline.numpy_to_pil(images) if output_type == "pil" else images
