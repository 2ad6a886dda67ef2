"""EDM2UNet2DModel: the recorded networks, magnitudes, precision, and weights that are normalised once and no more."""

import copy
import json
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from conventions import newer_torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from diffusers_ext import EDM2UNet2DModel
from diffusers_ext.checkpoints import UnsafePickleError, load_edm2
from diffusers_ext.checkpoints.edm2 import module_state_dict
from diffusers_ext.checkpoints.safe_pickle import PickledObject
from diffusers_ext.models import EDM2_PRESETS
from diffusers_ext.models import edm2_unet as module
from diffusers_ext.models.edm2_unet import MPFourier, MPLayer, mp_cat, mp_silu, mp_sum, normalize, resample

GOLDENS = Path(__file__).parent / "goldens"
CASES = ("cond", "uncond")
TINY = {
    "img_resolution": 8, "img_channels": 3, "label_dim": 5, "model_channels": 8, "channel_mult": (1, 2),
    "num_blocks": 1, "attn_resolutions": (4,), "channels_per_head": 8,
}  # fmt: skip
X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.1, 1.0, 20.0])
LABELS = torch.tensor([0, 4, 2])


def tiny(**changes) -> EDM2UNet2DModel:
    """Random weights, and gains that are not 0 as at the start of training."""
    torch.manual_seed(0)
    model = EDM2UNet2DModel(**{**TINY, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.7)
    return model.eval()


@torch.no_grad()
def run(model, x=X, sigma=SIGMA, labels=LABELS):
    return model(x, sigma, labels).sample


def record(case: str) -> tuple[dict, dict]:
    return json.loads((GOLDENS / f"edm2_{case}_io.json").read_text()), load_file(
        GOLDENS / f"edm2_{case}_io.safetensors"
    )


def recorded_network(case: str) -> EDM2UNet2DModel:
    """The network with its float32 weights."""
    if case == "uncond":
        return load_edm2(GOLDENS / "edm2_uncond_ema_fp32_nosource.pkl")
    weights = load_file(GOLDENS / "edm2_cond_weights.safetensors")
    return EDM2UNet2DModel.from_edm2_state_dict(weights, **record(case)[0]["config"])


def check(case: str, got: torch.Tensor, name: str):
    tolerance = record(case)[0]["tolerance"]
    torch.testing.assert_close(
        got, record(case)[1][name], atol=tolerance["recommended_atol"], rtol=tolerance["recommended_rtol"]
    )


@pytest.mark.parametrize("case", CASES)
def test_outputs_of_the_authors(case):
    network, tensors = recorded_network(case), record(case)[1]
    x, labels = tensors["x"], tensors.get("class_labels")
    with torch.no_grad():
        output = network(x, tensors["sigma"], labels, return_logvar=True)
    check(case, output.sample, "output")
    check(case, output.logvar, "logvar")
    check(case, run(network, x, tensors["sigma_scalar"], labels), "output_sigma_scalar")
    if case == "cond":
        check(case, run(network, x, tensors["sigma"], None), "output_labels_none")
        check(case, run(network, x, tensors["sigma"], tensors["class_labels_soft"]), "output_labels_soft")
        check(case, run(network, x, tensors["sigma"], labels.argmax(1)), "output")


@pytest.mark.parametrize("case", CASES)
def test_a_float16_checkpoint_has_two_readings(case):
    """As loaded, the gains are rounded to float16; upcast first, they are not."""
    network, tensors = load_edm2(GOLDENS / f"edm2_{case}_ema_fp16_nosource.pkl"), record(case)[1]
    assert network.dtype == torch.float16 and not network.training
    call = (tensors["x"], tensors["sigma"], tensors.get("class_labels"))
    with torch.no_grad():
        output = network(*call, return_logvar=True)
    check(case, output.sample, "output_ema_fp16_as_loaded")
    check(case, output.logvar, "logvar_ema_fp16_as_loaded")
    check(case, run(network.float(), *call), "output_ema_fp16_upcast_fp32")
    other = load_edm2(GOLDENS / f"edm2_{case}_ema_fp16_nosource.pkl", dtype=torch.float32)
    check(case, run(other, *call), "output_ema_fp16_upcast_fp32")


@pytest.mark.parametrize("case", CASES)
def test_forced_normalisation_of_the_authors(case):
    network, tensors = recorded_network(case).train(), record(case)[1]
    weight = network.enc["16x16_block0"].conv_res0.weight
    assert torch.equal(weight, tensors["trainmode.weight_before"])
    network(tensors["x"], tensors["sigma"], tensors.get("class_labels"))
    torch.testing.assert_close(weight, tensors["trainmode.weight_after_one_forward"], atol=1e-6, rtol=1e-6)


def test_presets_have_the_sizes_of_the_paper():
    """Millions of parameters, table 2 of arXiv 2312.02696."""
    published = {"xs": 125, "s": 280, "m": 498, "l": 777, "xl": 1119, "xxl": 1523}
    assert len(EDM2_PRESETS) == 10
    for name in EDM2_PRESETS:
        with torch.device("meta"):
            model = EDM2UNet2DModel.from_preset(name)
        assert round(model.num_parameters() / 1e6) == published[name.split("-")[2]]
        assert model.config.img_channels == (4 if "img512" in name else 3)
    assert EDM2_PRESETS["edm2-img512-s"]["dropout"] == 0 and EDM2_PRESETS["edm2-img64-m"]["dropout"] == 0.1
    with torch.device("meta"):
        assert EDM2UNet2DModel.from_preset("edm2-img512-xs", label_dim=0).emb_label is None
    with pytest.raises(ValueError, match="preset 'edm2-xs' is unknown; there are edm2-img512-xs, "):
        EDM2UNet2DModel.from_preset("edm2-xs")


# Magnitudes


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def test_magnitudes_are_preserved():
    torch.manual_seed(0)
    a, b = torch.randn(64, 32, 8, 8), torch.randn(64, 96, 8, 8)
    assert rms(mp_silu(a)) == pytest.approx(1, abs=0.01)
    assert rms(mp_sum(a, torch.randn_like(a), 0.3)) == pytest.approx(1, abs=0.01)
    joined = mp_cat(a, b, 0.3)
    assert rms(joined) == pytest.approx(1, abs=0.01)
    assert rms(joined[:, 32:]) ** 2 * 96 / (rms(joined[:, :32]) ** 2 * 32) == pytest.approx((0.3 / 0.7) ** 2, rel=0.02)
    assert rms(MPFourier(256)(torch.linspace(-1, 1, 64))) == pytest.approx(1, abs=0.02)
    assert rms(MPLayer(32, 64, 3)(a)[:, :, 1:-1, 1:-1]) == pytest.approx(1, abs=0.05)
    assert rms(MPLayer(32, 64)(a[:, :, 0, 0])) == pytest.approx(1, abs=0.05)


def test_normalize_divides_by_rms_plus_epsilon():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    expected = x / (torch.tensor([[math.sqrt(12.5)], [0.0]]) + 1e-4)
    torch.testing.assert_close(normalize(x, 1), expected)
    large = torch.full((1, 100), 3000.0, dtype=torch.float16)  # whose squares overflow
    torch.testing.assert_close(normalize(large, 1), torch.ones_like(large))


def test_scale_of_the_weights_does_not_matter_nearly():
    """It would not at all without epsilon."""
    model = tiny()
    before = run(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(3)
    torch.testing.assert_close(run(model), before, atol=2e-2, rtol=1e-2)
    assert not torch.equal(run(model), before)


def test_box_filter_is_the_general_filter():
    x = torch.randn(2, 3, 8, 8)
    for mode, size in (("down", 4), ("up", 16)):
        box = resample(x, (1, 1), mode)
        assert box.shape == (2, 3, size, size)
        general = resample(x, (0, 1, 1, 0), mode)
        torch.testing.assert_close(general, box)
    wide = resample(torch.ones(1, 1, 8, 8), (1, 3, 3, 1), "up")
    torch.testing.assert_close(wide[..., 2:-2, 2:-2], torch.ones(1, 1, 12, 12))


def test_a_fresh_network_returns_the_scaled_input():
    """All gains start at 0, so D(x) = c_skip x."""
    model = EDM2UNet2DModel(**TINY).eval()
    sigma = SIGMA.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(run(model), 0.25 / (sigma**2 + 0.25) * X)


# Weights are normalised once


class Count:
    """Counts how often weights are normalised."""

    def __init__(self, monkeypatch):
        self.calls = 0
        original = MPLayer.normalised_weight

        def counted(layer):
            self.calls += 1
            return original(layer)

        monkeypatch.setattr(MPLayer, "normalised_weight", counted)

    def during(self, function) -> int:
        before = self.calls
        function()
        return self.calls - before


def test_weights_are_normalised_once_in_a_block(monkeypatch):
    """One normalisation of every layer that runs, whatever the number of forwards; outside each forward its own."""
    model, count = tiny(), Count(monkeypatch)
    layers = sum(isinstance(layer, MPLayer) for layer in model.modules()) - 1  # the head of logvar is not asked
    expected = run(model)
    assert count.during(lambda: run(model)) == layers
    for _ in range(2):
        with model.constant_weights() as same:
            assert same is model
            assert count.during(lambda: run(model)) == layers
            assert count.during(lambda: [run(model), run(model)]) == 0
            assert torch.equal(run(model), expected)
            assert count.during(lambda: run(copy.deepcopy(model))) == layers
    assert count.during(lambda: run(model)) == layers
    model.train()
    with model.constant_weights():
        assert count.during(lambda: run(model)) == count.during(lambda: run(model)) == layers


def other_weights() -> dict[str, torch.Tensor]:
    return {name: 1.3 * tensor + 0.1 for name, tensor in tiny().state_dict().items()}


def averaged(model) -> EMAModel:
    """An average whose weights are others."""
    return EMAModel([1.3 * p.detach() + 0.1 for p in model.parameters()])


def restore_others(model):
    average = averaged(model)
    average.store([1.2 * p for p in model.parameters()])
    average.copy_to(model.parameters())
    run(model)
    average.restore(model.parameters())


COUNTED = {
    "half": lambda model: model.half(),
    "half and back": lambda model: model.half().float(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
    "load_state_dict": lambda model: model.load_state_dict(other_weights()),
    "assign": lambda model: model.load_state_dict(other_weights(), assign=True),
    "in place": lambda model: model.out_conv.weight.mul_(-1),
    "gain": lambda model: model.out_conv.gain.fill_(2.0),
    "another parameter": lambda model: setattr(model.out_conv, "gain", torch.nn.Parameter(torch.tensor(3.0))),
    "other data": lambda model: setattr(model.out_conv.weight, "data", -model.out_conv.weight.data),
    "vector_to_parameters": lambda model: vector_to_parameters(
        1.3 * parameters_to_vector(model.parameters()) + 0.1, model.parameters()
    ),
    "train and eval": lambda model: model.train() and model.eval(),
}
CHANGES = {
    **COUNTED,
    "data in place": lambda model: model.out_conv.weight.data.mul_(-1),
    "EMAModel.copy_to": lambda model: averaged(model).copy_to(model.parameters()),
    "EMAModel.restore": restore_others,
}


def check_change(model, change):
    """After the change the model is what a new one with the same parameters is."""
    before = run(model)
    with torch.no_grad():
        CHANGES[change](model)
    fresh = tiny().to(model.dtype)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(model), run(fresh))
    if change not in ("train and eval", "double"):
        assert not torch.equal(run(model), before)


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_of_the_weights_is_missed(change):
    model = tiny()
    with model.constant_weights():
        run(model)
    check_change(model, change)
    with model.constant_weights():  # and none before a block
        fresh = tiny().to(model.dtype)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(run(model), run(fresh))


@pytest.mark.parametrize("change", COUNTED)
def test_what_torch_counts_is_seen_inside_of_a_block(change):
    model = tiny()
    with model.constant_weights():
        check_change(model, change)


def test_blocks_know_nothing_of_each_other(tmp_path):
    """A block inside of another, one of another thread, and a thread without a block see the weights as they are."""
    model = tiny()
    with model.constant_weights():
        before = run(model)
        with torch.no_grad():
            model.out_conv.weight.data.mul_(-1)  # hidden from torch
        assert torch.equal(run(model), before)
        with model.constant_weights():
            inside = run(model)
        with ThreadPoolExecutor(1) as pool:
            elsewhere = pool.submit(run, model).result()
        assert torch.equal(run(model), before)  # as it was promised
        model.save_pretrained(tmp_path)
    assert not torch.equal(inside, before)
    assert torch.equal(inside, elsewhere) and torch.equal(inside, run(model))
    torch.testing.assert_close(run(EDM2UNet2DModel.from_pretrained(tmp_path)), inside, atol=1e-5, rtol=0)
    with pytest.raises(ZeroDivisionError), model.constant_weights():
        1 / 0  # noqa: B018
    assert not module._constant.get()


def test_two_networks_at_a_time(monkeypatch):
    one, other, count = tiny(), tiny(label_dim=0), Count(monkeypatch)
    with one.constant_weights(), other.constant_weights():
        first = count.during(lambda: [run(one), run(other, labels=None)])
        assert first > 0 and count.during(lambda: [run(one), run(other, labels=None)]) == 0


def test_offloading_keeps_no_copies(monkeypatch):
    """accelerate takes the weights away between calls, where a second copy of them would be in the way."""
    model, count = tiny(), Count(monkeypatch)
    expected = run(model)
    cpu_offload(model, torch.device("cpu"))
    with model.constant_weights():
        assert torch.equal(run(model), expected) and torch.equal(run(model), expected)
        assert not any(module._constant.get().values())
    whole = tiny()
    add_hook_to_module(whole, ModelHook())  # as of model offloading, which moves the network as a whole
    with whole.constant_weights():
        run(whole)
        assert count.during(lambda: run(whole)) == 0
        whole.to("cpu", torch.float64)
        assert not any(module._constant.get().values())


@newer_torch
def test_group_offloading_and_casting_keep_no_copies():
    expected, other = run(tiny()), tiny()
    other.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    cast = tiny()
    cast.enable_layerwise_casting(torch.float16, torch.float32)
    for network in (other, cast):
        with network.constant_weights():
            torch.testing.assert_close(run(network), expected, atol=5e-3, rtol=0)
            assert not module._constant.get()


@newer_torch
def test_layerwise_casting():
    """Most of the parameters are stored in the narrow type; embeddings, gains and both ends of the network not."""
    expected, model = run(tiny()), tiny()
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    narrow = {name for name, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert "enc.4x4_block0.attn.to_qkv.weight" in narrow and "dec.8x8_block0.conv_res1.weight" in narrow
    assert not [name for name in narrow if "emb" in name or "gain" in name or "out_conv" in name or "logvar" in name]
    with torch.device("meta"):
        real = EDM2UNet2DModel.from_preset("edm2-img512-xs")
    real.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    cast = sum(p.numel() for p in real.parameters() if p.dtype == torch.float8_e4m3fn)
    assert cast / real.num_parameters() > 0.9
    assert model.dtype == torch.float32
    torch.testing.assert_close(run(model), expected, atol=0.2, rtol=0)
    assert not torch.equal(run(model), expected)
    few = tiny()
    few.enable_layerwise_casting(compute_dtype=torch.float32, skip_modules_pattern=("^enc",))
    assert {name.split(".")[0] for name, p in few.named_parameters() if p.dtype == torch.float8_e4m3fn} == {"dec"}
    none = tiny()
    none.enable_layerwise_casting(skip_modules_classes=(MPLayer,))
    assert {p.dtype for p in none.parameters()} == {torch.float32}


def test_gradients():
    """Of the weights, also in evaluation mode; of the input, also after inference mode."""
    model = tiny()
    run(model)
    model(X, SIGMA, LABELS).sample.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "logvar" not in name)
    frozen, x = tiny().requires_grad_(False), X.clone().requires_grad_()
    with torch.inference_mode():
        frozen(X, SIGMA, LABELS)
    frozen(x, SIGMA, LABELS).sample.sum().backward()
    assert x.grad.abs().sum() > 0


def test_training_forces_normalisation_and_allows_two_forwards():
    model = tiny().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):
        loss = model(X, SIGMA, LABELS).sample.square().mean() + model(2 * X, SIGMA, LABELS).sample.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model(X, SIGMA, LABELS)
    for layer in model.modules():
        if isinstance(layer, MPLayer) and layer is not model.logvar_linear:
            rows = layer.weight.flatten(1).square().mean(1).sqrt()
            torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-3, rtol=0)


