r"""Boost-and-Skip for four diffusers schedulers: samples from low-density regions without guidance or training.

Boost-and-Skip (Um, Kim, Ye: "Boost-and-Skip: A Simple Guidance-Free Diffusion for Minority Generation", ICML 2025,
arXiv 2502.06516) changes a stock sampler in two places. With the steps of the schedule numbered from 0 (noisiest),

.. math:: x_{start} = \gamma \epsilon, \quad \epsilon \sim N(0, I), \quad start = skip\_steps.

`gamma` multiplies the standard deviation of the initial noise (the boost); the first `skip_steps` steps are dropped
(the skip); a list of timesteps or sigmas runs as it was given, whole. The noise is not rescaled to the level of the
later start. In the variance-exploding form of `EulerDiscreteScheduler` the same start reads
:math:`x = \gamma \epsilon \sqrt{1 + \sigma_{start}^2}`. The paper uses gamma 4 (CelebA-64) and 2.5 (ImageNet-64) with
skip_steps 3 of 250. gamma 1 and skip_steps 0 is the stock scheduler, bit for bit.

What the skip means is the noise level that the sampler starts from, and 3 steps of 250 are another one than 3 of 50.
`skip_to_sigma` names the level itself: the first step that is kept is the one whose sigma is nearest to it.

All are scheduler configuration, so every pipeline that honours `init_noise_sigma` gets them with

    pipe.scheduler = boost_and_skip(pipe.scheduler, gamma=2.5, skip_steps=3)

`DDPMPipeline`, `DDIMPipeline` and `DiTPipeline` ignore `init_noise_sigma`: there only the skip takes effect. So does
image-to-image, which starts from the noised image and counts the skipped steps as strength: use text-to-image.
"""

import functools
import inspect
import math
from bisect import bisect_right
from operator import neg

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

# diffusers loads a saved scheduler only if the namespace of its module holds this name.
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .scheduler_arguments import check_generators, checked_arguments, is_of_kind, short


def _checked(gamma: float, skip_steps: int, skip_to_sigma: float | None) -> tuple[float, int, float | None]:
    """The three as plain (JSON-able) Python numbers. Raises ValueError if one is not allowed."""
    if not is_of_kind(gamma, float) or not (math.isfinite(gamma) and gamma > 0):
        raise ValueError(
            f"gamma={short(gamma)} must be a finite number > 0: it multiplies the standard deviation of the initial"
            " noise. Pass gamma=1.0 to switch the boost off."
        )
    if not is_of_kind(skip_steps, int) or skip_steps < 0:
        raise ValueError(
            f"skip_steps={short(skip_steps)} must be an integer >= 0: it counts the steps dropped from the start of"
            " the schedule. Pass skip_steps=0 to drop none."
        )
    if skip_to_sigma is None:
        return float(gamma), int(skip_steps), None
    if not is_of_kind(skip_to_sigma, float) or not (math.isfinite(skip_to_sigma) and skip_to_sigma > 0):
        raise ValueError(
            f"skip_to_sigma={short(skip_to_sigma)} must be a finite number > 0: the noise level, noise over signal,"
            " of the first step that is kept. Pass None to drop none."
        )
    if skip_steps:
        raise ValueError(
            f"skip_steps={skip_steps} and skip_to_sigma={skip_to_sigma} both say where the sampler starts: pass one."
        )
    return float(gamma), int(skip_steps), float(skip_to_sigma)


