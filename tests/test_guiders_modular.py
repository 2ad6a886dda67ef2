"""Guiders in an interval on the modular pipelines of every family that builds with tiny networks."""

import copy

import diffusers
import pytest
import torch
from diffusers import ClassifierFreeGuidance
from tiny_guided_pipelines import CASES, STEPS
from tiny_modular_pipelines import MODULAR_CASES, ModularCase, helios_pyramid

from diffusers_ext.guidance.guiders import IntervalGuidance, limit_to_interval
from diffusers_ext.pipelines import GuidanceInterval

pytestmark = pytest.mark.filterwarnings("ignore:the guidance interval")
SCALE = 4.0
# What a guider's weights are where they do next to nothing; exactly off, rows would be left out.
NEARLY_OFF = {"guidance_scale": 1 + 1e-7, "modality_scale": 1 + 1e-7, "stg_scale": 1e-7}


@pytest.fixture(params=MODULAR_CASES)
def case(request) -> ModularCase:
    built = MODULAR_CASES[request.param]()
    if request.param != "ltx_2":  # whose guiders have more than one weight
        guiders = {name: ClassifierFreeGuidance(guidance_scale=SCALE) for name in built.guiders}
        built.pipe.update_components(**guiders)
    return built


def limited(case: ModularCase, **interval) -> dict:
    """The case's guiders in an interval."""
    guiders = {}
    for name, guider in case.guiders.items():
        if type(guider) is ClassifierFreeGuidance:
            guiders[name] = IntervalGuidance(guidance_scale=guider.guidance_scale, **interval)
        else:
            guiders[name] = limit_to_interval(guider, **interval)
    return guiders


def all_rows(guider, guided_steps: set[int]):
    """The guider as an independent loop would use it: all rows in every step, and weights that depend on the step."""

    class AllRows(type(guider)):
        def set_state(self, step, *args, **kwargs):
            super().set_state(step, *args, **kwargs)
            for name, value in NEARLY_OFF.items():
                if hasattr(guider, name):
                    setattr(self, name, getattr(guider, name) if step in guided_steps else value)

    reference = copy.copy(guider)
    reference.__class__ = AllRows
    return reference


def run(case: ModularCase, guiders: dict) -> tuple[torch.Tensor, int]:
    """The result and the rows that the networks were run on."""
    case.pipe.update_components(**guiders)
    rows = []

    def count(module, args, kwargs):
        rows.append(len(args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "x"]))

    handles = [network.register_forward_pre_hook(count, with_kwargs=True) for network in case.networks]
    try:
        result = case.pipe(**case.options, generator=torch.Generator().manual_seed(0), output=case.output)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(result, dim=-1) if isinstance(result, list) else result, sum(rows)


def middle(case: ModularCase) -> dict[str, float]:
    """Sigmas that select steps 1 and 2, in the flow matching that the scheduler did last."""
    upper, lower = (float(case.pipe.scheduler.sigmas[step]) for step in (1, 3))
    return {"sigma_lo": lower / (1 - lower), "sigma_hi": upper / (1 - upper)}


def test_whole_line_is_the_stock_guider(case):
    plain, rows = run(case, {})
    for _ in range(3):  # a call leaves nothing behind
        again, again_rows = run(case, limited(case, sigma_lo=0.0))
        assert torch.equal(again, plain) and again_rows == rows
    assert rows >= 2 * case.rows * case.runs * STEPS


def test_empty_interval_is_no_guidance(case):
    plain, _ = run(case, {})
    guiders = limited(case, sigma_hi=1e-9)
    off = {name: guider.new(enabled=False) for name, guider in case.guiders.items()}
    expected, rows = run(case, off)
    for _ in range(2):
        result, result_rows = run(case, guiders)
        assert torch.equal(result, expected)
        assert result_rows == rows == case.rows * case.runs * STEPS
    assert (plain - expected).abs().max() > 1e-3


def test_middle_interval_is_a_loop_over_all_rows(case):
    plain, all_of_them = run(case, {})
    interval = middle(case)
    expected, rows = run(case, {name: all_rows(guider, {1, 2}) for name, guider in case.guiders.items()})
    assert rows == all_of_them
    assert (plain - expected).abs().max() > 1e-3
    stock = case.guiders
    for which in (interval, {"guided_steps": (1, 2)}):
        case.pipe.update_components(**stock)
        guiders = limited(case, **which)
        for _ in range(2):
            result, rows = run(case, guiders)
            torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)
            # in two steps all rows, in the others those of the condition
            assert rows == all_of_them // 2 + case.rows * case.runs * STEPS // 2


OTHER_NETWORKS = ("ernie_image", "ltx_2")  # than the classic pipeline of that name has here


