"""Losses of discrete diffusion against the authors' numbers and their definition."""

import pytest
import torch
from discrete_goldens import golden

from diffusers_ext import CTMCScheduler
from diffusers_ext.discrete.losses import likelihood_bound, score_entropy, score_entropy_loss, x0_cross_entropy

SEDD = {
    "absorb": {"kernel": "absorbing", "vocab_size": 18},
    "uniform": {"kernel": "uniform", "vocab_size": 17, "noise_schedule": "geometric"},
}


@pytest.mark.parametrize("graph", SEDD)
def test_score_entropy_of_sedd(graph):
    g, scheduler = golden(f"sedd_{graph}_graph").t, CTMCScheduler(**SEDD[graph])
    entropy = score_entropy(scheduler, g["score"].log(), g["xt"], g["x0"], g["t"])
    # at sigma_bar = 2e-4 the authors' float32 ratio has lost digits; ours is that of float64
    torch.testing.assert_close(entropy, g["score_entropy"], rtol=3e-4 if graph == "uniform" else 1e-5, atol=1e-4)
    exact = score_entropy(scheduler, g["score"].double().log(), g["xt"], g["x0"], g["t"].double())
    torch.testing.assert_close(entropy, exact.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("graph", SEDD)
def test_training_loss_of_sedd(graph):
    g, scheduler = golden(f"sedd_{graph}_loss").t, CTMCScheduler(**SEDD[graph])
    loss = score_entropy_loss(scheduler, g["log_score"], g["xt"], g["x0"], g["t"])
    torch.testing.assert_close(loss, g["loss"], rtol=1e-4, atol=1e-4)


def test_training_loss_of_jump_your_steps():
    g, scheduler = golden("jys_loss").t, CTMCScheduler(vocab_size=17)
    t = -torch.expm1(-g["sigma_bar"].double()) / (1 - 1e-3)
    log_score = g["log_score"].requires_grad_()
    loss = score_entropy_loss(scheduler, log_score, g["xt"], g["x0"], t, weighting="none")
    torch.testing.assert_close(loss.sum().float(), g["loss_sum"], rtol=1e-5, atol=0)
    torch.testing.assert_close((loss.sum() / g["xt"].numel()).float(), g["loss_mean"], rtol=1e-5, atol=0)
    loss.sum().backward()
    torch.testing.assert_close(log_score.grad, g["grad_log_score"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel", ["absorbing", "uniform"])
def test_score_entropy_is_its_definition(kernel):
    scheduler, generator = CTMCScheduler(kernel=kernel, vocab_size=5), torch.Generator().manual_seed(0)
    t, s = torch.tensor([0.3, 0.8]), torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    x0 = torch.randint(4, (2, 7), generator=generator)
    x = scheduler.add_noise(x0, generator, t)
    unit = scheduler.rate_matrix(0.5) / float(scheduler.sigma(torch.tensor(0.5, dtype=torch.float64)))
    expected = torch.zeros(2, 7, dtype=torch.float64)
    for b in range(2):
        P = scheduler.transition_matrix(float(t[b]))
        for i in range(7):
            for y in range(5):
                now, r = x[b, i], P[x0[b, i], y] / P[x0[b, i], x[b, i]]
                if y != now:
                    constant = r * (r.log() - 1) if r > 0 else 0
                    expected[b, i] += unit[y, now] * (s[b, i, y].exp() - r * s[b, i, y] + constant)
    torch.testing.assert_close(score_entropy(scheduler, s, x, x0, t.double()), expected, rtol=1e-4, atol=1e-4)


def test_cross_entropy_of_the_clean_tokens():
    generator = torch.Generator().manual_seed(0)
    logits, x0 = torch.randn(2, 6, 5, generator=generator), torch.randint(4, (2, 6), generator=generator)
    x = x0.clone()
    x[0, :3] = 4
    absorbing = x0_cross_entropy(CTMCScheduler(vocab_size=5), logits, x, x0)
    law = logits[..., :4].log_softmax(-1)
    expected = -law[0, :3].gather(-1, x0[0, :3, None]).mean()
    torch.testing.assert_close(absorbing, torch.stack([expected, torch.zeros(())]))
    uniform = x0_cross_entropy(CTMCScheduler(kernel="uniform", vocab_size=5), logits, x, x0)
    torch.testing.assert_close(uniform, -logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0].mean(1))


class Independent(torch.nn.Module):
    """The exact network of tokens that are drawn independently from one law."""

    def __init__(self, scheduler, law):
        super().__init__()
        self.scheduler, self.law = scheduler, torch.nn.Parameter(law.float())

    def forward(self, tokens, sigma_bar):
        stay, size = torch.exp(-sigma_bar)[:, None, None], len(self.law)
        absorbing = self.scheduler.config.kernel == "absorbing"
        if self.scheduler.config.prediction_type == "log_score":
            parts = [self.law * stay, 1 - stay] if absorbing else [self.law * stay + (1 - stay) / size]
            marginal = torch.cat(parts, dim=-1).expand(*tokens.shape, -1).log()
            return marginal - marginal.gather(-1, tokens[..., None])
        if absorbing:
            return torch.cat([self.law, self.law.new_zeros(1)]).expand(*tokens.shape, -1)
        joint = self.law * (torch.nn.functional.one_hot(tokens, size) * stay + (1 - stay) / size)
        return joint / joint.sum(-1, keepdim=True)


@pytest.mark.parametrize("prediction", ["log_score", "probabilities"])
@pytest.mark.parametrize("kernel", ["absorbing", "uniform"])
def test_the_bound_of_an_exact_network_is_the_likelihood(kernel, prediction):
    law = torch.tensor([0.5, 0.3, 0.15, 0.05])
    scheduler = CTMCScheduler(kernel=kernel, vocab_size=4 + (kernel == "absorbing"), prediction_type=prediction)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(law, 40 * 50, replacement=True, generator=generator).view(40, 50)
    options = {"num_times": 128, "batch_size": 16, "generator": generator}
    bound = likelihood_bound(Independent(scheduler, law), scheduler, tokens, **options)
    assert bound.shape == (40,) and bound.dtype == torch.float64
    torch.testing.assert_close(bound.mean().float(), -law[tokens].log().mean(), rtol=0.02, atol=0)
    # another law has a larger bound
    wrong = likelihood_bound(Independent(scheduler, law.flip(0)), scheduler, tokens, num_times=8)
    assert wrong.mean() > bound.mean() + 0.5


def test_refusals():
    ordered = CTMCScheduler(kernel="birth_death", vocab_size=5, prediction_type="x0")
    x, t = torch.zeros(1, 2, dtype=torch.long), torch.ones(1)
    with pytest.raises(ValueError, match="is for kernel='absorbing' and 'uniform'"):
        score_entropy(ordered, torch.zeros(1, 2, 5), x, x, t)
    with pytest.raises(ValueError, match='must be "sigma" or "none"'):
        score_entropy_loss(CTMCScheduler(vocab_size=5), torch.zeros(1, 2, 5), x, x, t, weighting="elbo")