@newer_torch
@pytest.mark.slow
def test_compiles_as_one_graph():
    """With the weights of the moment; and in training, with what gradients need."""
    model = tiny(channel_mult=(1,), attn_resolutions=(8,))
    expected = run(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(run(compiled), expected)
    with model.constant_weights():
        assert torch.equal(run(compiled), expected)
    with torch.no_grad():
        model.out_conv.weight.mul_(-1)
    assert torch.equal(run(compiled), run(model)) and not torch.equal(run(model), expected)
    averaged(model).copy_to(model.parameters())
    assert torch.equal(run(compiled), run(model))
    trained = torch.compile(model.train(), backend="aot_eager", fullgraph=True)
    trained(X, SIGMA, LABELS).sample.sum().backward()
    assert model.out_conv.weight.grad is not None


# Precision


def test_half_precision_keeps_the_parts_that_need_float32():
    exact = tiny()
    for dtype, atol in ((torch.float16, 5e-3), (torch.bfloat16, 5e-2)):
        rough = tiny().to(dtype)
        assert rough.dtype == dtype
        assert torch.equal(rough.emb_fourier.freqs, exact.emb_fourier.freqs)
        assert torch.equal(rough.logvar_fourier.phases, exact.logvar_fourier.phases)
        output = run(rough)
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, run(exact), atol=atol, rtol=0)
        assert not torch.equal(output, run(exact))


