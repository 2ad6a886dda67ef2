"""Every network of the package does what diffusers' own networks do: files, types, hooks, training, compilation."""

import copy
import inspect
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from accelerate import cpu_offload
from conventions import newer_torch
from diffusers import AutoModel, DDPMScheduler, ModelMixin
from diffusers.training_utils import EMAModel
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, BaseOutput

from diffusers_ext import models

CPU = torch.device("cpu")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


TOKENS = torch.randint(6, (2, 48), generator=torch.Generator().manual_seed(1))
TIMES = torch.tensor([0.2, 0.9])
UNET = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4, "attn_norm_num_groups": 4, "num_attention_heads": 2, "num_class_embeds": 5,
}  # fmt: skip
SEQUENCE = {
    "vocab_size": 6, "d_model": 16, "num_layers": 2, "num_heads": 2, "dim_feedforward": 24, "temb_dim": 8,
}  # fmt: skip
EDM2 = {
    "img_resolution": 8, "img_channels": 3, "label_dim": 5, "model_channels": 8, "channel_mult": (1, 2),
    "num_blocks": 1, "attn_resolutions": (4,), "channels_per_head": 8,
}  # fmt: skip
IMAGES = {"sample": draw(2, 3, 8, 8), "class_labels": torch.tensor([0, 3])}


@dataclass
class Case:
    """A tiny network. shape: of the first output. share: least part of the parameters that layerwise casting casts."""

    cls: type[ModelMixin]
    config: dict
    inputs: dict
    shape: tuple[int, ...]
    checkpointing: bool = True
    attention: bool = True
    share: float = 0.5
    tolerance: dict = field(default_factory=lambda: {"rtol": 1e-4, "atol": 1e-4})

    def build(self) -> ModelMixin:
        """In evaluation mode, with random values everywhere, the layers that start at zero included."""
        torch.manual_seed(0)
        model = self.cls(**self.config).eval()
        for name, parameter in model.named_parameters():
            if not (name.endswith("weight") and self.cls is models.EDM2UNet2DModel):
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    def without_dropout(self) -> ModelMixin:
        """In training mode, where dropout would make the calls different."""
        model = self.build().train()
        for module in model.modules():
            if isinstance(getattr(module, "p", None), float):
                module.p = 0.0
        return model

    def run(self, model, **options) -> torch.Tensor:
        with torch.no_grad():
            return model(**self.inputs, **options)[0]

    def backward(self, model) -> dict[str, torch.Tensor]:
        """Gradients of the mean square of all outputs."""
        asked = {"return_logvar": True} if self.cls is models.EDM2UNet2DModel else {}
        outputs = model(**self.inputs, **asked, return_dict=False)
        sum(output.float().square().mean() for output in outputs).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}


