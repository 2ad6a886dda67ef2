"""Configurations at random: a public constructor or table raises ValueError, or what it makes works."""

import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UNet2DModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_ext import (
    ADMUNet2DModel,
    ADMUpsamplerPipeline,
    BoostAndSkipDDIMScheduler,
    BoostAndSkipDDPMScheduler,
    BoostAndSkipDPMSolverMultistepScheduler,
    BoostAndSkipEulerDiscreteScheduler,
    BoostAndSkipPipeline,
    ClassifierGuidance,
    CTMCScheduler,
    CTMCSequenceTransformer,
    CTMCUNet,
    DiscreteDiffusionPipeline,
    EDM2Pipeline,
    EDM2UNet2DModel,
    EDMHeunScheduler,
    FlowPostprocessingPipeline,
    GuidanceInterval,
    ImageClassifier,
    NoiseAwareClassifier,
    SEDDTransformer,
    TableAmusedScheduler,
    jump_your_steps,
    models,
    pipelines,
    schedulers,
)
from diffusers_ext.guidance.guiders import IntervalGuidance
from diffusers_ext.jump_your_steps import KLUB, Cost, RateStatistics, TimestepTables

FIXED = {"derandomize": True, "deadline": None, "database": None}
BAD = st.sampled_from([-1, 0, math.nan, math.inf, -math.inf, True, "4", None, 1e-300])
# older versions of diffusers do not have all of them
BESIDES_AMUSED = [
    getattr(schedulers, name)
    for name in ("TableBlockRefinementScheduler", "TableDiscreteDDIMScheduler")
    if hasattr(schedulers, name)
]
BOOSTED = (
    BoostAndSkipDDPMScheduler,
    BoostAndSkipDDIMScheduler,
    BoostAndSkipEulerDiscreteScheduler,
    BoostAndSkipDPMSolverMultistepScheduler,
)


def mostly(good: st.SearchStrategy) -> st.SearchStrategy:
    """Values of a kind, and now and then what is none."""
    return st.one_of(good, good, good, good, good, good, BAD)


def decreasing(times: list[float]) -> bool:
    return all(a > b for a, b in pairwise(times))


@pytest.mark.parametrize("cls", BOOSTED)
@given(data=st.data())
@settings(max_examples=40, **FIXED)
def test_boost_and_skip(cls, data):
    draw, at = data.draw, st.sampled_from
    config = {
        "num_train_timesteps": draw(st.integers(100, 1000)),
        "beta_start": draw(st.floats(1e-5, 1e-3)),
        "beta_end": draw(st.floats(2e-3, 0.03)),
        "beta_schedule": draw(at(["linear", "scaled_linear", "squaredcos_cap_v2"])),
        "prediction_type": draw(at(["epsilon", "sample", "v_prediction"])),
        "timestep_spacing": draw(at(["linspace", "leading", "trailing"])),
    }
    boost = {"gamma": draw(mostly(st.floats(0.1, 5))), "skip_steps": draw(mostly(st.integers(0, 15)))}
    steps = draw(st.integers(1, 20))
    try:
        scheduler = cls(**config, **boost)
        scheduler.set_timesteps(steps)
    except ValueError as error:
        assert str(boost["gamma"]) in str(error) or str(boost["skip_steps"]) in str(error)
        return
    assert boost["gamma"] > 0 and 0 <= boost["skip_steps"] < steps
    times = scheduler.timesteps.tolist()
    stock = cls(**config)
    stock.set_timesteps(steps)  # trailing may take one more, at -1
    assert len(times) == len(stock.timesteps) - boost["skip_steps"] and decreasing(times)
    x = torch.ones(1, 1, 2, 2) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(0.3 * scheduler.scale_model_input(x, t).clamp(-3, 3), t, x).prev_sample
    assert torch.isfinite(x).all()