def test_fourier_features_follow_wide_types():
    features = MPFourier(4)
    before = features.freqs.clone()
    assert features.double().freqs.dtype == torch.float64
    assert features.half().freqs.dtype == torch.float64  # not narrowed
    assert torch.equal(features.float().freqs, before)


def test_what_computes_in_which_dtype():
    seen = {}

    def watch(model):
        for name in ("out_conv", "emb_noise", "enc.8x8_conv", "dec.4x4_in0.emb_linear"):
            layer = model.get_submodule(name)
            layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].dtype))
        run(model)
        return dict(seen)

    assert set(watch(tiny()).values()) == {torch.float32}
    types = watch(tiny().to(torch.bfloat16))
    assert types["out_conv"] == types["enc.8x8_conv"] == torch.bfloat16
    assert types["emb_noise"] == types["dec.4x4_in0.emb_linear"] == torch.float32
    assert set(watch(tiny().half()).values()) == {torch.float32}  # on the CPU
    assert set(watch(tiny(use_fp16=False).to(torch.bfloat16)).values()) == {torch.float32}
    assert tiny().half()._working_dtype(torch.device("cuda")) == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_save_and_load(tmp_path, dtype):
    model = tiny().to(dtype)
    model.save_pretrained(tmp_path)
    again = EDM2UNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert again.dtype == dtype and not again.training
    assert torch.equal(again.emb_fourier.freqs, model.emb_fourier.freqs)
    torch.testing.assert_close(run(again), run(model), atol=1e-5, rtol=0)
    assert list(again.config.channel_mult) == [1, 2]


