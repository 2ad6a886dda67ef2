"""Every pipeline, scheduler and sampler on a second device: as on the CPU, nothing mixed, and nobody waits in a step.

The device is `stand_in_device.py`. A step's waits are the difference between calls of two lengths.
"""

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable

import diffusers
import pytest
import tiny_discrete
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UNet2DModel,
)
from diffusers.pipelines import pipeline_loading_utils, pipeline_utils
from stand_in_device import (
    Draws,
    coarse_draws,
    device,
    moving_data,
    needs_device,
    waits,
    without_float64,
)
from tiny_pipelines import tiny_sdxl, tiny_stable_diffusion
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_ext import (
    ADMUpsamplerPipeline,
    BoostAndSkipPipeline,
    ClassifierGuidance,
    CTMCScheduler,
    EDM2Pipeline,
    EDM2UNet2DModel,
    EDMHeunScheduler,
    FlowPostprocessingPipeline,
    NoiseAwareClassifier,
    boost_and_skip,
)
from diffusers_ext.discrete.losses import likelihood_bound
from diffusers_ext.evaluation import evaluate_digits, load_extractor
from diffusers_ext.jump_your_steps import optimize_timesteps
from diffusers_ext.metrics import (
    average_knn_distance,
    countdown_errors,
    countdown_errors_original,
    feature_statistics,
    frechet_distance,
    generative_perplexity,
    histogram_distance,
    precision_recall,
    rarity_score,
    unigram_entropy,
)
from diffusers_ext.shipped import load_network, load_pipeline, shipped_models

pytestmark = [needs_device, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
FEW, MANY = 2, 3  # steps of two calls


@pytest.fixture(autouse=True)
def switched_on():
    with device(), sdpa_kernel(SDPBackend.MATH):  # the device has no fused attention, so the CPU has none to compare
        yield


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def seeded(build: Callable) -> Callable:
    """With the same weights every time; without the progress bar."""

    @functools.wraps(build)
    def built(*args, **settings):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = build(*args, **settings)
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        return pipe

    return built


# Pipelines: how to build one, and the arguments of its call


@seeded
def unet(channels: int = 3, out_channels: int | None = None, classes: int | None = None) -> UNet2DModel:
    network = UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=out_channels or channels, layers_per_block=1,
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, attention_head_dim=8,
        num_class_embeds=classes,
    ).eval()  # fmt: skip
    network.conv_out.weight.data *= 0.3
    return network


@seeded
def edm2_unet(classes: int = 3, channels: int = 3) -> EDM2UNet2DModel:
    network = EDM2UNet2DModel(
        img_resolution=8, img_channels=channels, label_dim=classes, model_channels=16, channel_mult=(1, 2),
        num_blocks=1, attn_resolutions=(4,), channels_per_head=16,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.3)
    return network.eval()


@seeded
def vae() -> AutoencoderKL:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=2, **kinds).eval()


def boosted(scheduler, **settings):
    return boost_and_skip(scheduler, **{"gamma": 2.0, "skip_steps": 1, **settings})


@seeded
def edm2(decoding: bool = False, **settings) -> EDM2Pipeline:
    channels = 4 if decoding else 3
    parts = {"vae": vae(), "latent_scale": [0.5] * 4, "latent_bias": [0.1] * 4} if decoding else {}
    scheduler = EDMHeunScheduler(sigma_min=0.05, sigma_max=2.0, **settings)
    return EDM2Pipeline(edm2_unet(3, channels), scheduler, guidance_unet=edm2_unet(0, channels), **parts)


def classifier_guided() -> BoostAndSkipPipeline:
    scheduler = boosted(DDIMScheduler())
    classifier = seeded(NoiseAwareClassifier)(3 * 8 * 8, 4, (16,)).eval()
    return BoostAndSkipPipeline(ClassifierGuidance(unet(), classifier, scheduler, 2.0, num_classes=4), scheduler)


