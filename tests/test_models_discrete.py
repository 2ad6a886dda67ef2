"""The networks of discrete diffusion: equal to the authors', and diffusers models in all that users do with them."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from discrete_goldens import GOLDENS, golden, tauldr_model

from diffusers_ext import CTMCSequenceTransformer, CTMCUNet, SEDDTransformer
from diffusers_ext.checkpoints import load_sedd

TINY = {
    SEDDTransformer: {"vocab_size": 9, "hidden_size": 16, "cond_dim": 8, "num_blocks": 2, "num_heads": 2},
    CTMCUNet: {
        "shape": (3, 4, 4),
        "num_levels": 6,
        "channels": 8,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "time_embed_dim": 8,
    },
    CTMCSequenceTransformer: {
        "vocab_size": 6,
        "d_model": 16,
        "num_layers": 2,
        "num_heads": 2,
        "dim_feedforward": 24,
        "temb_dim": 8,
    },
}


def tiny(cls) -> torch.nn.Module:
    """With random values everywhere, the layers that start at zero included."""
    torch.manual_seed(0)
    model = cls(**TINY[cls]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(cls) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(6, (2, 48), generator=generator), torch.tensor([0.2, 0.9])


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
@torch.no_grad()
def test_sedd_network(graph):
    g, model = golden(f"sedd_{graph}_net").t, load_sedd(GOLDENS / f"sedd_{graph}_hub")
    for x in ("x", "x_short"):
        log_score = model(g[x], g["sigma"]).sample
        torch.testing.assert_close(log_score, g[x.replace("x", "log_score")], rtol=2e-5, atol=2e-5)
        assert (log_score.gather(-1, g[x].unsqueeze(-1)) == 0).all()


def authors_head(mean: torch.Tensor, log_scale: torch.Tensor, levels: int, fix_logistic: bool):
    """The authors' log masses in float64, and the condition of each: what a rounding inside its logarithm becomes."""
    edges = torch.linspace(-1, 1, levels + 1, dtype=torch.float64)
    scaled = (edges - mean.double().unsqueeze(-1)) * (2 - log_scale.double()).exp().unsqueeze(-1)

    def from_one_side(upper, lower):
        inside = -torch.expm1(F.logsigmoid(lower) - F.logsigmoid(upper)) + 1e-6
        return F.logsigmoid(upper) + inside.log(), 1 / inside

    logits, condition = from_one_side(scaled[..., 1:], scaled[..., :-1])
    if fix_logistic:
        other, other_condition = from_one_side(-scaled[..., :-1], -scaled[..., 1:])
        condition = torch.where(other < logits, other_condition, condition)
        logits = torch.minimum(logits, other)
    return logits, condition


@pytest.mark.parametrize("fix_logistic", [False, True])
@pytest.mark.parametrize("log_scale", [-20.0, -3.0, 0.0, 2.0, 20.0])
def test_unet_head_is_exact_in_both_tails(fix_logistic, log_scale):
    model = CTMCUNet(**{**TINY[CTMCUNet], "num_levels": 256}, fix_logistic=fix_logistic)
    mean = torch.linspace(-1, 1, 41).unsqueeze(0)
    scales = torch.full_like(mean, log_scale)
    logits, (exact, _) = model._logits(mean, scales), authors_head(mean, scales, 256, fix_logistic)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("log_scale", [-1e4, -100.0, 100.0, 1e4])
def test_unet_head_is_finite_for_every_scale(log_scale):
    mean = torch.linspace(-1, 1, 5).unsqueeze(0).requires_grad_()
    scales = torch.full_like(mean, log_scale).requires_grad_()
    logits = CTMCUNet(**TINY[CTMCUNet])._logits(mean, scales)
    logits.softmax(-1)[..., 0].sum().backward()
    assert logits.isfinite().all() and mean.grad.isfinite().all() and scales.grad.isfinite().all()


@pytest.mark.parametrize(
    ("expected", "changes"),
    [("probs", {}), ("probs_fixlogistic", {"fix_logistic": True}), ("probs_norescale", {"skip_rescale": False})],
)
@torch.no_grad()
def test_tauldr_unet(expected, changes, tmp_path, monkeypatch):
    """Recorded in float32, whose rounding the authors' head magnifies in the right tail: see `authors_head`."""
    g, model = golden("ctmc_unet_net").t, tauldr_model(tmp_path, "ctmc_unet_net", "ctmc_unet_model", **changes)
    head, laws = model._logits, []
    monkeypatch.setattr(model, "_logits", lambda *law: laws.append(law) or head(*law))
    logits = model(g["x"], g["t"]).sample
    # A float32 network's mean and scale are good to about 1e-6, and more without the rescaling of residual sums.
    torch.testing.assert_close(logits.softmax(-1), g[expected], rtol=2e-5, atol=1e-6)
    exact, condition = authors_head(*laws[0], model.config.num_levels, model.config.fix_logistic)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-6, atol=1e-6)
    if not changes:
        assert ((logits - g["logits"]).abs() <= 2e-5 * (1 + exact.abs()) + 2**-23 * condition).all()