@given(
    numbers=st.fixed_dictionaries(
        {"sigma_min": mostly(st.floats(1e-3, 1)), "sigma_max": mostly(st.floats(0.5, 1000))},
        optional={
            "rho": mostly(st.one_of(st.floats(1, 10), st.floats(1e-6, 1e9))),
            "S_churn": mostly(st.floats(0, 100)),
            "S_min": mostly(st.floats(0, 1)),
            "S_max": mostly(st.floats(0, 100)),
            "S_noise": mostly(st.floats(0, 2)),
        },
    ),
    steps=mostly(st.integers(1, 12)),
)
@settings(max_examples=150, **FIXED)
def test_edm_heun(numbers, steps):
    try:
        scheduler = EDMHeunScheduler(**numbers)
        scheduler.set_timesteps(steps)
    except ValueError as error:
        assert len(str(error)) > 10
        return
    assert decreasing(scheduler.sigmas.tolist()) and scheduler.sigmas[-1] == 0 and len(scheduler.sigmas) == steps + 1
    x, generator = torch.ones(1, 2) * scheduler.init_noise_sigma, torch.Generator().manual_seed(0)
    for sigma in scheduler.sigmas[1:].tolist():
        x, hat = scheduler.churn(x, generator=generator)
        x = scheduler.step(0.5 * x, hat, x).prev_sample
        if sigma:
            x = scheduler.step(0.5 * x, sigma, x).prev_sample
    assert torch.isfinite(x).all()


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=200, **FIXED)
def test_ctmc(data):
    draw, at = data.draw, st.sampled_from
    vocab = draw(st.integers(2, 6))
    config = {
        "kernel": draw(at(["absorbing", "uniform", "gaussian", "birth_death", "other"])),
        "vocab_size": draw(mostly(st.just(vocab))),
        "noise_schedule": draw(at(["loglinear", "cosine", "arccos", "geometric", "exponential", "constant"])),
        "sampler": draw(at(["euler", "tweedie", "theta_trapezoidal", "gillespie"])),
        "prediction_type": draw(at(["log_score", "x0", "probabilities"])),
        "jumps": draw(at([None, None, "categorical", "poisson"])),
        "num_corrector_steps": draw(at([0, 0, 0, 1])),
        "min_timestep": draw(mostly(st.floats(1e-5, 0.1))),
        "eps": draw(mostly(st.floats(1e-5, 0.1))),
        "sigma_max": draw(mostly(st.floats(1e-2, 30))),
        "time_exponential": draw(mostly(st.floats(1.1, 100))),
        "constant_rate": draw(mostly(st.floats(0.1, 10))),
        "timestep_tables": draw(at([None, {"2": [1.0, 0.5, 0.1]}, {"2": [1.0, 1.0, 0.1]}, {"3": [1.0, 0.5]}])),
        "timestep_spacing": draw(at(["uniform", "table"])),
    }
    try:
        scheduler = CTMCScheduler(**config)
        scheduler.set_timesteps(draw(mostly(st.integers(1, 5))))
    except ValueError as error:
        assert len(str(error)) > 10
        return
    assert decreasing(scheduler.edges.tolist()) and 0 < scheduler.edges[-1] <= scheduler.edges[0] <= 1
    generator = torch.Generator().manual_seed(0)
    sample = scheduler.sample_prior((2, 3), generator)
    for t in scheduler.timesteps:
        output = torch.randn(2, 3, vocab, generator=generator)
        if config["prediction_type"] == "probabilities":
            output = output.softmax(-1)
        if config["prediction_type"] == "log_score":
            output = output.scatter(-1, sample.unsqueeze(-1), 0)
        assert torch.isfinite(scheduler.model_time(t, 2)).all()
        assert torch.isfinite(scheduler.reverse_rates(output, t, sample)).all()
        sample = scheduler.step(output, t, sample, generator).prev_sample
        assert sample.shape == (2, 3) and sample.min() >= 0 and sample.max() < vocab


EDGES = st.lists(st.one_of(st.floats(0, 1), st.floats(), st.sampled_from([True, "1", None])), max_size=5)


@given(
    edges=st.one_of(
        EDGES,
        EDGES,
        st.lists(st.floats(1e-6, 1), unique=True, max_size=6).map(lambda x: sorted(x, reverse=True)),
        st.lists(st.floats(1e-6, 0.999), unique=True, max_size=6).map(lambda x: [1.0, *sorted(x, reverse=True)]),
    )
)
@settings(max_examples=200, **FIXED)
def test_tables(edges):
    """Accepted in every place where tables go, or refused in every one."""
    plain = all(isinstance(t, float) for t in edges)
    good = len(edges) >= 2 and plain and decreasing(edges) and edges[-1] > 0 and edges[0] == 1
    name = str(len(edges) - 1)
    makers = (
        lambda: TimestepTables({name: edges}, {}),
        lambda: CTMCScheduler(vocab_size=3, timestep_tables={name: edges}),
        lambda: TableAmusedScheduler(3, timestep_tables={name: edges}),
        *(partial(cls, timestep_tables={name: edges}) for cls in BESIDES_AMUSED),
    )
    for make in makers:
        if good:
            make()
        else:
            with pytest.raises(ValueError, match=r".{10}"):
                make()


