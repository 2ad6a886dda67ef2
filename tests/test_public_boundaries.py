"""Public calls with one argument of a wrong kind end in a ValueError; numbers of NumPy are numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ClassifierFreeGuidance,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)  # fmt: skip

import diffusers_ext
from diffusers_ext import evaluation, flow, metrics, sampling
from diffusers_ext.checkpoints import convert_edm2, load_edm2, load_guided_diffusion
from diffusers_ext.discrete.losses import score_entropy, x0_cross_entropy
from diffusers_ext.discrete.music import notes, pitches_to_tokens
from diffusers_ext.guidance.search import coarse_to_fine, search_interval
from diffusers_ext.jump_your_steps import KLUB, TimestepTables, optimize_timesteps
from diffusers_ext.pipelines.call_arguments import checked_arguments, is_of_kind
from diffusers_ext.shipped import load_network, load_pipeline

ROOT = Path(__file__).parent.parent
WRONG = (
    "x", -1, float("nan"), float("inf"), 10**400, ["x"], {"x": 1}, object(), np.zeros(3), torch.zeros(3),
    torch.zeros(2, 2, dtype=torch.int64), True, [[1, 2], [3]],
)  # fmt: skip
torch.manual_seed(0)
X = torch.rand(2, 3, 8, 8)
TOKENS = torch.randint(0, 6, (2, 6))
SCORES = torch.zeros(2, 6, 7)
PIXELS = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
POINTS = np.random.default_rng(0).random((30, 4))


def unet(channels: int = 3, out_channels: int = 3, classes: int | None = 4) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=out_channels, block_out_channels=(4,), norm_num_groups=2,
        layers_per_block=1, add_attention=False, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        num_class_embeds=classes,
    ).eval()  # fmt: skip


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edm2(labels: int):
    return diffusers_ext.EDM2UNet2DModel(
        img_resolution=8, img_channels=3, label_dim=labels, model_channels=8, channel_mult=(1, 2), num_blocks=1,
        attn_resolutions=(4,), channels_per_head=8,
    ).eval()  # fmt: skip


BOOST = quiet(diffusers_ext.BoostAndSkipPipeline(unet(), DDPMScheduler(), null_class=3))
UPSAMPLE = quiet(diffusers_ext.ADMUpsamplerPipeline(unet(6), DDPMScheduler()))
FLOW = quiet(diffusers_ext.FlowPostprocessingPipeline(unet(), FlowMatchEulerDiscreteScheduler()))
EDM2 = quiet(diffusers_ext.EDM2Pipeline(edm2(4), diffusers_ext.EDMHeunScheduler(), guidance_unet=edm2(0)))
CTMC = diffusers_ext.CTMCScheduler(vocab_size=7)
NETWORK = diffusers_ext.SEDDTransformer(vocab_size=7, hidden_size=8, cond_dim=4, num_blocks=1, num_heads=2).eval()
DISCRETE = quiet(diffusers_ext.DiscreteDiffusionPipeline(NETWORK, CTMC))


def ready(name: str, method: str, **config):
    """A method of a new scheduler whose schedule is set."""

    def call(**arguments):
        scheduler = getattr(diffusers_ext, name)(**config)
        scheduler.set_timesteps(5)
        return getattr(scheduler, method)(**arguments)

    return call


def boosted() -> dict:
    cases = {}
    for name in ("DDPM", "DDIM", "EulerDiscrete", "DPMSolverMultistep"):
        name = f"BoostAndSkip{name}Scheduler"
        config = {"gamma": 2.0, "skip_steps": 1}
        scheduler = getattr(diffusers_ext, name)(**config)
        scheduler.set_timesteps(5)
        noising = {"original_samples": X, "noise": X, "timesteps": scheduler.timesteps[:2]}
        cases |= {
            f"{name}": (getattr(diffusers_ext, name), config),
            f"{name}.set_timesteps": (ready(name, "set_timesteps", **config), {"num_inference_steps": 4}),
            f"{name}.set_timesteps list": (ready(name, "set_timesteps", **config), {"timesteps": [900, 500]}),
            f"{name}.add_noise": (ready(name, "add_noise", **config), noising),
        }
    return cases


def discrete() -> dict:
    cases = {}
    tokens = {"model_output": SCORES, "timestep": 0.5, "sample": TOKENS}
    for name, config in {
        "absorbing": {}, "uniform": {"kernel": "uniform"},
        "gaussian": {"kernel": "gaussian", "prediction_type": "x0"}, "tweedie": {"sampler": "tweedie"},
    }.items():  # fmt: skip
        for method, arguments in {
            "set_timesteps": {"num_inference_steps": 4},
            "step": {**tokens, "generator": torch.Generator(), "next_timestep": 0.2},
            "step_correct": {**tokens, "step_size": 0.1, "generator": torch.Generator()},
            "denoise": {**tokens, "generator": torch.Generator()},
            "add_noise": {"original_samples": TOKENS, "noise": torch.Generator(), "timesteps": [0.5, 0.2]},
            "reverse_rates": tokens,
            "sample_prior": {"shape": (2, 6), "generator": torch.Generator()},
            "sigma_bar": {"timestep": 0.5},
            "model_time": {"timestep": 0.5, "batch_size": 2},
            "transition_matrix": {"timestep": 0.5, "next_timestep": 0.1},
        }.items():
            cases[f"CTMCScheduler.{method} {name}"] = ready("CTMCScheduler", method, vocab_size=7, **config), arguments
    return cases


IMAGES = {"generator": torch.Generator(), "output_type": "pt", "callback_on_step_end": lambda *_: {}}
DDIM = {"model_output": X, "timestep": 800, "sample": X, "eta": 0.5, "generator": torch.Generator()}
SEARCH = {
    "model": NETWORK, "scheduler": CTMC, "data": TOKENS, "num_inference_steps": [2], "method": "exact",
    "batch_size": 2, "grid_size": 4, "seed": 0, "progress": False,
}  # fmt: skip
TRAINING = {
    "samples": PIXELS, "real": PIXELS, "k": 2, "steps": 1, "batch_size": 2, "learning_rate": 1e-3, "weight_decay": 0.0,
    "ema_decay": 0.9, "max_grad_norm": 1.0, "log_every": 1, "seed": 0, "balance": False,
}  # fmt: skip
STOCK = DiTPipeline(
    DiTTransformer2DModel(1, 4, 3, num_layers=1, sample_size=4, norm_num_groups=1), AutoencoderKL(), DDIMScheduler()
)
INTERVAL = {"sigma_lo": 0.2, "sigma_hi": 3.0, "sigma_unit": "edm"}
NEAREST = {"features": POINTS, "reference": POINTS, "k": 3}
CASES = {
    "BoostAndSkipPipeline": (
        BOOST, {"class_labels": [0, 1], "batch_size": 2, "num_inference_steps": 2, "gamma": 2.0, "skip_steps": 1,
        "guidance_scale": 1.0, "eta": 0.0, "latents": X, **IMAGES},
    ),
    "ADMUpsamplerPipeline": (
        UPSAMPLE, {"image": X[..., :4, :4], "class_labels": [0, 1], "num_inference_steps": 2, "latents": X, **IMAGES},
    ),
    "FlowPostprocessingPipeline": (
        FLOW, {"images": X, "class_labels": [0, 1], "num_inference_steps": 2, "strength": 0.5, "solver": "scheduler",
        **IMAGES},
    ),
    "EDM2Pipeline": (
        EDM2, {"class_labels": [0, 1], "batch_size": 2, "num_inference_steps": 2, "guidance_scale": 1.5,
        "guided_steps": (0, 1), "latents": X, "decode_batch_size": 1, **IMAGES},
    ),
    "EDM2Pipeline.decode": (EDM2.decode, {"latents": X, "batch_size": 1}),
    "DiscreteDiffusionPipeline": (
        DISCRETE, {"batch_size": 2, "sequence_length": 6, "num_inference_steps": 2, "sampler": "euler", **IMAGES,
        "output_type": "tokens"},
    ),
    **boosted(),
    "BoostAndSkipDDIMScheduler.step": (ready("BoostAndSkipDDIMScheduler", "step", gamma=2.0), DDIM),
    "boost_and_skip": (diffusers_ext.boost_and_skip, {"scheduler": DDPMScheduler(), "gamma": 2.0, "skip_steps": 1}),
    "EDMHeunScheduler": (diffusers_ext.EDMHeunScheduler, {"sigma_min": 0.01, "sigma_max": 8.0, "rho": 7.0}),
    "EDMHeunScheduler.set_timesteps": (ready("EDMHeunScheduler", "set_timesteps"), {"num_inference_steps": 4}),
    "EDMHeunScheduler.step": (
        ready("EDMHeunScheduler", "step"), {"model_output": X, "timestep": 80.0, "sample": X},
    ),
    "EDMHeunScheduler.add_noise": (
        ready("EDMHeunScheduler", "add_noise"), {"original_samples": X, "noise": X, "timesteps": [1.0, 2.0]},
    ),
    **discrete(),
    "CTMCScheduler": (
        diffusers_ext.CTMCScheduler, {"kernel": "absorbing", "vocab_size": 7, "eps": 1e-3, "time_exponential": 100.0,
        "timestep_tables": None},
    ),
    "GuidanceInterval": (diffusers_ext.GuidanceInterval, {"pipe": STOCK, **INTERVAL, "layout": "uncond, cond"}),
    "apply_guidance_interval": (diffusers_ext.apply_guidance_interval, {"pipe": STOCK, **INTERVAL, "verify": True}),
    "apply_guidance_interval steps": (
        diffusers_ext.apply_guidance_interval, {"pipe": STOCK, "guided_steps": (1, 2), "layout": "uncond, cond"},
    ),
    "apply_guider": (
        diffusers_ext.apply_guider, {"pipe": STOCK, "guider": ClassifierFreeGuidance(), **INTERVAL},
    ),
    "limit_to_interval": (diffusers_ext.limit_to_interval, {"guider": ClassifierFreeGuidance(), **INTERVAL}),
    "IntervalGuidance": (
        diffusers_ext.IntervalGuidance, {"guidance_scale": 2.0, **INTERVAL, "guidance_rescale": 0.1, "start": 0.1,
        "stop": 0.9, "enabled": False},
    ),
    "remove_guider": (diffusers_ext.remove_guider, {"pipe": STOCK}),
    "remove_guidance_interval": (diffusers_ext.remove_guidance_interval, {"pipe": STOCK}),
    "optimize_timesteps": (optimize_timesteps, SEARCH),
    "KLUB": (KLUB(NETWORK, CTMC, TOKENS), {"t1": 0.9, "t2": 0.5, "t3": 0.1}),
    "TimestepTables.of": (TimestepTables.of, {"scheduler": CTMC}),
    "average_knn_distance": (metrics.average_knn_distance, NEAREST),
    "precision_recall": (metrics.precision_recall, NEAREST),
    "feature_statistics": (metrics.feature_statistics, {"batches": POINTS}),
    "countdown_sequences": (metrics.countdown_sequences, {"count": 2, "length": 8, "num_vocabs": 4}),
    "unigram_entropy": (metrics.unigram_entropy, {"tokens": TOKENS}),
    "find_neighbours": (flow.find_neighbours, {"queries": POINTS, "reference": POINTS, "k": 3}),
    "extract_features": (flow.extract_features, {"images": PIXELS, "batch_size": 4}),
    "flow_loss": (flow.flow_loss, {"model": FLOW.model, "x0": X, "x1": X, "t": torch.rand(2),
        "class_labels": torch.tensor([0, 1])}),
    "sample_images": (
        sampling.sample_images, {"pipe": BOOST, "labels": torch.tensor([0, 1]), "seed": 0, "batch_size": 2,
        "num_inference_steps": 2},
    ),
    "cycled_labels": (sampling.cycled_labels, {"pipe": BOOST, "count": 3, "labels": [0, 1]}),
    "score_entropy": (
        score_entropy, {"scheduler": CTMC, "log_score": SCORES, "noisy": TOKENS, "original": TOKENS,
        "timesteps": torch.tensor([0.5, 0.2])},
    ),
    "x0_cross_entropy": (
        x0_cross_entropy, {"scheduler": CTMC, "logits": SCORES, "noisy": TOKENS, "original": TOKENS},
    ),
    "notes": (notes, {"voice": np.full(8, 60)}),
    "pitches_to_tokens": (pitches_to_tokens, {"pitches": np.full((4, 8), 60)}),
    "search_interval": (search_interval, {"distance": lambda _: 1.0, "guidance_scales": [1.5], "num_steps": 4}),
    "coarse_to_fine": (coarse_to_fine, {"value": float, "low": 0, "high": 4}),
    "evaluate_digits": (
        evaluation.evaluate_digits, {"images": torch.rand(5, 1, 28, 28), "labels": torch.zeros(5, dtype=torch.long),
        "metrics": ["knn_distance"]},
    ),
}  # fmt: skip
# Of these only wrong arguments are tried: a right call takes files, or changes the network.
REFUSALS = {
    "train_postprocessing_flow": (
        lambda **call: flow.train_postprocessing_flow(**call, model=unet(1, 1, None), progress=False),
        TRAINING,
    ),
    "load_edm2": (load_edm2, {"path": "no-file"}),
    "load_guided_diffusion": (load_guided_diffusion, {"path": "no-file"}),
    "convert_edm2": (convert_edm2, {"path": "no-file", "folder": "no-folder"}),
    "load_pipeline": (load_pipeline, {"model": "mnist-unet"}),
    "load_network": (load_network, {"model": "mnist-classifier"}),
}


@pytest.mark.parametrize("name", CASES)
def test_right_arguments(name):
    call, arguments = CASES[name]
    call(**arguments)


@pytest.mark.parametrize("name", [*CASES, *REFUSALS])
def test_wrong_arguments(name):
    """A ValueError, or a result where the value happens to be allowed; never another library's error."""
    call, arguments = (CASES | REFUSALS)[name]
    refused = 0
    for argument in arguments:
        for value in WRONG:
            if name in REFUSALS and isinstance(value, str):
                continue  # another path
            try:
                call(**{**arguments, argument: value})
            except ValueError:
                refused += 1
            except Exception as error:
                raise AssertionError(f"{name}({argument}={value!r:.60}): {error!r:.200}") from error
    assert refused >= 7 * len(arguments)