# Attention


def test_attention_goes_through_the_dispatcher(monkeypatch):
    model, calls = tiny(), []
    expected = run(model)
    original = module.dispatch_attention_fn

    def watch(*args, **kwargs):
        calls.append((args[0].shape, kwargs["backend"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "dispatch_attention_fn", watch)
    with attention_backend("_native_math"):
        torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=0)
    assert calls == [((3, 16, 2, 8), None)] * 4  # (batch, pixels, heads, channels); one encoder, three decoder blocks
    assert len(model.attn_processors) == 4
    processor = type(model.enc["4x4_block0"].attn.processor)()
    processor._attention_backend = "_native_math"
    model.set_attn_processor(processor)
    calls.clear()
    run(model)
    assert {backend for _, backend in calls} == {"_native_math"}


def test_blocks_narrower_than_a_head_have_no_attention():
    assert all(block.attn is None for block in [*tiny(channels_per_head=64).dec.values()])
    with pytest.raises(ValueError, match="channels_per_head gives 3 heads for a block of 16 channels"):
        tiny(channels_per_head=5)


# Inputs


def test_labels_in_all_forms():
    model = tiny()
    rows = torch.nn.functional.one_hot(LABELS, 5)
    expected = run(model)
    for labels in (LABELS.tolist(), LABELS.int(), rows, rows.float(), rows.double()):
        assert torch.equal(run(model, labels=labels), expected)
    torch.testing.assert_close(run(model, labels=2), run(model, labels=[2, 2, 2]))
    torch.testing.assert_close(run(model, labels=None), run(model, labels=torch.zeros(3, 5)))
    assert not torch.allclose(run(model, labels=None), expected, atol=1e-3)


def test_sigma_in_all_forms():
    model = tiny()
    for sigma in (2, 2.0, torch.tensor(2.0), torch.tensor([2.0], dtype=torch.float64), torch.full((3, 1, 1, 1), 2.0)):
        torch.testing.assert_close(run(model, sigma=sigma), run(model, sigma=torch.full((3,), 2.0)))


def test_outputs():
    model = tiny()
    with torch.no_grad():
        output = model(X, 1.0, 2, return_logvar=True)
        assert output.sample.shape == X.shape and output.logvar.shape == (1, 1, 1, 1)
        assert model(X, SIGMA, 2, return_logvar=True).logvar.shape == (3, 1, 1, 1)
        assert model(X, 1.0, 2).logvar is None
        sample, logvar = model(X, 1.0, 2, return_logvar=True, return_dict=False)
        assert torch.equal(sample, output.sample) and torch.equal(logvar, output.logvar)
        assert len(model(X, 1.0, 2, return_dict=False)) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"x": X[:, :2]}, r"sample must have shape \(batch, 3, height, width\), got \(3, 2, 8, 8\)"),
        ({"x": X[0]}, "sample must have shape"),
        ({"x": X[:, :, :7]}, r"height and width of sample must be multiples of 2, .* got \(3, 3, 7, 8\)"),
        ({"sigma": SIGMA[:2]}, r"sigma must be one number or one a sample \(3\), got 2"),
        ({"labels": [0, 5, 1]}, r"class_labels must be in \[0, 5\), got \[5\]"),
        ({"labels": [-1]}, r"got \[-1\]"),
        ({"labels": [0, 1]}, "class_labels must be one index or 3"),
        ({"labels": torch.zeros(3, 4)}, "rows of 5 numbers"),
        ({"labels": torch.tensor([0.5, 1, 2])}, "indices are integers"),
    ],
)
def test_inputs_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        run(tiny(), **call)