SMALL = st.integers(1, 12)


@given(hidden_size=SMALL, cond_dim=SMALL, num_heads=st.integers(1, 4), num_streams=st.integers(0, 3),
       num_blocks=st.integers(0, 2), vocab_size=st.integers(2, 5))  # fmt: skip
@settings(max_examples=25, **FIXED)
def test_sedd(**sizes):
    try:
        model = SEDDTransformer(**sizes, scale_by_sigma=False)
    except ValueError as error:
        assert "hidden_size / num_heads must be even" in str(error) or "num_streams" in str(error)
        return
    output = model(torch.zeros(2, 4, dtype=torch.int64), torch.ones(2)).sample
    assert output.shape == (2, 4, sizes["vocab_size"]) and torch.isfinite(output).all()


@given(d_model=SMALL, num_heads=st.integers(1, 4), num_layers=st.integers(0, 2), temb_dim=SMALL,
       dim_feedforward=SMALL, one_hot_input=st.booleans(), vocab_size=st.integers(2, 5))  # fmt: skip
@settings(max_examples=25, **FIXED)
def test_sequence_transformer(**sizes):
    try:
        model = CTMCSequenceTransformer(**sizes)
    except ValueError as error:
        assert "d_model must be even and a multiple of num_heads" in str(error) or "temb_dim" in str(error)
        return
    output = model.eval()(torch.zeros(2, 4, dtype=torch.int64), torch.ones(2)).sample
    assert output.shape == (2, 4, sizes["vocab_size"]) and torch.isfinite(output).all()


@given(channels=st.integers(1, 3).map(lambda n: 4 * n), factors=st.lists(st.integers(1, 2), min_size=1, max_size=2),
       num_res_blocks=st.integers(1, 2), attention_level=st.integers(0, 2), size=st.integers(1, 3))  # fmt: skip
@settings(max_examples=15, **FIXED)
def test_ctmc_unet(channels, factors, num_res_blocks, attention_level, size):
    side = size if len(factors) == 1 or size == 3 else 2 * size
    try:
        model = CTMCUNet(
            shape=(1, side, side), num_levels=4, channels=channels, channel_mult=tuple(factors),
            num_res_blocks=num_res_blocks, attention_level=attention_level, time_embed_dim=4 * size - 2,
        )  # fmt: skip
    except ValueError as error:
        wrong = (size == 1, len(factors) == 2 and size == 3, attention_level >= len(factors))
        said = ("time_embed_dim must be even", "height and width of shape", "attention_level must be in")
        assert any(one and text in str(error) for one, text in zip(wrong, said, strict=True))
        return
    output = model.eval()(torch.zeros(1, side * side, dtype=torch.int64), torch.ones(1)).sample
    assert output.shape == (1, side * side, 4) and torch.isfinite(output).all()


@given(img_channels=st.integers(1, 3), label_dim=st.integers(0, 3), model_channels=st.sampled_from([8, 16, 24]),
       factors=st.lists(st.integers(1, 2), min_size=1, max_size=2), channels_per_head=st.sampled_from([4, 8, 16]),
       num_blocks=st.integers(1, 2))  # fmt: skip
