"""A number that is not finite never passes: samplers say step and sample, searches never take it for the best."""

import math
import shutil

import numpy as np
import pytest
import torch
from adm_checkpoints import adm_state
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from safetensors.torch import load_file, save_file
from test_damaged_files import GOLDENS, edm2, sedd
from tiny_discrete import build

from diffusers_ext import BoostAndSkipPipeline, CTMCScheduler, FlowPostprocessingPipeline, metrics
from diffusers_ext.checkpoints import convert_guided_diffusion, load_edm2, load_guided_diffusion, load_sedd
from diffusers_ext.checkpoints.guided_diffusion import read_state_dict
from diffusers_ext.guidance.search import search_interval
from diffusers_ext.jump_your_steps.costs import cheapest_schedules
from diffusers_ext.jump_your_steps.golden import Bracket, golden_middle
from diffusers_ext.pipelines.pixel_space import FiniteWatch, NotFiniteError
from diffusers_ext.sampling import sample_to_folder
from diffusers_ext.shipped import ASSETS, load_pipeline

BAD = [torch.nan, torch.inf, -torch.inf]
TOLD = {"num_heads": 4, "noise_schedule": "cosine", "image_size": 16, "use_new_attention_order": True}


def breaks(model, call: int, spoil):
    """Spoil the output of a network from its call number `call` on; spoil(output) acts in place."""
    forward, calls = model.forward, []

    def broken(*args, **kwargs):
        output = forward(*args, **kwargs)
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        calls.append(0)
        if len(calls) > call:
            tensor = tensor.detach().clone()
            spoil(tensor)
        return tensor if isinstance(output, torch.Tensor) else UNet2DOutput(sample=tensor)

    model.forward = broken


def sample_1(value):
    def spoil(output):
        output[1].reshape(-1)[0] = value

    return spoil


# Image samplers


def tiny_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=4,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("value", BAD)
def test_boost_and_skip_names_step_and_sample(value):
    pipe = BoostAndSkipPipeline(tiny_unet(), DDPMScheduler())  # which clips, so that infinity would become a 1
    breaks(pipe.unet, 2, sample_1(value))
    with pytest.raises(NotFiniteError, match="output of sample 1 is not finite in step 2 of 5") as error:
        pipe(batch_size=3, num_inference_steps=5, generator=torch.Generator().manual_seed(0))
    assert (error.value.sample, error.value.step) == (1, 2)


@pytest.mark.parametrize("value", BAD)
def test_edm2_names_step_and_sample(value):
    pipe = load_pipeline("mnist-edm2")
    breaks(pipe.unet, 3, sample_1(value))
    with pytest.raises(NotFiniteError, match="of sample 1 is not finite in step 1 of 4"):
        pipe(class_labels=[1, 2], num_inference_steps=4, generator=torch.Generator().manual_seed(0))


def flow(field) -> FlowPostprocessingPipeline:
    pipe = FlowPostprocessingPipeline(tiny_unet(), FlowMatchEulerDiscreteScheduler())
    pipe.model.forward = lambda x, t, **_: UNet2DOutput(sample=field(x, t.view(-1, 1, 1, 1) / 1000))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("value", BAD)
def test_the_flow_names_step_and_sample(value):
    def field(x, t):
        v = torch.zeros_like(x)
        v[1] = torch.where(t[1] > 0.45, value, 0.0)
        return v

    images = torch.full((2, 3, 8, 8), 0.5)
    with pytest.raises(NotFiniteError, match="of sample 1 is not finite in step 5 of 10"):
        flow(field)(images, num_inference_steps=10)
    pytest.importorskip("torchdiffeq")
    with pytest.raises(NotFiniteError, match=r"at t = .* the velocity of sample 1 is not finite"):
        flow(field)(images, solver="dopri5")


@pytest.mark.slow
@pytest.mark.parametrize("field", [lambda x, t: 1e6 * (torch.cos(40 * t) - x), lambda x, t: x.square() * 1e4 + 1e3])
def test_a_stiff_field_stops_dopri5(field):
    pytest.importorskip("torchdiffeq")
    calls = []

    def counted(x, t):
        calls.append(0)
        return field(x, t)

    with pytest.raises(ValueError, match=r"dopri5 does not get to t = 1\.0|is not finite"):
        flow(counted)(torch.full((1, 3, 8, 8), 0.5), solver="dopri5")
    assert len(calls) <= 5001


def test_on_a_device_it_is_told_at_the_end():
    """Values of other devices are read once; the meta device stands for one that cannot be read in between."""
    watch = FiniteWatch(3)
    watch.see("it", torch.empty(2, 4, device="meta"), 0)
    assert len(watch.seen) == 1
    watch.seen = [("it", 0, torch.tensor([True, True])), ("that", 2, torch.tensor([True, False]))]
    with pytest.raises(NotFiniteError, match="that of sample 1 is not finite in step 2 of 3"):
        watch.finish()


