r"""The chain in reverse: what a network's output says about rates, and about laws of the next and of the clean token.

.. math:: \hat R_t(x, y) = \sigma(t)\, Q[y, x]\, \frac{p_t(y)}{p_t(x)}

The functions act on rows, (n, vocab) float32 outputs of n positions whose current tokens are x, all at the same time.
They overwrite the outputs: what a step works on is a copy of a part of them.
"""

from dataclasses import dataclass
from typing import Any

import torch

LARGEST_LOG_SCORE = 40.0  # e^40 = 2e17


@dataclass(frozen=True)
class ReverseChain:
    """A kernel, its noise in time, and how a network predicts: "log_score", "x0" (logits) or "probabilities".

    kernel: one of `ctmc_kernels`. noise: a `ctmc_noise_schedules.NoiseSchedule`. floor: added to P[x_0, x] where a
    prediction of x_0 is divided by it.
    """

    kernel: Any
    noise: Any
    prediction_type: str
    floor: float

    @property
    def predicts_scores(self) -> bool:
        """Whether the network predicts log scores, and not p(x_0 | x_t)."""
        return self.prediction_type == "log_score"

    @property
    def denoising_draws(self) -> bool:
        """Whether the final denoising draws tokens, as a step does, or takes the most probable ones."""
        return self.kernel.mask is not None or self.predicts_scores

    def sigma_bar(self, time: float) -> float:
        """Total noise up to a time, in float64."""
        return float(self.noise.sigma_bar(torch.tensor(time, dtype=torch.float64)))

    def sigma(self, time: float) -> float:
        """Noise rate at a time, in float64."""
        return float(self.noise.sigma(torch.tensor(time, dtype=torch.float64)))

    def bounded(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log scores (n, vocab) whose exponentials neither overflow nor vanish; what was taken from each row, (n, 1).

        Only a row whose largest score lies outside of +-LARGEST_LOG_SCORE changes. Beyond, a jump is certain in a step
        of any length, or never comes, and its target depends on ratios alone. Other predictions come back as they are.
        """
        largest = output[:, : self.kernel.num_real_tokens].amax(dim=1, keepdim=True)
        if not self.predicts_scores:
            return output, torch.zeros_like(largest)
        excess = largest - largest.clamp(-LARGEST_LOG_SCORE, LARGEST_LOG_SCORE)
        excess = excess.masked_fill(largest.isinf(), 0)
        return output.sub_(excess).clamp_(max=LARGEST_LOG_SCORE), excess

    def largest(self, output: torch.Tensor) -> torch.Tensor:
        """The logarithm of the largest prediction of each row of (..., vocab), of logits and scores as they are.

        -inf rules a token out, so this is what must be finite; NaN and inf come through. The mask's column is not
        read.
        """
        largest = output[..., : self.kernel.num_real_tokens].amax(dim=-1)
        return largest.log() if self.prediction_type == "probabilities" else largest

    def score(self, output: torch.Tensor, x: torch.Tensor, time: float) -> torch.Tensor:
        """p_t(y) / p_t(x)."""
        if self.predicts_scores:
            return output.exp_()
        return self.kernel.score(self.x0_law(output), x, self.sigma_bar(time), self.floor)

    def x0_law(self, output: torch.Tensor) -> torch.Tensor:
        """p(x_0 | x) of a network that predicts it."""
        return self.kernel.x0_law(output, logits=self.prediction_type == "x0")

    def rates(self, output: torch.Tensor, x: torch.Tensor, time: float, duration: float = 1.0) -> torch.Tensor:
        """Rates of jumping times a duration, 0 at the current token."""
        return self.kernel.jumps_into(self.score(output, x, time), x, self.sigma(time) * duration)

    def held(self, output: torch.Tensor, x: torch.Tensor, time: float, start: float, end: float) -> torch.Tensor:
        """Expected jumps from one time down to another with the prediction made at `time`; 0 at the current token."""
        noise = (self.sigma_bar(t) for t in (time, start, end))
        return self.kernel.jumps_into(self.score(output, x, time), x, self.kernel.exposure(*noise))

    def rates_both_ways(self, output: torch.Tensor, x: torch.Tensor, time: float, duration: float) -> torch.Tensor:
        """Reverse plus forward rates times a duration: they leave the law at the time as it is."""
        forward = self.kernel.jumps_from(x)
        return self.rates(output, x, time, duration).add_(forward, alpha=self.sigma(time) * duration)

    def posterior_weights(self, output: torch.Tensor, x: torch.Tensor, time: float, next_time: float) -> torch.Tensor:
        """Weights of the token at an earlier time, exact for each position given the network's output."""
        now, then = self.sigma_bar(time), self.sigma_bar(next_time)
        if self.predicts_scores:
            return self.kernel.tweedie_weights(output.exp_(), x, now - then)
        return self.kernel.posterior_weights(self.x0_law(output), x, now, then, self.floor)

    def clean_weights(self, output: torch.Tensor, x: torch.Tensor, time: float) -> torch.Tensor:
        """Weights of the clean token; 0 for the mask."""
        if not self.predicts_scores:
            return self.x0_law(output)
        return self.kernel.clean_weights(output.exp_(), x, self.sigma_bar(time))

    def law_given_others(self, output: torch.Tensor, x: torch.Tensor, time: float) -> torch.Tensor:
        """What the network says of each position by the others alone; not of the absorbing kernel, see `x0_law`."""
        if self.kernel.ordered:
            return self.kernel.law_given_others(self.x0_law(output), x, self.sigma_bar(time), self.floor)
        return self.kernel.law_given_others(self.score(output, x, time), x)

    def rates_of_law(self, law: torch.Tensor, x: torch.Tensor, made: torch.Tensor, time: float) -> torch.Tensor:
        """Rates out of tokens x (n,) at a time that `law_given_others` (..., n, vocab) of times `made` imply."""
        now = self.kernel.law_at(law, made, self.sigma_bar(time))
        here = x.expand(now.shape[:-1])
        score = now / now.gather(-1, here.unsqueeze(-1)).clamp(min=1e-12)
        return self.kernel.jumps_into(score.flatten(0, -2), here.flatten(), self.sigma(time)).view_as(score)

    def hazard(self, times: torch.Tensor) -> torch.Tensor:
        """The rate at which a mask is decoded at times, of their shape and dtype."""
        noise = self.noise if times.dtype == torch.float64 else self.noise.stable or self.noise
        return noise.sigma(times) / noise.sigma_bar(times).expm1()

    def decoding_rates(self, times: torch.Tensor) -> torch.Tensor:
        """Factors that make `clean_weights` of the absorbing kernel rates at times, of their shape and dtype."""
        noise = self.noise.stable or self.noise
        return noise.sigma(times) if self.predicts_scores else self.hazard(times)