@pytest.mark.parametrize("name", [name for name in CASES if name != "DiscreteDiffusionPipeline"])
def test_numbers_of_numpy(name):
    call, arguments = CASES[name]
    numpy = {int: np.int64, float: np.float64}
    call(**{key: numpy.get(type(value), lambda same: same)(value) for key, value in arguments.items()})


def test_the_message():
    @checked_arguments
    def draw(steps: int, scale: float | None = None, labels: list[int] | torch.Tensor = (), device: str = "cpu"):
        return steps

    assert type(draw(np.int64(3), np.float32(0.5), range(3))) is int
    for call, message in {
        (("x",), ()): "steps must be an integer, got 'x'",
        ((True,), ()): "steps must be an integer, got True",
        ((10**400,), ()): "steps must be an integer, got an integer of 1329 bits",
        ((3,), (("scale", "1"),)): "scale must be a number or None, got '1'",
        ((3,), (("labels", (1.5,)),)): r"labels must be a list of integers or a tensor, got \(1.5,\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            draw(*call[0], **dict(call[1]))


def test_both_floors_have_the_same_checks():
    """schedulers/ and pipelines/ may not import each other."""
    copies = [ROOT / "schedulers/scheduler_arguments.py", ROOT / "pipelines/call_arguments.py"]
    assert len({path.read_text(encoding="utf-8") for path in copies}) == 1


def test_kinds():
    assert is_of_kind(torch.tensor([1, 2]), list[int]) and not is_of_kind(torch.tensor(1), list[int])
    assert is_of_kind((0.1, 5), tuple[float, float]) and not is_of_kind((0.1,), tuple[float, float])
    assert is_of_kind({"3": [1.0]}, dict[str, list[float]]) and not is_of_kind({3: [1.0]}, dict[str, list[float]])
    assert is_of_kind("cpu", str | torch.device) and not is_of_kind("gpu", str | torch.device)