CASES = {
    "SEDDTransformer": Case(
        models.SEDDTransformer,
        {"vocab_size": 9, "hidden_size": 16, "cond_dim": 8, "num_blocks": 2, "num_heads": 2, "num_streams": 4},
        {"tokens": TOKENS, "sigma": TIMES},
        (2, 48, 9),
    ),
    "CTMCUNet": Case(
        models.CTMCUNet,
        {"shape": (3, 4, 4), "num_levels": 6, "channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1,
         "time_embed_dim": 8},
        {"tokens": TOKENS, "timestep": TIMES},
        (2, 48, 6),
    ),
    "CTMCSequenceTransformer": Case(
        models.CTMCSequenceTransformer, SEQUENCE, {"tokens": TOKENS, "timestep": TIMES}, (2, 48, 6)
    ),
    "CTMCSequenceTransformer of numbers": Case(
        models.CTMCSequenceTransformer,
        {**SEQUENCE, "one_hot_input": False},
        {"tokens": TOKENS, "timestep": TIMES},
        (2, 48, 6),
    ),
    "EDM2UNet2DModel": Case(
        models.EDM2UNet2DModel, EDM2, {**IMAGES, "sigma": torch.tensor([0.5, 20.0])}, (2, 3, 8, 8)
    ),
    "ADMUNet2DModel": Case(
        models.ADMUNet2DModel, UNET, {**IMAGES, "timestep": torch.tensor([1, 700])}, (2, 3, 8, 8), attention=False
    ),
    "NoiseAwareClassifier": Case(
        models.NoiseAwareClassifier,
        {"in_features": 64, "num_classes": 3, "hidden": (16,)},
        {"sample": draw(2, 1, 8, 8), "timestep": torch.tensor([1, 700])},
        (2, 3),
        checkpointing=False,
        attention=False,
    ),
    "ImageClassifier": Case(
        models.ImageClassifier,
        {"channels": (4, 8), "feature_dim": 8, "num_classes": 3},
        {"sample": draw(2, 1, 8, 8)},
        (2, 3),
        checkpointing=False,
        attention=False,
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def cases(holds: Callable[[Case], bool]):
    """Those of the networks of which something is true."""
    return pytest.mark.parametrize("case", [name for name, one in CASES.items() if holds(one)], indirect=True)


def floats(inputs: dict, dtype: torch.dtype) -> dict:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def test_every_network_is_covered():
    exported = [getattr(models, name) for name in models.__all__]
    networks = {value for value in exported if inspect.isclass(value) and issubclass(value, ModelMixin)}
    assert networks == {case.cls for case in CASES.values()} | {models.ClassifierGuidance}


# Calls


def test_outputs(case):
    """An output by default, and the same as a tuple; the same again at the next call."""
    model = case.build()
    parameter = inspect.signature(model.forward).parameters["return_dict"]
    assert parameter.default is True
    with torch.no_grad():
        output, values = model(**case.inputs), model(**case.inputs, return_dict=False)
    assert isinstance(output, BaseOutput) and isinstance(values, tuple) and type(values) is tuple
    assert output[0].shape == case.shape and ({"sample", "logits"} & set(output.keys()))
    assert len(output.to_tuple()) == len(values)
    for one, other in zip(output.to_tuple(), values, strict=True):
        assert torch.equal(one, other)


def test_attributes(case):
    model = case.build()
    model.dummy_attribute = 5
    model.register_to_config(test_attribute=5)
    assert model.dummy_attribute == 5
    with pytest.warns(FutureWarning):
        assert model.test_attribute == 5
    with pytest.raises(AttributeError, match=f"^'{case.cls.__name__}' object has no attribute 'does_not_exist'$"):
        model.does_not_exist  # noqa: B018
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.num_parameters(only_trainable=True) == model.num_parameters()
    assert case.cls._deprecated_kwargs == [] and "kwargs" not in inspect.signature(case.cls.__init__).parameters


def test_copies(case):
    model = case.build()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(case.run(again), case.run(model))


# Files


def same_weights(one: ModelMixin, other: ModelMixin) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_save_and_load(case, tmp_path):
    """By its class and by AutoModel, in evaluation mode."""
    model = case.build()
    model.save_pretrained(tmp_path)
    for again in (case.cls.from_pretrained(tmp_path), AutoModel.from_pretrained(str(tmp_path))):
        assert type(again) is case.cls and not again.training and same_weights(again, model)
        torch.testing.assert_close(case.run(again), case.run(model), **case.tolerance)
    config = {name: value for name, value in again.config.items() if name != "_name_or_path"}
    for built in (case.cls.from_config(config), AutoModel.from_config(dict(config))):
        assert type(built) is case.cls
        assert {name: p.shape for name, p in built.named_parameters()} == {
            name: p.shape for name, p in model.named_parameters()
        }


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_variants_and_shards(case, tmp_path, variant):
    model, kind = case.build(), "" if variant is None else f".{variant}"
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path / "whole", variant=variant)
    model.save_pretrained(tmp_path / "shards", variant=variant, max_shard_size=int(size * 0.75))
    assert (tmp_path / "whole" / f"diffusion_pytorch_model{kind}.safetensors").is_file()
    index = json.loads((tmp_path / "shards" / SAFE_WEIGHTS_INDEX_NAME.replace(".index", f".index{kind}")).read_text())
    shards = {path.name for path in (tmp_path / "shards").glob("*.safetensors")}
    assert len(shards) > 1 and shards == set(index["weight_map"].values())
    for name in ("whole", "shards"):
        assert same_weights(case.cls.from_pretrained(tmp_path / name, variant=variant), model)
        if variant is not None:
            with pytest.raises(OSError, match="no file named"):
                case.cls.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_types(case, tmp_path, dtype):
    """In a file of the type, and cast while it is loaded; what must stay float32 does."""
    model, kept = case.build(), case.cls._keep_in_fp32_modules or []
    model.save_pretrained(tmp_path / "wide")
    case.build().to(dtype).save_pretrained(tmp_path / "narrow")
    for folder in ("wide", "narrow"):
        again = case.cls.from_pretrained(tmp_path / folder, torch_dtype=dtype)
        assert again.dtype == dtype
        for name, tensor in again.state_dict().items():
            whole = not tensor.is_floating_point() or any(part in name.split(".") for part in kept)
            assert whole or tensor.dtype == dtype, name
    if dtype == torch.bfloat16:
        with torch.no_grad():
            rough = again(**floats(case.inputs, dtype))[0].float()
        assert rough.isfinite().all()
        assert (rough - case.run(model)).abs().mean() < 0.1 * case.run(model).abs().mean()
        assert not torch.equal(rough, case.run(model))
    if not kept:
        assert case.cls.from_pretrained(tmp_path / "wide", torch_dtype=dtype, low_cpu_mem_usage=False).dtype == dtype


# Precision and memory


def test_autocast(case):
    """In evaluation and in training; near what it is without, and not the same."""
    exact, model = case.run(case.build()), case.build()
    with torch.autocast("cpu", torch.bfloat16):
        rough = case.run(model).float()
        gradients = case.backward(case.without_dropout())
    assert rough.isfinite().all() and not torch.equal(rough, exact)
    assert (rough - exact).abs().mean() < 0.1 * exact.abs().mean()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


STORAGE = [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@newer_torch
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_layerwise_casting(case, compute):
    exact, sizes = case.run(case.build()), {}
    for storage in STORAGE if compute == torch.float32 else STORAGE[1:]:
        model = case.build().to(compute)
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
        assert model.dtype == compute
        cast = sum(p.numel() for p in model.parameters() if p.dtype == storage)
        assert cast >= case.share * model.num_parameters()
        with torch.no_grad():
            for _ in range(2):
                rough = model(**floats(case.inputs, compute))[0].float()
        assert rough.isfinite().all() and not torch.equal(rough, exact)
        if storage == torch.float16:
            assert (rough - exact).abs().mean() < 0.05 * exact.abs().mean()
        assert cast == sum(p.numel() for p in model.parameters() if p.dtype == storage)
        sizes[storage] = model.get_memory_footprint()
    wide = case.build()
    assert sizes[torch.float8_e4m3fn] < wide.get_memory_footprint()


@newer_torch
def test_training_with_layerwise_casting(case):
    for storage in STORAGE:
        model = case.without_dropout()
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        with torch.autocast("cpu"):
            gradients = case.backward(model)
        assert all(gradient is not None for gradient in gradients.values())


def test_sequential_offloading(case):
    """The weights are nowhere between the calls of the layers that hold them."""
    model, expected = case.build(), case.run(case.build())
    cpu_offload(model, CPU)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    for _ in range(2):
        assert torch.equal(case.run(model), expected)


@newer_torch
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading(case, level, tmp_path):
    """Also to files, in which a layer that is called past its hook would find no weights."""
    expected = case.run(case.build())
    groups = {"num_blocks_per_group": 1} if level == "block_level" else {}
    for files in ({}, {"offload_to_disk_path": str(tmp_path)}):
        model = case.build()
        model.enable_group_offload(CPU, offload_type=level, **groups, **files)
        for _ in range(2):
            assert torch.equal(case.run(model), expected)
    model = case.build()
    model.enable_group_offload(CPU, offload_type=level, **groups)
    model.enable_layerwise_casting(torch.float16, torch.float32)
    assert case.run(model).isfinite().all()


# Training


def test_gradients_reach_every_parameter(case):
    gradients = case.backward(case.without_dropout())
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


def kept_for_backward(case: Case, model: ModelMixin) -> int:
    """Bytes of the activations that a forward keeps."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(**case.inputs)  # noqa: F841  keeps the graph
    return sum(size for size, _ in kept.values())


def test_gradient_checkpointing(case):
    """The same gradients from fewer activations."""
    if not case.checkpointing:
        with pytest.raises(ValueError, match="does not support gradient checkpointing"):
            case.build().enable_gradient_checkpointing()
        return
    plain, model = case.without_dropout(), case.without_dropout()
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    assert kept_for_backward(case, model) < 0.7 * kept_for_backward(case, plain)
    expected = case.backward(plain)
    for name, gradient in case.backward(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        assert torch.equal(case.run(model), case.run(plain))
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


@cases(lambda case: case.cls not in (models.ADMUNet2DModel, models.NoiseAwareClassifier, models.ImageClassifier))
def test_checkpointing_repeats_dropout(case):
    """A layer that is run again drops what it dropped."""
    config = {**case.config, "dropout": 0.5}
    gradients = []
    for on in (False, True):
        model = Case(case.cls, config, case.inputs, case.shape).build().train()
        if on:
            model.enable_gradient_checkpointing()
        torch.manual_seed(3)
        gradients.append(case.backward(model))
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-4, atol=1e-6, msg=name)


def test_running_averages(case, tmp_path):
    """Averages step, replace the weights, give them back, and are saved; the network shows the weights that it has."""
    model = case.without_dropout()
    average = EMAModel(model.parameters(), decay=0.5, model_cls=case.cls, model_config=model.config)
    for _ in range(2):  # the first one copies
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        average.step(model.parameters())
    model.eval()
    raw = case.run(model)
    average.store(model.parameters())
    average.copy_to(model.parameters())
    averaged, fresh = case.run(model), case.build()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(averaged, case.run(fresh)) and not torch.equal(averaged, raw)
    average.restore(model.parameters())
    assert torch.equal(case.run(model), raw)
    average.save_pretrained(tmp_path)
    again = EMAModel.from_pretrained(tmp_path, model_cls=case.cls)
    assert again.optimization_step == 2 and again.decay == 0.5
    for one, other in zip(again.shadow_params, average.shadow_params, strict=True):
        assert torch.equal(one, other)


# Attention and compilation


@cases(lambda case: case.attention)
def test_attention_processors(case):
    model, expected = case.build(), case.run(case.build())
    processors = model.attn_processors
    assert processors and all(name.endswith(".processor") for name in processors)
    calls, kind = [], type(next(iter(processors.values())))

    class Watched(kind):
        def __call__(self, *args, **kwargs):
            calls.append(self)
            return super().__call__(*args, **kwargs)

    model.set_attn_processor({name: Watched() for name in processors})
    assert torch.equal(case.run(model), expected) and len(set(map(id, calls))) == len(processors)
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({next(iter(processors)): kind()})
    model.set_attention_backend("_native_math")
    try:
        torch.testing.assert_close(case.run(model), expected, **case.tolerance)
    finally:
        model.set_attention_backend("native")  # which diffusers also takes for its default from now on
        model.reset_attention_backend()
    model.fuse_qkv_projections()  # fused from the start, or not at all
    assert torch.equal(case.run(model), expected)


def test_xformers_is_refused_as_by_diffusers(case):
    model = case.build()
    if not case.attention and case.cls is not models.ADMUNet2DModel:
        model.enable_xformers_memory_efficient_attention()  # there is nothing to switch
    else:
        with pytest.raises((ValueError, ModuleNotFoundError), match=r"xformers|cuda"):
            model.enable_xformers_memory_efficient_attention()
    model.disable_xformers_memory_efficient_attention()
    assert torch.equal(case.run(model), case.run(case.build()))


@newer_torch
def test_compiles_as_one_graph(case):
    """Once for all calls, and with the weights of the moment."""
    torch._dynamo.reset()
    model, other = case.build(), case.build()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        first, second = case.run(compiled), case.run(compiled)
    torch.testing.assert_close(first, case.run(model), **case.tolerance)
    assert torch.equal(first, second)
    with torch.no_grad():
        for one, changed in zip(model.parameters(), other.parameters(), strict=True):
            changed.mul_(0.7).add_(0.1)
            one.data.copy_(changed)
    torch.testing.assert_close(case.run(compiled), case.run(other), **case.tolerance)


@newer_torch
@cases(lambda case: case.cls._repeated_blocks)
def test_repeated_blocks_compile(case):
    torch._dynamo.reset()
    model = case.build()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled = case.run(model)
    torch.testing.assert_close(compiled, case.run(case.build()), **case.tolerance)


# A network around a network


def guided() -> tuple[Callable, dict]:
    unet, classifier = CASES["ADMUNet2DModel"], models.NoiseAwareClassifier(192, 5, (8,))
    return models.ClassifierGuidance(unet.build(), classifier, DDPMScheduler(), 2.0), unet.inputs


def test_the_wrapped_network():
    model, inputs = guided()
    with torch.no_grad():
        output, values = model(**inputs), model(**inputs, return_dict=False)
        assert isinstance(output, BaseOutput) and torch.equal(output.sample, values[0])
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(**inputs).sample - output.sample).abs().mean() < 0.1 * output.sample.abs().mean()
        assert torch.equal(copy.deepcopy(model)(**inputs).sample, output.sample)
        cpu_offload(model, CPU)
        assert torch.equal(model(**inputs).sample, output.sample)