def test_configurations_are_checked():
    with pytest.raises(ValueError, match="class_labels: the network is unconditional"):
        run(tiny(label_dim=0))
    with pytest.raises(ValueError, match="img_resolution=9 must be divisible by 2"):
        tiny(img_resolution=9)
    with pytest.raises(ValueError, match="even number of taps"):
        tiny(resample_filter=(1, 2, 1))


# Checkpoints


def test_state_dicts_that_do_not_fit():
    weights = load_file(GOLDENS / "edm2_cond_weights.safetensors")
    config = record("cond")[0]["config"]
    with pytest.raises(ValueError, match="does not fit the configuration"):
        EDM2UNet2DModel.from_edm2_state_dict(weights, **{**config, "model_channels": 8})
    weights.pop("unet.out_gain")
    with pytest.raises(ValueError, match=r"out_conv\.gain"):
        EDM2UNet2DModel.from_edm2_state_dict(weights, **config)


def test_training_leaves_the_given_state_dict_alone():
    weights = load_file(GOLDENS / "edm2_cond_weights.safetensors")
    before = {name: tensor.clone() for name, tensor in weights.items()}
    model = EDM2UNet2DModel.from_edm2_state_dict(weights, **record("cond")[0]["config"]).train()
    model(record("cond")[1]["x"], 1.0)
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_files_that_are_no_networks(tmp_path):
    for content, message in (
        ({"fid": {"mu": 1.0}}, "a dictionary with 'fid'"),
        ([1, 2], "a list"),
        ({"ema": None}, "a dictionary with 'ema'"),
    ):
        (tmp_path / "file.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=f"no EDM2 network: .*{message}"):
            load_edm2(tmp_path / "file.pkl")
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"ema": print}))
    with pytest.raises(UnsafePickleError, match=r"builtins\.print"):
        load_edm2(tmp_path / "file.pkl")