# Discrete samplers


@pytest.mark.parametrize("sampler", ["euler", "tweedie", "theta_trapezoidal", "gillespie"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_discrete_samplers_name_step_and_sample(sampler, value):
    pipe = build("text")
    breaks(pipe.model, 2, sample_1(value))
    with pytest.raises(NotFiniteError, match="network's output of sample 1 is not finite in step 2 of"):
        pipe(batch_size=2, num_inference_steps=4, sampler=sampler, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", ["text", "sequence", "image"])
def test_a_row_without_a_token_is_refused_and_a_token_may_be(variant):
    pipe = build(variant)
    breaks(pipe.model, 0, lambda output: output[..., 0].fill_(-math.inf))
    tokens = pipe(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).tokens
    if variant == "text":  # the other kernels begin with any token
        assert (tokens != 0).all()
    breaks(pipe.model, 0, lambda output: output[1, 3].fill_(-math.inf))
    with pytest.raises(NotFiniteError, match="of sample 1 is not finite in step 0"):
        pipe(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0))


def test_probabilities_that_are_no_law_are_refused():
    pipe = build("text")
    pipe.scheduler = CTMCScheduler(vocab_size=9, prediction_type="probabilities")
    breaks(pipe.model, 0, lambda output: output.copy_(output.softmax(-1)))
    pipe(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    breaks(pipe.model, 1, lambda output: output[1, 2].zero_())
    with pytest.raises(NotFiniteError, match="of sample 1 is not finite in step 1"):
        pipe(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0))


def law_of_tokens(kernel, sampler, shift):
    """Frequencies of the tokens that are drawn where the log scores are those of one law plus a shift."""
    law = torch.tensor([0.1, 0.2, 0.3, 0.4])
    mask = kernel == "absorbing"
    scheduler = CTMCScheduler(kernel=kernel, vocab_size=4 + mask, sampler=sampler)
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    sample = scheduler.sample_prior((8, 2000), generator)
    scores = torch.nn.functional.pad(law.log(), (0, int(mask))).expand(8, 2000, -1) + shift
    for t in scheduler.timesteps:
        current = scores if mask else scores - scores.gather(-1, sample.unsqueeze(-1)) + shift
        sample = scheduler.step(current, t, sample, generator).prev_sample
    return torch.bincount(sample.flatten(), minlength=4 + mask) / sample.numel()


@pytest.mark.parametrize("shift", [-200.0, -90.0, 90.0, 200.0, 3000.0])
@pytest.mark.parametrize("sampler", ["euler", "tweedie", "theta_trapezoidal", "gillespie"])
def test_log_scores_of_any_size_draw_the_law(sampler, shift):
    """exp() of them overflows or vanishes, and then the first token was drawn, or none."""
    found = law_of_tokens("absorbing", sampler, shift)
    torch.testing.assert_close(found, torch.tensor([0.1, 0.2, 0.3, 0.4, 0]), atol=0.02, rtol=0)


@pytest.mark.parametrize("shift", [-200.0, 90.0, 200.0])
def test_log_scores_of_any_size_with_the_uniform_kernel(shift):
    """A shift of all scores, that of the current token included, changes no law of the tweedie sampler."""
    torch.testing.assert_close(
        law_of_tokens("uniform", "tweedie", shift), law_of_tokens("uniform", "tweedie", 0.0), atol=0.02, rtol=0
    )


def test_gillespie_keeps_the_order_of_unlikely_positions():
    """With tiny rates a position of a rate e^20 times as large is still decoded first."""
    scheduler = CTMCScheduler(vocab_size=3, sampler="gillespie")
    scheduler.set_timesteps(4)
    scores = torch.full((1, 8, 3), -220.0)
    scores[0, 6:] = -200
    sample = scheduler.sample_prior((1, 8))
    first = scheduler.step(scores, 1.0, sample, torch.Generator().manual_seed(0), num_decode=2).prev_sample
    assert (first[0] != 2).tolist() == [False] * 6 + [True] * 2


def test_masks_are_never_written():
    pipe = build("text")

    def mask_again(pipe, step, t, tensors):
        return {"tokens": torch.full_like(tensors["tokens"], 8)}

    with pytest.raises(ValueError, match="sample 0 of the batch still holds 12 masks after the last step"):
        pipe(batch_size=2, num_inference_steps=3, callback_on_step_end=mask_again)


def test_bulk_sampling_names_the_sample_among_all(tmp_path):
    pipe = build("text")
    breaks(pipe.model, 7, sample_1(torch.nan))  # in the second batch, whose calls are 5 each
    with pytest.raises(ValueError, match="of sample 5 is not finite in step 2 of 5"):
        sample_to_folder(pipe, tmp_path / "out", 8, batch_size=4, num_inference_steps=4)
    assert not list((tmp_path / "out").glob("*.txt"))


@pytest.mark.parametrize("length", [0, -1, 1_000_000, 2.5, "x"])
def test_a_length_out_of_proportion_is_refused(length):
    pipe = build("text")
    pipe.model.register_to_config(sequence_length=length)
    with pytest.raises(ValueError, match=r"sequence_length=.*must be an integer in \[1, 65536\]"):
        pipe(num_inference_steps=2)


# Converters


@pytest.mark.slow
def test_no_tensor_of_a_checkpoint_may_be_broken(tmp_path):
    state = adm_state()
    for number, name in enumerate(state):
        broken = dict(state)
        broken[name] = state[name].clone()
        broken[name].view(-1)[-1] = BAD[number % 3]
        torch.save(broken, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=f"tensor {name} holds numbers that are not finite".replace(".", r"\.")):
            read_state_dict(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="not finite"):
        convert_guided_diffusion(tmp_path / "a.pt", tmp_path / "out", **TOLD)
    assert not (tmp_path / "out").exists()


def test_what_leaves_the_range_of_a_dtype_is_refused(tmp_path):
    state = adm_state()
    name = "input_blocks.0.0.bias"
    for value, dtype, flags in ((1e5, torch.float16, {}), (1e300, torch.float32, {}), (1e5, None, {"use_fp16": True})):
        torch.save({**state, name: torch.full_like(state[name].double(), value)}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"UNet2DModel in float(16|32), .*conv_in.bias holds numbers"):
            if dtype is None:
                load_guided_diffusion(tmp_path / "a.pt", **TOLD, **flags)
            else:
                convert_guided_diffusion(tmp_path / "a.pt", tmp_path / "out", dtype=dtype, **TOLD)
    assert not (tmp_path / "out").exists()


def test_other_readers_look_at_all_tensors(tmp_path):
    sedd(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["vocab_embed.embedding"][0, 0] = torch.inf
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"vocab_embed\.embedding holds numbers that are not finite"):
        load_sedd(tmp_path)
    edm2(tmp_path)
    data = bytearray((GOLDENS / "edm2_uncond_ema_fp16_nosource.pkl").read_bytes())
    largest = max(load_edm2(tmp_path / "network.pkl").parameters(), key=torch.Tensor.numel)
    place = data.index(largest.detach().half().numpy().tobytes())
    data[place : place + 2] = b"\x00\x7e"  # NaN
    (tmp_path / "network.pkl").write_bytes(data)
    with pytest.raises(ValueError, match="holds numbers that are not finite"):
        load_edm2(tmp_path / "network.pkl")


def test_weights_of_a_shipped_model_may_not_be_broken(tmp_path):
    folder = shutil.copytree(ASSETS / "mnist-flow", tmp_path / "flow")
    path = folder / "model/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    name = next(iter(state))
    state[name].view(-1)[0] = torch.inf
    save_file(state, path)
    with pytest.raises(ValueError, match=f"{name} holds numbers that are not finite".replace(".", r"\.")):
        load_pipeline(str(folder))


# Searches and metrics


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_searches_never_take_it_for_the_best(bad):
    with pytest.raises(ValueError, match="the distance at weight 2, steps 1-7 is"):
        search_interval(lambda c: bad if c.first == 1 else 1.0 + c.first, [2.0], 8)
    if math.isnan(bad):
        with pytest.raises(ValueError, match="is not a number"):
            golden_middle(lambda start, middle, end: bad, [1.0, 0.8, 0.6, 0.4], 0, 3, Bracket(0.01, 0.01))
        costs = torch.ones(5, 5, dtype=torch.float64)
        costs[1, 3] = bad
        with pytest.raises(ValueError, match="from grid point 1 to 3 is not a number"):
            cheapest_schedules(costs, [2], False)


def test_metrics_refuse_what_overflows():
    rng = np.random.default_rng(0)
    huge, reference = rng.normal(size=(30, 3)) * 1e160, rng.normal(size=(40, 3))
    for metric in (metrics.average_knn_distance, metrics.rarity_score, metrics.precision_recall):
        with pytest.raises(ValueError, match="features must lie within"):
            metric(huge, reference)
    mean, covariance = np.array([1e149, -1e149]), np.eye(2)
    assert math.isfinite(metrics.frechet_distance(mean, covariance, -mean, covariance))


def test_statistics_of_something_else(tmp_path):
    path = tmp_path / "a.npz"
    for content in ({}, {"mean": [np.nan], "covariance": [[1.0]], "count": 3}, {"mean": [1.0], "covariance": [1.0]}):
        np.savez(path, **content)
        with pytest.raises(ValueError, match="holds no feature statistics"):
            metrics.FeatureStatistics.load(path)
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="holds no feature statistics"):
        metrics.FeatureStatistics.load(path)