@pytest.mark.parametrize("name", [name for name in MODULAR_CASES if name in CASES and name not in OTHER_NETWORKS])
def test_same_as_the_classic_pipeline(name):
    case = MODULAR_CASES[name]()
    classic, scale = CASES[case.classic[0]](), case.classic[1]
    weight = "true_cfg_scale" if "true_cfg_scale" in classic.options else "guidance_scale"
    given = {**classic.options, weight: scale}
    given |= {key: case.options[key] for key in ("latents", "sigmas") if key in case.options}
    with GuidanceInterval(classic.pipe, guided_steps=(1, 2)) as interval:
        expected = classic.pipe(**given, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
    guiders = {name: IntervalGuidance(guidance_scale=SCALE, guided_steps=(1, 2)) for name in case.guiders}
    result, rows = run(case, guiders)
    torch.testing.assert_close(result, unpacked(classic.pipe, expected, result.shape), rtol=0, atol=2e-5)
    assert rows == interval.report.rows


def test_second_guider_of_a_run_counts_all_its_steps():
    """Wan 2.2 asks its second guider from the middle of the schedule on; fractions of the steps stay those of it."""
    case = MODULAR_CASES["wan_2_2"]()
    stock = [ClassifierFreeGuidance(guidance_scale=SCALE, stop=stop) for stop in (1.0, 0.75)]
    expected, expected_rows = run(case, dict(zip(case.guiders, stock, strict=True)))
    limited = [limit_to_interval(guider, sigma_lo=0.0) for guider in stock]
    for _ in range(3):
        result, rows = run(case, dict(zip(case.guiders, limited, strict=True)))
        assert torch.equal(result, expected)
        assert rows == expected_rows == 2 * case.rows * STEPS - case.rows


def skip_layer(**config) -> diffusers.SkipLayerGuidance:
    layers = diffusers.LayerSkipConfig(indices=[0], fqn="transformer_blocks")
    window = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    return diffusers.SkipLayerGuidance(skip_layer_config=layers, **window, **config)


def perturbed_attention(**config) -> diffusers.PerturbedAttentionGuidance:
    window = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0}
    return diffusers.PerturbedAttentionGuidance(perturbed_guidance_layers=[0], **window, **config)


def smoothed_energy(**config) -> diffusers.SmoothedEnergyGuidance:
    window = {"seg_guidance_start": 0.0, "seg_guidance_stop": 1.0}
    return diffusers.SmoothedEnergyGuidance(seg_guidance_layers=[0], **window, **config)


def weaker_network(**config) -> diffusers.AutoGuidance:
    layers = diffusers.LayerSkipConfig(
        indices=[0], fqn="transformer_blocks", skip_attention=False, skip_ff=True, dropout=1.0
    )
    return diffusers.AutoGuidance(auto_guidance_config=layers, **config)


def with_momentum(**config) -> diffusers.AdaptiveProjectedGuidance:
    return diffusers.AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5, **config)


@pytest.mark.parametrize(
    ("build", "name", "passes"),  # passes through the network in steps 0 to 3
    [
        (skip_layer, "ltx_video", [2, 3, 3, 3]),
        (perturbed_attention, "qwen_image", [2, 3, 3, 3]),
        (smoothed_energy, "ltx_video", [2, 3, 3, 3]),
        (weaker_network, "ltx_video", [2, 2, 2, 2]),
        (with_momentum, "qwen_image", [2, 2, 2, 2]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_guiders_with_passes_and_state_of_their_own(build, name, passes):
    """Hooks in the network and running averages: in the interval as ever, outside of it and after it gone."""
    case, guider = MODULAR_CASES[name](), build(guidance_scale=SCALE)
    plain, rows = run(case, {"guider": guider})
    assert rows == case.rows * sum(passes)
    off, _ = run(case, {"guider": guider.new(enabled=False)})
    for _ in range(2):
        whole, rows = run(case, {"guider": limit_to_interval(guider, sigma_lo=0.0)})
        assert torch.equal(whole, plain) and rows == case.rows * sum(passes)
        empty, rows = run(case, {"guider": limit_to_interval(guider, sigma_hi=1e-9)})
        assert torch.equal(empty, off) and rows == case.rows * STEPS
    between = limit_to_interval(guider, guided_steps=(1, 2))
    first, rows = run(case, {"guider": between})
    assert rows == case.rows * (1 + passes[1] + passes[2] + 1)
    assert torch.equal(run(case, {"guider": between})[0], first)
    assert (first - plain).abs().max() > 1e-3 and (first - off).abs().max() > 1e-3
    assert torch.equal(run(case, {"guider": guider})[0], plain)


def test_steps_in_each_stage_of_a_pyramid():
    case, guider = helios_pyramid(), diffusers.ClassifierFreeZeroStarGuidance(guidance_scale=SCALE, zero_init_steps=0)
    plain, all_of_them = run(case, {"guider": guider})
    expected, _ = run(case, {"guider": all_rows(guider, {1, 2})})
    assert (plain - expected).abs().max() > 1e-3
    limited = limit_to_interval(guider, guided_steps=(1, 2))
    for _ in range(2):
        result, rows = run(case, {"guider": limited})
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)
        assert rows == all_of_them // 2 + case.rows * case.runs * STEPS // 2


def test_one_guider_for_video_and_sound():
    case = MODULAR_CASES["ltx_2"]()
    guider = case.guiders["guider"]
    apart = {name: limit_to_interval(guider, guided_steps=(1, 2)) for name in case.guiders}
    expected, expected_rows = run(case, apart)
    together = dict.fromkeys(case.guiders, apart["guider"])
    result, rows = run(case, together)
    assert torch.equal(result, expected) and rows == expected_rows


def test_two_intervals_for_video_and_sound():
    """The four passes are made where either needs them, and each guider takes what is its own."""
    case = MODULAR_CASES["ltx_2"]()
    steps = dict(zip(case.guiders, ((1, 2), (2, 3)), strict=True))
    stock = case.guiders
    expected, _ = run(case, {name: all_rows(guider, set(steps[name])) for name, guider in stock.items()})
    limited = {name: limit_to_interval(guider, guided_steps=steps[name]) for name, guider in stock.items()}
    result, rows = run(case, limited)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)
    assert rows == case.rows * (1 + 3 * 4)


def unpacked(pipe, latents: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Latents of a classic pipeline, which may be packed, in the modular one's shape."""
    if hasattr(pipe, "_unpack_latents") and latents.shape != shape:
        if len(shape) == 5 and shape[2] > 1:
            return pipe._unpack_latents(latents, *shape[2:])
        return pipe._unpack_latents(latents, 8 * shape[-2], 8 * shape[-1], 8)
    return latents