def test_networks_out_of_proportion_are_refused():
    for config, message in (
        ({"num_blocks": 10**9}, "num_blocks of the network"),
        ({"num_blocks": "3"}, "num_blocks of the network"),
        ({"channel_mult": [1] * 1000}, "channel_mult of the network"),
        ({"dropout": {}}, "dropout of the network"),
        ({"model_channels": 8, "class_name": "os.system"}, "made with class_name, which EDM2 does not have"),
    ):
        network = PickledObject("Precond", {"_init_kwargs": {"img_resolution": 8, **config}})
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=f"file: .*{message}"):
            patch.setattr("diffusers_ext.checkpoints.edm2.safe_load", lambda path, network=network: {"ema": network})
            load_edm2("file")


def test_endless_trees_of_modules_are_refused():
    leaf = PickledObject("ModuleDict")
    for _ in range(60):
        leaf = PickledObject("ModuleDict", {"_modules": {"a": leaf, "b": leaf}})
    with pytest.raises(ValueError, match="occurs twice"):
        module_state_dict(leaf)
    leaf.state["_modules"]["a"] = leaf
    with pytest.raises(ValueError, match="occurs twice"):
        module_state_dict(leaf)
    for _ in range(1000):
        leaf = PickledObject("ModuleDict", {"_modules": {"a": leaf}})
    with pytest.raises(ValueError, match="too deep"):
        module_state_dict(leaf)
