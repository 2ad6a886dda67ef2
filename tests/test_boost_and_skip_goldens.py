"""Boost-and-Skip schedulers against numbers of the authors' own code."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDPMScheduler,
)
from diffusers.schedulers import scheduling_ddpm
from safetensors.torch import load_file

from diffusers_ext.schedulers.scheduling_boost_and_skip import (
    BoostAndSkipDDIMScheduler,
    BoostAndSkipDDPMScheduler,
)

GOLDENS = Path(__file__).parent / "goldens"

LOOPS = [
    "gd_loop_celeba_ancestral_g1_dt0_r10",
    "gd_loop_celeba_ancestral_g4_dt3_r10",
    "gd_loop_celeba_ddim_eta0_g4_dt3_r25",
    "gd_loop_imagenet_ancestral_g2.5_dt3_r25",
    "gd_loop_imagenet_ddim_eta0.5_g2.5_dt3_r10",
    "gd_loop_imagenet_ddim_eta0_g1_dt0_r10",
    "gd_loop_upsampler_ancestral_r10",
]
MATHS = [
    f"gd_math_{schedule}_{steps}" for schedule in ("cosine", "linear") for steps in ("10", "250", "ddim25", "full")
]


def golden(case):
    return json.loads((GOLDENS / f"{case}.json").read_text()), load_file(GOLDENS / f"{case}.safetensors")


def guided_diffusion_scheduler(cls, noise_schedule, **config):
    beta_schedule = {"cosine": "squaredcos_cap_v2", "linear": "linear"}[noise_schedule]
    learned = {"variance_type": "learned_range"} if issubclass(cls, DDPMScheduler) else {}
    return cls(**{"beta_schedule": beta_schedule, "clip_sample": True, **learned, **config})


@pytest.mark.parametrize("case", LOOPS)
def test_authors_loops_step_by_step(case, monkeypatch):
    about, tensors = golden(case)
    ddim = about["loop"] == "ddim"
    ours = guided_diffusion_scheduler(
        BoostAndSkipDDIMScheduler if ddim else BoostAndSkipDDPMScheduler,
        about["noise_schedule"],
        gamma=about["gamma"],
        skip_steps=about["Delta_t"],
    )
    ours.set_timesteps(timesteps=tensors["timestep_map"].flip(0).tolist()[about["Delta_t"] :])
    assert ours.timesteps.tolist() == tensors["network_t"][:, 0].tolist()
    noises = tensors.get("step_noise")
    tolerance = {"atol": about["tolerance"]["recommended_atol"], "rtol": about["tolerance"]["recommended_rtol"]}

    x = tensors["init_noise"] * ours.init_noise_sigma
    for i, t in enumerate(ours.timesteps):
        if ddim:
            noise = {"eta": about["eta"], "variance_noise": noises[i]} if about["eta"] else {}
            out = ours.step(tensors["model_output"][i], t, x, use_clipped_model_output=True, **noise)
        else:
            monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, i=i, **__: noises[i])
            out = ours.step(tensors["model_output"][i], t, x)
        x = out.prev_sample
        torch.testing.assert_close(x, tensors["x_after_step"][i], **tolerance)
        torch.testing.assert_close(out.pred_original_sample, tensors["pred_xstart"][i], **tolerance)
    final = {**tolerance, "atol": about["tolerance"]["recommended_atol_final"]}
    torch.testing.assert_close(x, tensors["x_after_step"][-1], **final)


def guided_diffusion_math(case, cls=BoostAndSkipDDPMScheduler, **config):
    about, tensors = golden(case)
    ours = guided_diffusion_scheduler(cls, about["noise_schedule"], **config)
    ours.set_timesteps(timesteps=tensors["timestep_map"].flip(0).tolist())
    return ours, tensors


# The scheduler's tables are float32 products of up to 1000 factors, the authors' float64: relative differences of a
# few 1e-6 at most timesteps, and of 1e-4 near t = 999 of the cosine schedule, where alphas_cumprod is 1e-9.
TABLE = {"rtol": 2e-4, "atol": 0}


@pytest.mark.parametrize("case", MATHS)
def test_authors_tables(case):
    ours, tensors = guided_diffusion_math(case)
    kept = tensors["timestep_map"]
    torch.testing.assert_close(ours.alphas_cumprod[kept].double(), tensors["alphas_cumprod"], **TABLE)
    previous = torch.stack([torch.as_tensor(ours.previous_timestep(t)) for t in kept])
    assert previous.tolist() == [-1, *kept[:-1].tolist()]
    alphas_prev = torch.where(previous >= 0, ours.alphas_cumprod[previous], 1.0).double()
    torch.testing.assert_close(alphas_prev, tensors["alphas_cumprod_prev"], **TABLE)
    # learned_range interpolates from log posterior variance (v = -1) to log beta (v = 1); entry 0 adds no noise
    for v, name in ((-1.0, "posterior_log_variance_clipped"), (1.0, "log_betas")):
        log_variance = torch.stack([ours._get_variance(t, torch.tensor(v)) for t in kept[1:]]).double()
        torch.testing.assert_close(log_variance, tensors[name][1:], rtol=0, atol=2e-3)


@pytest.mark.parametrize("case", MATHS)
@pytest.mark.parametrize("clip", [True, False])
def test_authors_posterior(case, clip, monkeypatch):
    ours, tensors = guided_diffusion_math(case, clip_sample=clip)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: torch.zeros(shape))
    suffix = "" if clip else "_noclip"
    for i, t in enumerate(tensors["pmv.t_network"].tolist()):
        x, output = tensors["pmv.x_t"][i : i + 1], tensors["pmv.model_output"][i : i + 1]
        out = ours.step(output, t, x)
        torch.testing.assert_close(
            out.pred_original_sample[0], tensors[f"pmv.pred_xstart{suffix}"][i], atol=2e-5, rtol=2e-4
        )
        torch.testing.assert_close(out.prev_sample[0], tensors[f"pmv.mean{suffix}"][i], atol=2e-5, rtol=2e-4)
        if t > 0:
            log_variance = ours._get_variance(t, predicted_variance=output[:, 3:])
            torch.testing.assert_close(log_variance[0], tensors["pmv.log_variance"][i], atol=2e-3, rtol=0)
        noisy = ours.add_noise(tensors["q.x0"][i], tensors["q.noise"][i], torch.tensor([t]))
        torch.testing.assert_close(noisy, tensors["q.x_t"][i], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", MATHS)
def test_authors_ddim_step(case):
    """eta 0 and epsilon derived again from the clipped x_0: sqrt(alpha_prev) x_0 + sqrt(1 - alpha_prev) epsilon."""
    ours, tensors = guided_diffusion_math(case, BoostAndSkipDDIMScheduler)
    for i, t in enumerate(tensors["pmv.t_network"].tolist()):
        alpha_prev = tensors["alphas_cumprod_prev"][tensors["pmv.t"][i]].item()
        x0, eps = tensors["pmv.pred_xstart"][i], tensors["pmv.eps_rederived"][i]
        out = ours.step(
            tensors["pmv.model_output"][i : i + 1], t, tensors["pmv.x_t"][i : i + 1], use_clipped_model_output=True
        )
        expected = math.sqrt(alpha_prev) * x0 + math.sqrt(1 - alpha_prev) * eps
        torch.testing.assert_close(out.prev_sample[0], expected, atol=2e-5, rtol=3e-4)
