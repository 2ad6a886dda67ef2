"""Training losses and the likelihood bound of discrete diffusion; the mathematics of the chain is the scheduler's."""

import torch
import torch.nn.functional as F

from ..pipelines.call_arguments import checked_arguments
from ..schedulers import CTMCScheduler


@checked_arguments
def score_entropy(
    scheduler: CTMCScheduler,
    log_score: torch.Tensor,
    noisy: torch.Tensor,
    original: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    r"""Denoising score entropy of each position, (batch, length) (Lou et al., 2310.16834, theorem 3.4).

    .. math:: \sum_{y \ne x} Q[y, x] \Big( e^{s_y} - r_y s_y + r_y (\log r_y - 1) \Big), \quad
              r_y = \frac{P_{0t}[x_0, y]}{P_{0t}[x_0, x]}

    for the current token x; 0 where s is the log of r.

    Args:
        scheduler: with the kernel and the noise.
        log_score: s, (batch, length, vocab), float32 is wise.
        noisy: x, (batch, length) int64.
        original: x_0, (batch, length) int64.
        timesteps: (batch,).

    Raises:
        ValueError: for kernels that do not predict scores, and for other shapes.
    """
    _check_tokens(scheduler, "log_score", log_score, noisy, original)
    if timesteps.shape != original.shape[:1]:
        raise ValueError(f"timesteps must be ({len(original)},), got {tuple(timesteps.shape)}")
    sigma_bar = scheduler.sigma_bar(timesteps).unsqueeze(1)
    return scheduler.kernel.score_entropy(log_score, noisy, original, sigma_bar)


@checked_arguments
def score_entropy_loss(
    scheduler: CTMCScheduler,
    log_score: torch.Tensor,
    noisy: torch.Tensor,
    original: torch.Tensor,
    timesteps: torch.Tensor,
    weighting: str = "sigma",
) -> torch.Tensor:
    """Score entropy summed over the positions of each sample, (batch,); arguments as of `score_entropy`.

    Args:
        scheduler: as of `score_entropy`.
        log_score: as of `score_entropy`.
        noisy: as of `score_entropy`.
        original: as of `score_entropy`.
        timesteps: as of `score_entropy`.
        weighting: "sigma", times sigma(t), which makes it a bound on the likelihood (SEDD); "none", as Jump Your Steps
            trains its CountDown models.

    Raises:
        ValueError: for another weighting, and as `score_entropy`.
    """
    if weighting not in ("sigma", "none"):
        raise ValueError(f'weighting must be "sigma" or "none", got {weighting!r}')
    loss = score_entropy(scheduler, log_score, noisy, original, timesteps).sum(dim=1)
    return loss * scheduler.sigma(timesteps) if weighting == "sigma" else loss


@checked_arguments
def x0_cross_entropy(
    scheduler: CTMCScheduler, logits: torch.Tensor, noisy: torch.Tensor, original: torch.Tensor
) -> torch.Tensor:
    """Mean -log p(x_0 | x_t) of each sample, (batch,): over all positions, or over the masked ones (absorbing).

    A sample without masks has the loss 0.

    The part of tauLDR's loss (2205.14987, section 3.2) that trains a network of x_0 for any kernel.

    Args:
        scheduler: with the kernel.
        logits: (batch, length, vocab); the mask's column is left out.
        noisy: x_t, (batch, length) int64.
        original: x_0, (batch, length) int64.
    """
    _check_tokens(scheduler, "logits", logits, noisy, original)
    if scheduler.mask_token_id is None:
        return F.cross_entropy(logits.transpose(1, 2), original, reduction="none").mean(dim=1)
    masked = noisy == scheduler.mask_token_id
    real = logits[..., : scheduler.kernel.num_real_tokens].transpose(1, 2)
    each = F.cross_entropy(real, original, reduction="none") * masked
    return each.sum(dim=1) / masked.sum(dim=1).clamp(min=1)


@checked_arguments
@torch.no_grad()
def likelihood_bound(
    model: torch.nn.Module,
    scheduler: CTMCScheduler,
    tokens: torch.Tensor,
    num_times: int = 16,
    batch_size: int = 32,
    first_time: float = 1e-3,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    r"""Upper bound on -log p(x_0) / length of each sequence in nats a token, (n,) float64 on the CPU.

    .. math:: \frac{1}{L} \int_0^1 \sigma(t)\, E_{x_t | x_0}[\text{score entropy}]\, dt

    (2310.16834, section 3.3), estimated with one random time in each of `num_times` equal parts of [first_time, 1], so
    their mean over many sequences has little noise. As in the authors' evaluation the rest of the bound is left out:
    the times before, and how far the law at time 1 is from the prior.

    Args:
        model: as of `DiscreteDiffusionPipeline`.
        scheduler: as of `DiscreteDiffusionPipeline`; kernels "absorbing" and "uniform", any prediction type.
        tokens: (n, length) integers without masks.
        num_times: random times a sequence.
        batch_size: sequences that pass the network together.
        first_time: where the integral begins.
        generator: on the model's device.

    Raises:
        ValueError: for other kernels.
    """
    if num_times < 1 or batch_size < 1 or not 0 < first_time < 1:
        raise ValueError(
            f"need num_times >= 1, batch_size >= 1 and 0 < first_time < 1, got {num_times=}, {batch_size=} and"
            f" {first_time=}"
        )
    device, sums = next(model.parameters()).device, []
    for original in tokens.split(batch_size):
        original, total = original.to(device).long(), 0
        for part in range(num_times):
            inside = torch.rand(len(original), generator=generator, device=device)
            timesteps = first_time + (1 - first_time) * (part + inside) / num_times
            noisy = scheduler.add_noise(original, generator, timesteps)
            output = model(noisy, scheduler.model_time(timesteps, len(original)))
            log_score = _log_score(scheduler, output, noisy, timesteps)
            total = total + score_entropy_loss(scheduler, log_score, noisy, original, timesteps).cpu().double()
        sums.append(total / num_times / tokens.shape[1])
    return torch.cat(sums)


def _check_tokens(scheduler: CTMCScheduler, name: str, output, noisy: torch.Tensor, original: torch.Tensor) -> None:
    expected = (*original.shape, scheduler.config.vocab_size)
    integers = not (original.is_floating_point() or noisy.is_floating_point())
    if original.ndim != 2 or not integers or noisy.shape != original.shape or output.shape != expected:
        raise ValueError(
            f"original and noisy must be integers (batch, length) and {name} (batch, length, vocab_size), got"
            f" {tuple(original.shape)}, {tuple(noisy.shape)} and {tuple(output.shape)}"
        )


def _log_score(scheduler: CTMCScheduler, output, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """The network's log scores, or those that the scheduler makes of its p(x_0 | x_t), (batch, length, vocab)."""
    output = (output if isinstance(output, torch.Tensor) else output[0]).float()
    if scheduler.reverse.predicts_scores:
        return output
    return scheduler.scores(output, timesteps, noisy).clamp(min=1e-30).log()