@settings(max_examples=15, **FIXED)
def test_edm2_unet(img_channels, label_dim, model_channels, factors, channels_per_head, num_blocks):
    sizes = {"model_channels": model_channels, "channel_mult": tuple(factors), "num_blocks": num_blocks}
    try:
        model = EDM2UNet2DModel(
            img_resolution=8, img_channels=img_channels, label_dim=label_dim, attn_resolutions=(4, 8),
            channels_per_head=channels_per_head, **sizes,
        )  # fmt: skip
    except ValueError as error:
        assert "channels_per_head" in str(error)
        return
    x = torch.randn(2, img_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    output = model(x, torch.ones(1), class_labels=torch.zeros(2, dtype=torch.int64) if label_dim else None).sample
    assert output.shape == x.shape and torch.isfinite(output).all()


def tiny_unet(cls=UNet2DModel, **options):
    return cls(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **{"in_channels": 1, "out_channels": 1, "attention_head_dim": 8, **options},
    ).eval()  # fmt: skip


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@given(heads=st.one_of(st.none(), st.integers(0, 5)), dim=st.one_of(st.none(), st.integers(0, 9)),
       conv_resample=st.booleans(), kind=st.sampled_from(["conv", "resnet"]))  # fmt: skip
@settings(max_examples=15, **FIXED)
def test_adm_unet(heads, dim, conv_resample, kind):
    own = {"num_attention_heads": heads, "timestep_dim": dim, "conv_resample": conv_resample}
    try:
        model = tiny_unet(ADMUNet2DModel, **own, downsample_type=kind, upsample_type=kind)
    except ValueError as error:
        assert any(name in str(error) for name in own)
        return
    assert heads in (None, 1, 2, 4) and dim in (None, 2, 4, 6, 8) and (conv_resample or kind == "conv")
    assert torch.isfinite(model(torch.ones(2, 1, 8, 8), 5).sample).all()


WIDTHS = st.lists(st.integers(0, 4), max_size=2)


@given(in_channels=st.integers(0, 3), channels=WIDTHS, feature_dim=st.integers(0, 3), num_classes=st.integers(0, 3))
@settings(max_examples=25, **FIXED)
def test_image_classifier(**sizes):
    try:
        model = ImageClassifier(**sizes).eval()
    except ValueError as error:
        assert "must be >= 1" in str(error)
        return
    output = model(torch.ones(2, sizes["in_channels"], 4, 4))
    assert output.logits.shape == (2, sizes["num_classes"]) and output.features.shape == (2, sizes["feature_dim"])


@given(scale=mostly(st.floats(-3, 9)), kind=st.sampled_from(["epsilon", "v_prediction", "sample", "other"]),
       classes=st.one_of(st.none(), st.integers(1, 3)), hidden=st.lists(st.integers(1, 4), max_size=2),
       conditional=st.booleans())  # fmt: skip
@settings(max_examples=25, **FIXED)
def test_guidance_by_classifiers(scale, kind, classes, hidden, conditional):
    unet = tiny_unet(num_class_embeds=3 if conditional else None)
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type=kind)
    try:
        model = ClassifierGuidance(unet, NoiseAwareClassifier(64, 3, tuple(hidden)), scheduler, scale, classes)
    except ValueError as error:
        assert any(name in str(error) for name in ("guidance_scale", "prediction_type", "num_classes"))
        return
    output = model(torch.ones(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 2])).sample
    assert output.shape == (2, 1, 8, 8) and torch.isfinite(output).all()


BOUNDS = st.one_of(st.none(), mostly(st.floats(0, 3)))


@given(sigma_lo=BOUNDS, sigma_hi=BOUNDS, sigma_unit=st.sampled_from(["edm", "flow", "other"]),
       guided_steps=st.one_of(st.none(), st.tuples(st.integers(-1, 3), st.integers(-1, 3)), BAD))  # fmt: skip
@settings(max_examples=200, **FIXED)
def test_intervals(**given_interval):
    pipe = DDPMPipeline(UNET, DDPMScheduler())
    try:
        interval = GuidanceInterval(pipe, **given_interval).interval
    except ValueError as error:
        assert len(str(error)) > 10
        with pytest.raises(ValueError, match=r".{10}"):
            IntervalGuidance(**given_interval)
        return
    assert repr(IntervalGuidance(**given_interval).interval) == repr(interval)
    by_steps = given_interval["guided_steps"] is not None
    assert by_steps == (interval.sigma_lo is None)
    assert by_steps or 0 <= interval.sigma_lo < interval.sigma_hi


UNET = tiny_unet()


@given(null_class=mostly(st.one_of(st.none(), st.integers(-1, 4))), space=st.sampled_from(["pixel", "latent", ""]),
       bias=st.lists(st.floats(-1, 1), max_size=2), heun=st.booleans())  # fmt: skip