LATENT = {"output_type": "latent"}
TWO = {"batch_size": 2, **LATENT}
LABELS = {"class_labels": [0, 2], **LATENT}
INTERVAL = {**LABELS, "guidance_scale": 1.5, "guidance_interval": (0.1, 1.0)}
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = {"batch_size": 2, "output_type": "tokens"}
TEXT = {"prompt": ["a cat", "a dog"], "guidance_scale": 3.0, **LATENT}
RUNS: dict[str, tuple[Callable, dict]] = {
    "ddpm": (lambda: BoostAndSkipPipeline(unet(), DDPMScheduler()), {**TWO, "gamma": 2.0, "skip_steps": 1}),
    "ddpm, guided, learned variance": (
        lambda: BoostAndSkipPipeline(unet(3, 6, 4), DDPMScheduler(variance_type="learned_range"), null_class=3),
        {**LABELS, "gamma": 2.0, "guidance_scale": 2.0},
    ),
    "boosted ddim": (lambda: BoostAndSkipPipeline(unet(), boosted(DDIMScheduler())), {**TWO, "eta": 0.5}),
    "boosted ddim, off": (
        lambda: BoostAndSkipPipeline(unet(), boosted(DDIMScheduler(), gamma=1.0, skip_steps=0)), TWO,
    ),
    "boosted euler": (lambda: BoostAndSkipPipeline(unet(), boosted(EulerDiscreteScheduler())), TWO),
    "boosted dpm-solver": (lambda: BoostAndSkipPipeline(unet(), boosted(DPMSolverMultistepScheduler())), TWO),
    "classifier guidance": (classifier_guided, LABELS),
    "upsampler": (
        lambda: ADMUpsamplerPipeline(unet(6, 6, 4), DDPMScheduler(variance_type="learned_range")),
        {"image": IMAGES[..., ::2, ::2], **LABELS},
    ),
    "upsampler, ddim": (
        lambda: ADMUpsamplerPipeline(unet(6, 3, 4), boosted(DDIMScheduler())), {"image": IMAGES, **LABELS},
    ),
    "edm2": (edm2, INTERVAL),
    "edm2, rows of labels": (edm2, {**LATENT, "class_labels": torch.eye(3, dtype=torch.float64)[:2].numpy()}),
    "edm2 with churn": (lambda: edm2(S_churn=2.0), INTERVAL),
    "edm2 in latents": (lambda: edm2(True), {**INTERVAL, "output_type": "pt"}),
    "flow": (
        lambda: FlowPostprocessingPipeline(unet(), FlowMatchEulerDiscreteScheduler()),
        {"images": IMAGES, "output_type": "pt"},
    ),
    "flow, part of the way by heun": (
        lambda: FlowPostprocessingPipeline(unet(), FlowMatchHeunDiscreteScheduler()),
        {"images": IMAGES, "strength": 0.5, **LATENT},
    ),
    "flow in latents": (
        lambda: FlowPostprocessingPipeline(unet(4), FlowMatchEulerDiscreteScheduler(), vae=vae(), space="latent"),
        {"images": IMAGES.repeat(1, 1, 2, 2), "output_type": "pt"},
    ),
    "flow after a base": (
        lambda: FlowPostprocessingPipeline(
            unet(), FlowMatchEulerDiscreteScheduler(), base=BoostAndSkipPipeline(unet(), boosted(DDIMScheduler())),
        ),
        {"base_kwargs": {"batch_size": 2, "num_inference_steps": 2}, "output_type": "pt"},
    ),
    **{
        f"tokens of {variant}": (functools.partial(tiny_discrete.build, variant), {**TOKENS, "output_type": kind})
        for variant, kind in (("text", "tokens"), ("sequence", "tokens"), ("image", "pt"))
    },
    "tokens, given": (
        functools.partial(tiny_discrete.build, "text"),
        {"tokens": torch.ones(2, 12, dtype=torch.int64), "given": torch.arange(12) < 3, "output_type": "tokens"},
    ),
    **{
        f"tokens by {sampler}": (functools.partial(tiny_discrete.build, "text"), {**TOKENS, "sampler": sampler})
        for sampler in ("tweedie", "gillespie")
    },
    **{
        f"shipped {name}": (functools.partial(load_pipeline, name), options)
        for name, options in {
            "mnist-unet": {**TWO, "gamma": 2.0, "skip_steps": 1},
            "mnist-edm2": INTERVAL,
            "mnist-flow": {"latents": torch.zeros(2, 1, 28, 28), **LABELS},
            "countdown-sedd": TOKENS,
            "jsb-sedd": TOKENS,
            "shakespeare-sedd": TOKENS,
        }.items()
    },
    "stable diffusion, boosted": (
        lambda: _with_scheduler(tiny_stable_diffusion(), boosted), {**TEXT},
    ),
    "sdxl, boosted": (lambda: _with_scheduler(tiny_sdxl(), boosted), TEXT),
}  # fmt: skip


def _with_scheduler(pipe, change: Callable):
    pipe.scheduler = change(pipe.scheduler)
    return pipe