@torch.no_grad()
def test_tauldr_sequence_network(tmp_path):
    g, model = golden("ctmc_seq_net").t, tauldr_model(tmp_path, "ctmc_seq_net", "ctmc_seq_model")
    logits = model(g["x"], g["t"]).sample
    torch.testing.assert_close(logits, g["logits"], rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(logits.softmax(-1), g["probs"], rtol=2e-4, atol=2e-5)
    same = model(g["x"][:1].expand(3, -1), g["t"]).sample
    torch.testing.assert_close(same.softmax(-1), g["probs_same_x"], rtol=2e-4, atol=2e-5)


@torch.no_grad()
def test_continuous_time_reaches_the_sequence_network():
    model = tiny(CTMCSequenceTransformer)
    x, _ = inputs(CTMCSequenceTransformer)
    early, late = (model(x, torch.full((2,), t)).sample for t in (0.2, 0.7))
    assert (early - late).abs().max() > 1e-3
    model.register_to_config(integer_time=True)
    cut = [model(x, torch.full((2,), t)).sample for t in (0.2, 0.7, 1.0)]
    assert torch.equal(cut[0], cut[1]) and not torch.equal(cut[1], cut[2])


@torch.no_grad()
def test_scalar_input_of_the_sequence_network():
    model = CTMCSequenceTransformer(**TINY[CTMCSequenceTransformer], one_hot_input=False).eval()
    assert model.embedding.weight.shape == (16, 1)
    assert model(*inputs(CTMCSequenceTransformer)).sample.shape == (2, 48, 6)


@torch.no_grad()
def test_unet_levels_far_from_the_mean_have_mass():
    model = CTMCUNet(**TINY[CTMCUNet]).eval()
    mean, log_scale = torch.tensor([[-1.0, 1.0]]), torch.tensor([[0.0, 0.0]])
    law = model._logits(mean, log_scale).softmax(-1)[0]
    torch.testing.assert_close(law[0], law[1].flip(0), rtol=1e-4, atol=2e-6)  # atol: the floor of 1e-6
    assert law[0, 0] > 0.5
    # the mass of a bin is a difference of the logistic distribution function
    edges = torch.sigmoid((torch.linspace(-1, 1, 7) + 1) * 2.718281828**2)
    exact = edges.diff() / edges.diff().sum()
    torch.testing.assert_close(law[0], exact, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("cls", TINY)
@torch.no_grad()
def test_attention_backends(cls):
    """The dispatcher of diffusers is used: another backend gives the same numbers, an unknown one is refused there."""
    model = tiny(cls)
    expected = model(*inputs(cls)).sample
    with attention_backend("_native_math"):
        torch.testing.assert_close(model(*inputs(cls)).sample, expected, rtol=1e-4, atol=1e-4)
    assert model.attn_processors
    for processor in model.attn_processors.values():
        processor._attention_backend = "no such backend"
    with pytest.raises(ValueError, match="no such backend"):
        model(*inputs(cls))


def test_fresh_score_network_knows_nothing():
    """Zero read-out; with the scale of the exact score, so that training starts at a sensible level."""
    model = SEDDTransformer(**TINY[SEDDTransformer])
    sigma = torch.tensor([0.5, 2.0])
    with torch.no_grad():
        out = model(torch.full((2, 3), 8), sigma).sample
    expected = -(torch.expm1(sigma) * 8).log()
    torch.testing.assert_close(out[..., :8], expected[:, None, None].expand(2, 3, 8))


@pytest.mark.parametrize("cls", TINY)
def test_wrong_shapes_are_refused(cls):
    with pytest.raises(ValueError, match=r"got \(2, 48\), \(3,\)"):
        tiny(cls)(inputs(cls)[0], torch.ones(3))


def test_voices_in_turn_are_told_apart():
    """Of tokens that are all alike, one voice gives the same everywhere; of several each has its own."""
    tokens, sigma = torch.full((1, 8), 8), torch.ones(1)
    alone = tiny(SEDDTransformer)(tokens, sigma).sample[0]
    torch.testing.assert_close(alone, alone[:1].expand_as(alone))
    model = SEDDTransformer(**TINY[SEDDTransformer], num_streams=4).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    scores = model(tokens, sigma).sample[0]
    assert all((scores[i] - scores[i + 1]).abs().max() > 0.01 for i in range(3))
    with pytest.raises(ValueError, match="num_streams must be >= 1"):
        SEDDTransformer(**TINY[SEDDTransformer], num_streams=0)


def test_wrong_heads_are_refused():
    with pytest.raises(ValueError, match="hidden_size / num_heads must be even"):
        SEDDTransformer(hidden_size=18, num_heads=2)
    with pytest.raises(ValueError, match="d_model must be even"):
        CTMCSequenceTransformer(d_model=18, num_heads=4)
