"""Classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233) as a network that wraps a network."""

import math
from collections.abc import Callable
from numbers import Real
from pathlib import Path

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def classifier_gradient(
    classifier: Callable, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
) -> torch.Tensor:
    """grad_x log p(c | x_t) of a noise-aware classifier, by automatic differentiation.

    Args:
        classifier: called as classifier(x_t, timestep), returns logits (batch, classes), an output that has them, or a
            tuple of which they are the first.
        sample: x_t (batch, ...).
        timestep: (batch,).
        class_labels: (batch,); a label that is none of the classifier's classes, such as the null class, has gradient
            0.

    Returns:
        (batch, ...) in the sample's dtype.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # tensors that were made in inference mode have no gradients, their copies here have
        x, timestep, class_labels = (tensor.detach().clone() for tensor in (sample, timestep, class_labels))
        x.requires_grad_()
        output = classifier(x, timestep)
        logits = getattr(output, "logits", output)
        logits = logits[0] if isinstance(logits, tuple) else logits
        known = class_labels < logits.shape[1]
        log_p = logits.log_softmax(dim=1).gather(1, class_labels.where(known, 0)[:, None])[:, 0]
        (gradient,) = torch.autograd.grad((log_p * known).sum(), x)
    return gradient


class ClassifierGuidance(ModelMixin):
    r"""A network whose prediction is guided by a classifier; it is called like the `UNet2DModel` that it wraps.

    .. math:: \hat\epsilon = \epsilon - s \sqrt{1 - \bar\alpha_t}\, \nabla_{x_t} \log p(c \mid x_t)

    and the same change in a network that predicts v or the clean sample:

    .. math:: \hat v = v - s \sqrt{(1 - \bar\alpha_t) / \bar\alpha_t}\, \nabla, \quad
        \hat x_0 = x_0 + s\, (1 - \bar\alpha_t) / \sqrt{\bar\alpha_t}\, \nabla

    Take it as the unet of a pixel-space pipeline: `BoostAndSkipPipeline(ClassifierGuidance(unet, ...), scheduler)`.

    Args:
        unet: the network, conditional or not. A learned variance, in further channels, is left as it is.
        classifier: called as classifier(x_t, timestep), gives logits, (batch, classes), of noisy samples; see
            `classifier_gradient`.
        scheduler: for its alphas_cumprod and prediction_type, those that the network was trained with.
        guidance_scale: s; 0 is the network itself.
        num_classes: of the classifier, for an unconditional network, which pipelines otherwise hand no labels.

    Raises:
        ValueError: for a scheduler without alphas_cumprod or of another prediction_type, for num_classes of a
            conditional network, and when it is saved: save the network and the classifier instead.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        classifier: torch.nn.Module,
        scheduler: SchedulerMixin,
        guidance_scale: float = 1.0,
        num_classes: int | None = None,
    ):
        super().__init__()
        self.prediction_type = scheduler.config.get("prediction_type")
        if self.prediction_type not in PREDICTION_TYPES or not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"scheduler must have alphas_cumprod and a prediction_type in {PREDICTION_TYPES}, got"
                f" {type(scheduler).__name__} with {self.prediction_type!r}"
            )
        if not (isinstance(guidance_scale, Real) and math.isfinite(guidance_scale)):
            raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale!r}; 0 is off")
        self._takes_labels = unet.config.get("num_class_embeds") is not None
        if self._takes_labels and num_classes is not None:
            raise ValueError(f"num_classes={num_classes} is for an unconditional network; leave it out")
        self.unet, self.classifier, self.guidance_scale = unet, classifier, guidance_scale
        self.num_classes = num_classes
        alphas_cumprod = torch.cumprod(1 - scheduler.betas.cpu().double(), dim=0)
        # Both, from float64: in float32, 1 - alphas_cumprod of the first timesteps would have lost three digits
        self._shares = {(torch.device("cpu"), torch.float64): torch.stack([alphas_cumprod, 1 - alphas_cumprod])}

    @property
    def config(self) -> FrozenDict:
        """The network's, with num_class_embeds for labels that the classifier alone reads."""
        own = {} if self._takes_labels else {"num_class_embeds": self.num_classes}
        return FrozenDict({**self.unet.config, **own})

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple:
        """The guided prediction.

        Args:
            sample: x_t (batch, channels, height, width).
            timestep: one, or (batch,).
            class_labels: (batch,).
            return_dict: whether to return a `UNet2DOutput` or a tuple.

        Raises:
            ValueError: where labels are missing.
        """
        if class_labels is None:
            raise ValueError("class_labels must be given: the classifier guides towards a class")
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        labels = {"class_labels": class_labels} if self._takes_labels else {}
        output = self.unet(sample, timestep, **labels).sample
        if self.guidance_scale != 0:
            gradient = classifier_gradient(self.classifier, sample, timestep, class_labels)
            factor = self._factor(timestep, torch.promote_types(sample.dtype, torch.float32))
            factor = (self.guidance_scale * factor).view(-1, *[1] * (sample.ndim - 1))
            channels = sample.shape[1]
            guided = output[:, :channels] + (factor * gradient.to(factor.dtype)).to(output.dtype)
            output = torch.cat([guided, output[:, channels:]], dim=1)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _factor(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What multiplies the gradient, (batch,); between two timesteps alphas_cumprod is interpolated."""
        shares = self._shares_on(timestep.device, dtype)
        time = timestep.to(dtype).clamp(0, shares.shape[1] - 1)
        low = time.floor().long()
        high = (low + 1).clamp(max=shares.shape[1] - 1)
        signal, noise = torch.lerp(shares[:, low], shares[:, high], time - low)
        if self.prediction_type == "epsilon":
            factor = -noise.sqrt()
        elif self.prediction_type == "v_prediction":
            factor = -(noise / signal).sqrt()
        else:
            factor = noise / signal.sqrt()
        return factor.where(signal > 0, 0)  # of pure noise a classifier can say nothing

    def _shares_on(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """alphas_cumprod and 1 - alphas_cumprod, (2, timesteps), which go to a device once."""
        if (device, dtype) not in self._shares:
            exact = self._shares[torch.device("cpu"), torch.float64]
            self._shares[device, dtype] = exact.to(dtype).to(device)
        return self._shares[device, dtype]

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Not possible: the two networks are saved one by one.

        Args:
            save_directory: not used.
            **kwargs: not used.

        Raises:
            ValueError: always.
        """
        raise ValueError("ClassifierGuidance is not saved; save its .unet and its .classifier, and wrap them again")