def test_every_shipped_pipeline_is_run():
    pipelines = [name for name, folder in shipped_models().items() if (folder / "model_index.json").is_file()]
    assert sorted(name.removeprefix("shipped ") for name in RUNS if name.startswith("shipped ")) == sorted(pipelines)


def called(pipe, options: dict, steps: int, draws: bool) -> torch.Tensor:
    """What the pipeline returns, on the CPU. draws: with a generator of the host, otherwise from the device's own."""
    torch.manual_seed(3)
    noise = {"generator": generator()} if draws else {}
    return pipe(**options, **noise, num_inference_steps=steps, return_dict=False)[0].cpu()


def a_step(run: Callable[[int], object]) -> tuple[Counter, float]:
    """What a step waits for, and how much it draws with a generator: by calls of FEW and of MANY steps."""
    counts, drawn = [], []
    for steps in (FEW, MANY):
        with waits() as noted, Draws() as draws:
            run(steps)
        counts.append(Counter(noted))
        drawn.append(draws.count)
    counts[1].subtract(counts[0])
    each = MANY - FEW
    return Counter({wait: n / each for wait, n in counts[1].items() if n}), (drawn[1] - drawn[0]) / each


def allowed_reads(scheduler, draws: bool, searches: int = 1) -> Counter:
    """What a step of discrete diffusion may read: where the masks are, and the means of Poisson draws of the host."""
    allowed = Counter()
    if getattr(scheduler, "mask_token_id", None) is not None:
        allowed["nonzero"] = searches
    if draws and getattr(scheduler, "jumps", None) == "poisson":
        allowed["to host"] = searches
    return allowed


def assert_nobody_waits(step: Counter, draws: float, allowed: Counter | None = None) -> None:
    """By this package's code: no read but the allowed ones, and no transfer but of what the host has drawn."""
    found = {wait: n for wait, n in step.items() if wait.ours and n > 0}
    reads = Counter()
    for wait, n in found.items():
        if wait.kind == "read":
            reads[wait.op] += n
    assert reads <= (allowed or Counter()), found
    assert sum(n for wait, n in found.items() if wait.kind == "transfer") <= draws, found


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("as_on_a_mac", [False, True], ids=["generator", "without float64 and generator"])
def test_a_pipeline_on_a_device(name, as_on_a_mac, monkeypatch):
    build, options = RUNS[name]
    pipe, draws = build(), not as_on_a_mac
    pipe.set_progress_bar_config(disable=True)
    with monkeypatch.context() as patched:
        if as_on_a_mac:  # the state of EDM is float32 there
            patched.setattr(EDMHeunScheduler, "state_dtype", staticmethod(lambda device: torch.float32))
        expected = called(pipe, options, MANY, draws)
    assert torch.isfinite(expected.float()).all()
    outputs = []
    with without_float64() if as_on_a_mac else contextlib.nullcontext():
        pipe.to("dx")
        step, drawn = a_step(lambda steps: outputs.append(called(pipe, options, steps, draws)))
    torch.testing.assert_close(outputs[-1], expected, rtol=1e-5, atol=1e-5)
    assert_nobody_waits(step, drawn, allowed_reads(getattr(pipe, "scheduler", None), draws))


@pytest.mark.slow
def test_dopri5_on_a_device():
    pytest.importorskip("torchdiffeq")
    pipe = RUNS["flow"][0]()
    run = functools.partial(pipe, IMAGES, solver="dopri5", rtol=1e-4, atol=1e-4, output_type="pt")
    expected = run().images
    pipe.to("dx")
    torch.testing.assert_close(run().images.cpu(), expected, rtol=1e-5, atol=1e-5)
    with without_float64():  # its time is float32 there, so that other steps are accepted
        torch.testing.assert_close(run().images.cpu(), expected, rtol=0, atol=1e-2)


def test_the_state_of_edm_follows_the_device():
    place = torch.device("dx:0")
    assert EDMHeunScheduler.state_dtype(place) == torch.float64
    with without_float64():
        assert EDMHeunScheduler.state_dtype(place) == torch.float32


# Where the weights are


def as_balanced(pipe, folder) -> object:
    """Saved, and loaded with a map that puts its networks on the device."""
    pipe.save_pretrained(folder)
    placed = type(pipe).from_pretrained(folder, device_map="balanced")
    assert set(placed.hf_device_map.values()) == {torch.device("dx:0")}
    return placed