@settings(max_examples=20, **FIXED)
def test_settings_of_pipelines(null_class, space, bias, heun):
    call = {"batch_size": 1, "num_inference_steps": 1, "output_type": "pt"}
    for make, run in (
        (lambda: BoostAndSkipPipeline(CLASSES, DDPMScheduler(), null_class),
         lambda pipe: pipe(**call, class_labels=1)),
        (lambda: EDM2Pipeline(EDM2, EDMHeunScheduler(), VAE, latent_scale=bias, latent_bias=bias),
         lambda pipe: pipe(**call)),
        (lambda: FlowPostprocessingPipeline(
            UNET, FlowMatchHeunDiscreteScheduler() if heun else FlowMatchEulerDiscreteScheduler(), space=space),
         lambda pipe: pipe(torch.zeros(1, 1, 8, 8), num_inference_steps=1, output_type="pt")),
        (lambda: ADMUpsamplerPipeline(tiny_unet(in_channels=2), DDPMScheduler()),
         lambda pipe: pipe(torch.zeros(1, 1, 4, 4), num_inference_steps=1, output_type="pt")),
        (lambda: DiscreteDiffusionPipeline(SEDD, CTMCScheduler(vocab_size=4)),
         lambda pipe: pipe(batch_size=1, num_inference_steps=1)),
    ):  # fmt: skip
        try:
            result = run(quiet(make()))[0]
        except ValueError as error:
            assert any(name in str(error) for name in ("null_class", "latent_scale", "space", "VAE"))
            continue
        assert len(result) == 1 and torch.isfinite(result.float()).all()


CLASSES = tiny_unet(num_class_embeds=3)
EDM2 = EDM2UNet2DModel(
    img_resolution=8, img_channels=1, label_dim=0, model_channels=8, channel_mult=(1,), num_blocks=1,
    attn_resolutions=(), channels_per_head=8,
).eval()  # fmt: skip
VAE = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=1).eval()
SEDD = SEDDTransformer(vocab_size=4, hidden_size=4, cond_dim=4, num_blocks=1, num_heads=1, sequence_length=5).eval()


@given(data=st.data())
@settings(max_examples=40, **FIXED)
def test_objectives_of_timestep_tables(data):
    draw, at = data.draw, st.sampled_from
    scheduler = CTMCScheduler(vocab_size=4, sampler=draw(at(["euler", "gillespie"])))
    tokens = torch.randint(3, (3, 5), generator=torch.Generator().manual_seed(0))
    try:
        cost = Cost(draw(at(["kl", "klub", "alpha", "other"])), draw(at([None, 0.5, 1.0, math.nan])),
                    draw(at(["prediction", "rates", "other"])))  # fmt: skip
        statistics = RateStatistics(
            SEDD, scheduler, tokens, (cost,), grid_size=draw(st.integers(0, 6)),
            num_positions=draw(at([None, None, 0, 2, 6])),
        )  # fmt: skip
        klub = KLUB(
            SEDD, scheduler, tokens, coupling=draw(at(["data", "path", "other"])), batch_size=draw(st.integers(0, 3)),
            average=draw(at(["sequences", "batches", "other"])), given=draw(at([None, torch.ones(4).bool()])),
        )  # fmt: skip
    except ValueError as error:
        assert len(str(error)) > 10
        return
    size = statistics.grid.size + 1
    (divergence,) = statistics.of(torch.arange(3)).values()
    assert divergence.shape == (size, size) and torch.isfinite(divergence).all()
    points = (1, 2, 4) if scheduler.config.sampler == "gillespie" else (0.9, 0.5, 0.1)
    assert math.isfinite(klub(*points))


def test_no_public_constructor_is_left_out():
    """But for results, and for pipelines whose constructor is diffusers' own."""
    _, _, source = Path(__file__).read_text(encoding="utf-8").partition("\nFIXED =")  # what comes after the imports
    without = {"GuidanceReport"}
    without |= {"DiTGuidanceIntervalPipeline", "StableDiffusionXLGuidanceIntervalPipeline"}
    for package in (models, pipelines, schedulers, jump_your_steps):
        for name in package.__all__:
            if isinstance(getattr(package, name), type) and name not in without and not name.endswith("Output"):
                assert name in source, name