def _noise_over_signal(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """sqrt((1 - alpha) / alpha), float64, of a table of any shape."""
    alphas = alphas_cumprod.cpu().double()  # which not every device has
    return ((1 - alphas) / alphas).sqrt()


def _boosted_init(parent: type[SchedulerMixin]):
    """`__init__` with every parameter of `parent`, then `gamma`, `skip_steps` and `skip_to_sigma` as keywords.

    diffusers reads the config keys off the signature, which must therefore be spelled out: behind a bare `**kwargs`
    `from_config` would show the given values in the config but build the scheduler with the defaults.
    """
    inherited = inspect.signature(parent.__init__)

    def __init__(self, *args, gamma: float = 1.0, skip_steps: int = 0, skip_to_sigma: float | None = None, **kwargs):
        gamma, skip_steps, skip_to_sigma = _checked(gamma, skip_steps, skip_to_sigma)
        # By name, because diffusers takes positional arguments for defaults and then leaves them out of from_config.
        given = inherited.bind(self, *args, **kwargs).arguments
        length = given.get("num_train_timesteps", 1000)
        if not is_of_kind(length, int) or length < 1:
            raise ValueError(f"num_train_timesteps={short(length)} must be an integer >= 1.")
        parent.__init__(**given)
        self.register_to_config(gamma=gamma, skip_steps=skip_steps, skip_to_sigma=skip_to_sigma)
        if "init_noise_sigma" in vars(self):  # in Euler it is a property, see there
            self.init_noise_sigma = gamma

    own = [p for p in inspect.signature(__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    __init__.__signature__ = inherited.replace(parameters=[*inherited.parameters.values(), *own])
    return register_to_config(__init__)


def _skipping(set_timesteps, timesteps=list[int] | None):
    """`set_timesteps` of a parent with its arguments checked, then the cut, but of no list; the signature is kept.

    timesteps: what the argument of that name may be.
    """
    signature = inspect.signature(set_timesteps)
    kinds = {"num_inference_steps": int | None, "device": str | torch.device | None, "timesteps": timesteps}
    own = [p.replace(annotation=kinds.get(p.name, p.annotation)) for p in signature.parameters.values()]
    signature = signature.replace(parameters=own)

    @functools.wraps(set_timesteps)
    def wrapper(self, *args, **kwargs):
        given = {name: one for name, one in signature.bind(self, *args, **kwargs).arguments.items() if one is not None}
        self._check_schedule({name: given[name] for name in given if name not in ("self", "device", "mu")})
        if "timesteps" in given:
            given["timesteps"] = self._checked_timesteps(given["timesteps"])
        set_timesteps(**given)
        if "num_inference_steps" in given:
            self._drop_skipped_steps()

    wrapper.__signature__ = signature
    return checked_arguments(wrapper, but="timesteps")  # which the scheduler checks


class _BoostAndSkip:
    """The skip, shared by the four schedulers."""

    # Everything that a step looks up by its position in the schedule. A table left out would run out of step.
    _tables = ("timesteps",)
    _whole_timesteps = True

    def _check_schedule(self, given: dict) -> None:
        """Raises ValueError unless one of the number of steps, timesteps and sigmas is given, and in its range."""
        if len(given) != 1:
            raise ValueError(
                "Pass exactly one of num_inference_steps and timesteps (or, for Euler, sigmas), got"
                f" {', '.join(given) or 'none'}."
            )
        steps, sigmas = given.get("num_inference_steps", 1), given.get("sigmas", [1.0, 0.0])
        if steps < 1:
            raise ValueError(f"num_inference_steps={steps} must be an integer >= 1.")
        table = np.asarray(sigmas, dtype=np.float64)
        if len(table) < 2 or not np.isfinite(table).all() or table[-1] < 0 or (table[1:] >= table[:-1]).any():
            raise ValueError(f"sigmas={sigmas} must be finite, strictly decreasing and >= 0, at least two.")

    def _drop_skipped_steps(self):
        """Drop the first entries of each table, `skip_steps` or those before the sigma nearest to `skip_to_sigma`.

        Raises ValueError if no step would be left, and for a sigma that the schedule does not reach.
        """
        if self.config.skip_to_sigma is not None:
            skip_steps = self._steps_before(self.config.skip_to_sigma)
        else:
            skip_steps = self.config.skip_steps
        num_steps = len(self.timesteps)
        if skip_steps >= num_steps:
            raise ValueError(
                f"skip_steps={skip_steps} must be smaller than the number of steps, and this schedule has {num_steps}:"
                " set more steps, or build the scheduler with a smaller skip_steps."
            )
        for table in self._tables:
            setattr(self, table, getattr(self, table)[skip_steps:])

    def _init_step_index(self, timestep: int | torch.Tensor) -> None:
        """Stock takes the second of equal timesteps, right for a start in the middle; a boosted run starts at the
        first one, where Karras, exponential, beta and Lu noise levels that round to one timestep may lie."""
        super()._init_step_index(timestep)
        on = self.config.gamma != 1 or self._skips()
        if on and self.begin_index is None and self._step_index == 1 and self.timesteps[0] == self.timesteps[1]:
            self._step_index = 0

    @checked_arguments
    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """As of the stock scheduler.

        Args:
            original_samples: (batch, channels, ...).
            noise: of unit variance, the shape of the samples.
            timesteps: one, or (batch,).

        Raises:
            ValueError: for other shapes, and for no timestep: image-to-image with nothing left to do.
        """
        if noise.shape != original_samples.shape:
            raise ValueError(f"noise must have the shape {tuple(original_samples.shape)}, got {tuple(noise.shape)}.")
        if timesteps.ndim > 1 or timesteps.numel() not in (0, 1, len(original_samples)):
            raise ValueError(
                f"timesteps must be one or one a sample, {len(original_samples)}, got {tuple(timesteps.shape)}."
            )
        if self._skips() and not timesteps.numel():
            dropped = self.num_inference_steps - len(self.timesteps)
            raise ValueError(
                f"strength leaves no step: skip_steps={dropped} are dropped from the start of the schedule, and"
                " image-to-image starts behind its end; use a strength > skip_steps / num_inference_steps,"
                f" {dropped} / {self.num_inference_steps}, or skip none."
            )
        return super().add_noise(original_samples, noise, timesteps)

    def _skips(self) -> bool:
        return bool(self.config.skip_steps) or self.config.skip_to_sigma is not None

    def _steps_before(self, sigma: float) -> int:
        """How many steps lie before the one whose noise level is nearest to sigma, by their ratio.

        The highest level that can be asked for is that of the last training timestep: with few steps a schedule may
        start below it, and then no step is dropped.
        """
        levels = self._noise_levels()
        highest = max(_noise_over_signal(self.alphas_cumprod)[-1].item(), levels[0])
        if not levels[-1] <= sigma <= highest:
            raise ValueError(
                f"skip_to_sigma={sigma:g} is outside of the noise levels of this schedule, {levels[-1]:.4g} to"
                f" {highest:.4g} (noise over signal): choose one between them."
            )
        return min(range(len(levels)), key=lambda i: abs(math.log(levels[i] / sigma)))

    def _noise_levels(self) -> list[float]:
        """Noise over signal at the start of each step of the schedule as set."""
        return _noise_over_signal(self.alphas_cumprod)[self.timesteps.cpu().long()].tolist()

    def _checked_timesteps(self, timesteps: list[int]) -> np.ndarray:
        table, end = np.asarray(timesteps), self.config.num_train_timesteps
        kind = np.integer if self._whole_timesteps else np.number
        numbers = table.ndim == 1 and len(table) > 0 and np.issubdtype(table.dtype, kind)
        if not numbers or not 0 <= table[-1] <= table[0] < end or not (table[1:] < table[:-1]).all():
            raise ValueError(
                f"timesteps={timesteps} must be strictly decreasing"
                f" {'integers' if self._whole_timesteps else 'numbers'} in [0, {end}), and at least one: sort them,"
                " drop repeated ones, and round."
            )
        return table.astype(np.int64) if self._whole_timesteps else table


class BoostAndSkipDDPMScheduler(_BoostAndSkip, DDPMScheduler):
    """Ancestral sampling, the paper's sampler: `DDPMScheduler` with `gamma` and `skip_steps`.

    Takes every argument of `DDPMScheduler`. The stock step already reads its neighbour from `timesteps`, so uneven
    custom `timesteps=` are right, and learned variances (`variance_type` "learned" or "learned_range") expect model
    outputs (batch, 2 * channels, ...).

    Args:
        gamma: factor on the standard deviation of the initial noise, finite and > 0; 1 is off.
        skip_steps: steps dropped from the start of a schedule set by its number of steps, >= 0; 0 is off.
        skip_to_sigma: instead of `skip_steps`, the noise level (noise over signal, > 0) to start from, whatever the
            number of steps: those before the step whose level is nearest, by the ratio, are dropped; None is off.

    Raises:
        ValueError: if one of the three is out of range, for both kinds of skip at once, or (in `set_timesteps`) if no
            step would be left or the schedule does not reach `skip_to_sigma`.
    """

    __init__ = _boosted_init(DDPMScheduler)

    set_timesteps = _skipping(DDPMScheduler.set_timesteps)


class BoostAndSkipEulerDiscreteScheduler(_BoostAndSkip, EulerDiscreteScheduler):
    """`EulerDiscreteScheduler` with `gamma` and `skip_steps`: `timesteps` and `sigmas` are cut together.

    Takes every argument of `EulerDiscreteScheduler`. `s_churn` of `step` is spread over the steps that are kept.

    Args:
        gamma: as of `BoostAndSkipDDPMScheduler`.
        skip_steps: as of `BoostAndSkipDDPMScheduler`.
        skip_to_sigma: as of `BoostAndSkipDDPMScheduler`.

    Raises:
        ValueError: as `BoostAndSkipDDPMScheduler`.
    """

    _tables = ("timesteps", "sigmas")
    __init__ = _boosted_init(EulerDiscreteScheduler)
    _whole_timesteps = False
    set_timesteps = _skipping(EulerDiscreteScheduler.set_timesteps, list[float] | None)

    def _noise_levels(self) -> list[float]:
        return self.sigmas[: len(self.timesteps)].tolist()

    @property
    def init_noise_sigma(self) -> float | torch.Tensor:
        """gamma * sqrt(1 + sigma^2) at the first kept sigma; as in stock, gamma * sigma for the timestep spacings
        "linspace" and "trailing", which take the data to be negligible at the start."""
        return self.config.gamma * super().init_noise_sigma


class BoostAndSkipDPMSolverMultistepScheduler(_BoostAndSkip, DPMSolverMultistepScheduler):
    """`DPMSolverMultistepScheduler` with `gamma` and `skip_steps`: `timesteps` and `sigmas` are cut together.

    Takes every argument of `DPMSolverMultistepScheduler`. The solver starts anew, at order 1, at the first kept step.

    Args:
        gamma: as of `BoostAndSkipDDPMScheduler`.
        skip_steps: as of `BoostAndSkipDDPMScheduler`.
        skip_to_sigma: as of `BoostAndSkipDDPMScheduler`.

    Raises:
        ValueError: as `BoostAndSkipDDPMScheduler`.
    """

    _tables = ("timesteps", "sigmas")
    __init__ = _boosted_init(DPMSolverMultistepScheduler)
    set_timesteps = _skipping(DPMSolverMultistepScheduler.set_timesteps)

    def _noise_levels(self) -> list[float]:
        levels = self.sigmas[: len(self.timesteps)].double()
        return (levels / (1 - levels) if self.config.use_flow_sigmas else levels).tolist()


class BoostAndSkipDDIMScheduler(_BoostAndSkip, DDIMScheduler):
    """`DDIMScheduler` with `gamma` and `skip_steps`, custom timesteps, and true neighbours.

    A step goes from a timestep to the next entry of the table, also where the table is uneven. The stock scheduler
    goes to t - num_train_timesteps // num_inference_steps instead, which is another timestep for linspace spacing and
    for trailing spacing that does not divide evenly. To equal it bit for bit, that rule is kept while nothing is
    changed: gamma 1, nothing skipped and a table set by its number of steps.

    Takes every argument of `DDIMScheduler`.

    Args:
        gamma: as of `BoostAndSkipDDPMScheduler`.
        skip_steps: as of `BoostAndSkipDDPMScheduler`.
        skip_to_sigma: as of `BoostAndSkipDDPMScheduler`.

    Raises:
        ValueError: as `BoostAndSkipDDPMScheduler`.
    """

    custom_timesteps = False
    _table: torch.Tensor | None = None
    __init__ = _boosted_init(DDIMScheduler)

    @checked_arguments(but="timesteps")
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Set the schedule, by its number of steps, the first `skip_steps` dropped, or as a list, which runs as given.

        Args:
            num_inference_steps: number of steps before the cut, spaced by `timestep_spacing`.
            device: where `timesteps` goes.
            timesteps: custom integers, strictly decreasing, each in [0, num_train_timesteps).

        Raises:
            ValueError: unless exactly one of the two is given, the list is as above, and a step is left.
        """
        given = {"num_inference_steps": num_inference_steps, "timesteps": timesteps}
        self._check_schedule({name: one for name, one in given.items() if one is not None})
        if timesteps is None:
            super().set_timesteps(num_inference_steps, device)
            self._drop_skipped_steps()
        else:
            table = self._checked_timesteps(timesteps)
            self.num_inference_steps = len(table)
            self.timesteps = torch.from_numpy(table).to(device)
        self.custom_timesteps = timesteps is not None
        self._table = None
        if self.timesteps.device.type != "cpu":  # alphas_cumprod after that of clean data, timestep -1
            alphas = torch.cat([self.final_alpha_cumprod.reshape(1), self.alphas_cumprod.cpu()])
            self._table = alphas.to(self.timesteps.device)

    def previous_timestep(self, timestep: int | torch.Tensor) -> int:
        """The timestep that a step from `timestep` ends at: the next smaller one of the table; negative: clean data.

        Args:
            timestep: one of `timesteps`, or an integer between them.

        Raises:
            ValueError: for a timestep before the first one of the table, and for one that is no integer >= 0 (the
                stock rule, where it holds, asks for no table).
        """
        one = isinstance(timestep, torch.Tensor) and timestep.numel() == 1
        if not (one or is_of_kind(timestep, float)) or not math.isfinite(timestep):
            raise ValueError(
                f"timestep={short(timestep)} must be one of scheduler.timesteps, or an integer between them."
            )
        t, table = int(timestep), self.timesteps.tolist()
        if self._follows_stock_rule():
            return t - self.config.num_train_timesteps // self.num_inference_steps  # the stock rule
        if t != timestep or not 0 <= t <= table[0]:
            raise ValueError(
                f"timestep={timestep} is not in the schedule, from {table[0]} to 0: it must be one of"
                f" scheduler.timesteps, {table}, or an integer between them."
            )
        return [*table, -1][bisect_right(table, -t, key=neg)]

    @checked_arguments(but="timestep")
    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:
        r"""One step of DDIM (arXiv 2010.02502, equation 12) to the neighbour s of t in the table:

        .. math:: x_s = \sqrt{\bar\alpha_s} x_0 + \sqrt{1 - \bar\alpha_s - \sigma^2} \epsilon_\theta + \sigma z

        with sigma as in equation 16. The operations are in the order of the stock step, so that results are equal.

        Args:
            model_output: (batch, channels, ...); of learned-variance outputs, (batch, 2 * channels, ...), the second
                half is dropped.
            timestep: t, an entry of `timesteps`, or an integer between two of them.
            sample: x_t, (batch, channels, ...).
            eta: 0 for the deterministic sampler, 1 for the variance of DDPM.
            use_clipped_model_output: derive epsilon again from the clipped x_0, as guided-diffusion does.
            generator: draws z where eta > 0 and `variance_noise` is not given.
            variance_noise: z itself, the shape of sample.
            return_dict: `DDIMSchedulerOutput`, or the tuple (x_s, x_0).

        Raises:
            ValueError: before `set_timesteps`, for a timestep before the first one of the table, for generator with
                variance_noise.
        """
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps=None: call set_timesteps before step.")
        if sample.ndim > 1 and model_output.ndim > 1 and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        for name, tensor in (("model_output", model_output), ("variance_noise", variance_noise)):
            if tensor is not None and tensor.shape != sample.shape:
                raise ValueError(f"{name} must have the shape {tuple(sample.shape)}, got {tuple(tensor.shape)}.")

        check_generators(generator, len(sample))
        if not (math.isfinite(eta) and eta >= 0):
            raise ValueError(f"eta={eta} must be a finite number >= 0: 0 is DDIM, 1 its ancestral form.")

        alpha_prod_t, alpha_prod_s = self._alphas(timestep)
        pred_x0, pred_epsilon = self._predict(model_output, sample, alpha_prod_t)
        if self.config.thresholding:
            pred_x0 = self._threshold_sample(pred_x0)
        elif self.config.clip_sample:
            pred_x0 = pred_x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if use_clipped_model_output:
            pred_epsilon = (sample - alpha_prod_t**0.5 * pred_x0) / (1 - alpha_prod_t) ** 0.5

        variance = (1 - alpha_prod_s) / (1 - alpha_prod_t) * (1 - alpha_prod_t / alpha_prod_s)
        sigma = eta * variance**0.5
        direction = (1 - alpha_prod_s - sigma**2) ** 0.5 * pred_epsilon
        prev_sample = alpha_prod_s**0.5 * pred_x0 + direction
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("Pass only one of generator and variance_noise: the noise is drawn, or it is given.")
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )
            prev_sample = prev_sample + sigma * variance_noise
        return DDIMSchedulerOutput(prev_sample, pred_x0) if return_dict else (prev_sample, pred_x0)

    def _alphas(self, timestep: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alphas_cumprod () at t and at its neighbour.

        A timestep that lies on a device, beside the schedule, is looked up there: reading it would wait for all that
        the device has to do, and so would the check that it is in the schedule.
        """
        if not isinstance(timestep, torch.Tensor) or timestep.device.type == "cpu" or self._table is None:
            s, t = self.previous_timestep(timestep), int(timestep)
            return self.alphas_cumprod[t], self.alphas_cumprod[s] if s >= 0 else self.final_alpha_cumprod
        t = timestep.reshape(1).long()
        if self._follows_stock_rule():
            s = t - self.config.num_train_timesteps // self.num_inference_steps
        else:
            s = torch.where(self.timesteps < t, self.timesteps, -1).amax(dim=0, keepdim=True)
        return self._table[t + 1][0], self._table[s.clamp(min=-1) + 1][0]

    def _follows_stock_rule(self) -> bool:
        off = (self.config.gamma, self.config.skip_steps, self.config.skip_to_sigma) == (1, 0, None)
        return bool(off and self.num_inference_steps and not self.custom_timesteps)

    def _predict(self, model_output, sample, alpha_prod_t):
        """x_0, not yet clipped, and epsilon, from a model output of any prediction type."""
        alpha, sigma = alpha_prod_t**0.5, (1 - alpha_prod_t) ** 0.5
        match self.config.prediction_type:
            case "epsilon":
                return (sample - sigma * model_output) / alpha, model_output
            case "sample":
                return model_output, (sample - alpha * model_output) / sigma
            case "v_prediction":
                return alpha * sample - sigma * model_output, alpha * model_output + sigma * sample
        raise ValueError(f"{self.config.prediction_type=} must be 'epsilon', 'sample' or 'v_prediction'.")


_BOOSTED = {
    DDPMScheduler: BoostAndSkipDDPMScheduler,
    DDIMScheduler: BoostAndSkipDDIMScheduler,
    EulerDiscreteScheduler: BoostAndSkipEulerDiscreteScheduler,
    DPMSolverMultistepScheduler: BoostAndSkipDPMSolverMultistepScheduler,
}


@checked_arguments
def boost_and_skip(
    scheduler: SchedulerMixin,
    gamma: float | None = None,
    skip_steps: int | None = None,
    skip_to_sigma: float | None = None,
) -> SchedulerMixin:
    """The Boost-and-Skip scheduler with the config of `scheduler`; one that is boosted already gets the new numbers.

    A number left out is off for a stock scheduler (gamma 1, no skip) and stays as it is for a boosted one, of which a
    new skip of either kind replaces the old one. The result is a new scheduler: call `set_timesteps` on it.

    Args:
        scheduler: of one of the four classes exactly, or boosted already. A subclass, or a variant such as
            `DDPMParallelScheduler`, may hold tables of its own, which a cut would not reach.
        gamma: factor on the standard deviation of the initial noise, > 0.
        skip_steps: how many of the first steps to drop, >= 0.
        skip_to_sigma: instead, the noise level to start from, noise over signal: the steps before the one whose level
            is nearest are dropped.

    Raises:
        ValueError: for a scheduler of any other class, if a number is out of range, and for both kinds of skip.
    """
    cls = type(scheduler)
    given = {"gamma": gamma, "skip_steps": skip_steps, "skip_to_sigma": skip_to_sigma}
    given = {name: value for name, value in given.items() if value is not None}
    if given.keys() & {"skip_steps", "skip_to_sigma"}:
        given = {"skip_steps": 0, "skip_to_sigma": None, **given}
    if cls in _BOOSTED.values():
        return cls.from_config(scheduler.config, **given)
    if cls in _BOOSTED:  # a stock scheduler made from ours keeps its numbers in the config, so off is said aloud
        return _BOOSTED[cls].from_config(
            scheduler.config, **{"gamma": 1.0, "skip_steps": 0, "skip_to_sigma": None, **given}
        )
    advice = (
        "Unless the model is distilled, convert first: EulerDiscreteScheduler.from_config(pipe.scheduler.config)."
        if hasattr(scheduler, "alphas_cumprod")
        else "Flow matching and other processes without alphas_cumprod are not covered."
    )
    known = ", ".join(each.__name__ for pair in _BOOSTED.items() for each in pair)
    raise ValueError(
        f"scheduler={cls.__module__}.{cls.__name__} is not one that boost_and_skip can shorten safely. It knows"
        f" exactly {known}, and not their subclasses. {advice}"
    )