def as_on_one_device(pipe, folder) -> object:
    pipe.save_pretrained(folder)
    return type(pipe).from_pretrained(folder, device_map="dx")


PLACES: dict[str, Callable] = {
    'device_map="balanced"': as_balanced,
    'device_map="dx"': as_on_one_device,
    "model": lambda pipe, _: pipe.enable_model_cpu_offload(device="dx"),
    "sequential": lambda pipe, _: pipe.enable_sequential_cpu_offload(device="dx"),
    "leaf_level": lambda pipe, _: pipe.enable_group_offload(torch.device("dx"), offload_type="leaf_level"),
    "block_level": lambda pipe, _: pipe.enable_group_offload(
        torch.device("dx"), offload_type="block_level", num_blocks_per_group=1
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "name", ["boosted ddim", "upsampler", "edm2 in latents", "flow in latents"]
    + [f"tokens of {variant}" for variant in ("text", "sequence", "image")],
)  # fmt: skip
def test_weights_elsewhere(name, place, tmp_path, monkeypatch):
    """The host keeps the weights, or diffusers places them: the sample is the same."""
    # accelerate counts the memory of devices that it knows by name, and diffusers looks for devices when imported
    monkeypatch.setattr(pipeline_utils, "SUPPORTED_DEVICE_MAP", [*pipeline_utils.SUPPORTED_DEVICE_MAP, "dx"])
    monkeypatch.setattr(pipeline_loading_utils, "get_max_memory", lambda _=None: {torch.device("dx:0"): 2**30})
    build, options = RUNS[name]
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    expected = called(pipe, options, FEW, True)
    with moving_data():
        pipe = PLACES[place](pipe, tmp_path) or pipe
        pipe.set_progress_bar_config(disable=True)
        for _ in range(2):  # hooks are put in anew after a call
            torch.testing.assert_close(called(pipe, options, FEW, True), expected, rtol=1e-5, atol=1e-5)
    assert torch.device(pipe._execution_device).type == "dx"


# Schedulers


STOCK = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "stochastic ddim": (DDIMScheduler, {"eta": 1.0}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler, karras": (functools.partial(EulerDiscreteScheduler, use_karras_sigmas=True), {}),
    "dpm-solver": (DPMSolverMultistepScheduler, {}),
    "stochastic dpm-solver": (functools.partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"), {}),
}


def walk(scheduler, place: str, steps: int, options: dict) -> torch.Tensor:
    """A sample by a network that shrinks it."""
    torch.manual_seed(3)
    scheduler.set_timesteps(steps, device=place)
    sample = torch.randn(2, 3, 8, 8, device=place) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = 0.3 * scheduler.scale_model_input(sample, t)
        sample = scheduler.step(output, t, sample, **options).prev_sample
    return sample


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("settings", [{}, {"gamma": 1.0, "skip_steps": 0}], ids=["on", "off"])
def test_a_boosted_scheduler_waits_no_more_than_the_stock_one(kind, settings):
    build, options = STOCK[kind]
    scheduler = boosted(build(), **settings)
    walked = functools.partial(walk, options=options)
    with without_float64():
        torch.testing.assert_close(walked(scheduler, "dx", MANY).cpu(), walked(scheduler, "cpu", MANY))
        step, _ = a_step(lambda steps: walked(scheduler, "dx", steps))
        stock, _ = a_step(lambda steps: walked(build(), "dx", steps))
    assert_nobody_waits(step, 0)
    assert sum(step.values()) <= sum(stock.values()), (step, stock)


def test_a_boosted_ddim_steps_to_its_neighbours_on_a_device():
    scheduler = boosted(DDIMScheduler(), skip_steps=0)
    sample, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for timesteps in ([900, 400, 250, 0], [999, 7]):
        for between in (0, 3):
            expected, found = (
                [
                    scheduler.step(noise.to(place), t.to(place), sample.to(place)).prev_sample
                    for t in torch.tensor(timesteps) - between
                    if t >= 0
                ]
                for place in ("cpu", "dx")
                if scheduler.set_timesteps(timesteps=timesteps, device=place) is None
            )
            for one, other in zip(expected, found, strict=True):
                assert torch.equal(one, other.cpu())


def heun(place: str, steps: int, **settings) -> torch.Tensor:
    torch.manual_seed(3)
    scheduler = EDMHeunScheduler(sigma_max=5.0, **settings)
    scheduler.set_timesteps(steps, device=place)
    x = torch.randn(2, 3, 8, 8, device=place) * scheduler.init_noise_sigma
    for i in range(steps):
        x, sigma = scheduler.churn(x)
        x = scheduler.step(x * 0.5, sigma, x).prev_sample
        if i < steps - 1:
            x = scheduler.step(x * 0.5, scheduler.timesteps[2 * i + 1], x).prev_sample
    return x


@pytest.mark.parametrize("settings", [{}, {"S_churn": 2.0}])
def test_edm_heun_on_a_device(settings):
    torch.testing.assert_close(heun("dx", MANY, **settings).cpu(), heun("cpu", MANY, **settings))
    step, _ = a_step(lambda steps: heun("dx", steps, **settings))
    assert not step, step
    with without_float64():
        result = heun("dx", MANY, **settings)
    assert result.dtype == torch.float32
    if not settings:  # otherwise it has other draws in float32
        torch.testing.assert_close(result.cpu().double(), heun("cpu", MANY), rtol=1e-5, atol=1e-5)


KERNELS = {
    "absorbing": ("log_score", "x0", "probabilities"),
    "uniform": ("log_score", "x0"),
    "gaussian": ("x0",),
    "birth_death": ("probabilities",),
}
CHAINS = [
    (kernel, prediction, sampler, jumps)
    for kernel, predictions in KERNELS.items()
    for prediction, sampler in itertools.product(predictions, ("euler", "tweedie", "theta_trapezoidal", "gillespie"))
    for jumps in ("categorical", "poisson")
    if (sampler != "gillespie" or kernel == "absorbing")
    and (jumps == "categorical" or (kernel != "absorbing" and sampler == "euler"))
]


def chain(scheduler: CTMCScheduler, place: str, steps: int, draws: bool) -> torch.Tensor:
    """Tokens (3, 20), with a corrector step after each step but the last; the network's output is fixed."""
    torch.manual_seed(3)
    noise = generator() if draws else None
    output = torch.randn(3, 20, scheduler.config.vocab_size, generator=torch.Generator().manual_seed(1))
    output = (output.softmax(-1) if scheduler.config.prediction_type == "probabilities" else output).to(place)
    scheduler.set_timesteps(steps, device=place)
    sample = scheduler.sample_prior((3, 20), noise, place)
    for i, t in enumerate(scheduler.timesteps):
        scheduler.model_time(t, len(sample))
        sample = scheduler.step(output, t, sample, noise).prev_sample
        step, stage = divmod(i + 1, scheduler.order)
        if scheduler.config.sampler != "gillespie" and stage == 0 and step <= steps:
            time = float(scheduler.edges[step])
            sample = scheduler.step_correct(output, time, sample, 0.01, noise).prev_sample
    return sample


@pytest.mark.parametrize(("kernel", "prediction", "sampler", "jumps"), CHAINS)
@pytest.mark.parametrize("draws", [False, True], ids=["no generator", "generator"])
def test_a_chain_on_a_device(kernel, prediction, sampler, jumps, draws):
    settings = {"rate_sigma": 3.0, "Q_sigma": 20.0, "min_timestep": 0.01, "jumps": jumps}
    scheduler = CTMCScheduler(kernel, 8, sampler=sampler, prediction_type=prediction, **settings)
    expected = chain(scheduler, "cpu", MANY, draws)
    with without_float64():
        assert torch.equal(chain(scheduler, "dx", MANY, draws).cpu(), expected)
        step, drawn = a_step(lambda steps: chain(scheduler, "dx", steps, draws))
    searches = scheduler.order + (sampler != "gillespie")  # the corrector's is the last one
    assert_nobody_waits(step, drawn, allowed_reads(scheduler, draws, searches))


@pytest.mark.skipif(not hasattr(diffusers, "DiscreteDDIMScheduler"), reason="diffusers has no DiscreteDDIMScheduler")
@pytest.mark.parametrize("spacing", ["table", "uniform"])
def test_discrete_ddim_on_a_device(spacing):
    from diffusers_ext import TableDiscreteDDIMScheduler

    tables = {str(n): [1 - i / (n + 1) for i in range(n + 1)] for n in (FEW, MANY)}
    scheduler = TableDiscreteDDIMScheduler(timestep_tables=tables, timestep_spacing=spacing)

    def tokens(place: str, steps: int) -> torch.Tensor:
        torch.manual_seed(3)
        scheduler.set_timesteps(steps, device=place)
        logits = torch.randn(7, 7).to(place)
        sample = torch.randint(7, (3, 12), device=place)
        for t in scheduler.timesteps:
            sample = scheduler.step(logits[sample], t, sample, temperature=1.0).prev_sample
        return sample

    with without_float64():
        assert torch.equal(tokens("dx", MANY).cpu(), tokens("cpu", MANY))
        step, _ = a_step(lambda steps: tokens("dx", steps))
    assert_nobody_waits(step, 0)


# Draws of other devices


@pytest.mark.parametrize("negative_zeros", [False, True], ids=["floored", "negative zeros"])
@pytest.mark.parametrize("sampler", ["euler", "tweedie", "theta_trapezoidal", "gillespie"])
def test_coarse_draws_leave_no_mask_and_draw_no_impossible_token(sampler, negative_zeros):
    """With draws of 3 bits a uniform is exactly 0 one time in eight, and so is an exponential."""
    scheduler = CTMCScheduler(vocab_size=6, prediction_type="probabilities", sampler=sampler)
    scheduler.set_timesteps(8, device="dx")
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0, 0.0]).expand(50, 100, 6).to("dx")
    with coarse_draws(bits=3, negative_zeros=negative_zeros):
        sample = scheduler.sample_prior((50, 100), device="dx")
        for t in scheduler.timesteps:
            sample = scheduler.step(probabilities, t, sample).prev_sample
    assert set(sample.unique().tolist()) == {1, 3}


# Measures


def features(seed: int, rows: int = 40) -> torch.Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


class Language(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(9, 9)

    def forward(self, input_ids):
        return type("Output", (), {"logits": self.table(input_ids)})


def letters(seed: int) -> torch.Tensor:
    return torch.randint(9, (4, 12), generator=torch.Generator().manual_seed(seed))


MEASURES = {
    "frechet": lambda place: frechet_distance(
        features(0).mean(0).to(place), features(0).T.cov().to(place), features(1).mean(0), features(1).T.cov()
    ),
    "statistics": lambda place: feature_statistics(features(0).to(place)).covariance,
    "knn": lambda place: average_knn_distance(features(0).to(place), features(1).to(place)),
    "precision": lambda place: precision_recall(features(0).to(place), features(1).to(place)),
    "rarity": lambda place: rarity_score(features(0).to(place), features(1).to(place)).mean,
    "countdown": lambda place: countdown_errors(letters(0).to(place)),
    "countdown, original": lambda place: countdown_errors_original(letters(0).to(place)),
    "histogram": lambda place: histogram_distance(letters(0).to(place), letters(1).to(place), 9).hellinger,
    "entropy": lambda place: unigram_entropy(letters(0).to(place)),
    "perplexity": lambda place: generative_perplexity(seeded(Language)().to(place), letters(0).to(place), 3),
    "digits": lambda place: evaluate_digits(
        torch.rand(8, 1, 28, 28, generator=generator()).to(place), torch.arange(8), ["knn_distance", "frechet"]
    ),
    "extractor": lambda place: load_extractor("classifier", device=place)(
        (features(3, 28 * 28).view(-1, 28, 28, 1) * 20).byte().numpy()
    ),
    "network": lambda place: load_network("mnist-classifier").to(place)(torch.zeros(2, 1, 28, 28).to(place)).features,
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_on_a_device_without_float64(name):
    expected = MEASURES[name]("cpu")
    with without_float64(), torch.no_grad():
        found = MEASURES[name]("dx")
    found = found.cpu() if isinstance(found, torch.Tensor) else found
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "golden"])
def test_timestep_tables_are_searched_on_a_device_without_float64(method):
    pipe = tiny_discrete.build("text")
    search = functools.partial(
        optimize_timesteps, scheduler=pipe.scheduler, data=letters(0).clamp(max=7), num_inference_steps=[2, 4],
        method=method, progress=False, **({"grid_size": 16} if method == "exact" else {}),
    )  # fmt: skip
    expected = search(pipe.model)
    with without_float64():
        found = search(pipe.model.to("dx"))
    assert [found[n] for n in (2, 4)] == [expected[n] for n in (2, 4)]


def test_a_likelihood_on_a_device_without_float64():
    pipe = tiny_discrete.build("text")
    with contextlib.ExitStack() as stack:
        torch.manual_seed(3)
        expected = likelihood_bound(pipe.model, pipe.scheduler, letters(0).clamp(max=7), num_times=4)
        stack.enter_context(without_float64())
        torch.manual_seed(3)
        found = likelihood_bound(pipe.model.to("dx"), pipe.scheduler, letters(0).clamp(max=7), num_times=4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
